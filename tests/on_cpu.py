"""`python tests/on_cpu.py MODULE ARGUMENTS...` runs a module of speculators as a command where there is no accelerator.

Its trainer takes its device from `torch.accelerator`, and knows no CPU. Here the accelerator is the CPU. Nothing else
of the trainer changes, and it works under torchrun. (SpecForge needs none of this: SPECFORGE_DEVICE=cpu.)
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    init = dist.init_process_group

    def init_process_group(backend: str, device_id: Any = None) -> None:
        init(backend)

    accelerator: Any = torch.accelerator
    accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cpu")
    accelerator.is_available = lambda: False
    accelerator.set_device_index = accelerator.synchronize = lambda *_: None
    torch.Tensor.pin_memory = lambda self, *_: self
    dist.init_process_group = init_process_group
    from speculators.train import distributed

    distributed.get_local_rank = lambda: "cpu"  # The trainer moves tensors there.
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
