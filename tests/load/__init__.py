"""The load tool: `python -m tests.load`, and the parts of it that the chaos run and the benchmarks drive."""
