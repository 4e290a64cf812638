"""The package as it is installed and imported: layers, lazy Triton, checkouts, public names and their docstrings."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import fused_lk

ROOT = Path(__file__).resolve().parent.parent
# The rooms from top to bottom: each may import those after it, and none before it. Inside a room there is no circle.
ROOMS = (
    *("integrations", "__init__", "modules", "losses", "evaluate", "by_reference", "explain", "reduction", "output"),
    *("graph", "walk", "targets", "pairs", "objective", "impls", "kernels", "rows"),
    *("positions", "opaque", "gemm", "wide", "ranks", "checks", "reference", "checkout"),
)


def modules():
    """`{module: path}` of all that is installed, without the `fused_lk.` in front."""
    found = {}
    for folder, prefix in ((ROOT / "fused_lk", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return found


MODULES = modules()


def imports(name, deferred):
    """What `name` imports when it is imported; or, `deferred`, inside its functions."""
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    package = ["fused_lk", *name.split(".")][: None if path.name == "__init__.py" and name != "__init__" else -1]
    found = set()
    for node in ast.walk(tree):
        if node in typing_only or (node in inside) != deferred:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            known = {full for full in submodules if full.removeprefix("fused_lk.") in MODULES}
            found |= known or {base}
    return found


def ours(names):
    return {x.removeprefix("fused_lk.") if x != "fused_lk" else "__init__" for x in names if x.startswith("fused_lk")}


GRAPH = {name: ours(imports(name, deferred=False)) for name in MODULES}
DEFERRED = {name: ours(imports(name, deferred=True)) for name in MODULES}


def reached(start, graph):
    seen, waiting = set(), [start]
    while waiting:
        for name in graph[waiting.pop()]:
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    return seen


ALL = {name: GRAPH[name] | DEFERRED[name] for name in MODULES}


def test_the_graph_is_read_right():
    assert {"losses", "targets.target", "targets.vocab"} <= GRAPH["__init__"] | reached("__init__", GRAPH)
    assert GRAPH["losses"] >= {"walk.problem", "reduction"}
    assert "kernels.launch" in DEFERRED["impls"]
    assert "kernels.row_stats" in GRAPH["kernels.launch"]
    assert "rows.interface" in GRAPH["kernels.launch"]


def test_imports_run_one_way():
    """Also those inside functions; without exemptions."""
    room = {name: ROOMS.index(name.split(".")[0]) for name in MODULES}
    for name in MODULES:
        assert name not in reached(name, ALL), f"{name} imports itself, through others"
        for other in ALL[name]:
            assert room[other] >= room[name], f"{name} reaches up to {other}"


def test_what_stands_alone():
    assert not ALL["reference"]
    for name in MODULES:
        room = name.split(".")[0]
        if room == "kernels":
            above = {x for x in ALL[name] if not x.startswith("kernels")}
            assert above <= {"rows.interface", "checks"}, name
        else:
            assert not {x for x in GRAPH[name] if x.startswith("kernels")}, f"{name} needs Triton to be imported"


def test_no_parameter_shadows_a_module():
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        taken = {x.split(".")[-1] for x in ALL[name]} & {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                assert node.arg not in taken, f"{name}: the parameter {node.arg} shadows a module"


def test_triton_and_the_trainers_are_imported_late():
    late = ("triton", "transformers", "specforge", "speculators")
    for name in MODULES:
        if not name.startswith("kernels"):
            there = {x for x in imports(name, deferred=False) if x.split(".")[0] in late}
            assert not there, f"{name} imports {there}"


WITHOUT = """
import sys
for name in ("triton", "transformers", "specforge", "speculators", "matplotlib", "tqdm"):
    sys.modules[name] = None  # an ImportError from now on
import torch, fused_lk
loaded = [x for x in sys.modules if x.startswith("fused_lk.") and ("kernels" in x or "integrations" in x)]
assert not loaded, loaded
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
target = fused_lk.Target.from_logits(torch.randn(3, 7))
fused_lk.lk_loss(hidden, weight, target).loss.backward()
assert hidden.grad.abs().sum() > 0
import fused_lk.integrations
"""


def test_it_works_without_triton():
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CHECKOUT = """
import torch, fused_lk
assert not any(x.startswith("fused_lk.kernels") for x in __import__("sys").modules)
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
target = fused_lk.Target.from_logits(torch.randn(3, 7))
fused_lk.lk_loss(hidden, weight, target, impl="torch").loss.backward()
try:
    fused_lk.lk_loss(hidden, weight, target, impl="triton").loss.backward()
    from fused_lk.kernels import row_grad
    print(row_grad.__file__)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("options", "folders"),
    [([], ("fused_lk", "kernels")), (["-S"], ("fused_lk", "kernels")), (["-S"], ("fused_lk",))],
    ids=["installed elsewhere", "not installed", "without its kernels"],
)
def test_a_checkout_on_the_path(options, folders, tmp_path):
    """It finds its own kernels, or says what is missing. -S hides editable installations."""
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    packages = {str(Path(module.__file__).parents[1]) for module in (pytest, torch)}
    path = os.pathsep.join([str(tmp_path), *packages])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, *options, "-c", CHECKOUT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if "kernels" in folders:
        assert done.stdout.strip() == str(tmp_path / "kernels" / "row_grad.py")
    else:
        assert re.match(r"expected .*fused_lk\.kernels.*; got .*\. .*pip install", done.stdout)


def test_public_names():
    assert sorted(fused_lk.__all__) == fused_lk.__all__
    public = {name for name in vars(fused_lk) if not name.startswith("_")}
    submodules = {name for name, value in vars(fused_lk).items() if inspect.ismodule(value)} - {
        "positions",
        "reference",
    }
    assert public - submodules == set(fused_lk.__all__)


def callables():
    """`{name: callable}` of the public functions, classes and their public methods."""
    found = {}
    for name in fused_lk.__all__:
        value = getattr(fused_lk, name)
        if callable(value):
            found[name] = value
        if inspect.isclass(value):
            for member, method in inspect.getmembers(value, callable):
                if not member.startswith("_") and member in vars(value):
                    found[f"{name}.{member}"] = method
    found |= {
        f"{module.__name__.removeprefix('fused_lk.')}.{name}": value
        for module in (fused_lk.positions, fused_lk.reference)
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and value.__module__ == module.__name__
    }
    return found


CALLABLES = callables()
BY_FRAMEWORK = {"LKLoss.extra_repr"}


@pytest.mark.parametrize("name", sorted(set(CALLABLES) - BY_FRAMEWORK))
def test_docstrings_and_type_hints(name):
    value = CALLABLES[name]
    assert inspect.getdoc(value), f"{name} has no docstring"
    function = value.__init__ if inspect.isclass(value) else value
    if not inspect.isfunction(function):
        return
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self":
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name})"
    if not inspect.isclass(value):
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty, name


# Whose docstring documents the parameters that a docstring does not repeat
DOCUMENTED_WITH = defaultdict(
    tuple,
    {
        "lk_loss": ("lk_divergences",),
        "lk_divergences_from_logits": ("lk_divergences",),
        "lk_loss_from_logits": ("lk_loss", "lk_divergences"),
        "LKLoss": ("lk_loss",),
        "LKLoss.forward": ("lk_loss", "lk_divergences"),
        "lk_evaluate": ("lk_divergences",),
        "lk_evaluate_from_logits": ("lk_evaluate", "lk_divergences"),
        "Target.from_logits": ("Target.from_hidden",),
        "Target.from_probs": ("Target.from_hidden",),
    },
)
ENTRIES = ("lk_loss", "lk_loss_from_logits", "lk_divergences", "lk_divergences_from_logits", "LKLoss", "Pairs")
ENTRIES += ("DraftVocab", "TargetHead", "Target.from_hidden", "Target.from_logits", "Target.from_probs")
ENTRIES += ("Target.from_topk", "Sampling", "lk_evaluate", "lk_evaluate_from_logits")


@pytest.mark.parametrize("name", ENTRIES)
def test_every_parameter_is_documented(name):
    text = "\n".join(inspect.getdoc(CALLABLES[other]) for other in (name, *DOCUMENTED_WITH[name]))
    for parameter in inspect.signature(CALLABLES[name]).parameters.values():
        described_in_prose = parameter.name in ("draft_logits", "probs") or parameter.kind is parameter.VAR_KEYWORD
        if not described_in_prose:
            assert re.search(rf"\b{parameter.name}\b", text), f"{name}({parameter.name})"


@pytest.mark.parametrize("name", ENTRIES)
def test_every_documented_parameter_exists(name):
    """The names before the colons of the `Args:` block."""
    block = re.search(r"^Args.*?:\n((?:    .*\n|\n)+)", inspect.getdoc(CALLABLES[name]) + "\n", re.MULTILINE)
    if block is None:
        return
    entries = re.findall(r"^    (\w[\w, ]*?):", block[1], re.MULTILINE)
    documented = {x.strip() for entry in entries for x in entry.split(",")}
    signature = inspect.signature(CALLABLES[name]).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    known = set(signature) | (set(inspect.signature(fused_lk.lk_loss).parameters) if takes_more else set())
    assert documented
    assert documented <= known
