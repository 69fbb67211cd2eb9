"""Small models trained alike on small images: every family beside a ConvNeXt and a ViT of similar size; distillation.

python benchmarks/cifar.py --data cifar10 --out runs/cifar --csv cifar.csv --picture cifar.png

`cifar10` holds `train` and `test` with one folder per class. What is finished in --out is not trained again, and what
was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vision_ssm.analysis import complexity

SIZE, BATCH = 32, 64  # of the recipe `small`
FAMILIES = (
    "vmamba_atto",
    "sparx_mamba_atto",
    "sparx_swin_atto",
    "efficient_vmamba_atto",
    "group_mamba_atto",
    "vim2_atto",
    "viqs_atto",
)
STUDENT = "group_mamba_atto"
# timm's designs, made as small as ours: the smallest that timm names are 4 to 6 times as large. For images
# this small, both strides of ConvNeXt's stem that it can have: its first maps are 8x8 and 32x32, ours 16x16.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext_stride_4": ("convnext_atto", dict(depths=(2, 2, 4, 2), dims=(20, 40, 80, 160), patch_size=2)),
    "convnext_stride_1": ("convnext_atto", dict(depths=(2, 2, 4, 2), dims=(20, 40, 80, 160), patch_size=1)),
    "vit": ("vit_tiny_patch16_224", dict(img_size=SIZE, patch_size=4, embed_dim=128, depth=4, num_heads=4)),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        model: One of ``FAMILIES`` or ``PEERS``.
        seed: Its seed.
        distilled: Whether it learns from a teacher too (GroupMamba's way: its most probable class, alpha 0.5).
    """

    model: str
    seed: int = 0
    distilled: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "-".join([self.model, *(["distilled"] if self.distilled else []), str(self.seed)])

    def command(self, data: Path, out: Path, epochs: int, teacher: Path | None) -> list[str]:
        """What a user would type."""
        timm_name, arguments = PEERS.get(self.model, (self.model, {}))
        words = ["train", "classify", "--data", str(data / "train"), "--val-data", str(data / "test")]
        words += ["--recipe", "small", "--epochs", str(epochs), "--seed", str(self.seed), "--model", timm_name]
        if arguments:
            words += ["--model-args", *(f"{name}={value}".replace(" ", "") for name, value in arguments.items())]
        if self.distilled:
            words += ["--teacher", str(teacher)]
        return [*words, "--num-workers", "0", "--device", "cpu", "--out", str(out / self.name)]


@dataclass(frozen=True)
class Sweep:
    """Where runs are and how they are made."""

    data: Path
    out: Path
    epochs: int
    jobs: int

    def train(self, runs: Iterable[Run], teacher: Run | None = None) -> None:
        """Train what is not trained yet, some runs side by side, each with one thread."""
        waiting = [run for run in runs if len(self.history(run)) < self.epochs]
        with ThreadPoolExecutor(self.jobs) as pool:
            failed = [run for run in pool.map(lambda run: self._train(run, teacher), waiting) if run]
        if failed:
            raise SystemExit("\n".join(f"{run.name} failed; see {self.out / run.name}.log" for run in failed))

    def _train(self, run: Run, teacher: Run | None) -> Run | None:
        folder = self.out / run.name
        command = run.command(self.data, self.out, self.epochs, teacher and self.out / teacher.name)
        command += ["--resume"] if (folder / "last.ckpt").is_file() else ["--overwrite"]
        common.console().print(f"vision-ssm {' '.join(command)}", soft_wrap=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.out / f"{run.name}.log", "a") as log:
            done = subprocess.run(
                [sys.executable, "-m", "vision_ssm", *command], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        return run if done.returncode else None

    def history(self, run: Run) -> list[dict[str, float]]:
        """The metrics of each epoch so far."""
        path = self.out / run.name / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    def accuracy(self, run: Run) -> float:
        """Share of the test images that the last epoch gets right."""
        return self.history(run)[-1]["val_accuracy"]


def make(name: str) -> torch.nn.Module:
    """Return an untrained model as the runs make it."""
    timm_name, arguments = PEERS.get(name, (name, {}))
    return timm.create_model(timm_name, num_classes=10, **arguments)


def training_step(name: str) -> Callable[[], None]:
    """Return a function that makes a training step of random images."""
    model = make(name).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, targets = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return step


def summary(rows: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Join the seeds of a model, the best first."""
    kinds = dict.fromkeys((row["model"], row["distilled"]) for row in rows)
    groups = [[row for row in rows if (row["model"], row["distilled"]) == kind] for kind in kinds]
    for group in sorted(groups, key=lambda group: -statistics.mean(row["accuracy"] for row in group)):
        accuracies = [row["accuracy"] for row in group]
        mean = statistics.mean(accuracies)
        top1 = f"{mean:.1%}" if len(group) == 1 else f"{mean:.1%} ± {statistics.stdev(accuracies):.1%} ({len(group)})"
        row = group[0] | dict(top1=top1, top5=statistics.mean(row["top5"] for row in group))
        minutes = row["images_per_epoch"] * row["epochs"] / row["images_per_second"] / 60
        yield row | dict(minutes=None if row["distilled"] else minutes)


def draw(sweep: Sweep, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy by epoch, and by the time that training takes."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    first = sorted((row for row in rows if not row["seed"] and not row["distilled"]), key=lambda row: -row["accuracy"])
    for index, row in enumerate(first):
        style: dict[str, Any] = dict(color=f"C{index}", marker="s" if row["model"] in PEERS else "o")
        history = sweep.history(Run(row["model"]))
        epochs, accuracies = [each["epoch"] for each in history], [each["val_accuracy"] for each in history]
        by_epoch.plot(epochs, accuracies, label=f"{row['accuracy']:.1%}  {row['model']}", markersize=4, **style)
        minutes = row["images_per_epoch"] * sweep.epochs / row["images_per_second"] / 60
        by_time.plot(minutes, row["accuracy"], **style)
    by_epoch.set(xlabel="epoch", ylabel="accuracy on the test images")
    by_time.set(xlabel=f"minutes for {sweep.epochs} epochs on one thread")
    by_time.set_xlim(left=0)
    by_epoch.legend(frameon=False, loc="lower right", fontsize=8)
    for axes in (by_epoch, by_time):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    common.save_figure(path, figure)


def folder(text: str) -> Path:
    """Parse the folder of the images."""
    path = Path(text)
    if not all((path / part).is_dir() for part in ("train", "test")):
        raise argparse.ArgumentTypeError(f"{text!r} holds no folders named train and test")
    return path


def main() -> int:
    """Run the command line."""
    parser = common.Parser("Small models trained alike on small images.", seconds=3.0)
    parser.add_argument("--data", type=folder, required=True, metavar="DIR", help="holds train and test")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"), metavar="DIR", help="where the runs go")
    parser.add_argument("--epochs", type=common.count, default=6, metavar="N", help="of every run")
    parser.add_argument("--seeds", type=common.count, default=3, metavar="N", help="of the two best of ours")
    parser.add_argument("--jobs", type=common.count, default=2, metavar="N", help="runs side by side, a thread each")
    parser.add_argument("--picture", type=common.output_file, metavar="PATH", help="PNG file to draw")
    options = parser.parse_args()
    models = (*FAMILIES, *PEERS)
    if options.quick:
        models, options.epochs, options.seeds, options.seconds = (
            ("vmamba_atto", STUDENT, "convnext_stride_4"),
            1,
            1,
            0.01,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    common.console().print(common.machine_line())
    speeds = common.interleaved({name: training_step(name) for name in models}, options.seconds)
    sweep = Sweep(options.data, options.out, options.epochs, options.jobs)

    runs = [Run(name) for name in sorted(models, key=lambda name: -speeds[name].median)]
    sweep.train(runs)
    ranked = sorted((name for name in models if name in FAMILIES), key=lambda name: -sweep.accuracy(Run(name)))
    again = [Run(name, seed) for name in ranked[:2] for seed in range(1, options.seeds)]
    sweep.train(again)
    teacher = next(Run(name) for name in ranked if name != STUDENT)
    learned = Run(STUDENT, distilled=True)
    sweep.train([learned], teacher)

    images = sum(1 for path in (options.data / "train").rglob("*") if path.is_file())
    rows, epochs = [], []
    for run in (*runs, *again, learned):
        cost = complexity(make(run.model), (3, SIZE, SIZE))
        last = sweep.history(run)[-1]
        row = dict(model=run.model, seed=run.seed, distilled=run.distilled, epochs=options.epochs)
        row |= dict(accuracy=last["val_accuracy"], top5=last["val_top5_accuracy"], loss=last["val_loss"])
        row |= dict(parameters=cost.parameters, macs=cost.macs, images_per_epoch=images)
        rows.append(row | dict(images_per_second=BATCH / speeds[run.model].median))
        epochs += [dict(model=run.model, seed=run.seed, distilled=run.distilled) | each for each in sweep.history(run)]

    columns = [("model", "{model}"), ("distilled", "{distilled}"), (">top-1", "{top1}"), (">top-5", "{top5:.1%}")]
    columns += [(">parameters", "{parameters:,}"), (">MACs", "{macs:,}")]
    columns += [(">images/s", "{images_per_second:.0f}"), (">minutes", "{minutes:.1f}")]
    notes = [
        f"Accuracy of the last of {options.epochs} epochs; where there are several seeds, mean ± standard deviation.",
        "images/s: forward, backward and AdamW on one thread, measured before the runs; minutes: at that rate.",
        f"distilled: learned from {teacher.name} too, its most probable class, alpha 0.5.",
    ]
    common.show("Trained alike", list(summary(rows)), columns, notes)
    if options.csv:
        common.write_csv(options.csv, rows)
        common.write_csv(options.csv.with_stem(f"{options.csv.stem}-epochs"), epochs)
    if options.picture:
        draw(sweep, rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
