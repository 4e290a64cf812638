"""Settings of the whole test run."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors in many tests: threads cost more than they bring.
torch.set_num_threads(2)
