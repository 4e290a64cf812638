"""Everything that needs a card, in one command: `make gpu`, or `python -m bench.gpu`.

The tests with the compiled kernels, the kernel tests under compute-sanitizer, and the benchmark, with the Python that
runs this: nothing is installed or downloaded. The results go to `gpu-results/<card>-<date>`, ready to commit:

    machine.json   card, driver, clocks before and after, versions, commit; each step's command, seconds, exit status
    tests.xml      each test (JUnit)
    *.log          what each step printed
    bench files    as `python -m bench` writes them

A step that fails does not stop the next one; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = Path(__file__).resolve().parent / "checkout"
PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "numpy", "pytest", "hypothesis", "liger-kernel")
# Each touches every byte that a kernel reads or writes: one ragged vocabulary, all dtypes and optional arguments.
SANITIZED = ["tests/test_kernels.py", "-k", "1031 or lse or columns"]


class Step(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str]


def steps(device: str, out: Path, quick: bool) -> Iterator[Step]:
    """What is run, in order."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    on_card = {"FUSED_LK_TEST_DEVICE": device, "TRITON_INTERPRET": "1" if device.startswith("cpu") else "0"}
    chosen = ["tests/test_kernels.py"] if quick else []
    yield Step("tests", [*pytest, f"--junitxml={out / 'tests.xml'}", *chosen], on_card)
    if (sanitizer := shutil.which("compute-sanitizer")) is not None:
        # a cache of freed memory would hide an access beyond the end of a tensor
        uncached = {**on_card, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            yield Step(f"sanitizer-{tool}", [*command, *pytest, *SANITIZED], uncached)
    yield Step("bench", [sys.executable, "-m", "bench", "--out", str(out), *(["--quick"] if quick else [])], {})


def environment() -> dict[str, str]:
    """This environment, in which every Python finds `fused_lk.kernels`."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    probe = subprocess.run(
        [sys.executable, "-c", "import fused_lk.kernels"], cwd=ROOT, capture_output=True, env=os.environ
    )
    if probe.returncode:
        path.insert(0, str(CHECKOUT))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run(step: Step, out: Path, base: dict[str, str]) -> dict[str, Any]:
    """Run one step, shown and kept in a log."""
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    with (out / f"{step.name}.log").open("w") as log:
        child = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**base, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(line)
            log.write(line)
        status = child.wait()
    seconds = round(time.monotonic() - start, 1)
    print(f"== {step.name}: exit status {status} after {seconds} s", flush=True)
    return {"step": step.name, "command": step.command, **step.environment, "seconds": seconds, "exit_status": status}


def machine(device: str) -> dict[str, Any]:
    """The card, and what runs on it."""
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    card = torch.device(device)
    properties = torch.get_device_module(card).get_device_properties(0) if card.type != "cpu" else None
    return {
        "card": card_name(device),
        "properties": str(properties),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "state": clocks(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": _output("git", "status", "--porcelain", "-uno"),
        "compute_sanitizer": shutil.which("compute-sanitizer") or "not found: its steps were left out",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def card_name(device: str) -> str:
    card = torch.device(device)
    return platform.machine() if card.type == "cpu" else torch.get_device_module(card).get_device_name(0)


def clocks() -> str:
    """Driver, clocks, power and temperature, as the vendor's tool gives them."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    return (
        _output("nvidia-smi", f"--query-gpu={query}", "--format=csv")
        or _output("rocm-smi", "--showproductname", "--showdriverversion", "--showclocks", "--showpower")
        or "no nvidia-smi or rocm-smi"
    )


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_device() -> str:
    """The kind of card that PyTorch sees; without one, an exit that says so."""
    for device in ("cuda", "xpu"):  # ROCm's is "cuda" too
        module = getattr(torch, device, None)
        if module is not None and module.is_available():
            return device
    raise SystemExit(
        f"Expected a GPU (CUDA, ROCm, XPU), got none from PyTorch {torch.__version__}. Run this where "
        "`torch.cuda.is_available()`; PYTHON=... chooses the interpreter. `make test` needs no card."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the kernel tests and the short benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", help="where the folder of results is made")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="every step on a CPU, in Triton's interpreter: tries the command itself",
    )
    options = parser.parse_args()
    device = "cpu:0" if options.rehearse else find_device()
    name = re.sub(r"[^a-z0-9]+", "-", card_name(device).lower()).strip("-")
    out = options.out / f"{name}-{datetime.date.today().isoformat()}{'-rehearsal' if options.rehearse else ''}"
    out.mkdir(parents=True, exist_ok=True)
    found = machine(device)
    base = environment()
    found["steps"] = []
    for step in steps(device, out, options.quick):
        found["steps"].append(run(step, out, base))
        found["state_after"] = clocks()
        (out / "machine.json").write_text(json.dumps(found, indent=1) + "\n")
    failed = [step["step"] for step in found["steps"] if step["exit_status"]]
    print(f"wrote {out}\n" + (f"failed: {', '.join(failed)}" if failed else "every step passed"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
