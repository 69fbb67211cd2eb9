"""What scans attend to: rows of the matrices by which they mix tokens, channel attention, and chosen routes.

Source: Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models", arXiv 2403.01590; VMamba,
arXiv 2401.10166, which draws such maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.analysis.capture import capture, locate
from vision_ssm.analysis.pictures import path_name
from vision_ssm.analysis.result import COLOR_MAP, COLORS, Result, legend_below, new_figure
from vision_ssm.analysis.scan_layers import ATTENTION, SCAN, Call, choose_layer, find_scan_layers, trace
from vision_ssm.errors import InputError
from vision_ssm.layers import SwitchOfScans
from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.portable import of_channels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Callable[[Tensor], Any] | None


def attention_row(args: ScanArguments, image: int, token: int) -> Tensor:
    """How much the output of one token takes of the input of each token, on each route that an image takes.

    On a route, with t the step that writes the token and s a step up to t, whose weight goes to the token that it
    reads::

        sum over states n of  C_t[n] exp(A[n] (delta_(s+1) + ... + delta_t)) delta_s B_s[n]

    times the weight of the route; the skip connection D is not part of it. Padding tokens decay the state and have no
    weight.

    Args:
        args: The arguments of the scan.
        image: Number of the image in the batch.
        token: Number of the output token.

    Returns:
        Signed weights per channel, float64 (K', L, C); 0 where the route does not write the token, and for the channels
        that it does not carry.
    """
    tokens, channels = args.x.shape[1:]
    rows = torch.zeros(args.routes_per_image, tokens + 1, channels, dtype=torch.float64)
    for slot in range(args.routes_per_image):
        k, read, delta, A, B, C = _route(args, image, slot)
        for end in (args.write[k].cpu() == token).nonzero().flatten().tolist():
            delta, B = delta[: end + 1], B[: end + 1]
            later = F.pad(delta.flip(0).cumsum(0).flip(0)[1:], (0, 0, 0, 1))  # delta_(s+1) + ... + delta_t
            terms = (torch.exp(later * A[:, n]) * (C[end, n] * B[:, n, None]) for n in range(args.state_size))
            weight = delta * sum(terms)
            if not args.inclusive:
                weight[end] = 0
            if args.route_weight is not None:
                weight = weight * args.route_weight[image, slot].item()
            # What padding tokens, -1, would get goes to one row more, which is cut off.
            rows[slot, read[: end + 1], _channels(args, k)] = weight
    return rows[:, :tokens]


def step_sizes(args: ScanArguments, image: int) -> tuple[Tensor, Tensor]:
    """Step sizes, and decays exp(delta A), per token and route: means over channels (and states), float64 (K', L).

    NaN where the route does not read the token.
    """
    found = torch.full((2, args.routes_per_image, args.x.shape[1] + 1), torch.nan, dtype=torch.float64)
    for slot in range(args.routes_per_image):
        _, read, delta, A, _, _ = _route(args, image, slot)
        found[0, slot, read] = delta.mean(1)
        found[1, slot, read] = torch.stack([torch.exp(delta * rate).mean(1) for rate in A.unbind(1)]).mean(0)
    return found[0, :, :-1], found[1, :, :-1]


def _route(args: ScanArguments, image: int, slot: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One of the routes of an image: its number, the tokens it reads, step sizes (T, Dk), A (Dk, N), B and C (T, N)."""
    k = slot if args.route_index is None else int(args.route_index[image, slot])
    read = args.read[k].cpu().long()

    def own(parameter: Tensor) -> Tensor:
        return parameter[k if parameter.shape[0] > 1 else 0].detach().cpu().double()

    def along(tensor: Tensor) -> Tensor:
        values = tensor[image, :, k if tensor.shape[2] > 1 else 0].detach().cpu().double()
        return F.pad(values, (0, 0, 0, 1))[read]  # a padding token, -1, reads the zeros at the end

    low_rank, B, C = along(args.dbc).split([args.rank, args.state_size, args.state_size], -1)
    delta = along(args.delta) if args.delta is not None else low_rank @ own(args.dt_weight)  # type: ignore[arg-type]
    delta = delta if args.dt_bias is None else delta + own(args.dt_bias)
    delta = of_channels(F.softplus(delta) if args.softplus else delta, args.channels_per_route)
    return k, read, delta, own(args.A).expand(-1, args.state_size), B, C


def _channels(args: ScanArguments, route: int) -> slice:
    offset = route * args.channels_per_route if args.side_by_side else 0
    return slice(offset, offset + args.channels_per_route)


@dataclass(frozen=True)
class ImageAttention:
    """What one token of one image attends to.

    Args:
        image: Name of the image.
        picture: Its pixels as the model sees them, from 0 to 1, (H, W, 3).
        routes: The K' routes of the image.
        route_weights: Their weights; 1 without a choice of routes.
        token: Row and column of the output token.
        absolute: Absolute weights of the input tokens, means over channels; of all routes together, then of each,
            (1 + K', rows, columns). Of a group of channels with a route of its own these are the means over the group.
        signed: The same of signed weights.
        steps: Step sizes, means over channels, NaN for tokens that are not on the route, (K', rows, columns).
        decays: Factors exp(delta A) by which a token lets the state decay, means over channels and states, likewise.
    """

    image: str
    picture: np.ndarray
    routes: tuple[str, ...]
    route_weights: tuple[float, ...]
    token: tuple[int, int]
    absolute: np.ndarray
    signed: np.ndarray
    steps: np.ndarray
    decays: np.ndarray

    @property
    def pixels(self) -> tuple[float, float]:
        """Height and width of a token in pixels."""
        return self.picture.shape[0] / self.absolute.shape[1], self.picture.shape[1] / self.absolute.shape[2]

    def summary(self, radius: float) -> list[dict[str, Any]]:
        """How far attention reaches, on all routes together and on each.

        Args:
            radius: Distance in tokens; `near` is the share of the absolute weights within it.
        """
        lines = []
        rows, columns = np.indices(self.absolute.shape[1:])
        down, right = rows - self.token[0], columns - self.token[1]
        for place, route in enumerate(("all", *self.routes)):
            total = self.absolute[place].sum()
            share = self.absolute[place] / total if total > 0 else np.full_like(self.absolute[place], np.nan)
            in_pixels = np.hypot(down * self.pixels[0], right * self.pixels[1])
            line = dict(
                route_weight=self.route_weights[place - 1] if place else None,
                sum=float(total),
                near=float(share[np.hypot(down, right) <= radius].sum()),
                distance_tokens=float((share * np.hypot(down, right)).sum()),
                distance_pixels=float((share * in_pixels).sum()),
            )
            lines.append({"image": self.image, "route": route, **line})
        return lines


@dataclass(frozen=True)
class ScanAttention(Result):
    """What a scan attends to from one position; see `scan_attention`.

    Args:
        model: Name of the model.
        layer: Name of the layer.
        images: One entry per image.
    """

    model: str
    layer: str
    images: tuple[ImageAttention, ...]

    def plot(self) -> Figure:
        """The picture, the weights on all routes and on each; of a single image signed weights and steps too."""
        single = len(self.images) == 1
        panels = max(len(item.routes) for item in self.images) + (5 if single else 2)
        columns = 5 if single else panels
        rows = -(-panels // columns) if single else len(self.images)
        shape = self.images[0].picture.shape
        figure = new_figure(2.2 * columns, ((1.65 if single else 1.9) * shape[0] / shape[1] + 0.45) * rows + 0.5)
        figure.suptitle(
            f"What the marked token attends to in {self.layer} of {self.model}\n"
            "weights: means over channels, colored by their square roots, all on one scale",
            fontsize=10,
        )
        axes = figure.subplots(rows, columns, squeeze=False)
        for each in axes.flat:
            each.axis("off")
        for item, places in zip(self.images, [axes.flat] if single else axes, strict=True):
            self._draw(item, iter(places), single)
        return figure

    def _draw(self, item: ImageAttention, places: Iterator[Axes], single: bool) -> None:
        top = _top(item.absolute)
        size = "×".join(f"{side:.3g}" for side in item.pixels)
        grid = "×".join(map(str, item.absolute.shape[1:]))
        title = f"{short_name(item.image)}\n{grid} tokens of {size} pixels"
        _draw_map(next(places), item, title, None)
        _draw_map(next(places), item, "|weight|\nall routes", item.absolute[0], top)
        if single:
            _draw_map(next(places), item, "weight\nall routes", item.signed[0], _top(item.signed[0]), signed=True)
            # Tokens that several routes read have a step size on each.
            for what, maps in (("step size Δ", item.steps), ("decay exp(Δ A)", item.decays)):
                known = np.isfinite(maps)
                mean = np.where(known, maps, 0).sum(0) / np.maximum(known.sum(0), 1)
                _draw_map(next(places), item, f"{what}\nmean of the routes", np.where(known.any(0), mean, np.nan))
        for route, weight, values in zip(item.routes, item.route_weights, item.absolute[1:], strict=True):
            title = route if weight == 1 else f"{route}\nweight of the route {weight:.2f}"
            _draw_map(next(places), item, title, values, top, bar=False)

    def rows(self) -> list[dict[str, Any]]:
        lines = []
        for item in self.images:
            for place, route in enumerate(("all", *item.routes)):
                for row, column in np.ndindex(item.absolute.shape[1:]):
                    at = (row, column)
                    line = {"image": item.image, "layer": self.layer, "route": route, "row": row, "column": column}
                    line |= {"weight": float(item.absolute[place][at]), "signed_weight": float(item.signed[place][at])}
                    steps = (float(maps[place - 1][at]) if place else np.nan for maps in (item.steps, item.decays))
                    known = [value if np.isfinite(value) else None for value in steps]
                    lines.append(line | dict(zip(("step_size", "decay"), known, strict=True)))
        return lines


def _draw_map(
    axes: Axes,
    item: ImageAttention,
    title: str,
    values: Any,
    top: float | None = None,
    *,
    signed: bool = False,
    bar: bool = True,
) -> None:
    """Draw values over the gray picture, or without any the picture itself, and mark the token."""
    from matplotlib.colors import FuncNorm, Normalize
    from matplotlib.patches import Rectangle

    height, width = item.picture.shape[:2]
    extent = (0, width, height, 0)
    axes.set_title(title, fontsize=8)
    if values is None:
        axes.imshow(item.picture, extent=extent)
    else:
        axes.imshow(item.picture.mean(2), extent=extent, cmap="gray", vmin=-0.4, vmax=1.4)
        norm: Any = Normalize(np.nanmin(values), np.nanmax(values))
        if top is not None:
            norm = FuncNorm((_root, _square), vmin=-top if signed else 0, vmax=top)
            values = np.where(values == 0, np.nan, values)  # not seen at all: the picture stays bare
        colors = "PuOr" if signed else COLOR_MAP
        image = axes.imshow(values, extent=extent, cmap=colors, norm=norm, alpha=0.8, interpolation="nearest")
        if bar:
            side = axes.inset_axes((1.03, 0, 0.06, 1))  # as high as the picture
            low, high = float(norm.vmin), float(norm.vmax)
            spread = (high - low) / max(abs(high), abs(low), 1e-30)  # decays differ little
            digits = 3 if top is not None else 2 + max(1, -int(np.floor(np.log10(max(spread, 1e-6)))))
            ticks = [low, 0.0, high] if signed else [low, float(norm.inverse(0.5)), high]
            axes.figure.colorbar(image, cax=side, ticks=ticks, format=lambda value, _: f"{value:.{digits}g}")
            side.tick_params(labelsize=7)
    down, right = item.pixels
    corner = (item.token[1] * right, item.token[0] * down)
    for color, line in (("white", 3.0), (COLORS[1], 1.5)):
        axes.add_patch(Rectangle(corner, right, down, fill=False, edgecolor=color, linewidth=line))


def scan_attention(
    model: nn.Module,
    images: Iterable[Tensor],
    layer: str | None = None,
    position: tuple[float, float] = (0.5, 0.5),
    *,
    name: str | None = None,
    names: Sequence[str] | None = None,
    run: Run = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> ScanAttention:
    """What a scan attends to from one position of each image, along its routes.

    Only the row of that position is computed, in float64, from the arguments with which the scan was called; see
    `attention_row`.

    Args:
        model: The model, in evaluation mode.
        images: Images, (3, H, W) each, normalized as the model takes them.
        layer: Name of the layer, see `find_scan_layers`; by default the last scan of the third stage.
        position: Row and column of the output token, relative to the image: 0 is the upper or left border.
        name: How to call the model.
        names: How to call the images.
        run: What to call with (1, 3, H, W) instead of the model; a part of it, such as its backbone.
        mean: Channel means of the normalization, which is undone for the picture.
        std: Channel standard deviations of the normalization.

    Raises:
        InputError: There is no such layer, it does not scan tokens, or the position is not within the image.
    """
    found: list[ImageAttention] = []
    for number, image in enumerate(images):
        chosen = choose_layer(find_scan_layers(model, image, run), layer)
        if chosen.kind != SCAN:
            raise InputError(f"{chosen.name} is a {chosen.kind}; only positions of layers that scan attend")
        layer, (height, width) = chosen.name, chosen.grid
        args = _arguments(model, image, run, layer)
        row, column = locate(position, chosen.grid)
        weights = attention_row(args, 0, row * width + column)
        picture = (image.detach().cpu().float().permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
        index = range(args.routes) if args.route_index is None else args.route_index[0].tolist()
        parts = [weights.sum(0), *(weights[slot][:, _channels(args, k)] for slot, k in enumerate(index))]
        steps, decays = step_sizes(args, 0)
        found.append(
            ImageAttention(
                image=names[number] if names else f"image {number}",
                picture=picture.numpy(),
                routes=tuple(chosen.routes[k] for k in index),
                route_weights=tuple([1.0] * len(index) if args.route_weight is None else args.route_weight[0].tolist()),
                token=(row, column),
                absolute=torch.stack([part.abs().mean(1) for part in parts]).view(-1, height, width).numpy(),
                signed=torch.stack([part.mean(1) for part in parts]).view(-1, height, width).numpy(),
                steps=steps.view(-1, height, width).numpy(),
                decays=decays.view(-1, height, width).numpy(),
            )
        )
    if layer is None:
        raise InputError("there are no images to look at")
    return ScanAttention(name or type(model).__name__, layer, tuple(found))


def _arguments(model: nn.Module, image: Tensor, run: Run, layer: str) -> ScanArguments:
    """The arguments of the latest scan of a layer, whatever is changed in place afterwards."""
    kept: list[ScanArguments] = []

    def note(name: str, call: Call) -> None:
        if name == layer and call[2] is not None:
            tensors: dict[str, Any] = {
                field: value.clone() for field, value in vars(call[2]).items() if isinstance(value, Tensor)
            }
            kept[:] = [replace(call[2], **tensors)]

    trace(model, image, run, note)
    return kept[0]


@dataclass(frozen=True)
class ChannelMaps(Result):
    """How much channels attend to channels in an aggregator of SparX; see `channel_attention`.

    Args:
        model: Name of the model.
        layer: Name of the layer.
        images: Names of the images.
        weights: Of each image, (images, heads, C / heads, C / heads): what a channel (third axis) takes of each other.
    """

    model: str
    layer: str
    images: tuple[str, ...]
    weights: np.ndarray

    def plot(self) -> Figure:
        """A matrix per image and head."""
        from matplotlib.ticker import MaxNLocator

        count, heads, channels = self.weights.shape[:3]
        figure = new_figure(2.5 * heads + 0.8, 2.5 * count + 1)
        figure.suptitle(f"Attention of channels to channels: {self.layer} of {self.model}", fontsize=11)
        axes = figure.subplots(count, heads, squeeze=False)
        # Up to twice the even share at least: rounding errors of even weights are no pattern.
        limits = dict(vmin=0, vmax=max(float(self.weights.max()), 2 / channels))
        for (row, head), each in np.ndenumerate(axes):
            image = each.imshow(self.weights[row, head], cmap=COLOR_MAP, interpolation="nearest", **limits)
            each.set_title(f"{short_name(self.images[row])}, head {head}" if head == 0 else f"head {head}", fontsize=9)
            each.tick_params(labelsize=7)
            for axis in (each.xaxis, each.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True))
            each.set_xlabel("channel of the earlier layers" if row == count - 1 else "", fontsize=8)
            each.set_ylabel("channel" if head == 0 else "", fontsize=8)
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("weight; a row has sum 1", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        return figure

    def rows(self) -> list[dict[str, Any]]:
        names = ("head", "channel", "from_channel")
        return [
            {"image": self.images[at[0]], "layer": self.layer, **dict(zip(names, at[1:], strict=True)), "weight": value}
            for at, value in np.ndenumerate(self.weights)
        ]


def channel_attention(
    model: nn.Module,
    images: Iterable[Tensor],
    layer: str,
    *,
    name: str | None = None,
    names: Sequence[str] | None = None,
    run: Run = None,
) -> ChannelMaps:
    """The channel attention of a ganglion layer of SparX.

    Args:
        model: The model, in evaluation mode.
        images: Images, (3, H, W) each, normalized as the model takes them.
        layer: Name of the layer, the attribute `attention` of an aggregator; see `find_scan_layers`.
        name: How to call the model.
        names: How to call the images.
        run: What to call with (1, 3, H, W) instead of the model.

    Raises:
        InputError: There is no such layer, or it has no channel attention.

    Source: SparX, arXiv 2409.09649, section on the dynamic multi-layer channel aggregator.
    """
    found: list[np.ndarray] = []
    for image in images:
        chosen = choose_layer(find_scan_layers(model, image, run), layer)
        if chosen.kind != ATTENTION:
            raise InputError(f"{layer} is a {chosen.kind}; it has no channel attention")
        with torch.no_grad():
            trace(model, image, run, lambda at, call: found.append(_matrix(call)) if at == layer else None)
    labels = names or [f"image {number}" for number in range(len(found))]
    return ChannelMaps(name or type(model).__name__, layer, tuple(labels), np.stack(found))


def _matrix(call: Call) -> np.ndarray:
    attention: Any = call[0]
    q, k = (tensor.double() for tensor in call[1][:2])
    return attention.weights(q, k)[0].cpu().float().numpy()


@dataclass(frozen=True)
class SwitchChoices(Result):
    """Which routes images take in the layers of ViM2 or ViQS; see `switch_choices`.

    Args:
        model: Name of the model.
        layers: Names of the switches.
        paths: The paths of the pool.
        images: Names of the images.
        weights: Weights of the paths, 0 of those not taken, (images, layers, paths).
    """

    model: str
    layers: tuple[str, ...]
    paths: tuple[str, ...]
    images: tuple[str, ...]
    weights: np.ndarray

    def plot(self) -> Figure:
        """The mean weights of the paths in each layer."""
        figure = new_figure(7.5, 0.34 * len(self.layers) + 1.8)
        axes = figure.subplots()
        mean, end = self.weights.mean(0), np.zeros(len(self.layers))
        for path, color, hatch, values in zip(self.paths, COLORS * 9, ("", "//", "..", "xx") * 9, mean.T, strict=False):
            axes.barh(self.layers, values, left=end, color=color, hatch=hatch, edgecolor="white", label=path)
            end = end + values
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.set(xlabel="weight of a path, in both directions", xlim=(0, 1), ylabel="layer")
        axes.spines[["top", "right"]].set_visible(False)
        count = len(self.images)
        figure.suptitle(f"Paths that {self.model} takes, mean of {count} image{'s' * (count > 1)}", fontsize=11)
        legend_below(axes)
        return figure

    def rows(self) -> list[dict[str, Any]]:
        names = (self.images, self.layers, self.paths)
        columns = ("image", "layer", "path")
        return [
            {column: labels[i] for column, labels, i in zip(columns, names, at, strict=True)} | {"weight": value}
            for at, value in np.ndenumerate(self.weights)
        ]


def switch_choices(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    name: str | None = None,
    names: Sequence[str] | None = None,
    run: Run = None,
) -> SwitchChoices | None:
    """Which paths the switches of a model choose; None where it has none.

    Args:
        model: The model, in evaluation mode.
        images: Images, (3, H, W) each, normalized as the model takes them.
        name: How to call the model.
        names: How to call the images.
        run: What to call with (1, 3, H, W) instead of the model.
    """
    switches = {at: module for at, module in model.named_modules() if isinstance(module, SwitchOfScans)}
    if not switches:
        return None
    pool = list(dict.fromkeys(path for module in switches.values() for path in module.paths))
    found: list[np.ndarray] = []
    for image in images:
        weights = np.zeros((len(switches), len(pool)))
        with capture(model, list(switches)) as outputs, torch.no_grad():
            (run or model)(image[None])
        for row, (at, module) in enumerate(switches.items()):
            index, weight, _ = outputs[at]
            for k, value in zip(index[0].tolist(), weight[0].tolist(), strict=True):
                weights[row, pool.index(module.paths[k])] += value
        found.append(weights)
    labels = tuple(names or [f"image {number}" for number in range(len(found))])
    paths = tuple(path_name(path).replace("Transposed(Rows)", "Columns") for path in pool)
    return SwitchChoices(name or type(model).__name__, tuple(switches), paths, labels, np.stack(found))


def _root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> Any:
    return np.sign(values) * np.square(values)


def _top(values: np.ndarray) -> float:
    return max(float(np.abs(values).max()), 1e-30)


def short_name(image: str, most: int = 28) -> str:
    """The name of an image file with its folder, or of another image, cut from the left."""
    name = "/".join(PurePath(image).parts[-2:])
    return name if len(name) <= most else f"…{name[1 - most :]}"
