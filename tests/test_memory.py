"""Freed memory, in processes of their own."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from vision_ssm.memory import keep_freed_memory
kept = [keep_freed_memory()] if "keep" in sys.argv else []
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(3 * 2**21)  # 48 MiB: above 32, glibc maps every block by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(*kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    def run(*words, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-c", CODE, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | variables)
        return done.stdout.split()

    (returned,) = run()
    kept, few = run("keep")
    refused, many = run("keep", MALLOC_MMAP_THRESHOLD_="65536")
    assert (kept, refused) == ("True", "False")
    assert int(few) < 0.1 * int(returned)
    assert int(many) > 0.5 * int(returned)
