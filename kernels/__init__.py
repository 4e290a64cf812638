"""Triton kernels of fused_lk; installed as `fused_lk.kernels`, imported only when a Triton path is asked for."""
