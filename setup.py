"""Packaging; everything static is in pyproject.toml.

The Triton kernels live in `kernels/` and install as `fused_lk.kernels`: never as a top-level `kernels`, the import
name of another package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fused_lk", "fused_lk.*"]), "fused_lk.kernels"],
    package_dir={"fused_lk.kernels": "kernels"},
    package_data={"fused_lk": ["py.typed"]},
)
