"""`make compat`: its environments are pinned and cover what is declared, and its table says what its results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import compat

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = compat.environments()
LINE = dict.fromkeys(compat.COLUMNS, "")
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"><failure/></testcase>
<testcase classname="tests.test_b" name="three"><error/></testcase>
<testcase classname="tests.test_b" name="four"><skipped/></testcase>
<testcase classname="tests.test_b" name="five"><properties/></testcase>
</testsuite></testsuites>"""


def numbers(version):
    return tuple(int(x) for x in re.findall(r"\d+", version.partition("+")[0]))


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e.name)
def test_exact_pins(environment):
    assert {"torch", "triton", "numpy", "pytest", "hypothesis", "mpmath", "setuptools"} == set(environment.pins)
    assert all(re.fullmatch(r"[\d.]+", version) for version in environment.pins.values())
    assert environment.name.endswith("-torch{}.{}".format(*numbers(environment.pins["torch"])))
    assert environment.reason.endswith(".")
    # whose interpreter takes int() of an array of one element, which NumPy 2.4 refuses
    assert numbers(environment.pins["triton"]) >= (3, 7) or numbers(environment.pins["numpy"]) < (2, 4)


def test_what_is_declared_is_covered():
    declared = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "triton"):
        (oldest,) = re.findall(rf'"{name}>=([\d.]+)', declared)
        assert min(numbers(e.pins[name]) for e in ENVIRONMENTS)[:2] == numbers(oldest)
    assert min(e.python for e in ENVIRONMENTS) == numbers(re.findall(r'requires-python = ">=(.*)"', declared)[0])
    development = dict(re.findall(r"^(\w+)==(.*)$", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE))
    assert any(all(e.pins[x] == development[x] for x in e.pins) for e in ENVIRONMENTS)


def test_the_tests_exist():
    for group in compat.GROUPS.values():
        for test in group.tests:
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / "tests" / file).read_text()


def test_counts():
    found, failed = compat.counts(JUNIT)
    assert found == {"passed": 2, "failed": 2, "skipped": 1}
    assert failed == ["test_a::two", "test_b::three"]
    assert compat.counts("<testsuites/>")[0]["failed"] == 1  # a crash is no success


def test_what_is_run_again():
    line = {**LINE, "commit": "abc", "seconds": "9"}
    assert compat.is_current(line, "abc")
    assert not compat.is_current(line, "def")
    assert not compat.is_current({**line, "commit": "abc+changes"}, "abc+changes")
    assert not compat.is_current({**line, "seconds": ""}, "abc")  # it could not be installed
    assert not compat.is_current(None, "abc")


def test_what_fails_the_command():
    assert compat._broken({**LINE, "remarks": "not run"})
    assert not compat._broken({**LINE, "seconds": "9", "package failed": "0"})
    assert compat._broken({**LINE, "seconds": "9", "kernels failed": "1"})


def test_the_page_is_of_the_results():
    lines = compat.known()
    pins = {e.name: e.pins for e in ENVIRONMENTS}
    for name, line in lines.items():
        assert [line[x].partition("+")[0] for x in ("torch", "triton", "numpy")] == [*pins[name].values()][:3]
        assert line["environment"] == name
    assert compat.page([lines[e.name] for e in ENVIRONMENTS if e.name in lines]) == compat.PAGE.read_text()
