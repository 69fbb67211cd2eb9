"""Compile the C++ scan into a shared library beside its sources.

Uses the standard library only: the package's build runs this file by its path, before torch is installed. To build
again after a change of the sources: ``python -m vision_ssm.scan.cpu``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = "libvision_ssm_scan" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

# No -ffast-math: infinities and NaN keep their meaning, and sums their order. Products and sums may fuse.
_FLAGS = [
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=fast", "-fno-math-errno"),
]
_TARGETS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}


class BuildError(Exception):
    """There is no compiler, or it failed."""


def source_hash() -> str:
    """Return a hash of the sources, which identifies a library built from them."""
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"), SOURCES / "build.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ on the path.

    Raises:
        BuildError: If there is none.
    """
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise BuildError(f"CXX is {command!r}: {error}") from error
        if words and shutil.which(words[0]):
            return words
    raise BuildError(
        f"CXX is {chosen!r}, which was not found" if chosen else "no C++ compiler (c++, g++, clang++) found"
    )


def build(folder: Path = SOURCES, optimize: Sequence[str] = ("-O3",), link: Sequence[str] = ()) -> Path:
    """Compile the library into ``folder``; return its path.

    Args:
        folder: Where the library goes.
        optimize: Compiler flags besides those the code needs.
        link: Flags for the linker.

    Raises:
        BuildError: If there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as temporary:
        commands, objects = [], []
        for source in ("scan", *(_TARGETS if x86 else ("baseline",))):
            flags = [*_FLAGS, *optimize, *_TARGETS.get(source, "").split(), f'-DSOURCE="{source_hash()}"']
            objects.append(f"{temporary}/{source}.o")
            commands.append([*compiler, *flags, "-c", str(SOURCES / f"{source}.cpp"), "-o", objects[-1]])
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(_run, commands))
        built = f"{temporary}/{LIBRARY}"
        _run([*compiler, "-shared", *objects, "-o", built, *link])
        # A process may have the old library open: replace it, never write into it.
        target = folder / LIBRARY
        try:
            shutil.copyfile(built, f"{target}.new")
            os.replace(f"{target}.new", target)
        except OSError as error:
            raise BuildError(f"cannot write {target}: {error}") from error
    return target


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except subprocess.CalledProcessError as error:
        raise BuildError(
            f"{shlex.join(command)} failed with code {error.returncode}: {error.stderr.strip()}"
        ) from error
    except OSError as error:
        raise BuildError(f"{shlex.join(command)} failed: {error}") from error
