"""A classifier as timm's ``push_to_hub`` lays it out: configuration, weights, and a model card filled from its run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme, save_config_for_hf

from vision_ssm.engine.files import read_json, temporary, write_json, write_text
from vision_ssm.engine.plots import draw_curves
from vision_ssm.engine.run_folder import RunFolder, rank
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import printable
from vision_ssm.models.registry import registered_models
from vision_ssm.tasks.classification import Classification
from vision_ssm.tasks.results import percent

_MOST_CLASSES = 50  # rows of the card's table
_SETTINGS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")

_USAGE = """{note}
```python
import timm
import torch
from PIL import Image
{register}
model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # hf-hub:OWNER/{name} after an upload
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("picture.jpg").convert("RGB"))
with torch.no_grad():
    probabilities = model(image[None]).softmax(1)[0]
best = probabilities.argmax().item()
print(model.pretrained_cfg["label_names"][best], probabilities[best].item())
```"""


def write_hub_folder(
    out: Path, task: Classification, run: RunFolder | None = None, *, best: bool = False, published: bool = False
) -> None:
    """Write a classifier into a new folder, which appears whole or not at all.

    Its weights file is also one of this package: ``vision_ssm.load`` reads it.

    Args:
        out: The folder; it is empty or does not exist.
        task: The classifier, not optimized.
        run: The run that it is from.
        best: Whether these are the best weights of the run, to which its metrics belong.
        published: Whether these are the weights that the model's authors published.

    Raises:
        InputError: A file of the run is damaged.
        OSError: The folder cannot be written.
    """
    from_authors = published or (run is not None and getattr(run.read_config(), "pretrained", None) is True)
    cfg: Mapping[str, Any] = getattr(task.model, "pretrained_cfg", None) or {}
    license_name = (from_authors and cfg.get("license")) or "unknown"
    part = temporary(out)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        save_weights(part / "model.safetensors", task.model.state_dict(), task.name, task.spec)
        _write_config(part / "config.json", task, {} if published else {"license": license_name})
        write_text(part / "README.md", _card(printable(out.absolute().name), task, run, best, license_name, part))
        if out.is_dir():
            out.rmdir()  # os.replace does not replace an empty folder everywhere
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_config(path: Path, task: Classification, changes: Mapping[str, Any]) -> None:
    """Write timm's configuration; with changes, those of weights that are not the authors'."""
    spec = task.spec
    data = {"input_size": (3, *spec.input_size), **{name: getattr(spec, name) for name in _SETTINGS}}
    more = {"label_names": list(spec.classes), "pretrained_cfg": dict(changes)}
    save_config_for_hf(task.model, str(path), model_config=more, data_config=data)
    values = read_json(path)
    # It stands in num_classes too, and transformers' wrapper of timm fails on what is given twice.
    values["model_args"].pop("num_classes", None)
    for key in ("tag", "description", "origin_url") if changes else ():  # of the authors' weights
        values["pretrained_cfg"].pop(key, None)
    write_json(path, values)


def _card(name: str, task: Classification, run: RunFolder | None, best: bool, license_name: str, place: Path) -> str:
    """The text of the model card; its pictures are put beside it."""
    spec = task.spec
    ours = spec.model.split(".")[0] in registered_models()
    details: dict[str, Any] = {
        "Architecture": spec.model,
        "Parameters": f"{sum(p.numel() for p in task.model.parameters()):,}",
        "Input": f"{task.summary.partition(', ')[2]}; mean {spec.mean}, standard deviation {spec.std}",
        "Classes": f"{len(spec.classes):,}",
    }
    text = [f"An image classifier, `{spec.model}`."]
    if run is not None:
        record, history = read_json(run.config), run.read_metrics()
        monitor = run.read_config().monitor or task.monitor
        top = max(history, key=lambda row: rank(row, monitor))
        details["Recipe"] = record.get("recipe", "none")
        details["Epochs"] = f"best {top['epoch']} of {history[-1]['epoch']}" if best else f"{history[-1]['epoch']}"
        details["Trained with"] = ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items())
        draw_curves(history, top, monitor, place / "curves.png")
        if best:
            saved = read_json(run.results) if run.results.is_file() else {}
            found = saved or {key.removeprefix("val_"): value for key, value in top.items() if key.startswith("val_")}
            text += ["## Results", *_results(found)]
            if saved and (confusion := run.path / "confusion.png").is_file():
                shutil.copyfile(confusion, place / confusion.name)
                text += ["![Which class is taken for which](confusion.png)"]
        text += ["## Training", "![Learning curves](curves.png)"]
        text += [f"```sh\n{printable(record['command'])}\n```"] if "command" in record else []
    note = (
        "The architecture comes with vision-ssm (`pip install vision-ssm`), whose import registers it.\n"
        if ours
        else ""
    )
    register = "\nimport vision_ssm  # registers the architecture with timm\n" if ours else ""
    card: dict[str, Any] = {
        "tags": ["image-classification", "timm", "transformers", *(["vision-ssm"] if ours else [])],
        "license": license_name if re.fullmatch(r"[\w.-]+", license_name) else "other",
        "description": "\n\n".join(text),
        "details": {**{key: printable(str(value)) for key, value in details.items()}, "License": license_name},
        "usage": _USAGE.format(name=name, note=note, register=register),
    }
    return generate_readme(card, name)


def _results(found: Mapping[str, Any]) -> Iterator[str]:
    """What a run wrote of its validation images, as parts of a Markdown text."""
    low, high = found.get("accuracy_interval", (None, None))
    rows = []
    for key in ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "worst_recall", "loss"):
        if key in found:
            value = f"{found[key]:.4f}" if key == "loss" else percent(found[key])
            interval = f" (95% interval {percent(low)} to {percent(high)})" if key == "accuracy" and low else ""
            rows.append([key.replace("_", " ").replace("top5", "top-5"), value + interval])
    images = f"{found['images']:,} validation images" if "images" in found else "the validation images"
    yield f"On {images}, on which the best epoch was chosen too:"
    yield _table(["metric", "value"], rows)
    classes = found.get("per_class", ())
    if 0 < len(classes) <= _MOST_CLASSES:
        shown = [
            [_escape(row["class"]), row["images"], percent(row["recall"]), percent(row["precision"])] for row in classes
        ]
        yield _table(["class", "images", "recall", "precision"], shown)


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([*map(str, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """A text as Markdown shows it; names of classes may hold anything."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(text))
