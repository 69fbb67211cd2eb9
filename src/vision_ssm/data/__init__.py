"""Images for training: folders, tar files, the embedded digits, and the samples they give.

The Lightning data module is in `vision_ssm.data.module`, which is not imported here: Lightning takes seconds, and only
training needs it.
"""

from vision_ssm.data.datasets import (
    Images,
    LabelledImages,
    Splits,
    find_images,
    load_digits,
    load_folder,
    read_folder,
    shorten,
)
from vision_ssm.data.images import open_image, to_rgb
from vision_ssm.data.outputs import assign_outputs
from vision_ssm.data.samples import EpochSampler, Samples, TrainingSamples, Transform, find_unreadable
from vision_ssm.data.seeding import seeded
from vision_ssm.data.sources import load_splits
from vision_ssm.data.streams import ImageStream
from vision_ssm.data.tars import read_tars

__all__ = [
    "EpochSampler",
    "ImageStream",
    "Images",
    "LabelledImages",
    "Samples",
    "Splits",
    "TrainingSamples",
    "Transform",
    "assign_outputs",
    "find_images",
    "find_unreadable",
    "load_digits",
    "load_folder",
    "load_splits",
    "open_image",
    "read_folder",
    "read_tars",
    "seeded",
    "shorten",
    "to_rgb",
]
