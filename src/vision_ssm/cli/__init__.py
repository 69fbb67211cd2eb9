"""The command line, `vision-ssm`.

Each command is a function that takes the remaining words and returns the exit code; its module is imported only
when the command is called. To add one, add a line to `COMMANDS`.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("vision_ssm.cli.train:train", "train a model on your images, or on the embedded digits"),
    "recipes": ("vision_ssm.cli.recipes:recipes", "list the recipes for training, and where their values come from"),
    "eval": ("vision_ssm.cli.use:evaluate", "measure a trained model, or any timm model"),
    "predict": ("vision_ssm.cli.use:predict", "predict for images with a trained model"),
    "models": ("vision_ssm.cli.models:models", "list the models of this package"),
    "info": ("vision_ssm.cli.models:info", "show what a model costs and the maps it gives"),
    "bench": ("vision_ssm.cli.bench:bench", "time models, with every setting that matters"),
    "analyze": ("vision_ssm.cli.analyze:analyze", "look into models: similarity, receptive fields, attention, maps"),
    "ablate": ("vision_ssm.cli.ablate:ablate", "train or measure a grid of variants of a recipe"),
    "export": ("vision_ssm.cli.export:export", "write a model for ONNX Runtime, torch programs or the hub"),
    "report": ("vision_ssm.cli.report:report", "write a report of one or more runs in one HTML file"),
    "demo": ("vision_ssm.cli.demo:demo", "serve a web page that predicts for pictures"),
    "convert": ("vision_ssm.cli.convert:convert", "turn an official checkpoint into safetensors"),
}
"""Name of each command: where its function is, and what it does."""

BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after the program's name; those of this process by default.

    Returns:
        The exit code: 0, 2 for anything wrong with options or data, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    modules: list[str] = []
    while words[:1] == ["--import"] and len(words) > 1:
        modules, words = [*modules, words[1]], words[2:]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if words else BAD_INPUT
    if words[0] == "--version":
        from vision_ssm import __version__

        sys.stdout.write(f"vision-ssm {__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        return fail(f"no command {words[0]}; there are {', '.join(COMMANDS)}")

    from vision_ssm.errors import InputError
    from vision_ssm.memory import keep_freed_memory

    if argv is None:  # in a process of its own
        keep_freed_memory()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its profiler warns of memory that was there before
    try:
        _import_modules(modules)
        module, function = COMMANDS[words[0]][0].split(":")
        return getattr(importlib.import_module(module), function)(words[1:])
    except InputError as error:
        return fail(error.line)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        needed = f"{words[0]} needs {package}, which is not installed"
        extras = {"faster_coco_eval": "detection", "transformers": "segmentation"}
        extras |= dict.fromkeys(("pytorch_grad_cam", "jinja2"), "analysis")
        extras |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export") | {"gradio": "demo"}
        extra = extras.get(package, "segmentation" if package.startswith("segmentation_models") else "train")
        return fail(f"{needed}; pip install 'vision-ssm[{extra}]' installs all that it needs")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return fail(f"{error.strerror or error}{where}")
    except SystemExit as leave:  # tyro's, after --help or options that do not fit
        return int(leave.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("\nvision-ssm: interrupted\n")
        return INTERRUPTED


def _import_modules(names: Sequence[str]) -> None:
    from vision_ssm.errors import InputError

    sys.path[:0] = [""] if names else []  # as python -m does
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # modules of users raise anything
            raise InputError(f"--import {name}: {type(error).__name__}: {error}") from error


def fail(message: str) -> int:
    """Print one line about what is wrong, and return the exit code for it."""
    sys.stderr.write(f"vision-ssm: error: {message}\n")
    return BAD_INPUT


def warn(message: str) -> None:
    """Print one line about what went wrong while the rest goes on."""
    sys.stderr.write(f"vision-ssm: warning: {message}\n")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "".join(f"  {name:<{width}}  {text}\n" for name, (_, text) in COMMANDS.items())
    return (
        "usage: vision-ssm [--import MODULE] COMMAND ...\n\nVision state-space backbones: train them and use them.\n\n"
        f"commands:\n{lines}\n`vision-ssm COMMAND --help` lists its options.\n"
        "--import MODULE runs a module first, such as one that registers your own models with timm.\n"
    )
