"""Settings of the whole test run."""

import os

import torch
from hypothesis import Phase, settings

# On a CPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported. `make gpu`
# runs the same tests on a card, with the compiled kernels: tensors and random numbers are then made there.
DEVICE = os.environ.get("FUSED_LK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # A rehearsal on "cpu:0" makes tensors on "cpu": fake ones keep an index that real ones drop.
    torch.set_default_device(torch.device(DEVICE).type)

    class Generator(torch.Generator):
        def __new__(cls, device: torch.device | str = DEVICE) -> "Generator":
            return super().__new__(cls, device)

    torch.Generator = Generator  # type: ignore[misc]

# Small tensors in many tests, and a process a core: threads cost more than they bring. (`make test` runs some tests on
# two threads, too: other sums, other last bits.) They sleep when they wait, in child processes too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("FUSED_LK_TEST_THREADS", "1"))
torch.set_num_threads(int(os.environ.get("FUSED_LK_TEST_THREADS", "1")))

# Tests that search for examples find the same ones in every run.
settings.register_profile("default", derandomize=True, database=None, deadline=None)
settings.load_profile("default")
# For tests/mutations.py, which asks whether, not why.
settings.register_profile("first failure", phases=[Phase.generate], report_multiple_bugs=False)
