import re

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset

from vision_ssm.data.dataset import ImageDataset
from vision_ssm.errors import InputError, shorten


def assign_outputs(images: ImageDataset, outputs: int) -> ImageDataset:
    """Images of class folders, with a classifier's outputs as their classes.

    WordNet ids stand for outputs in ImageNet's order, whole numbers for outputs themselves; both may be a subset.
    Folders of any other name are the outputs in sorted order, if there are as many.

    Args:
        images: The images; their classes are named as the folders are.
        outputs: Number of outputs.

    Raises:
        InputError: The folders' names do not say which outputs they are.
    """
    folders = images.classes
    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset is not None and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        info = ImageNetInfo(subset)
        place = {name: i for i, name in enumerate(info.label_names())}
        if unknown := [name for name in folders if name not in place]:
            raise InputError(f"{shorten(unknown)}: not among the {outputs} classes of {subset}")
        classes = tuple(f"{name} {info.label_name_to_description(name).split(',')[0]}" for name in place)
        chosen = [place[name] for name in folders]
    elif all(name.isdecimal() for name in folders):
        classes, chosen = tuple(map(str, range(outputs))), [int(name) for name in folders]
        if wrong := [str(i) for i in chosen if i >= outputs]:
            raise InputError(f"class folder {shorten(wrong)}: the outputs are numbered 0 to {outputs - 1}")
    elif len(folders) == outputs:
        return images
    else:
        raise InputError(
            f"cannot tell which of the {outputs} outputs the {len(folders)} class folders ({shorten(folders)}) are; "
            f"name them by WordNet ids or by numbers from 0 to {outputs - 1}, or give one folder for each output"
        )
    return images.with_labels(np.array(chosen), classes)
