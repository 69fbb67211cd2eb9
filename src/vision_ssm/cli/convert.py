import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.output import make_table
from vision_ssm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vision_ssm.checkpoints import Checkpoint

State = dict[str, "Tensor"]
_PARTS = ("stem.", "stages.", "norm.", "head.", "feature_norms.")  # of every model that has a conversion


@dataclass(frozen=True)
class ConvertOptions:
    """Turn an official checkpoint into safetensors with this package's names; all keys must fit."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The official file, .pth or .safetensors; nothing in it is executed."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT.safetensors")]
    """The .safetensors file to write."""
    model: str
    """The model it belongs to, such as vmamba_tiny."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model, where the file is of none of the named variants."""
    ema: bool = False
    """Take the averaged weights where the file has both."""
    backbone: bool = False
    """Take the backbone alone from the file of a detector or segmenter."""
    verify: Annotated[Path | None, tyro.conf.arg(metavar="IMAGE")] = None
    """Classify an image with the converted weights, and print the five likeliest classes."""
    overwrite: bool = False
    """Replace the output file if it is there."""


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
    import safetensors.torch
    import torch
    from rich.console import Console

    from vision_ssm.checkpoints import convert_official
    from vision_ssm.data import open_image
    from vision_ssm.engine.files import atomic_write
    from vision_ssm.models.create import create_model

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if "num_classes" in options.model_args:
        raise InputError("--model-args takes no num_classes: the number of classes comes from the file")
    cfg: Any = create_model(options.model, {**options.model_args, "device": "meta"}, 1000).pretrained_cfg
    image = None if options.verify is None else open_image(options.verify)
    checkpoint, theirs, left_out = _read(options)
    ours = convert_official(options.model, theirs)
    args = _arguments(options, ours, cfg)
    if image is not None and not args["num_classes"]:
        raise InputError(f"{options.source} holds no classifier; there is nothing to verify an image with")
    _check(options, args, theirs, ours)
    broken = [name for name, tensor in theirs.items() if not tensor.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        problem = f"{len(broken)} tensors hold numbers that are not finite: {', '.join(broken[:8])}{more}"
        if image is not None:
            raise InputError(f"{options.source}: {problem}; there is nothing to verify an image with")
        sys.stderr.write(f"vision-ssm: warning: {problem}\n")
    # Cloned, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in ours.items()}
    metadata = {"model": options.model, "source": options.source.name, "format": "pt"}
    with atomic_write(options.out) as file:
        file.write(safetensors.torch.save(tensors, metadata))
    _report(options, checkpoint, theirs, left_out, ours, console)
    console.print(
        f"wrote {options.out}; nothing of {options.model} is missing. To load it:\n  {_call(options, args, cfg)}"
    )
    if image is not None:
        _verify(options, args, ours, image, console)
    return 0


def _read(options: ConvertOptions) -> tuple["Checkpoint", State, dict[str, int]]:
    """Return the file, the tensors to convert, and how many it has besides by the first part of their names."""
    from vision_ssm.checkpoints import read_checkpoint, take_backbone

    checkpoint = read_checkpoint(options.source, ema=options.ema)
    if options.ema and not checkpoint.averaged:
        raise InputError(f"{options.source} keeps no averaged weights apart; leave --ema out")
    taken, others = take_backbone(checkpoint.state)
    if others and not options.backbone:
        raise InputError(
            f"{options.source} is of a whole detector or segmenter: {len(taken)} tensors of a backbone and "
            f"{_listed(others)}; --backbone takes the backbone alone"
        )
    if options.backbone and not others and "backbone." not in checkpoint.prefix:
        raise InputError(f"{options.source} has no names that begin with backbone.; leave --backbone out")
    return checkpoint, taken, others


def _arguments(options: ConvertOptions, ours: State, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the model that has such tensors."""
    from vision_ssm.checkpoints import classifier_names, options_of

    weights = [ours.get(f"{name}.weight") for name in classifier_names(cfg["classifier"])]
    classes = next((weight.shape[0] for weight in weights if weight is not None and weight.dim()), 0)
    args = {**options_of(ours), **options.model_args, "num_classes": classes}
    if not classes and (options.backbone or args.get("feature_norm")):
        args["features_only"] = True
    return args


def _create(name: str, args: Mapping[str, Any], **more: Any) -> "nn.Module":
    from vision_ssm.models.create import create_model

    others = {key: value for key, value in args.items() if key != "num_classes"}
    model: Any = create_model(name, {**others, **more}, args["num_classes"])
    return model.model if args.get("features_only") else model  # timm's wrapper holds the pruned model


def _check(options: ConvertOptions, args: Mapping[str, Any], theirs: State, ours: State) -> None:
    """Check that the tensors are those of the model; tell of which other one they are."""
    from vision_ssm.checkpoints import CheckpointError, check_fit

    try:
        check_fit(_create(options.model, args, device="meta"), ours)
    except InputError as error:
        missing = error.keys["missing"] if isinstance(error, CheckpointError) else []
        if missing and all(key.startswith("head.fc_dist.") for key in missing):
            raise InputError(
                f"{options.source} lacks the second classifier, {', '.join(missing)}; "
                "--model-args distilled=False makes a model without one"
            ) from None
        if (name := _find_fitting(options, theirs)) is not None:
            raise InputError(f"{options.source} is no {options.model}; it fits {name}") from None
        raise error


def _find_fitting(options: ConvertOptions, theirs: State) -> str | None:
    """Return the first model that a file fits, those of the same family first."""
    import timm

    from vision_ssm.checkpoints import can_convert, check_fit, convert_official, same_family
    from vision_ssm.models.registry import registered_models

    names = [name for name in registered_models() if name != options.model and can_convert(name)]
    for name in sorted(names, key=lambda name: not same_family(name, options.model)):
        others = options if same_family(name, options.model) else replace(options, model_args={})
        try:
            ours = convert_official(name, theirs)
            if not all(key.startswith(_PARTS) for key in ours):
                continue  # spares building the model
            args = _arguments(others, ours, timm.get_pretrained_cfg(name).to_dict())
            check_fit(_create(name, args, device="meta"), ours)
        except InputError:
            continue
        return name
    return None


def _report(
    options: ConvertOptions,
    checkpoint: "Checkpoint",
    theirs: State,
    left_out: Mapping[str, int],
    ours: State,
    console: Any,
) -> None:
    """Print which tensors were read, and where they went."""
    from vision_ssm.checkpoints import trace_official

    where = f" under {checkpoint.source!r}" if checkpoint.source else ""
    prefix = f", all names without {checkpoint.prefix!r}" if checkpoint.prefix else ""
    console.print(f"{len(checkpoint.state)} tensors in {options.source}{where}{prefix}")
    if checkpoint.other is not None:
        kind, way = ("plain", "leaving --ema out") if options.ema else ("averaged", "--ema")
        console.print(f"the file also holds {kind} weights under {checkpoint.other!r}; {way} takes those")
    if left_out:
        console.print(f"left out, not of the backbone: {_listed(left_out)}")
    sources = trace_official(options.model, theirs)
    place = {name: i for i, name in enumerate(theirs)}
    published: dict[tuple[str, str], set[str]] = {}
    numbers: dict[tuple[str, str], list[int]] = {}
    for name, tensor in ours.items():
        pair = " + ".join(dict.fromkeys(map(_group, sources[name]))), _group(name)
        published.setdefault(pair, set()).update(sources[name])
        numbers.setdefault(pair, []).append(tensor.numel())
    table = make_table("published", ">tensors", "goes to", ">tensors", ">numbers")
    for pair, names in sorted(published.items(), key=lambda each: min((place[name] for name in each[1]), default=0)):
        table.add_row(pair[0], str(len(names)), pair[1], str(len(numbers[pair])), f"{sum(numbers[pair]):,}")
    unused = Counter(_group(name) for name in theirs.keys() - {key for keys in sources.values() for key in keys})
    for group, count in sorted(unused.items()):
        table.add_row(group, str(count), "not needed", "-", "-")
    console.print(table)
    if checkpoint.placeholders:
        console.print(
            f"the file also names code, none of which was run or loaded: {', '.join(checkpoint.placeholders)}"
        )


def _group(name: str) -> str:
    """Return the part of the model that a name belongs to: stem, stages.0, block1."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if len(rest) > 2 and rest[0].isdigit() and not first[-1].isdigit() else first


def _listed(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())} besides ({', '.join(f'{name} {count}' for name, count in counts.items())})"


def _call(options: ConvertOptions, args: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    """Return the Python call that makes the model from the written file."""
    words = {key: value for key, value in args.items() if key != "num_classes" or value != cfg["num_classes"]}
    if args.get("features_only"):
        # timm hands checkpoint_path= to its wrapper, whose names are others
        words |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(options.out)}}
        del words["num_classes"]
    else:
        words |= {"checkpoint_path": str(options.out)}
    return f"timm.create_model({', '.join([repr(options.model), *(f'{k}={v!r}' for k, v in words.items())])})"


def _verify(options: ConvertOptions, args: Mapping[str, Any], ours: State, image: Any, console: Any) -> None:
    """Print the likeliest classes of an image."""
    import torch
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    from vision_ssm.checkpoints import load_strict

    model = _create(options.model, args).eval()
    load_strict(model, ours)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        probabilities = model(transform(image)[None])[0].softmax(dim=0)
    best = probabilities.topk(min(5, len(probabilities)))
    names = ImageNetInfo() if len(probabilities) == 1000 else None
    table = make_table(">", ">probability", ">index", "class")
    for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
        table.add_row(f"{rank}.", f"{value:.1%}", str(index), names.index_to_description(index) if names else "-")
    console.print(f"\n{options.verify}, as {options.model} sees it:", table, sep="\n")
