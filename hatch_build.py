"""Compiles the C++ scan while the package is built; without a compiler the package installs all the same."""

from __future__ import annotations

import importlib.util
import platform
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("src/vision_ssm/scan/cpu")


class CustomBuildHook(BuildHookInterface):
    """Adds the compiled library to wheels, which then belong to one platform but to any Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile beside the sources, which is also where an editable install looks."""
        del version
        # By its path: the package itself needs torch, which is not there yet.
        spec = importlib.util.spec_from_file_location("build_scan", Path(self.root) / _FOLDER / "build.py")
        assert spec is not None
        assert spec.loader is not None
        build_scan = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build_scan)
        try:
            library = build_scan.build()
        except (build_scan.BuildError, OSError) as error:
            self.app.display_warning(f"vision-ssm is installed without its C++ scan: {error}")
            return
        build_data["artifacts"].append(f"/{_FOLDER.as_posix()}/{library.name}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def _platform_tag() -> str:
    # A Python for two processors still compiles for the one it runs on.
    name = sysconfig.get_platform().replace("universal2", platform.machine())
    return name.replace("-", "_").replace(".", "_")
