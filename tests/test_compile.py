"""The kernels compiled for A100, H100, B200 and MI300, on the newest and the oldest Triton (see `compiled_checks`).

In processes of their own: this one may be running Triton's interpreter, and has one Triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".venv-oldest" / "triton"  # put there by the Makefile


def run(tmp_path: Path, *arguments: str, path: Path | None = None) -> str:
    """Run Python with Triton's compiler and an empty cache; `path` goes before the installed packages."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for name in ("FUSED_LK_AUTOTUNE", "FUSED_LK_TEST_DEVICE"):
        environment.pop(name, None)
    paths = (path, ROOT, os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in paths if p)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def checks(tmp_path: Path, path: Path | None = None) -> str:
    return run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/compiled_checks.py", path=path)


def test_newest_triton(tmp_path):
    assert "skipped" not in checks(tmp_path)


def test_oldest_triton(tmp_path):
    if not OLDEST.is_dir():
        pytest.skip(f"the oldest supported Triton is not in {OLDEST}: `make test` puts it there")
    version = run(tmp_path, "-c", "import triton; print(triton.__version__)", path=OLDEST)
    assert version.startswith("3.2.")
    assert "skipped" not in checks(tmp_path, OLDEST)
