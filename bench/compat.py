"""The tests on other pairs of PyTorch and Triton: `make compat`, or `python -m bench.compat [environment ...]`.

An environment is a file of `requirements/compat/`: exact pins, and a comment that says why it is there. Its name begins
with the Python it takes (py311: python3.11, of the PATH or of pyenv). For each one this makes `.venv-compat/<name>`,
runs the chosen tests in it, appends what they printed to `.venv-compat/<name>.log`, and removes it again, because a
CUDA build of torch takes 5 GB. Then it writes the environment's line of `bench/results/compat.csv` and
`bench/COMPAT.md`.

An environment with a line for the commit that last touched what is tested is not run again (`--again` does it anyway).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from . import machine
from .tables import markdown, write_csv

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS, VENVS = ROOT / "requirements", ROOT / ".venv-compat"
RESULTS, PAGE = ROOT / "bench" / "results" / "compat.csv", ROOT / "bench" / "COMPAT.md"
# What a result is a result of: all that is run, without what is written about it.
TESTED = ("fused_lk", "kernels", "tests", "requirements", "bench", "pyproject.toml", ":!bench/results", ":!*.md")
PEERS_SINCE = (3, 11)  # Python of SpecForge 0.2.0 and speculators 0.9.0


class Group(NamedTuple):
    """Tests that one run of pytest takes; left out where a peer that they compare with cannot be imported."""

    tests: tuple[str, ...]
    peers: tuple[str, ...] = ()
    interpreted: bool = True


# Few enough for some five minutes on two cores, and what other versions break first.
GROUPS = {
    "package": Group(
        (
            *("test_package.py", "test_target.py", "test_low_rank.py", "test_gemm_counts.py", "test_checkpointing.py"),
            *("test_autocast.py", "test_torch_compile.py", "test_eval_modes.py::test_global_modes_change_nothing"),
            "test_distributed.py",
        )
    ),
    "kernels": Group(("test_kernels.py",)),
    # with the quick report of bench.compile_report, for the cards that this Triton knows
    "compiled": Group(("compiled_checks.py",), interpreted=False),
    "SpecForge": Group(("test_specforge.py", "test_specforge_losses.py"), ("specforge",)),
    "speculators": Group(("test_speculators.py", "test_speculators_losses.py"), ("speculators",)),
    "quantised": Group(("test_quantized.py",), ("compressed_tensors", "torchao")),
}
COUNTS = ("passed", "failed", "skipped")
COLUMNS = (
    *("environment", "python", "torch", "triton", "numpy", "transformers"),
    *(f"{group} {count}" for group in GROUPS for count in COUNTS),
    *("seconds", "cpu", "commit", "date", "remarks"),
)

# Runs in the environment: its versions, and why a peer cannot be imported.
PROBE = """
import importlib.metadata, json, platform, sys
sys.path.insert(0, "tests")
import peers
versions, broken = {"python": platform.python_version()}, {}
for name in ("torch", "triton", "numpy", "transformers"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = ""
for name in sys.argv[1:]:
    try:
        getattr(peers, name)()
    except Exception as error:
        broken[name] = (type(error).__name__ + ": " + str(error).strip().splitlines()[0])[:200]
print(json.dumps([versions, broken]))
"""


class Environment(NamedTuple):
    """A file of `requirements/compat/`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def python(self) -> tuple[int, int]:
        major, minor = re.match(r"py(\d)(\d+)-", self.name).groups()  # type: ignore[union-attr]
        return int(major), int(minor)

    @property
    def reason(self) -> str:
        return " ".join(line.lstrip("# ") for line in self.path.read_text().splitlines() if line.startswith("#"))

    @property
    def pins(self) -> dict[str, str]:
        lines = [line for line in self.path.read_text().splitlines() if not line.startswith("#")]
        return dict(line.split("==") for line in lines)  # type: ignore[misc]  # a line that is no pin is an error

    @property
    def peers(self) -> tuple[str, ...]:
        if self.python < PEERS_SINCE:
            return ()
        return tuple(name for group in GROUPS.values() for name in group.peers)


def environments() -> list[Environment]:
    """The oldest first."""
    found = [Environment(path) for path in (REQUIREMENTS / "compat").glob("*.txt")]
    return sorted(found, key=lambda e: ([int(x) for x in e.pins["torch"].split(".")], e.python))


def interpreter(python: tuple[int, int]) -> str | None:
    """A Python of this version, if there is one."""
    name = f"python{python[0]}.{python[1]}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    known = sorted(str(path) for path in pyenv.glob(f"{python[0]}.{python[1]}.*/bin/{name}"))
    for path in (*known[-1:], shutil.which(name)):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def install(environment: Environment, log: IO[str]) -> None:
    """Make the venv.

    Raises:
        subprocess.CalledProcessError: pip failed; the log says why.
    """
    venv = VENVS / environment.name
    shutil.rmtree(venv, ignore_errors=True)
    _run([interpreter(environment.python) or "", "-m", "venv", str(venv)], log)
    pip = [str(venv / "bin" / "pip"), "install", "-q", "--no-cache-dir", "--disable-pip-version-check"]
    _run([*pip, "-r", str(environment.path)], log)
    if environment.peers:
        # With the pins beside them: a requirement that they do not meet is an error, not another torch.
        _run([*pip, "-r", str(environment.path), "-r", str(REQUIREMENTS / "peers-deps.txt")], log)
        _run([*pip, "--no-deps", "-r", str(REQUIREMENTS / "peers.txt")], log)


def _run(command: list[str], log: IO[str]) -> None:
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def test(group: Group, python: Path, log: IO[str]) -> tuple[dict[str, int], list[str]]:
    """`(counts, names)`: how many tests passed, failed and were skipped, and which failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        files = [f"tests/{name}" for name in group.tests]
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=8"]
        settings = {"TRITON_INTERPRET": str(int(group.interpreted)), "TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        log.write(f"$ {' '.join([*command, *files])}\n")
        log.flush()
        subprocess.run(
            [*command, f"--junitxml={results}", *files],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        return counts(results.read_text() if results.exists() else "<testsuites/>")


def counts(junit: str) -> tuple[dict[str, int], list[str]]:
    """Of a JUnit report. A report without tests is one failure: nothing was tested."""
    found, failed = dict.fromkeys(COUNTS, 0), []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind] += 1
        if kind == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}".removeprefix("tests."))
    return (found, failed) if sum(found.values()) else ({**found, "failed": 1}, ["no test was run"])


def measure(environment: Environment, keep: bool) -> dict[str, str]:
    """Install, test and remove one environment: its line of the table."""
    line = {**dict.fromkeys(COLUMNS, ""), "environment": environment.name, "cpu": machine.cpu_name()}
    line |= {name: version for name, version in environment.pins.items() if name in COLUMNS}
    line |= {"python": ".".join(map(str, environment.python)), "commit": commit()}
    line["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if interpreter(environment.python) is None:
        return {**line, "remarks": f"not run: no Python {line['python']} on this machine"}
    venv, remarks = VENVS / environment.name, []
    VENVS.mkdir(exist_ok=True)
    with (VENVS / f"{environment.name}.log").open("w") as log:
        try:
            install(environment, log)
        except subprocess.CalledProcessError as error:
            return {**line, "remarks": f"not run: {' '.join(map(str, error.cmd[-3:]))} failed"}
        python = venv / "bin" / "python"
        start = time.monotonic()
        command = [str(python), "-W", "ignore", "-c", PROBE, *environment.peers]
        probe = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
        versions, broken = json.loads(probe.stdout.splitlines()[-1])
        line |= versions
        if not environment.peers:
            remarks.append("no integrations: SpecForge 0.2.0 and speculators 0.9.0 need Python 3.11")
        remarks += [f"{name} cannot be imported: {why}" for name, why in broken.items()]
        for name, group in GROUPS.items():
            if set(group.peers) - set(environment.peers) or set(group.peers) & set(broken):
                continue
            print(f"{environment.name}: {name}", flush=True)
            found, failed = test(group, python, log)
            line |= {f"{name} {count}": str(number) for count, number in found.items()}
            remarks += [f"failed: {test}" for test in failed[:5]]
        line |= {"seconds": f"{time.monotonic() - start:.0f}", "remarks": "; ".join(remarks)}
    if not keep:
        shutil.rmtree(venv)
    return line


def commit() -> str:
    """The last one that touched what is tested; "+changes": and there is more that is not committed."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *TESTED]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("+changes" if git("status", "--porcelain") else "")


def known() -> dict[str, dict[str, str]]:
    """The lines of the table, by environment."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {line["environment"]: line for line in csv.DictReader(file)}


def is_current(line: dict[str, str] | None, now: str) -> bool:
    return line is not None and line["commit"] == now and "+" not in now and bool(line["seconds"])


def page(lines: Sequence[dict[str, str]]) -> str:
    """The table to read."""
    reasons = {environment.name: environment.reason for environment in environments()}
    rows = []
    for line in lines:
        cells = [" ".join(_cell(line, group)) for group in GROUPS]
        versions = [line[name] or "-" for name in ("python", "torch", "triton", "numpy", "transformers")]
        rows.append([*versions, *cells, line["seconds"] or "-", line["commit"]])
    header = ["Python", "torch", "Triton", "NumPy", "transformers", *GROUPS, "s", "commit"]
    notes = [f"- torch {x['torch']}, Python {x['python']}: {reasons[x['environment']]} {x['remarks']}" for x in lines]
    measured = {line["environment"] for line in lines}
    missing = [e for e in environments() if e.name not in measured]
    notes += [
        f"- torch {e.pins['torch']}, Python {'.'.join(map(str, e.python))}: {e.reason} Not run yet." for e in missing
    ]
    cpus = ", ".join(dict.fromkeys(line["cpu"] for line in lines))
    return "\n".join([INTRODUCTION.format(cpus=cpus), markdown(header, rows), "", *(x.strip() for x in notes), ""])


def _cell(line: dict[str, str], group: str) -> list[str]:
    """Tests that passed, and what else there is to say."""
    passed, *others = (line[f"{group} {count}"] for count in COUNTS)
    unusual = [f"**{n} {kind}**" for n, kind in zip(others, COUNTS[1:], strict=True) if n not in ("", "0")]
    return [passed or "-", *unusual]


INTRODUCTION = """# The versions that the tests were run with

`make compat` wrote this page ([CSV](results/compat.csv)). Each line is an environment of its own with exactly these
versions (`requirements/compat/`), on {cpus}. Numbers are tests that passed; "-" was not run, and the notes say why.
`bench/compat.py` lists the files of each column: the package with PyTorch's own operations, the kernels in Triton's
interpreter, the kernels compiled for the cards that this Triton knows (the quick report of `bench.compile_report` is
part of it), and the integrations.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = {environment.name: environment for environment in environments()}
    parser.add_argument("names", nargs="*", metavar="environment", help=f"of {', '.join(chosen)} (default: all)")
    parser.add_argument("--again", action="store_true", help="also those that have a result for this commit")
    parser.add_argument("--keep", action="store_true", help="keep each venv (5 GB) after its run")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(chosen):
        parser.error(f"expected environments of requirements/compat, got {', '.join(sorted(unknown))}")
    lines = known()
    for name in arguments.names or chosen:
        if arguments.again or not is_current(lines.get(name), commit()):
            lines[name] = measure(chosen[name], arguments.keep)
            print(f"{name}: {lines[name]['seconds'] or 0} s; {lines[name]['remarks'] or 'no remarks'}", flush=True)
            write(lines)
    write(lines)
    return any(_broken(lines[name]) for name in arguments.names or chosen)


def write(lines: dict[str, dict[str, str]]) -> None:
    ordered = [lines[e.name] for e in environments() if e.name in lines]
    write_csv(RESULTS, COLUMNS, [[line[column] for column in COLUMNS] for line in ordered])
    PAGE.write_text(page(ordered))


def _broken(line: dict[str, str]) -> bool:
    return not line["seconds"] or any(line[f"{group} failed"] not in ("", "0") for group in GROUPS)


if __name__ == "__main__":
    sys.exit(main())
