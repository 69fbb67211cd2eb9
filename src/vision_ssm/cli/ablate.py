import dataclasses
import inspect
import json
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import UseAppendAction

from vision_ssm import recipes
from vision_ssm.cli import INTERRUPTED, fail
from vision_ssm.cli.options import read_literal, split_values
from vision_ssm.cli.train import absolute, parse_config
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config, limited

if TYPE_CHECKING:
    from vision_ssm.analysis.ablation import Ablation, Variant

_USAGE = """usage: vision-ssm ablate RECIPE --over NAME=VALUE,... [--over NAME=VALUE,...] [--seeds 5] [OPTIONS]
       vision-ssm ablate RECIPE --variant "TITLE: NAME=VALUE,..." --variant "TITLE: ..." [--seeds 5] [OPTIONS]

Trains every combination of values of model arguments or options, or variants named one by one, with several seeds,
and compares them.
`vision-ssm recipes` lists the recipes, `vision-ssm ablate RECIPE --help` all options, which are those of train too.
"""


@dataclass(frozen=True, kw_only=True)
class AblationOptions(Config):
    """What to compare."""

    over: UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE,...")]] = ()
    """A model argument or an option, and its values, such as windows=1,2,none or "steps=(1,1,2,1),(1,1,3,1)"; several
    of these give all combinations. A name of both the model and the options, such as SparX's steps, is the model's."""
    variant: UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar='"TITLE: NAME=VALUE,..."')]] = ()
    """Instead of --over: one variant with any number of values, such as "deeper: depths=(1,1,4,1), lr=1e-3"; with none,
    "as it is:" alone."""
    seeds: int = limited(3, least=1)
    """How often each is trained, with seeds from --seed on."""
    measure_only: bool = False
    """Train nothing: count parameters and multiply-accumulates, and measure the time."""
    seconds: float = limited(1.0, above=0)
    """Measure the time of each for at least this long."""
    out: Path | None = None
    """Folder of the runs, ablation.csv and ablation.png; by default runs/ablation-RECIPE. Finished runs
    there are kept, and stopped ones continue."""
    json: bool = False
    """Print JSON instead of a table."""


def ablate(words: Sequence[str]) -> int:
    """Compare variants; `words` follow `vision-ssm ablate`."""
    if not words or words[0].startswith("-"):
        wants_help = words[:1] in (["-h"], ["--help"])
        (sys.stdout if wants_help else sys.stderr).write(_USAGE)
        return 0 if wants_help else 2
    recipe = recipes.find(words[0])
    text = f"Compare variants of the recipe {recipe.name}: {recipe.text}."
    config, options = parse_config(words[1:], f"ablate {recipe.name}", recipe(), AblationOptions(), text)
    if bool(options.variant) == bool(options.over):
        example = '--over lr=1e-3,2e-3 or --variant "deeper: depths=(1,1,4,1)"'
        raise InputError(f"name what to compare with either --over or --variant, such as {example}")
    if config.processes > 1:
        raise InputError("ablate trains in one process; leave out --devices and --num-nodes")

    from vision_ssm.analysis.ablation import Ablation, grid
    from vision_ssm.analysis.ablation import ablate as train_all
    from vision_ssm.engine.files import write_csv
    from vision_ssm.tasks import train

    console = make_console(stderr=options.json)
    out = options.out or Path("runs") / f"ablation-{recipe.name}"
    config = absolute(config)
    combinations = _read_variants(options.variant) if options.variant else grid(_read_over(options.over))
    configs = {name: change(config, values) for name, values in combinations.items()}
    seeds = range(config.seed, config.seed + options.seeds)

    def prepare(name: str, seed: int) -> tuple[RunFolder, Any]:
        return RunFolder(out / f"{_stem(name)}-seed{seed}"), replace(configs[name], seed=seed)

    for name in () if options.measure_only else configs:
        for folder, each in (prepare(name, seed) for seed in seeds):
            if folder.state.is_file():
                folder.check_resumable(each)
            else:
                folder.check_free(overwrite=False)
    with console.status("measuring the variants"):
        metric, variants = _measure(configs, combinations, options.seconds, weights=not options.measure_only)
    out.mkdir(parents=True, exist_ok=True)

    def train_one(variant: "Variant", seed: int) -> tuple[float, float]:
        folder, each = prepare(variant.name, seed)
        if not folder.results.is_file():
            about = {"recipe": recipe.name, "command": shlex.join(["vision-ssm", *sys.argv[1:]])}
            train(each, folder, resume=folder.state.is_file(), about=about)
        speed = statistics.median(row["images_per_second"] for row in folder.read_metrics())
        return float(json.loads(folder.results.read_text())[metric]), speed

    def report(so_far: "Ablation") -> None:
        write_csv(out / "ablation.csv", so_far.rows())
        run, total = so_far.runs[-1], len(variants) * len(seeds)
        said = f"failed: {run.error}" if run.value is None else f"{metric.replace('_', ' ')} {run.value:.1%}"
        console.out(f"{len(so_far.runs)}/{total} {run.variant} seed {run.seed}: {said}", highlight=False)

    result = Ablation(metric, variants)
    if not options.measure_only:
        from vision_ssm.engine.recorder import Stopped  # Lightning takes seconds

        try:
            result = train_all(variants, seeds, train_one, metric=metric, on_run=report)
        except Stopped:
            sys.stderr.write("\nStopped. The same command continues.\n")
            return INTERRUPTED
    files = result.save(out / "ablation")
    if options.json:
        print_json({"variants": result.summary(), "runs": result.rows(), "files": [*map(str, files)]})
    else:
        _show(result, console)
        console.out("\n".join(map(str, files)), highlight=False)
    failed = [run for run in result.runs if run.value is None]
    return fail(f"{len(failed)} of {len(result.runs)} runs failed; {files[1]} says why") if failed else 0


def _stem(name: str) -> str:
    return re.sub(r"[^\w=.,()+-]+", "_", name)


def _read_over(words: Sequence[str]) -> dict[str, list[Any]]:
    over: dict[str, list[Any]] = {}
    for word in words:
        name, values = _read_setting(word, over, f"--over {word}")
        over[name] = values
    return over


def _read_variants(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {}
    for word in words:
        title, colon, settings = word.partition(":")
        if not (title := title.strip()) or not colon or _stem(title) in map(_stem, variants):
            raise InputError(f'--variant {word}: expected "TITLE: NAME=VALUE,...", each title once')
        variants[title] = {}
        for setting in split_values(settings) if settings.strip() else ():
            name, values = _read_setting(setting.strip(), variants[title], f"--variant {word}")
            variants[title][name] = values[0]
    return variants


def _read_setting(text: str, known: Mapping[str, Any], where: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not (name and equals) or name in known or name == "seed":
        problem = "seeds come from --seeds" if name == "seed" else "expected NAME=VALUE,..., each name once"
        raise InputError(f"{where}: {problem}")
    try:
        return name, [read_literal(value.strip(), text) for value in split_values(values)]
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def change(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration with other values of options and, by their names, of arguments of its model.

    Options of the model and its input come first, then arguments that the model's class has, then other options.

    Raises:
        InputError: An option does not take its value.
    """
    from vision_ssm.models.create import model_class

    first = {item.name for item in dataclasses.fields(config.groups[0])}
    options = {item.name for item in dataclasses.fields(config)}
    known = recipes.to_dict(config)
    try:
        config = recipes.from_dict(type(config), known | {k: v for k, v in values.items() if k in first})
        taken = inspect.signature(model_class(config.model)).parameters
        args = {k: v for k, v in values.items() if k not in first and (k in taken or k not in options)}
        rest = {k: v for k, v in values.items() if k not in first and k not in args}
        config = recipes.from_dict(type(config), recipes.to_dict(config) | rest)
        return replace(config, model_args={**config.model_args, **args})
    except TypeError as error:
        raise InputError(str(error)) from None


def _measure(
    configs: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]], seconds: float, *, weights: bool
) -> tuple[str, tuple["Variant", ...]]:
    """Make all models, with the weights that their training starts from or not; return metric, and costs of each.

    Raises:
        InputError: A model cannot be made, or does not take the images; names the variant.
    """
    import numpy as np

    from vision_ssm.analysis import complexity
    from vision_ssm.analysis.ablation import Variant
    from vision_ssm.analysis.resolution import measure_task
    from vision_ssm.analysis.speed import FAILURES, reason
    from vision_ssm.data import ImageDataset, Splits
    from vision_ssm.engine.devices import find_device
    from vision_ssm.engine.task import as_dataset
    from vision_ssm.tasks import task_type

    variants, metric = [], ""
    known: dict[str, tuple[int, int, float]] = {}  # networks that differ in training alone are timed once
    for name, config in configs.items():
        kind = task_type(config.task)
        try:
            if config.data or weights or config.task != "classification":
                splits = kind.load_data(config)
            else:  # nothing is trained, and only the number of classes matters
                classes = tuple(map(str, range(config.num_classes or 1000)))
                images = ImageDataset(lambda number: Path(), (), {"label": np.zeros(0, np.int64)}, classes)
                splits = Splits(images, images)
            task = kind.from_config(config, splits, resume=not weights)
            task.ready(find_device(config.device), config.precision, optimized=False)
            height, width = task.spec.input_size
            if (network := repr(task.spec)) not in known:
                cost = complexity(task.model, (3, height, width))
                speed = measure_task(task, as_dataset(np.zeros((height, width, 3), np.uint8)), seconds=seconds)
                known[network] = cost.parameters, cost.macs, speed.milliseconds
        except InputError as error:
            raise InputError(f"{name}: {error.line}") from None
        except FAILURES as error:
            raise InputError(f"{name}: {reason(error)}") from error
        metric = metric or task.monitor
        variants.append(Variant(name, values[name], *known[network]))
    return metric, tuple(variants)


def _show(result: "Ablation", console: Any) -> None:
    name = result.metric
    lines = result.summary()
    heads = ["variant", ">parameters", ">MACs", ">ms per image"]
    if result.runs:
        heads += [">images/s, training", ">seeds", f">{name.replace('_', ' ')}", ">difference to the first"]
    table = make_table(*heads)
    for line in lines:
        cells = [line["variant"], f"{line['parameters'] / 1e6:.3f} M", f"{line['macs'] / 1e6:,.1f} M"]
        cells += [f"{line['milliseconds']:.2f}"]
        if result.runs:
            speed = line["images_per_second"]
            cells += [f"{speed:.0f}" if speed else "-", str(line["seeds"])]
            cells += [_percent(line[name], line["standard_error"])]
            cells += [_percent(line["difference"], line["difference_error"], "+")]
        table.add_row(*cells)
    console.print(table)
    if result.runs:
        console.out("± standard error; differences in points, between runs of the same seed", highlight=False)


def _percent(value: float | None, error: float | None, sign: str = "") -> str:
    shown = "-" if value is None else f"{100 * value:{sign}.2f}"
    return shown if error is None else f"{shown} ± {100 * error:.2f}"
