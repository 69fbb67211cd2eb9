import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# The first word after the seed keeps the draws for order, augmentation and replacements apart from one another, and
# from those of the training step and the first weights.
ORDER, AUGMENT, REPLACE = 0, 1, 4


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Make every random draw inside the block a function of `key` alone.

    Seeds Python's, NumPy's and torch's global generators (timm's augmentation uses all three) and puts back
    what was there. So a result depends neither on the number of workers nor on what ran before, and a resumed
    run needs no stored random state.

    Args:
        key: Non-negative integers, such as (seed, epoch, sample).
        device: An accelerator whose generator to seed as well.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm draws from it)
    accelerators = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        random.seed(words.tobytes())
        np.random.seed(words)  # noqa: NPY002
        torch.random.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        if accelerators:
            torch.cuda.manual_seed(int(words[2]) << 32 | int(words[3]))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
