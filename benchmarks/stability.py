"""Does training in autocast stay finite? Steps of the smallest model of every family, on made-up pictures.

python benchmarks/stability.py --csv stability.csv
python benchmarks/stability.py --device cuda --dtype float16
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import common
import timm
import torch
from rich.progress import track
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from vision_ssm.models.registry import registered_models

CLASSES = 10


def batches(size: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw pictures without end: a smooth pattern for each class, shifted at random, under as much noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    while True:
        classes = torch.randint(CLASSES, (batch,), generator=generator)
        shifts = torch.randint(size, (batch, 2), generator=generator).tolist()
        pictures = torch.stack(
            [patterns[c].roll(shift, dims=(1, 2)) for c, shift in zip(classes.tolist(), shifts, strict=True)]
        )
        yield pictures + torch.randn(pictures.shape, generator=generator), classes


def train(name: str, steps: int, batch: int, lr: float, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Train a model, and stop at the first loss or parameter that is not finite."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.1).train().to(device)
    scaler = torch.GradScaler(device, enabled=dtype == torch.float16)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    data = batches(model.pretrained_cfg["input_size"][-1], batch, seed=0)
    losses: list[float] = []
    largest = 0.0
    screen = common.console()
    start = time.perf_counter()
    for _ in track(range(steps), name, console=screen, transient=True, disable=not screen.is_terminal):
        pictures, classes = (tensor.to(device) for tensor in next(data))
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(pictures), classes)
        extra = getattr(model, "aux_loss", None)  # of models that balance their routers
        optimizer.zero_grad()
        scaler.scale(loss if extra is None else loss + extra).backward()
        scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm=5.0))
        scaler.step(optimizer)  # leaves out a step whose scaled gradients overflow, and scales less
        scaler.update()
        losses.append(loss.item())
        largest = max(largest, norm) if norm < float("inf") or dtype != torch.float16 else largest
        if not is_finite(model, losses[-1]):
            break
    seconds = time.perf_counter() - start
    last = losses[-10:]
    return dict(
        model=name,
        steps=len(losses),
        batch=batch,
        first_loss=losses[0],
        last_loss=sum(last) / len(last),
        largest_gradient=largest,
        finite=is_finite(model, losses[-1]),
        seconds=seconds,
        milliseconds=seconds / len(losses) * 1e3,
    )


def is_finite(model: nn.Module, loss: float) -> bool:
    """Tell whether loss and all parameters are numbers."""
    return bool(torch.tensor(loss).isfinite()) and all(bool(p.isfinite().all()) for p in model.parameters())


def main() -> int:
    """Run the command line; the exit code tells whether all stayed finite."""
    parser = common.Parser("Training in autocast: does it stay finite?", seconds=None)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm names (default: every *_atto of ours)")
    parser.add_argument("--steps", type=common.count, default=500, metavar="N", help="training steps of each")
    parser.add_argument("--batch", type=common.count, default=16, metavar="N", help="pictures in a step")
    parser.add_argument("--lr", type=common.duration, default=1e-3, metavar="X", help="learning rate of AdamW")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of autocast")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if options.quick:
        options.steps, options.batch = 3, 2
    names = options.models or [name for name in registered_models() if name.endswith("_atto")]
    unknown = [name for name in names if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm knows no model named {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    common.console().print(common.machine_line(device))
    dtype = getattr(torch, options.dtype)
    rows = [train(name, options.steps, options.batch, options.lr, options.device, dtype) for name in names]
    columns = [("model", "{model}"), (">steps", "{steps}"), (">first loss", "{first_loss:.3f}")]
    columns += [(">last loss", "{last_loss:.3f}"), (">largest gradient", "{largest_gradient:.2f}")]
    columns += [("finite", "{finite}"), (">s", "{seconds:.0f}"), (">ms per step", "{milliseconds:.0f}")]
    notes = ["last loss: mean of the last ten steps. largest gradient: its norm before clipping to 5."]
    common.show(f"Training in {options.dtype} autocast, {options.batch} pictures per step", rows, columns, notes)
    if options.csv:
        rows = [dict(dtype=options.dtype, batch=options.batch) | row for row in rows]
        common.write_csv(options.csv, rows, common.machine(device))
    return 0 if all(row["finite"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
