"""Images for training: data sets and streams, where they come from, and the samples they give.

The Lightning data module is in `vision_ssm.data.module`, which is not imported here: Lightning takes seconds, and only
training needs it.
"""

from vision_ssm.data.dataset import ImageDataset, Images, Sample, Splits, Strings, hold_out, how_many, load_digits
from vision_ssm.data.images import open_image, to_rgb
from vision_ssm.data.outputs import assign_outputs
from vision_ssm.data.sampling import EpochSampler, Samples, TrainingSamples, Transform, find_unreadable
from vision_ssm.data.seeding import seeded
from vision_ssm.data.sources import find_images, load_splits, read_folder, read_images, read_tars, shorten
from vision_ssm.data.streams import ImageStream

__all__ = [
    "EpochSampler",
    "ImageDataset",
    "ImageStream",
    "Images",
    "Sample",
    "Samples",
    "Splits",
    "Strings",
    "TrainingSamples",
    "Transform",
    "assign_outputs",
    "find_images",
    "find_unreadable",
    "hold_out",
    "how_many",
    "load_digits",
    "load_splits",
    "open_image",
    "read_folder",
    "read_images",
    "read_tars",
    "seeded",
    "shorten",
    "to_rgb",
]
