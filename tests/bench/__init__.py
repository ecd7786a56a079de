"""Benchmarks: `python -m tests.bench` (macro, side by side with baselines) and test_micro_*.py (pytest-benchmark)."""
