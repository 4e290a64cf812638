"""Everything that needs a card, in one command: `make gpu`, or `python -m bench.gpu`.

It takes PyTorch, Triton, pytest and hypothesis from the Python that runs it. Nothing is installed or downloaded, and
no other package is needed: a test that compares with one that is not there is skipped. The steps come in the order in
which their results tell most, and none takes longer than `LIMIT_S`. The results go to `gpu-results/<card>-<commit>`,
ready to commit, as they come:

    machine.json   card, driver, clocks before and after, versions, commit; each step's command, seconds, exit status
    <step>.xml     each test (JUnit)
    <step>.log     what the step printed
    <step>/        tables and plots, as `python -m bench` writes them

A step that fails does not stop the next one; the exit status is 1 if any failed. The next run of the same commit takes
up what did not pass. `--minutes` is for machines that are lent for less than the whole.
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
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .shapes import LARGE, SERIES

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = Path(__file__).resolve().parent / "checkout"
PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "numpy", "pytest", "hypothesis", "liger-kernel")
LIMIT_S = 480.0
# The tests of the product, in the files of `tests`. Those that are not here have nothing to do with a card.
TESTS = {
    "kernels": ("kernels", "kernel_mixes", "one_kernel", "fuzz"),
    "losses": ("losses", "hard_rows", "extremes", "precision", "not_a_number"),
    "products": ("wide", "gemm_counts", "low_rank", "quantized", "keep", "determinism"),
    "calls": ("fuzz_calls", "gradcheck", "host", "work_lists", "owned", "autocast", "checkpointing", "no_full_logits"),
    "compiled": ("torch_compile", "eval_modes"),
    "options": ("target", "heads", "terms", "positions", "offsets", "pairs", "evaluate", "metrics", "top1"),
}
# What a trainer would choose from; the first are measured first.
OURS = ("ours-one-pass", "ours-default", "ours-kept", "ours-recompute")
TRAINERS = ("specforge-eager", *OURS, "specforge-compiled", "checkpointed")
# Each touches every byte that a kernel reads or writes: one ragged vocabulary, all dtypes and optional arguments.
SANITIZED = ["tests/test_kernels.py", "-k", "1031 or lse or columns"]
# Of each kernel of one step: time, bytes of memory, share of the bandwidth, registers, occupancy.
COUNTERS = (
    "gpu__time_duration.sum,dram__bytes.sum,gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed,"
    "launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active"
)


class Step(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str]


def steps(device: str, out: Path) -> Iterator[Step]:
    """What is run, in order. On a CPU, as a rehearsal, the benchmark takes small shapes and few rounds."""
    rehearsed = device.startswith("cpu")
    on_card = {"FUSED_LK_TEST_DEVICE": device, "TRITON_INTERPRET": str(int(rehearsed))}
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]

    def tests(name: str) -> Step:
        files = [f"tests/test_{file}.py" for file in TESTS[name]]
        return Step(name, [*pytest, f"--junitxml={out / name}.xml", *files], on_card)

    def times(name: str, *what: str) -> Step:
        some = ["--quick", "--minutes", "3"] if rehearsed else ["--minutes", f"{LIMIT_S / 60 - 1:g}"]
        return Step(
            f"times-{name}", [sys.executable, "-m", "bench", *what, "--out", f"{out / 'times'}-{name}", *some], {}
        )

    def sanitized(tool: str) -> Iterator[Step]:
        # a cache of freed memory would hide an access beyond the end of a tensor
        if (found := shutil.which("compute-sanitizer")) is not None:
            command = [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *pytest, *SANITIZED]
            yield Step(f"sanitizer-{tool}", command, {**on_card, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    shapes = ["cpu-ttt3-masked"] if rehearsed else [shape.name for shape in LARGE]
    yield tests("kernels")
    yield times(shapes[0], "--shapes", shapes[0], "--providers", *TRAINERS)
    one_kernel = times("one-kernel", "--shapes", shapes[0], "--providers", "ours-one-pass")
    yield one_kernel._replace(environment={**on_card, "FUSED_LK_ONE_KERNEL": "1"})
    yield tests("losses")
    yield tests("products")
    yield from (times(shape, "--shapes", shape, "--providers", *TRAINERS) for shape in shapes[1:])
    yield from sanitized("memcheck")
    yield tests("calls")
    yield tests("compiled")
    yield tests("options")
    yield from sanitized("racecheck")
    if (ncu := shutil.which("ncu")) is not None:
        profiler = [ncu, "--profile-from-start", "off", "--csv", "--log-file", str(out / "counters.csv")]
        run_once = [sys.executable, "-m", "bench.one_step", shapes[0], *OURS]
        yield Step("counters", [*profiler, "--metrics", COUNTERS, *run_once], {})
    yield times("others", "--shapes", shapes[0])
    yield from (times(f"by-{grown}", "--shapes", "--series", grown) for grown in SERIES["cpu" if rehearsed else "gpu"])


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
    """Run one step, shown and kept in a log; it and its children are ended at the limit."""
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
            start_new_session=True,
        )
        assert child.stdout is not None
        limit = threading.Timer(LIMIT_S, os.killpg, (child.pid, signal.SIGKILL))
        limit.start()
        for line in child.stdout:
            sys.stdout.write(line)
            log.write(line)
            log.flush()
        status = child.wait()
        limit.cancel()
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


def folder(options: argparse.Namespace, found: dict[str, Any], device: str) -> Path:
    """Of this card and commit; without a commit, of this day."""
    name = re.sub(r"[^a-z0-9]+", "-", card_name(device).lower()).strip("-")
    when = found["commit"][:8] or datetime.date.today().isoformat()
    parts = (name, when, "changed" if found["changed"] else "", "rehearsal" if options.rehearse else "")
    return options.out / "-".join(filter(None, parts))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps by name, also if they passed before")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no step that may end later; 0: no limit")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", help="where the folder of results is made")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="every step on a CPU, in Triton's interpreter: tries the command itself",
    )
    options = parser.parse_args()
    device = "cpu:0" if options.rehearse else find_device()
    found = machine(device)
    out = folder(options, found, device)
    chosen = list(steps(device, out))
    if unknown := set(options.only or ()) - {step.name for step in chosen}:
        parser.error(f"expected steps of {', '.join(step.name for step in chosen)}; got {', '.join(sorted(unknown))}")
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "machine.json"
    # What passed stays, unless the sources are of no commit.
    before = json.loads(kept.read_text())["steps"] if kept.exists() and not found["changed"] else []
    done = {step["step"]: step for step in before if not step["exit_status"]}
    base, begin = environment(), time.monotonic()
    for step in chosen:
        if step.name not in options.only if options.only else step.name in done:
            continue
        if options.minutes and time.monotonic() - begin + LIMIT_S > 60 * options.minutes:
            print(f"== {step.name}: left for the next run, with what follows")
            break
        done[step.name] = run(step, out, base)
        found |= {"steps": list(done.values()), "state_after": clocks()}
        kept.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, step in done.items() if step["exit_status"]]
    left = [step.name for step in chosen if step.name not in done]
    print(f"results in {out}\n" + (f"failed: {', '.join(failed)}" if failed else "no step failed"))
    print(f"not run: {', '.join(left)}" if left else "every step was run")
    return bool(failed or left)


if __name__ == "__main__":
    sys.exit(main())
