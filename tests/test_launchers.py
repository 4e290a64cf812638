"""The trainers' own commands, with the integration applied to the models that they build, in every process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch

from fused_lk.integrations import launch

TESTS = Path(__file__).resolve().parent
SPECFORGE = ("-m", "fused_lk.integrations.specforge")
SPECULATORS = (str(TESTS / "on_cpu.py"), "fused_lk.integrations.speculators")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
WITHOUT = "import sys; sys.modules['fused_lk'] = None\n"  # Importing it is an error then.
STEPS = 3


def run(*command: str, status: int = 0, **environment: str) -> str:
    """Run Python with these arguments, and return what it printed."""
    common = {"SPECFORGE_DEVICE": "cpu", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | common | {"COLUMNS": "500"} | environment
    done = subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True, timeout=600)
    printed = done.stdout + done.stderr
    assert done.returncode == status, printed
    return printed


def at_once(commands: dict[str, tuple[tuple[str, ...], dict[str, str]]]) -> dict[str, str]:
    """Two commands at a time: most of their time is one thread that imports."""
    with ThreadPoolExecutor(2) as pool:
        made = {name: pool.submit(run, *command, **more) for name, (command, more) in commands.items()}
        return {name: done.result() for name, done in made.items()}


def test_specforge(tmp_path):
    """One rank, two ranks, and a producer and a consumer; the same metrics as without the integration."""
    control = {"control_dir": str(tmp_path / "control"), "backend": "shared_dir", "store_root": str(tmp_path / "store")}
    trainer = {"trainer": {"nproc_per_node": 2}}
    runs = {
        "fused": tiny_runs.specforge(tmp_path, "fused"),
        "plain": tiny_runs.specforge(tmp_path, "plain"),
        "ranks": tiny_runs.specforge(tmp_path, "ranks", deployment=trainer),
        "roles": tiny_runs.specforge(tmp_path, "roles", deployment={"mode": "disaggregated", "disaggregated": control}),
    }
    commands = {name: ((*SPECFORGE, "train", "-c", str(path)), {}) for name, path in runs.items()}
    commands["plain"] = (commands["plain"][0], {"FUSED_LK_DISABLE": "1"})
    commands["torchrun"] = (
        (*TORCHRUN, *SPECFORGE, "train", "-c", str(runs["ranks"]), f"output_dir={tmp_path / 't'}"),
        {},
    )
    commands["fused"] = (commands["fused"][0], {"FUSED_LK_WORKSPACE_MB": "0.01"})
    printed = at_once(commands)

    line = "fused_lk: rank {}: applied to OnlineEagle3Model (impl=auto, workspace_mb={})"
    assert printed["fused"].count(line.format(0, 0.01)) == 1 and "fused_lk: rank" not in printed["plain"]
    for name, ranks in (("ranks", 2), ("torchrun", 2), ("roles", 1)):
        lines = [line.format(rank, "auto") for rank in range(ranks)]
        assert [printed[name].count(x) for x in lines] == [1] * ranks and printed[name].count("applied to") == ranks, (
            name
        )
    plain, fused = metrics_of(printed["plain"]), metrics_of(printed["fused"])
    assert len(plain) == STEPS and plain[0].keys() == fused[0].keys() > {"loss", "acceptance_rate_2", "grad_norm"}
    for ours, theirs in zip(fused, plain, strict=True):
        for name in theirs.keys() - {"lr"}:
            # bfloat16 logits: SpecForge rounds the gradient of each; 2^-8 is one rounding.
            assert ours[name] == pytest.approx(theirs[name], rel=2**-7, abs=1e-4), name
    assert metrics_of(printed["roles"]) == fused, "the same data, in the same order"
    assert metrics_of(printed["torchrun"]) == metrics_of(printed["ranks"])

    # What they saved loads where this package cannot be imported, and is exported by the trainer's own command.
    saved = [str(path) for path in (tmp_path / "ranks").rglob("*.pt")]
    exported = {"to": "hf", "checkpoint": "ranks/tiny-step3", "draft-config": "draft.json", "output-dir": "exported"}
    exported |= {"vocab-mapping": "vocabulary.pt", "embedding-source": "target"}
    load = f"import torch; assert len([torch.load(x, weights_only=False) for x in {saved}]) >= {STEPS}"
    export = ["specforge", "export"]
    export += [f"--{key}={value if key == 'to' else tmp_path / value}" for key, value in exported.items()]
    export = f"import sys; sys.argv = {export}; from specforge.cli import main; main()"
    at_once({code: (("-c", WITHOUT + code), {}) for code in (load, export)})
    assert (tmp_path / "exported" / "model.safetensors").exists()


def metrics_of(printed: str) -> list[dict[str, float]]:
    """What rank 0 logged at each step, but times."""
    steps = dict(re.findall(r"step (\d+): (\{.*?\})", printed))
    steps = [json.loads(x.replace("'", '"')) for x in steps.values()]
    return [{name: x for name, x in step.items() if not name.startswith("perf/")} for step in steps]


def test_speculators(tmp_path):
    """EAGLE-3 on one rank and two, and DFlash with its default loss; the same validation as without the integration."""
    options = tiny_runs.speculators(tmp_path)
    eagle3 = ("train", *options, "--speculator-type=eagle3", "--ttt-steps=2", "--loss-fn=lk_hybrid")
    dflash = ("train", *options, "--speculator-type=dflash", "--block-size=4", "--max-anchors=4")
    commands = {}
    for name, command in (("eagle3", eagle3), ("dflash", dflash)):
        plain = (*SPECULATORS, *command, "--loss-implementation=eager", f"--save-path={tmp_path / name / 'plain'}")
        commands[f"{name} plain"] = (plain, {"FUSED_LK_DISABLE": "1"})
        commands[f"{name} fused"] = ((*SPECULATORS, *command, f"--save-path={tmp_path / name / 'fused'}"), {})
    commands["ranks"] = ((*TORCHRUN, *SPECULATORS, *eagle3, f"--save-path={tmp_path / 'ranks'}"), {})
    printed = at_once(commands)

    for name, kind in (("eagle3", "Eagle3DraftModel"), ("dflash", "DFlashDraftModel")):
        assert printed[f"{name} fused"].count(f"fused_lk: rank 0: applied to {kind}") == 1
        assert "fused_lk: rank" not in printed[f"{name} plain"]
        ours, theirs = (
            json.loads((tmp_path / name / x / "0" / "val_metrics.json").read_text()) for x in ("fused", "plain")
        )
        assert ours.keys() == theirs.keys() and any("loss" in x for x in ours)
        for metric, value in theirs.items():
            assert ours[metric] == pytest.approx(value, rel=2**-8, abs=1e-4), (name, metric)
    assert [printed["ranks"].count(f"rank {rank}: applied to Eagle3DraftModel") for rank in (0, 1)] == [1, 1]

    folders = [str(tmp_path / x / "0") for x in ("eagle3/fused", "dflash/fused", "ranks")]
    folders = [str(tmp_path / x / "0") for x in ("eagle3/fused", "dflash/fused", "ranks")]
    load = f"from speculators import SpeculatorModel as Model; [Model.from_pretrained(x) for x in {folders}]"
    run("-c", WITHOUT + load)


def test_a_run_that_is_not_fused_ends_with_an_error(monkeypatch):
    from specforge import cli

    from fused_lk.integrations.specforge.__main__ import main

    def published(arguments):
        training = SimpleNamespace(role=arguments[0])
        return cli._train(SimpleNamespace(config=SimpleNamespace(training=training))), cli.build_launch_plan

    monkeypatch.setattr(cli, "build_launch_plan", None, raising=False)
    monkeypatch.setattr(cli, "main", published)
    monkeypatch.setattr(cli, "_train", lambda resolved: 0)
    assert main(["producer"]) == (0, None)
    with pytest.raises(RuntimeError, match=r"was not fused.*FUSED_LK_DISABLE=1"):
        main(["all"])
    monkeypatch.setattr(cli, "main", lambda arguments: 0)
    with pytest.raises(RuntimeError, match="that uses build_launch_plan, _train"):
        main(["all"])
    monkeypatch.setenv("FUSED_LK_DISABLE", "1")
    assert main(["all"]) == 0


def test_the_same_of_speculators(monkeypatch):
    import speculators.cli
    from speculators.train import cli

    from fused_lk.integrations.speculators.__main__ import main

    def published(config):
        return config.flatten(), cli.Trainer

    monkeypatch.setattr(cli, "main", published)
    monkeypatch.setattr(speculators.cli, "app", lambda dry: cli.main(SimpleNamespace(flatten=lambda: {"dry_run": dry})))
    assert main(True) is None
    with pytest.raises(RuntimeError, match="was not fused"):
        main(False)
    monkeypatch.setattr(cli, "main", lambda config: None)
    with pytest.raises(RuntimeError, match="that uses Trainer"):
        main(False)


def test_what_cannot_be_served_is_refused_before_training(monkeypatch):
    """The options of the environment reach `apply`; the trainer's keywords reach `refuse`."""
    given = []

    def refuse(**call):
        given.append(call)
        raise ValueError("no such loss")

    def apply(model, **options):
        given.append(options)
        model.forward = SimpleNamespace(refuse=refuse)

    monkeypatch.setenv("FUSED_LK_IMPL", "torch")
    monkeypatch.setenv("FUSED_LK_WORKSPACE_MB", "1.5")
    applied = launch.Applied(apply)
    with pytest.raises(ValueError, match="no such loss"):
        applied.to(torch.nn.Linear(2, 2), {"loss_config": {}}, target_head=None)
    assert (
        given == [{"impl": "torch", "workspace_mb": 1.5, "target_head": None}, {"loss_config": {}}]
        and not applied.models
    )


def test_replaced_names_come_back():
    module = SimpleNamespace(__name__="trainer", build=1)
    with launch.replaced(module, build=2):
        assert module.build == 2
    assert module.build == 1
    with contextlib.suppress(KeyError), launch.replaced(module, build=2):
        raise KeyError
    assert module.build == 1
    with pytest.raises(RuntimeError, match="trainer with other, as published; got one without other"):
        launch.replaced(module, other=2).__enter__()


def test_disabled(monkeypatch):
    for value, want in (("1", True), ("0", False)):
        monkeypatch.setenv("FUSED_LK_DISABLE", value)
        assert launch.disabled() == want
    monkeypatch.setenv("FUSED_LK_DISABLE", "yes")
    with pytest.raises(ValueError, match="FUSED_LK_DISABLE"):
        launch.disabled()
    monkeypatch.delenv("FUSED_LK_DISABLE")
    assert not launch.disabled()
