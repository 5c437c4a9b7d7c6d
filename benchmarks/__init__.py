"""Benchmarks and reports; run from the repository's root as `python -m benchmarks.NAME`."""
