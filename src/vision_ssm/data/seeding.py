import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# The first word after the seed keeps the draws for order, augmentation and replacements apart from one another, and
# from those of the training step and the first weights.
ORDER, AUGMENT, REPLACE = 0, 1, 4


def seed_generators(*key: int, device: torch.device | None = None) -> None:
    """Make what Python's, NumPy's and torch's global generators draw next a function of `key` alone.

    timm's augmentation uses all three.

    Args:
        key: Non-negative integers, such as (seed, epoch, sample).
        device: An accelerator whose generator to seed as well.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)  # noqa: NPY002
    torch.random.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def restored_generators(device: torch.device | None = None) -> Iterator[None]:
    """Put the global generators' states back after the block, `device`'s too."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm draws from it)
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators inside the block, and put back what was there.

    So a result depends neither on the number of workers nor on what ran before, and a resumed run needs no stored
    random state. Arguments are those of `seed_generators`.
    """
    with restored_generators(device):
        seed_generators(*key, device=device)
        yield
