"""Makes `fused_lk.kernels` importable from a checkout that is not installed: this folder on PYTHONPATH, and the root.

An installation maps the folder `kernels` into the package (setup.py); this does the same at import time, in every
Python process that inherits the path.
"""

import importlib.util
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class Kernels:
    """A finder that knows one name, and comes after all others."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fused_lk.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
        )


sys.meta_path.append(Kernels)
