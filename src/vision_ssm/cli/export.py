from collections.abc import Sequence

from vision_ssm.cli.options import run_named

FORMATS = {
    "onnx": ("onnx:onnx", "a file for ONNX Runtime, of any size of image and batch"),
    "program": ("program:program", "a torch.export program, which runs without this package's models"),
    "hub": ("hub:hub", "a folder as timm's push_to_hub writes it, with a model card of the run"),
}
"""Name of each format: where its function is in this package, and what it writes."""


def export(words: Sequence[str]) -> int:
    """Write a model in one format; `words` follow `vision-ssm export`."""
    models = "MODEL is a timm name with its published weights, NAME=FILE with those of a file, or NAME=random."
    return run_named("export", "FORMAT MODEL|RUN OUT", FORMATS, words, models)
