"""The table of mutations names texts that exist; `python tests/mutations.py` tries them."""

from __future__ import annotations

import re

import pytest
from mutations import ROOT, TABLE, sources, split


@pytest.mark.parametrize("mutation", TABLE, ids=[f"{m.where}: {m.original}" for m in TABLE])
def test_the_original_text_is_there_once(mutation):
    assert mutation.original != mutation.mutated
    assert len(sources(ROOT, mutation)) == 1


def test_the_tests_it_names_exist():
    for mutation in TABLE:
        for test in split(mutation.tests):
            path, *name = re.sub(r"\[.*", "", test).split("::")
            text = (ROOT / path).read_text()
            assert not name or f"def {name[0]}(" in text, test


def test_every_kernel_is_broken_in_every_way():
    for kernel in ("row_stats", "row_grad"):
        kinds = {m.kind for m in TABLE if m.where == f"kernels/{kernel}.py"}
        assert {"offset", "index", "sign", "guard", "int32 offset"} <= kinds, kernel
    assert len({(m.where, m.original, m.mutated) for m in TABLE}) == len(TABLE)
