"""A web page for one model: drop a picture, see the prediction, click to see what it depends on."""

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from vision_ssm.analysis.attention import scan_attention
from vision_ssm.analysis.fields import effective_receptive_field
from vision_ssm.analysis.inputs import single_inputs
from vision_ssm.data import open_image
from vision_ssm.detectors.detector import OnBackbone
from vision_ssm.engine.onnx_model import OnnxModel
from vision_ssm.engine.task import Task, as_dataset
from vision_ssm.errors import InputError, printable
from vision_ssm.optimize.packed import Frozen

if TYPE_CHECKING:
    from gradio import Blocks

_SIDE = 480  # pixels to about which smaller inputs are enlarged


def demo(
    predictor: Task,
    *,
    title: str | None = None,
    max_pixels: int = 40_000_000,
    max_megabytes: float = 20,
    **options: Any,
) -> "Blocks":
    """Make a page that predicts for the pictures that are dropped on it; `.launch()` serves it.

    A click on a picture, as the model sees it, shows the effective receptive fields of the stages and what the scan
    attends to at that position. The page loads nothing from elsewhere, and pictures are deleted within two hours.

    Args:
        predictor: A classifier, detector or segmenter, as `vision_ssm.load(..., optimized=False)` gives it; optimized
            copies and ONNX files only predict.
        title: The heading; by default the name of the model.
        max_pixels: Largest number of pixels of a picture.
        max_megabytes: Largest size of its file.
        options: Those of the prediction's `row`: `top` and `threshold` of a classifier, `threshold` of a detector.
    """
    import gradio as gr  # seconds

    model, spec, classifies = predictor.model, predictor.spec, predictor.name == "classification"

    def read(given: Mapping[str, Any]) -> Image.Image:
        path = Path(given["path"])
        name, size = printable(given.get("orig_name") or path.name), path.stat().st_size / 1e6
        if size > max_megabytes:
            raise InputError(f"{name} has {size:,.1f} MB; at most {max_megabytes:g} are taken here")
        return open_image(path, name, max_pixels)

    def see(image: Image.Image) -> tuple[torch.Tensor, Image.Image]:
        x = next(single_inputs(predictor, as_dataset(image))).to(predictor.dtype)
        pixels = x.float().cpu().permute(1, 2, 0) * torch.tensor(spec.std) + torch.tensor(spec.mean)
        seen = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
        factor = max(1, round(_SIDE / max(seen.size)))
        return x, seen.resize((seen.width * factor, seen.height * factor), Image.Resampling.NEAREST)

    def predict(given: Mapping[str, Any] | None) -> dict[Any, Any]:
        """Predict for a picture."""
        shown: dict[Any, Any] = {item: None for item in (answer, table, seen, fields, attention)}
        shown |= {item: gr.update(visible=False) for item in (message, inside)}
        if given is None:
            return shown
        try:
            image = read(given)
            (prediction,) = predictor.predict(image)
            if classifies:
                shown[answer] = {printable(name): p for name, p in prediction.top(options.get("top", 5))}
                if prediction.confidence < (least := options.get("threshold", 0)):
                    shown[message] = gr.update(value=f"unsure: no class is as probable as {least:.0%}", visible=True)
            else:
                rows = predictor.as_csv([prediction.row(**options)])
                shown[answer] = prediction.draw(image, **options)
                shown[table] = [[_text(name, row[name]) for name in predictor.csv_columns[1:]] for row in rows]
                if not rows:
                    shown[message] = gr.update(value="nothing was found", visible=True)
            if not closed:
                shown |= {seen: see(image)[1], inside: gr.update(visible=True)}
        except InputError as error:
            shown[message] = gr.update(value=error.line, visible=True)
        return shown

    def explain(given: Mapping[str, Any], event: gr.SelectData) -> dict[Any, Any]:
        x, picture = see(read(given))
        position = (event.index[1] / picture.height, event.index[0] / picture.width)
        _mark(picture, event.index)
        how: dict[str, Any] = dict(name=spec.model, position=position)
        seen_by = dict(mean=spec.mean, std=spec.std, run=model.backbone if isinstance(model, OnBackbone) else None)
        shown: dict[Any, Any] = {seen: picture}
        for item, analyze in (
            (fields, lambda: effective_receptive_field(model, [x[None]], **how)),
            (attention, lambda: scan_attention(model, [x], names=["the picture"], **how, **seen_by)),
        ):
            try:
                shown[item] = _as_html(item.label, analyze())
            except InputError as error:  # such as a model that does not scan
                shown[item] = f"<p>{item.label}: {html.escape(error.line)}</p>"
        return shown

    closed = ""
    if isinstance(model, OnnxModel):
        closed = "An ONNX file only predicts; receptive fields and attention need the run it was exported from."
    elif any(isinstance(module, Frozen) for module in model.modules()):
        closed = "An optimized copy only predicts; receptive fields and attention need `load(..., optimized=False)`."
    hint = f"Drop a picture here, or click; at most {max_pixels / 1e6:g} megapixels and {max_megabytes:g} MB"
    how: dict[str, Any] = dict(analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True)
    with gr.Blocks(title=title or spec.model, **how) as page:
        gr.Markdown(f"# {printable(title or spec.model)}\n{predictor.name}: {predictor.summary}. {closed}")
        with gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(sources=["upload", "clipboard"], label="Picture", height=320, placeholder=hint)
                message = gr.Textbox(label="Message", visible=False, interactive=False)
            with gr.Column(min_width=300):
                columns = [name.capitalize() for name in predictor.csv_columns[1:]]
                answer: Any = (
                    gr.Label(label="Prediction")
                    if classifies
                    else gr.Image(label="Prediction", height=320, buttons=["fullscreen", "download"])
                )
                table = gr.Dataframe(
                    headers=columns, visible=not classifies, interactive=False, label="Table", max_height=240
                )
        with gr.Column(visible=False) as inside:
            gr.Markdown("### As the model sees it\nClick a position to see what the model depends on there.")
            seen = gr.Image(label="Seen", show_label=False, buttons=[], interactive=False, format="png")
            fields = gr.HTML(label="Effective receptive field", padding=False)
            attention = gr.HTML(label="Scan attention", padding=False)
        # Without gradio's decoding, so that every format and limit is ours; one at a time, for analyses hook the model.
        how = dict(preprocess=False, concurrency_id="model", concurrency_limit=1)
        results = [answer, table, message, inside, seen, fields, attention]
        picture.change(predict, picture, results, api_name="predict", **how)
        seen.select(explain, picture, [seen, fields, attention], api_visibility="private", **how)
    return page


def _text(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if name in ("score", "share") else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else printable(value)


def _mark(picture: Image.Image, place: tuple[int, int]) -> None:
    draw, radius = ImageDraw.Draw(picture), max(picture.size) // 60
    for color, width in (("white", radius), ("#d55e00", radius // 2)):
        draw.circle(place, 2 * radius, outline=color, width=max(1, width))


def _as_html(what: str, result: Any) -> str:
    """The plot of an analysis, which narrow windows scroll."""
    file = io.BytesIO()
    result.plot().savefig(file, format="png", dpi=130)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    style = "width: 100%; min-width: 860px; max-width: none"
    return f'<h3>{what}</h3><div style="overflow-x: auto"><img alt="{what}" style="{style}" src="{source}"></div>'
