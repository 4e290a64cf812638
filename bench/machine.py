"""Where a figure comes from: machine, versions, commit. In every row of every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "liger-kernel", "specforge", "speculators")


def provenance(threads: int) -> dict[str, str]:
    """One line per fact; the keys are columns of the CSV."""
    versions = " ".join(f"{name}={_version(name)}" for name in _PACKAGES)
    return {
        "device": device_name(),
        "cpu": cpu_name(),
        "threads": str(threads),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def file_stem() -> str:
    """A file name for this card, or this processor and its number of cores."""
    name = device_name() if torch.cuda.is_available() else f"{cpu_name()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def gpu_state() -> str:
    """Clocks, power and temperature as nvidia-smi gives them; "" without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return f"{query}: {done.stdout.strip()}" if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
