"""Benchmarks and models of cost; run as `python -m bench.<name>` from the repository root."""
