"""The published packages that the tests compare with, and what loading them takes.

A peer that cannot be imported is an error of the test run, never a skip: parity that was not checked is not parity.
`requirements/peers-deps.txt` lists what their modules import. The exception is `make gpu`, whose machine need not have
them: there, what compares with one that is not installed is skipped.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

# SpecForge's cross-entropy exists as Triton kernels alone; on a CPU they run in Triton's interpreter, which has to be
# chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_DRAFT_KINDS = ("eagle3", "peagle", "dflash", "dflash2", "dspark", "xpress", "mtp")


def device() -> torch.device:
    """Where the peers' kernels run in this process."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")


def _installed(load: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(load)
    def loaded() -> Any:
        try:
            return load()
        except ModuleNotFoundError as error:
            if os.environ.get("FUSED_LK_TEST_DEVICE", "cpu") == "cpu":
                raise
            import pytest

            pytest.skip(f"{error.name} is not installed")

    return loaded


@_installed
def specforge() -> SimpleNamespace:
    """`lk_loss`, `loss`, `compact_teacher` (modules of `specforge.core`); training models and drafts of every kind."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flash_attn is not found")
        return SimpleNamespace(
            lk_loss=importlib.import_module("specforge.core.lk_loss"),
            loss=importlib.import_module("specforge.core.loss"),
            compact_teacher=importlib.import_module("specforge.core.compact_teacher"),
            adapters=importlib.import_module("specforge.core.eagle3_adapters"),
            model=importlib.import_module("specforge.algorithms.eagle3.model"),
            draft=importlib.import_module("specforge.modeling.draft.llama3_eagle"),
            strategies=importlib.import_module("specforge.training.strategies.base"),
            target_head=importlib.import_module("specforge.modeling.target.target_head"),
            peagle=importlib.import_module("specforge.algorithms.peagle.model"),
            peagle_draft=importlib.import_module("specforge.modeling.draft.peagle"),
            blocks=importlib.import_module("specforge.algorithms.common.dflash_family_model"),
            dflash=importlib.import_module("specforge.modeling.draft.dflash"),
            domino=importlib.import_module("specforge.modeling.draft.domino"),
            dspark=importlib.import_module("specforge.modeling.draft.dspark"),
        )


@_installed
def speculators() -> SimpleNamespace:
    """`eager`, `fused`, `utils` (modules of `speculators.losses`), `core` and `config` (EAGLE-3), `metrics`, `kinds`.

    `kinds` has the `core` and the `config` module of each kind of draft, by its name.
    """
    kinds = {
        kind: SimpleNamespace(
            core=importlib.import_module(f"speculators.models.{kind}.core"),
            config=importlib.import_module(f"speculators.models.{kind}.config"),
        )
        for kind in _DRAFT_KINDS
    }
    return SimpleNamespace(
        eager=importlib.import_module("speculators.losses.eager"),
        fused=importlib.import_module("speculators.losses.fused"),
        utils=importlib.import_module("speculators.losses.utils"),
        config=importlib.import_module("speculators.models.eagle3.config"),
        core=importlib.import_module("speculators.models.eagle3.core"),
        metrics=importlib.import_module("speculators.models.metrics"),
        kinds=kinds,
    )


@_installed
def compressed_tensors() -> SimpleNamespace:
    """`compressors` and `quantization` of compressed-tensors."""
    return SimpleNamespace(
        compressors=importlib.import_module("compressed_tensors.compressors"),
        quantization=importlib.import_module("compressed_tensors.quantization"),
    )


@_installed
def torchao() -> ModuleType:
    """`torchao.quantization`."""
    return importlib.import_module("torchao.quantization")
