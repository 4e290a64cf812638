"""`make gpu`: what it would run exists, and a run goes on where the last one ended."""

import json
import sys
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import Step

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("device", ["cpu:0", "cuda"])
def test_what_it_would_run_exists(device, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = list(gpu.steps(device, tmp_path))
    assert len({step.name for step in steps}) == len(steps)
    named = [Path(word) for step in steps for word in step.command if word.startswith("tests/")]
    assert named and all((ROOT / path).is_file() for path in named)
    assert all(step.environment["TRITON_INTERPRET"] == str(int(device != "cuda")) for step in steps if step.environment)


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Run three steps of one line; which were started, and what is on disk."""
    log = tmp_path / "started"
    lines = {
        "good": "",
        "bad": f"import os, sys; sys.exit(not os.path.exists({str(tmp_path / 'mended')!r}))",
        "last": "",
    }

    def steps(device, out):
        for name, line in lines.items():
            yield Step(name, [sys.executable, "-c", f"open({str(log)!r}, 'a').write('{name} ')\n{line}"], {})

    monkeypatch.setattr(gpu, "steps", steps)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "_output", lambda *command: "0123456789" if "rev-parse" in command else "")

    def run(*arguments):
        log.write_text("")
        monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(tmp_path / "out"), *arguments])
        status = gpu.main()
        return status, log.read_text().split(), json.loads(next(tmp_path.glob("out/*/machine.json")).read_text())

    return run, lines


def test_the_next_run_takes_up_what_did_not_pass(ran, tmp_path):
    run, _ = ran
    status, started, kept = run()
    assert (status, started) == (1, ["good", "bad", "last"]), "a failed step does not stop the next one"
    assert [step["exit_status"] for step in kept["steps"]] == [0, 1, 0]
    (tmp_path / "mended").touch()
    status, started, kept = run()
    assert (status, started) == (0, ["bad"])
    assert {step["step"]: step["exit_status"] for step in kept["steps"]} == dict.fromkeys(("good", "bad", "last"), 0)
    assert run()[:2] == (0, [])
    assert run("--only", "last")[:2] == (0, ["last"])


def test_limits(ran, monkeypatch):
    run, lines = ran
    lines["bad"] = "import time; time.sleep(60)"
    monkeypatch.setattr(gpu, "LIMIT_S", 3.0)
    status, started, kept = run("--only", "bad", "last")
    assert (status, started) == (1, ["bad", "last"])
    assert kept["steps"][0]["exit_status"] == -9 and kept["steps"][0]["seconds"] < 30, "ended at the limit"
    monkeypatch.setattr(gpu, "LIMIT_S", 300.0)
    assert run("--minutes", "1")[:2] == (1, []), "nothing is begun that may end too late"
