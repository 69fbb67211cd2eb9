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
