import sys
from pathlib import Path

import numpy as np
import pytest

from vision_ssm.scan import triton

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _scans_of_whole_slices():
    """Let Triton's interpreter scan slice by slice; by itself it goes number by number, 100 times slower."""
    if not triton.interpreted():
        yield
        return
    from triton.runtime.interpreter import ScanOps

    def scan(self, values):
        done = [np.moveaxis(np.empty_like(value.handle.data), self.axis, 0) for value in values]
        steps = list(zip(*(np.moveaxis(value.handle.data, self.axis, 0) for value in values), strict=True))
        state = None
        for i, step in enumerate(steps):
            current = [self.to_tensor(np.ascontiguousarray(d), v.dtype) for d, v in zip(step, values, strict=True)]
            state = current if state is None else self.combine_fn.fn(*state, *current)
            for out, tensor in zip(done, state, strict=True):
                out[i] = tensor.handle.data
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(out, 0, self.axis)), v.dtype)
            for out, v in zip(done, values, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanOps, "generic_scan", scan)
        yield
