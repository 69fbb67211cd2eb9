"""``python -m vision_ssm.scan.cpu`` compiles the C++ scan into the installed package."""

import sys

from vision_ssm.scan.cpu.build import BuildError, build

try:
    sys.stdout.write(f"{build()}\n")
except BuildError as error:
    sys.exit(str(error))
