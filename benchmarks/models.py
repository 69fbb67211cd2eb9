"""Speed and memory of models on a CPU beside their peers, in one run.

python benchmarks/models.py --csv inference.csv
python benchmarks/models.py --training --csv training.csv
python benchmarks/models.py --set tiny --size 224 512
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import timm
import torch
from kinds import time_by_kind
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vision_ssm
from vision_ssm.analysis import scan_backend
from vision_ssm.models.registry import registered_models

SWIN = "swin_tiny_patch4_window7_224"
# Patterns of this package's names, and timm's names of their peers. Swin-T is what all are compared to.
SETS = {
    "vmamba": (["vmamba_tiny"], [SWIN, "convnext_tiny"]),
    "tiny": (["*_tiny"], [SWIN, "convnext_tiny", "resnet50", "vit_small_patch16_224"]),
    "light": (["efficient_vmamba_tiny", "efficient_vmamba_small"], [SWIN, "mobilevitv2_100", "efficientvit_b1"]),
}
Setting = tuple[int, str, int]  # size, dtype, batch
PLAIN, CHECKPOINTING, OPTIMIZED, COMPILED, ONNX = "plain", "checkpointing", "optimized", "compiled", "onnx"


def names_of(name: str, quick: bool) -> list[str]:
    """Return the models of a set that are there; with ``quick`` the smallest of their families."""
    patterns, peers = SETS[name]
    ours = [model for pattern in patterns for model in fnmatch.filter(registered_models(), pattern)]
    if not quick:
        return [*ours, *peers]
    attos = dict.fromkeys(f"{model.rsplit('_', 1)[0]}_atto" for model in ours)
    return [*(model for model in attos if timm.is_model(model)), "convnext_atto"]


def build(name: str, size: int, dtype: str) -> nn.Module:
    """Create a model for images of one size."""
    cfg = timm.get_pretrained_cfg(name)
    other_size = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != size
    torch.manual_seed(0)
    return timm.create_model(name, **({"img_size": size} if other_size else {})).to(common.DTYPES[dtype])


def build_all(parser: common.Parser, options: argparse.Namespace) -> dict[tuple[int, str], dict[str, nn.Module]]:
    """Create all models for every size and dtype and try them; stop before anything is measured if one fails."""
    built: dict[tuple[int, str], dict[str, nn.Module]] = defaultdict(dict)
    for size, dtype, name in itertools.product(options.size, options.dtype, options.models):
        try:
            built[size, dtype][name] = build(name, size, dtype).eval()
            inference_step(built[size, dtype][name], random_images((size, dtype, 1)))
        except (RuntimeError, ValueError, AssertionError) as error:
            parser.error(f"{name} cannot take {dtype} images of {size}x{size}: {str(error).splitlines()[0]}")
    return built


def inference_step(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Classify without gradients."""
    with torch.inference_mode():
        return model(images)


def training_step(model: nn.Module, images: torch.Tensor, form: str, forward: Callable[..., torch.Tensor]) -> None:
    """Forward and backward; leaves the gradients behind, as before an optimizer's step."""
    model.set_grad_checkpointing(form == CHECKPOINTING)  # type: ignore[operator]
    model.zero_grad(set_to_none=True)
    forward(images).float().square().mean().backward()


def forms_of(model: nn.Module, dtype: str, options: argparse.Namespace) -> list[str]:
    """Return in which forms a model is measured."""
    compiled = [COMPILED] if options.compile else []
    if options.training:
        return [PLAIN, *([CHECKPOINTING] if can_checkpoint(model) else []), *compiled]
    in_runtime = options.onnx and dtype == "float32" and not is_ours(model)
    return [PLAIN, OPTIMIZED, *compiled, *([ONNX] if in_runtime else [])]


def make_step(model: nn.Module, images: torch.Tensor, training: bool, form: str = PLAIN) -> Callable[[], Any]:
    """Return what is measured."""
    model.train(training)
    forward: Any = model
    if form == COMPILED:
        torch.compiler.reset()
        # Frozen parameters are packed for oneDNN, as in the optimized copy.
        forward = torch.compile(model, options={"freezing": not training})
    if training:
        return partial(training_step, model, images, form, forward)
    if form == OPTIMIZED:
        forward = vision_ssm.optimize(model)
    elif form == ONNX:
        return onnx_step(model, images)
    return partial(inference_step, forward, images)


def onnx_step(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """Return a call of ONNX Runtime that classifies, with as many threads as torch has."""
    import onnxruntime

    program: Any = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # in the turns of the others
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return partial(session.run, None, feed)


def random_images(setting: Setting) -> torch.Tensor:
    """Draw a batch."""
    size, dtype, batch = setting
    return torch.randn(batch, 3, size, size).to(common.DTYPES[dtype])


def measure_memory(name: str, setting: Setting, training: bool, form: str, threads: int) -> float | None:
    """Measure the peak of one step in a process of its own; MiB beyond model and images."""
    return common.in_new_process(_memory_of_step, name, setting, training, form, threads)


def _memory_of_step(name: str, setting: Setting, training: bool, form: str, threads: int) -> float | None:
    torch.set_num_threads(threads)
    model, images = build(name, *setting[:2]), random_images(setting)
    step = make_step(model, images, training, form)
    step()  # loads code, fills caches of routes and packs weights
    model.zero_grad(set_to_none=True)
    return common.peak_memory(step)


def measure(models: dict[str, nn.Module], setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one step of all models in all forms in turns, and in inference matrix products among them."""
    size, dtype, batch = setting
    images = random_images(setting)
    steps = {
        (name, form): make_step(model, images, options.training, form)
        for name, model in models.items()
        for form in forms_of(model, dtype, options)
    }
    gmacs = {name: batch * macs_per_image(model, images) / 1e9 for name, model in models.items()}
    backends = {key: scan_backend(step) or "" for key, step in steps.items()}
    others = (
        {} if options.training else common.products(common.DTYPES[dtype], (256,) if options.quick else (1024, 2048))
    )
    timings = common.interleaved({**{str(key): step for key, step in steps.items()}, **others}, options.seconds)
    first = reference(models)
    rows: list[dict[str, Any]] = []
    for name, form in steps:
        timing = timings[str((name, form))]
        base, alike = (_seconds(timings.get(str((first, same))), options) for same in (PLAIN, form))
        seconds = _seconds(timing, options)
        row = dict(
            model=name,
            form=form,
            size=size,
            dtype=dtype,
            batch=batch,
            milliseconds=timing.median * 1e3,
            best_milliseconds=timing.best * 1e3,
            images_per_second=batch / timing.median,
            gmacs=gmacs[name],
            calls=timing.calls,
            spread=timing.spread,
            ratio=seconds / base,
            ratio_alike=seconds / alike if alike else None,
            ratio_per_mac=seconds / alike * gmacs[first] / gmacs[name] if alike else None,
            backend=backends[name, form],
        )
        if options.training:
            row = dict(table="training", **row)
        else:
            rate = common.product_rate(timings) / 1e9
            floor = 2e3 * gmacs[name] / rate
            row = dict(table="inference", **row, product_gflops=rate)
            row |= dict(floor_milliseconds=floor, ratio_to_floor=timing.median * 1e3 / floor)
        rows.append(row)
    if not options.no_memory:
        add_memory(rows, options.training, options.threads)
    return rows


def _seconds(timing: common.Timing | None, options: argparse.Namespace) -> Any:
    """Return what ratios are of: medians, and of training, whose steps are few, the best."""
    return timing and (timing.best if options.training else timing.median)


def add_memory(rows: list[dict[str, Any]], training: bool, threads: int) -> None:
    """Measure the peak memory of every row, and its ratio to that of the reference."""
    for row in rows:
        setting = row["size"], row["dtype"], row["batch"]
        row["peak_mib"] = measure_memory(row["model"], setting, training, row["form"], threads)
    first = reference({row["model"]: None for row in rows})
    of_first = {row["form"]: row["peak_mib"] for row in rows if row["model"] == first}
    for row in rows:
        base = of_first.get(row["form"])
        row["memory_ratio"] = row["peak_mib"] / base if row["peak_mib"] is not None and base else None


def add_bfloat16_gain(rows: list[dict[str, Any]]) -> None:
    """Tell how many times as fast as in float32 every row in bfloat16 is, where both were measured."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["size"], row["batch"], row["form"]

    float32 = {key(row): row["milliseconds"] for row in rows if row["dtype"] == "float32"}
    for row in rows:
        both = row["dtype"] == "bfloat16" and key(row) in float32
        row["bfloat16_gain"] = float32[key(row)] / row["milliseconds"] if both else None


def can_checkpoint(model: nn.Module) -> bool:
    """Tell whether a model recomputes its activations on request."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError):
        return False
    return True


def is_ours(model: nn.Module) -> bool:
    """Tell whether this package made a model."""
    return type(model).__module__.startswith("vision_ssm")


def reference(models: dict[str, Any]) -> str:
    """Return the name of the model to which the others are compared: Swin-T, else the first."""
    return next((name for name in models if name.startswith("swin_tiny")), next(iter(models)))


def macs_per_image(model: nn.Module, images: torch.Tensor) -> int:
    """Count multiply-accumulates as torch does, half of its FLOPs; the scan operator has a formula there."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    model.train(training)
    return counter.get_total_flops() // 2


def measure_kinds(model: nn.Module, setting: Setting, training: bool) -> list[dict[str, Any]]:
    """Return where a step spends its time."""
    size, dtype, batch = setting
    spent = time_by_kind(make_step(model, random_images(setting), training, PLAIN if training else OPTIMIZED))
    whole = sum(spent.values())
    shared = dict(table="kinds", size=size, dtype=dtype, batch=batch)
    return [{**shared, "kind": kind, "milliseconds": ms, "share": ms / whole} for kind, ms in spent.items()]


def show_rows(rows: list[dict[str, Any]], training: bool) -> None:
    """Print the table of steps."""
    first = reference({row["model"]: None for row in rows})
    columns = [
        ("model", "{model}"),
        ("form", "{form}"),
        (">size", "{size}"),
        ("dtype", "{dtype}"),
        (">batch", "{batch}"),
    ]
    columns += [(">median", "{milliseconds:.1f}"), (">best", "{best_milliseconds:.1f}")]
    columns += [(">images/s", "{images_per_second:.1f}"), (">ratio", "{ratio:.2f}")]
    columns += [(">alike", "{ratio_alike:.2f}"), (">per MAC", "{ratio_per_mac:.2f}")]
    notes = [
        f"ratio: of the {'best time' if training else 'median'} to that of {first}, plain, in the same turns; "
        f"alike: to {first} in the same form; per MAC: that of the times per MAC. "
        f"At least {min(row['calls'] for row in rows)} calls each."
    ]
    if any(row["bfloat16_gain"] for row in rows):
        columns += [(">gain", "{bfloat16_gain:.2f}")]
        notes.append("gain: how many times as fast as in float32 (not in the same turns).")
    if not training:
        columns += [(">floor", "{floor_milliseconds:.1f}"), (">times floor", "{ratio_to_floor:.2f}")]
        best: dict[str, float] = {}
        for row in rows:
            best[row["dtype"]] = max(row["product_gflops"], best.get(row["dtype"], 0.0))
        rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in best.items())
        notes.append(f"floor: 2 x MACs at the rate of matrix products in the same turns and dtype (at best {rates}).")
    columns += [("scan", "{backend}")]
    if "peak_mib" in rows[0]:
        columns += [(">peak MiB", "{peak_mib:.0f}"), (">ratio", "{memory_ratio:.2f}")]
        notes.append("peak: memory of a step beyond model and images, in a process of its own.")
    title = "Training: ms per forward and backward pass" if training else "Inference: ms per forward pass"
    common.show(title, rows, columns, notes)


def show_kinds(rows: list[dict[str, Any]], step: str) -> None:
    """Print where the time of one model goes, one column per setting."""
    settings = list(dict.fromkeys((row["size"], row["dtype"], row["batch"]) for row in rows))
    lines: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        cell = f"{row['milliseconds']:.1f} {row['share']:4.0%}"
        lines[row["kind"]][f"s{settings.index((row['size'], row['dtype'], row['batch']))}"] = cell
    common.show(
        f"{rows[0]['model']}: where the time of a {step} goes (ms and share)",
        [{"kind": kind, **cells} for kind, cells in lines.items()],
        [("kind", "{kind}"), *((f">{s} {d} batch {b}", f"{{s{i}}}") for i, (s, d, b) in enumerate(settings))],
        [
            "Self times of torch's profiler in the fastest of several passes; the profiler itself costs time, mostly "
            "between operators.",
            "Copies that a convolution or a matrix product makes of its arguments count as copies.",
        ],
    )


def main() -> int:
    """Run the command line."""
    parser = common.Parser("Speed and memory of models on a CPU beside their peers.", seconds=5.0)
    parser.add_argument("--set", choices=SETS, default="vmamba", help="which models, and which peers beside them")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these timm names instead, ours included")
    parser.add_argument(
        "--size", nargs="+", type=common.count, default=[224], metavar="N", help="sides of images in pixels"
    )
    parser.add_argument("--batch", nargs="+", type=common.count, default=[1, 8], metavar="N", help="images at once")
    parser.add_argument(
        "--dtype", nargs="+", choices=common.DTYPES, default=list(common.DTYPES), help="dtypes of model and images"
    )
    parser.add_argument("--training", action="store_true", help="measure training steps instead of inference")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also measure them through torch.compile, for inference with freezing",
    )
    parser.add_argument("--onnx", action="store_true", help="also measure the peers in ONNX Runtime, in float32")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process for every row)")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch, options.dtype, options.seconds = [32], [2], ["float32"], 0.02
    options.models = options.models or names_of(options.set, options.quick)
    unknown = [name for name in options.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm knows no model named {', '.join(unknown)}")
    if options.onnx and (options.training or "float32" not in options.dtype):
        parser.error("--onnx is for inference in float32")
    for package in ("onnx", "onnxscript", "onnxruntime") if options.onnx else ():
        parser.need(package)
    torch.set_num_threads(options.threads)
    # Our models share one forward method, of which torch.compile makes no more than 8 versions by default.
    if options.compile:
        torch._dynamo.config.recompile_limit = max(8, len(options.models))
    common.console().print(common.machine_line())
    rows: list[dict[str, Any]] = []
    kinds: list[dict[str, Any]] = []
    built = build_all(parser, options)
    for setting in [(s, d, b) for s in options.size for d in options.dtype for b in options.batch]:
        measured = measure(built[setting[:2]], setting, options)
        rows += measured
        for row in measured:
            model = built[setting[:2]][row["model"]]
            if row["form"] == (PLAIN if options.training else OPTIMIZED):
                kinds += [{"model": row["model"], **k} for k in measure_kinds(model, setting, options.training)]
        add_bfloat16_gain(rows)
        if options.csv:
            common.write_csv(options.csv, rows + kinds)  # a later setting may fail after hours
    show_rows(rows, options.training)
    for name in dict.fromkeys(row["model"] for row in kinds):
        show_kinds(
            [row for row in kinds if row["model"] == name], "training step" if options.training else "forward pass"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
