from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from vision_ssm.data import Images
from vision_ssm.detectors.segmenter import IGNORED
from vision_ssm.engine.plots import elide, save_figure
from vision_ssm.tasks.label_maps import color_labels, read_labels

_ALPHA = 0.6  # of the colors over the image
_SIDE = 640  # pixels of the longest side in a sheet


def blend(image: Image.Image, labels: np.ndarray, colors: Sequence[str]) -> Image.Image:
    """Lay the colors of the classes over an image, but where a pixel does not count."""
    colored = Image.blend(image.convert("RGB"), color_labels(labels, colors), _ALPHA)
    colored.paste(image, mask=Image.fromarray(labels == IGNORED))
    return colored


def draw_maps(
    image: Image.Image, maps: Sequence[np.ndarray], classes: Sequence[str], colors: Sequence[str]
) -> Image.Image:
    """Draw an image under one label map after the other, from top to bottom, and a legend below."""
    canvas = Image.new("RGB", (image.width, image.height * len(maps)))
    for place, labels in enumerate(maps):
        canvas.paste(blend(image, labels, colors), (0, place * image.height))
    present = sorted({*np.concatenate([np.unique(labels) for labels in maps]).tolist()} - {IGNORED})
    return add_legend(canvas, [(classes[label], colors[label]) for label in present], size=min(image.size))


def add_legend(image: Image.Image, entries: Sequence[tuple[str, str]], size: int) -> Image.Image:
    """Write names and colors of classes below an image, in letters that suit an image of this size."""
    size = max(11, round(size / 26))
    font = ImageFont.truetype(findfont(FontProperties()), size)
    measure = ImageDraw.Draw(image)
    places: list[tuple[int, int, str, str]] = []
    x, y, line, gap = size // 2, size // 2, round(1.7 * size), size // 2
    for name, color in entries:
        text = elide(name, 30)
        width = size + gap + int(measure.textlength(text, font)) + 2 * gap
        if x + width > image.width and x > size // 2:
            x, y = size // 2, y + line
        places.append((x, y, text, color))
        x += width
    canvas = Image.new("RGB", (image.width, image.height + y + line), "white")
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    for x, y, text, color in places:
        top = image.height + y
        draw.rectangle((x, top, x + size, top + size), fill=color, outline="black")
        draw.text((x + size + gap, top + size // 2), text, fill="black", font=font, anchor="lm")
    return canvas


def draw_pairs(
    records: Sequence[tuple[str, float, bytes]],
    classes: Sequence[str],
    colors: Sequence[str],
    images: Images,
    path: Path,
    *,
    most: int = 4,
) -> None:
    """Draw a sheet of the images with the best and the worst predictions, the true classes above the predicted ones.

    Args:
        records: Id, mean IoU and label map of each image.
        classes: Names of the classes.
        colors: Their colors.
        images: The images, in the same order; those without pixels that count have no record.
        path: The PNG file to write.
        most: Number of images of each kind.
    """
    numbers = {images.id(key): key for key in range(len(images))}  # type: ignore[arg-type]
    order = sorted(records, key=lambda record: -record[1])
    half = min(most, (len(order) + 1) // 2)
    rows = [("best", order[:half]), ("worst", order[half:][-most:])]
    rows = [(title, found) for title, found in rows if found]
    columns = max(len(found) for _, found in rows)
    figure = Figure(figsize=(4.2 * columns, 6.6 * len(rows) + 1), layout="constrained")
    figure.suptitle("True classes, and below them the predicted ones; black pixels do not count", fontsize=12)
    grid = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    present: set[int] = set()
    for row, (title, found) in enumerate(rows):
        samples = images.pick([numbers[name] for name, _, _ in found])
        for column, (sample, (name, value, file)) in enumerate(zip(samples, found, strict=True)):
            truth, predicted = sample["mask"], read_labels(file)
            present |= {*np.unique(truth).tolist(), *np.unique(predicted).tolist()} - {IGNORED}
            for place, labels in enumerate((truth, predicted)):
                picture = blend(sample["image"], labels, colors)
                if place == 0:
                    picture.paste("black", mask=Image.fromarray(labels == IGNORED))
                picture.thumbnail((_SIDE, _SIDE))
                axes = grid[2 * row + place, column]
                axes.imshow(picture)
                if place == 0:
                    axes.set_title(f"{title}: {elide(name, 34)}, mIoU {value:.0%}", fontsize=9, loc="left")
    shown = sorted(present)[:40]
    handles = [figure.axes[0].scatter([], [], marker="s", s=60, color=colors[label]) for label in shown]
    names = [elide(classes[label], 24) for label in shown]
    figure.legend(handles, names, loc="outside lower center", ncols=min(8, len(shown)), frameon=False, fontsize=10)
    save_figure(figure, path)
