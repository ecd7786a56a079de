"""The load tool: `python -m scripts.load`, and its parts, which the tests and the chaos run also use."""
