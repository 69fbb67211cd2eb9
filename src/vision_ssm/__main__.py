import sys

from vision_ssm.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
