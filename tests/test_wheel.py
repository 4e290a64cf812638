"""What is handed out: an sdist with the checkout and none of its outputs, and a wheel that works where it lies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fused_lk

ROOT = Path(__file__).resolve().parent.parent
NAME = f"fused_lk-{fused_lk.__version__}"
SOURCES = ("fused_lk", "kernels", "bench", "demo", "docs", "examples", "requirements", "study", "tests", ".ci")
# What lies in a checkout that was worked in; none of it is handed out
OUTPUTS = (".study/draft.pt", ".study-quick/x", ".venv-compat/x", "bench/out/x.csv", "gpu-results/x")
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def build(hook, source, folder):
    """The path of what `hook` made, without network and without an environment of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, hook, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`(sdist, wheel)`; the wheel is built of the sdist, as an index would have it."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "out", *(("kernels",) if name == "fused_lk" else ()))
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".md", ".py", ".toml", ".in", ".cff", ""):
            shutil.copy(path, source)
    for output in OUTPUTS:
        (source / output).parent.mkdir(parents=True, exist_ok=True)
        (source / output).write_text("not to be handed out")
    sdist = build("build_sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("build_wheel", folder / "unpacked" / NAME, folder)


def test_the_sdist(made):
    """Sources, kernels, docs, tests, licence; whoever unpacks it can test it. Nothing that a run left behind."""
    with tarfile.open(made[0]) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    for name in ("LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "kernels/row_stats.py", "fused_lk/py.typed",
                 "docs/api.md", "docs/build.py", "bench/results/memory.csv", "tests/data/smollm2.pt",
                 "study/__main__.py", "requirements/dev.txt", "examples/plain_loop.py"):  # fmt: skip
        assert name in names, name
    assert not names & set(OUTPUTS)
    assert not {name for name in names if re.search(r"__pycache__|\.py[co]$|^\.(venv|study|git)|/out/", name)}
    assert "fused_lk/kernels/row_stats.py" not in names  # a link to kernels/, in some checkouts


def test_the_wheel(made):
    """The kernels are inside `fused_lk`, never beside it: `kernels` is the import name of another package."""
    with zipfile.ZipFile(made[1]) as archive:
        names = archive.namelist()
    there = {name for name in names if not name.startswith(f"{NAME}.dist-info/")}
    expected = {f"fused_lk/{path.relative_to(ROOT / 'fused_lk')}" for path in (ROOT / "fused_lk").rglob("*.py")}
    expected |= {f"fused_lk/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert there == expected | {"fused_lk/py.typed"}
    assert f"{NAME}.dist-info/licenses/LICENSE" in names


SMOKE = """
import torch, fused_lk
from importlib.metadata import version
from fused_lk.kernels import row_grad, row_stats
torch.manual_seed(0)
hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
vocab = fused_lk.DraftVocab(torch.arange(24) < 16)
target = fused_lk.Target.from_logits(torch.randn(5, 24, dtype=torch.float64), vocab)
results = []
for impl in ("triton", "reference"):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fused_lk.lk_loss(h, w, target, impl=impl)
    out.loss.backward()
    results.append((out.loss.detach(), h.grad, w.grad))
for ours, reference in zip(*results):
    torch.testing.assert_close(ours, reference)
assert results[0][1].abs().sum() > 0
print(fused_lk.__file__, row_stats.__file__, version("fused_lk"), sep="\\n")
"""


def test_the_wheel_in_an_empty_environment(made, tmp_path):
    """Nothing is installed there but the wheel; PyTorch and Triton are found where these tests find them."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "-q", str(made[1])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (packages,) = environment.glob("lib/python*/site-packages")
    # A .pth file of a folder that a .pth file names is not read, so that editable installations are not seen.
    (packages / "pytorch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    kernels = {"TRITON_INTERPRET": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [str(python), "-I", "-c", SMOKE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**kernels, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    package, kernel, version = done.stdout.split()
    assert Path(package).is_relative_to(environment)
    assert Path(kernel).is_relative_to(environment / Path(package).relative_to(environment).parent)
    assert version == fused_lk.__version__


def test_the_version_is_one():
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")}
    patterns = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## (.+)$",
    }
    for name, pattern in patterns.items():
        assert re.search(pattern, texts[name], re.MULTILINE)[1] == fused_lk.__version__, name
