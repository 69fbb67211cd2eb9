import os

import torch

from vision_ssm.errors import InputError


def find_device(name: str) -> torch.device:
    """The device of that name; auto takes an accelerator if there is one.

    Raises:
        InputError: There is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        if torch.empty(1, device=device).cpu().device.type != "cpu":
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise InputError(f"no device {name} here; there is {there}") from error
    return device


def loader_workers(workers: int | None) -> int:
    """Number of loading processes: as asked, or all cores but one, at most eight."""
    return min(8, max(1, (os.cpu_count() or 2) - 1)) if workers is None else workers
