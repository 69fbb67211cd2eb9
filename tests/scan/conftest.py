import sys
from pathlib import Path

import numpy as np
import pytest

from vision_ssm.scan import triton

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _faster_interpreter():
    """Let Triton's interpreter scan slice by slice, not number by number, and prepare the language once.

    By itself it replaces the language's functions in every call of a device function.
    """
    if not triton.interpreted():
        yield
        return
    from triton.runtime import interpreter

    prepared = set()

    def call(self, *args, **options):
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

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
        patch.setattr(interpreter.ScanOps, "generic_scan", scan)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
