import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.engine.output import make_table
from vision_ssm.errors import InputError, shorten

State = dict[str, Any]  # tensors; torch takes seconds to import, so only the functions that need it do
_PARTS = ("stem.", "stages.", "norm.", "head.", "feature_norms.")  # of every model that has a conversion


@dataclass(frozen=True)
class ConvertOptions:
    """Turn an official checkpoint into safetensors with this package's names; all keys must fit."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The official file, .pth or .safetensors; nothing in it is executed."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT.safetensors")]
    """The .safetensors file to write."""
    model: str
    """The model it belongs to, or the backbone of the detector or segmenter, such as vmamba_tiny."""
    task: Literal["classify", "detect", "segment"] = "classify"
    """Convert a model (or with --backbone that of a detector or segmenter), a whole detector, or a whole segmenter."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model, if the file belongs to none of the named variants."""
    class_map: Path | None = None
    """Text file that names one class of the detector or segmenter per line; by default those of COCO, where there are
    80, of ADE20K, where there are 150, or else numbers."""
    ema: bool = False
    """Take the averaged weights where the file has both."""
    backbone: bool = False
    """Take the backbone alone from the file of a detector or segmenter."""
    verify: Annotated[Path | None, tyro.conf.arg(metavar="IMAGE")] = None
    """Use the converted weights on an image, and print top-5 classes, detected objects, or the pixels' classes."""
    overwrite: bool = False
    """Replace the output file if it exists."""


@dataclass(frozen=True)
class _Converted:
    """Weights with our names, and how to write and use them.

    Args:
        theirs: The weights as published.
        ours: The same with our names.
        sources: The published names of which each of ours is made.
        save: Writes the file.
        call: The Python call that loads it.
        verify: Prints what the model makes of an image.
    """

    theirs: State
    ours: State
    sources: Mapping[str, list[str]]
    save: Callable[[], None]
    call: str
    verify: Callable[[Any, Any], None]


def convert(words: Sequence[str]) -> int:
    """Convert an official checkpoint; `words` follow `vision-ssm convert`."""
    options = parse_options(ConvertOptions, words, "convert")
    if options.out.suffix != ".safetensors":
        raise InputError(f"the output must end in .safetensors, got {options.out.name}")
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out} exists; --overwrite replaces it")
    if not options.out.parent.is_dir():
        raise InputError(f"no such folder: {options.out.parent}")
    if not options.source.is_file():
        raise InputError(f"no such checkpoint file: {options.source}")
    if "num_classes" in options.model_args:
        raise InputError("--model-args takes no num_classes: the number of classes comes from the file")
    whole = options.task != "classify"
    if options.backbone and whole:
        both = f"--backbone and --task {options.task}"
        raise InputError(f"{both} exclude each other: one takes the backbone, the other the whole")
    if options.class_map is not None and not whole:
        raise InputError("--class-map is for detectors and segmenters: give --task detect or --task segment too")
    from rich.console import Console

    from vision_ssm.checkpoints import read_checkpoint
    from vision_ssm.data import open_image

    _create(options.model, 1000, **{**options.model_args, "device": "meta"})  # refuses unknown models and arguments
    image = None if options.verify is None else open_image(options.verify)
    checkpoint = read_checkpoint(options.source, ema=options.ema)
    if options.ema and not checkpoint.averaged:
        raise InputError(f"{options.source} keeps no averaged weights apart; leave --ema out")
    made = (_whole if whole else _model)(options, checkpoint)
    if broken := [name for name, tensor in made.theirs.items() if not tensor.isfinite().all()]:
        problem = f"{len(broken)} tensors hold numbers that are not finite: {shorten(broken)}"
        if image is not None:
            raise InputError(f"{options.source}: {problem}; there is nothing to verify an image with")
        sys.stderr.write(f"vision-ssm: warning: {problem}\n")
    made.save()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _report(options, checkpoint, made, console)
    console.print(f"wrote {options.out}; nothing of {options.model} is missing. To load it:\n  {made.call}")
    if image is not None:
        console.print(f"\n{options.verify}, as {options.model} sees it:")
        made.verify(image, console)
    return 0


def _model(options: ConvertOptions, checkpoint: Any) -> _Converted:
    """Convert a model, or with `--backbone` that of a detector or segmenter."""
    import safetensors.torch

    from vision_ssm.checkpoints import convert_official, detector_of, take_backbone, trace_official
    from vision_ssm.engine.files import atomic_write

    theirs, others = take_backbone(checkpoint.state)
    if others and not options.backbone:
        kind = detector_of(checkpoint.state)
        raise InputError(
            f"{options.source} is of a whole {kind or 'detector or segmenter'}: {len(theirs)} tensors of a backbone "
            f"and {_listed(others)}; {f'--task {_task_of(kind)} takes all, ' if kind else ''}--backbone takes the "
            "backbone alone"
        )
    if options.backbone and not others and "backbone." not in checkpoint.prefix:
        raise InputError(f"{options.source} has no names that begin with backbone.; leave --backbone out")
    ours = convert_official(options.model, theirs)
    try:
        args = _fit(options, options.model, options.model_args, ours)
    except InputError as error:
        raise _explain(options, theirs, error) from None
    if options.verify is not None and not args["num_classes"]:
        raise InputError(f"{options.source} holds no classifier; there is nothing to verify an image with")

    def save() -> None:
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
        metadata = {"model": options.model, "source": options.source.name, "format": "pt"}
        with atomic_write(options.out) as file:
            file.write(safetensors.torch.save(tensors, metadata))

    sources = trace_official(options.model, theirs)
    verify = functools.partial(_classify, options, args, ours)
    return _Converted(theirs, ours, sources, save, _call(options, args), verify)


def _task_of(kind: str) -> str:
    return "segment" if kind == "upernet" else "detect"


def _whole(options: ConvertOptions, checkpoint: Any) -> _Converted:
    """Convert a whole detector or segmenter."""
    import torch

    import vision_ssm
    from vision_ssm.checkpoints import (
        CheckpointError,
        check_fit,
        convert_detector,
        detector_of,
        take_backbone,
        trace_detector,
    )
    from vision_ssm.detectors import create_detector, create_segmenter
    from vision_ssm.engine.weights import save_weights
    from vision_ssm.tasks import TASKS, task_type

    theirs = checkpoint.state
    what = {"detect": "detector", "segment": "segmenter"}[options.task]
    if (kind := detector_of(theirs)) is None:
        raise InputError(
            f"{options.source} holds no {what}, as no weights of its heads are there; leave --task {options.task} out"
        )
    if _task_of(kind) != options.task:
        raise InputError(f"{options.source} holds no {what}, but {kind}; use --task {_task_of(kind)}")
    ours = convert_detector(options.model, theirs)
    create: Any = create_segmenter if kind == "upernet" else create_detector
    head = {"retinanet": "head.classification_head.cls_logits", "upernet": "decode_head.classifier"}.get(kind)
    outputs = len(ours.get(f"{head or 'bbox_pred'}.bias", ()))
    classes = _class_names(options, max(1, outputs // {"retinanet": 9, "upernet": 1}.get(kind, 4)))
    try:
        with torch.device("meta"), torch.no_grad():
            check_fit(create(kind, options.model, options.model_args, len(classes)), ours)
    except CheckpointError as error:
        if not any(key.startswith("backbone.") for keys in error.keys.values() for key in keys):
            raise
        raise _explain(options, take_backbone(theirs)[0], error) from None
    names, numbers = tuple(classes.values()), tuple(classes)
    common: dict[str, Any] = dict(model=options.model, model_args=options.model_args, classes=names)
    if kind == "upernet":
        common |= dict(decoder=kind, labels=numbers, ignored=(255,) if 0 in classes else (0,))
        if options.model.startswith("sparx"):  # as it was tested
            common["size_multiple"] = 32
    else:
        common |= dict(detector=kind, category_ids=numbers)
    task = next(name for name in TASKS if name.startswith(options.task))
    spec = task_type(task).Spec(**common)

    def verify(image: Any, console: Any) -> None:
        model = vision_ssm.load(options.out)
        lines = model.as_csv([model.predict([image])[0].row()])
        columns = [name for name in model.csv_columns if name != "image"]
        table = make_table(columns[0], *(f">{name}" for name in columns[1:]))
        for line in lines:
            shown = (line[name] for name in columns)
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in shown))
        console.print(table if lines else "nothing")

    save = functools.partial(save_weights, options.out, ours, task, spec)
    sources, call = trace_detector(options.model, theirs), f"vision_ssm.load({str(options.out)!r})"
    return _Converted(theirs, ours, sources, save, call, verify)


def _class_names(options: ConvertOptions, count: int) -> dict[int, str]:
    """Return the names of the classes by their numbers in files."""
    from importlib.resources import files

    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    if options.class_map is not None:
        if not options.class_map.is_file():
            raise InputError(f"no such file of class names: {options.class_map}")
        names = list(filter(None, map(str.strip, options.class_map.read_text("utf-8").splitlines())))
        if len(names) != count:
            raise InputError(f"{options.class_map} names {len(names)} classes, {options.source} is of {count}")
        return dict(enumerate(names))
    if options.task == "segment":
        ade20k = files("vision_ssm.checkpoints").joinpath("ade20k.txt").read_text("utf-8").splitlines()
        return dict(enumerate(ade20k, start=1)) if count == len(ade20k) else {i: str(i) for i in range(count)}
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    known = {i: name for i, name in enumerate(coco) if name not in ("__background__", "N/A")}
    return known if count == len(known) else {i: str(i) for i in range(count)}


def _fit(options: ConvertOptions, name: str, model_args: Mapping[str, Any], ours: State) -> dict[str, Any]:
    """Return the arguments of the model that has such tensors; an `InputError` if it needs others."""
    import timm

    from vision_ssm.checkpoints import check_fit, classifier_names, options_of

    heads = classifier_names(timm.get_pretrained_cfg(name).classifier)
    weights = [ours[f"{head}.weight"] for head in heads if f"{head}.weight" in ours]
    args = {**options_of(ours), **model_args, "num_classes": next((len(w) for w in weights if w.dim()), 0)}
    if not args["num_classes"] and (options.backbone or args.get("feature_norm")):
        args["features_only"] = True
    check_fit(_create(name, **{**args, "device": "meta"}), ours)
    return args


def _create(name: str, /, num_classes: int, **args: Any) -> Any:
    from vision_ssm.models.create import create_model

    model = create_model(name, args, num_classes)
    return model.model if args.get("features_only") else model  # timm's wrapper holds the pruned model


def _explain(options: ConvertOptions, theirs: State, error: InputError) -> InputError:
    """Return what to do about tensors that do not fit, or which model they fit, those of the same family first."""
    from vision_ssm.checkpoints import CheckpointError, convert_official, same_family
    from vision_ssm.models.registry import registered_models

    missing = error.keys["missing"] if isinstance(error, CheckpointError) else []
    if missing and all(key.startswith("head.fc_dist.") for key in missing):
        return InputError(
            f"{options.source} lacks the second classifier, {', '.join(missing)}; "
            "--model-args distilled=False makes a model without one"
        )
    others = (name for name in registered_models() if name != options.model)  # whose backbone may fit without the heads
    for name in sorted(others, key=lambda name: not same_family(name, options.model)):
        with contextlib.suppress(InputError):
            ours = convert_official(name, theirs)
            if all(key.startswith(_PARTS) for key in ours):  # spares building the others
                _fit(options, name, options.model_args if same_family(name, options.model) else {}, ours)
                return InputError(f"{options.source} is no {options.model}; it fits {name}")
    return error


def _report(options: ConvertOptions, checkpoint: Any, made: _Converted, console: Any) -> None:
    """Print which tensors were read, and where they went."""
    from vision_ssm.checkpoints import take_backbone

    where = f" under {checkpoint.source!r}" if checkpoint.source else ""
    prefix = f", all names without {checkpoint.prefix!r}" if checkpoint.prefix else ""
    console.print(f"{len(checkpoint.state)} tensors in {options.source}{where}{prefix}")
    if checkpoint.other is not None:
        kind, way = ("plain", "leaving --ema out") if options.ema else ("averaged", "--ema")
        console.print(f"the file also holds {kind} weights under {checkpoint.other!r}; {way} takes those")
    if options.backbone and (left_out := take_backbone(checkpoint.state)[1]):
        console.print(f"left out, not of the backbone: {_listed(left_out)}")
    rows: dict[tuple[str, str], tuple[set[str], list[int]]] = {}  # in the file's order, as are our tensors
    for name, tensor in made.ours.items():
        pair = " + ".join(dict.fromkeys(map(_group, made.sources[name]))), _group(name)
        names, numbers = rows.setdefault(pair, (set(), []))
        names.update(made.sources[name])
        numbers.append(tensor.numel())
    table = make_table("published", ">tensors", "goes to", ">tensors", ">numbers")
    for (published, goes_to), (names, numbers) in rows.items():
        table.add_row(published, str(len(names)), goes_to, str(len(numbers)), f"{sum(numbers):,}")
    unused = made.theirs.keys() - {key for keys in made.sources.values() for key in keys}
    for group, count in sorted(Counter(map(_group, unused)).items()):
        table.add_row(group, str(count), "not needed", "-", "-")
    console.print(table)
    if code := ", ".join(checkpoint.placeholders):
        console.print(f"the file also names code, none of which was run or loaded: {code}")


def _group(name: str) -> str:
    """Return the part of the model that a name belongs to: stem, stages.0, block1, backbone.stem."""
    if name.startswith("backbone."):
        return f"backbone.{_group(name.removeprefix('backbone.').removeprefix('model.'))}"
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if len(rest) > 2 and rest[0].isdigit() and not first[-1].isdigit() else first


def _listed(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())} besides ({', '.join(f'{name} {count}' for name, count in counts.items())})"


def _call(options: ConvertOptions, args: Mapping[str, Any]) -> str:
    """Return the Python call that makes the model from the written file."""
    words = {key: value for key, value in args.items() if (key, value) != ("num_classes", 1000)}
    if args.get("features_only"):  # timm passes checkpoint_path= to its wrapper, whose names differ
        del words["num_classes"]
        words |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(options.out)}}
    else:
        words |= {"checkpoint_path": str(options.out)}
    return f"timm.create_model({', '.join([repr(options.model), *(f'{k}={v!r}' for k, v in words.items())])})"


def _classify(options: ConvertOptions, args: Mapping[str, Any], ours: State, image: Any, console: Any) -> None:
    """Print the likeliest classes of an image."""
    import torch
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    model = _create(options.model, **args).eval()
    model.load_state_dict(ours)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        probabilities = model(transform(image)[None])[0].softmax(dim=0)
    best = probabilities.topk(min(5, len(probabilities)))
    names = ImageNetInfo() if len(probabilities) == 1000 else None
    table = make_table(">", ">probability", ">index", "class")
    for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
        table.add_row(f"{rank}.", f"{value:.1%}", str(index), names.index_to_description(index) if names else "-")
    console.print(table)
