"""Benchmarks and proofs: time, memory, roofline, accuracy, and what the kernels compile to."""
