"""Run a script, such as timm's own, with the models of this package registered: ``python -m vision_ssm.timm SCRIPT``.

The script runs as ``python SCRIPT`` would run it, with the words that follow its name.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import vision_ssm.models  # noqa: F401  (registers them)

_USAGE = "usage: python -m vision_ssm.timm SCRIPT.py [ARGUMENTS OF THE SCRIPT]\n"


def main(words: Sequence[str]) -> int:
    """Run the script that the first word names, with the others."""
    if not words or words[0] in ("-h", "--help"):
        (sys.stdout if words else sys.stderr).write(_USAGE)
        return 0 if words else 2
    script = Path(words[0])
    if not script.is_file():
        sys.stderr.write(f"vision_ssm.timm: error: no such script: {script}\n")
        return 2
    sys.argv = [*words]
    sys.path.insert(0, str(script.absolute().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11
        sys.path.pop(0)  # the working directory, which python -m puts there
    sys.exit(main(sys.argv[1:]))
