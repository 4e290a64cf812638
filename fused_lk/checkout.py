"""Where `fused_lk.kernels` is in a checkout that is not installed: in the folder `kernels`, beside this package.

An installation maps that folder into the package (setup.py). A checkout on `sys.path` has to be told.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
KERNELS = PACKAGE.parent / "kernels"


class BesideThePackage:
    """A finder that knows one name. It is asked first: an installation elsewhere would answer with its own kernels."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "fused_lk.kernels":
            return None
        where = [str(KERNELS)]
        return importlib.util.spec_from_file_location(name, KERNELS / "__init__.py", submodule_search_locations=where)


def find_kernels() -> None:
    """Have the kernels found from now on. They are imported when they are asked for."""
    if not (PACKAGE / "kernels").is_dir() and (KERNELS / "row_stats.py").is_file():
        sys.meta_path.insert(0, BesideThePackage)
