from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import AnalysisOptions, Subject, choose_images, image_names, load_subject, write_result
from vision_ssm.errors import InputError, nearest
from vision_ssm.recipes.config import limited

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _MapOptions(AnalysisOptions):
    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL|RUN")]
    """A model or run."""
    images: int = limited(4, least=1, most=32)
    """How many images to show, spread evenly over those there are."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(_MapOptions):
    """Maps of stages as pictures, next to the images."""

    stages: Annotated[tuple[int, ...], tyro.conf.arg(metavar="STAGE...")] = ()
    """Stages, counted from 0, or negative from the last; all by default."""
    show: Literal["mean", "components", "channel"] = "mean"
    """The mean absolute value over the channels, the first three principal components as colors, or the channel that
    varies most."""


@dataclass(frozen=True, kw_only=True)
class CamOptions(_MapOptions):
    """Which parts of an image are evidence for a class: class activation maps of a classifier or segmenter."""

    classes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS...")] = ()
    """Names or numbers of classes; by default the predicted one of each image."""
    stage: int | None = limited(None, least=0)
    """The stage, counted from 0, whose map is used; by default the last one."""
    method: str = "GradCAM"
    """GradCAM, or another class of the library grad-cam: GradCAMPlusPlus, HiResCAM, LayerCAM, EigenCAM, ScoreCAM..."""


def features(words: Sequence[str]) -> int:
    """Draw maps of stages; `words` follow `vision-ssm analyze features`."""
    options: FeatureOptions = parse_options(FeatureOptions, words, "analyze features")
    from vision_ssm.analysis import maps

    subject = load_subject(options.model, options.device)
    inputs, shown = _inputs(options, subject)
    kinds = {
        "mean": maps.mean_absolute_activation,
        "components": maps.principal_components,
        "channel": maps.most_varying_channel,
    }
    how: dict[str, Any] = dict(show=kinds[options.show], name=subject.name, **shown)
    return write_result(maps.stage_maps(subject.model, inputs, options.stages or None, **how), options, "features")


def cam(words: Sequence[str]) -> int:
    """Draw class activation maps; `words` follow `vision-ssm analyze cam`."""
    options: CamOptions = parse_options(CamOptions, words, "analyze cam")
    from vision_ssm.analysis.maps import class_activation

    subject = load_subject(options.model, options.device)
    if subject.task.name == "detection":
        raise InputError(f"analyze cam is for classifiers and segmenters, and {options.model} is a detector")
    names = _class_names(subject)
    chosen = [_class_index(word, names) for word in options.classes]
    inputs, shown = _inputs(options, subject)
    title = subject.name.replace("=random", " with random weights")
    how: dict[str, Any] = dict(class_names=names, name=title, stage=options.stage, **shown)
    result = class_activation(subject.model, inputs, chosen or None, options.method, **how)
    return write_result(result, options, "cam")


def _inputs(options: _MapOptions, subject: Subject) -> tuple[list["Tensor"], dict[str, Any]]:
    """The images as the model takes them; as people see them, and their names."""
    from vision_ssm.analysis.inputs import single_inputs
    from vision_ssm.analysis.maps import unnormalize

    images, spec = choose_images(options, [subject]), subject.task.spec
    inputs = list(single_inputs(subject.task, images))
    pictures = [unnormalize(x, spec.mean, spec.std) for x in inputs]
    return inputs, dict(pictures=pictures, image_names=image_names(images))


def _class_names(subject: Subject) -> Sequence[str]:
    """The names of a model's classes; those of ImageNet in place of the numbers that timm's models have."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    classes = subject.task.spec.classes
    subset = infer_imagenet_subset(subject.model) if subject.run is None and classes[0] == "0" else None
    if subset is None:
        return classes
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(len(classes))]


def _class_index(word: str, names: Sequence[str]) -> int:
    if word in names:
        return list(names).index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise InputError(f"there is no class {word} among the {len(names)}{nearest(word, names)}")
