"""Images for training: data sets and streams, where they come from, and the samples they give.

The Lightning data module is in `vision_ssm.data.module`, which is not imported here: Lightning takes seconds, and only
training needs it.
"""

from vision_ssm.data.dataset import ImageDataset, Images, Sample, Splits, load_digits
from vision_ssm.data.images import open_image
from vision_ssm.data.sampling import EpochSampler, Transform
from vision_ssm.data.seeding import seeded
from vision_ssm.data.sources import find_images, load_splits, read_images
from vision_ssm.data.streams import ImageStream

__all__ = [
    "EpochSampler",
    "ImageDataset",
    "ImageStream",
    "Images",
    "Sample",
    "Splits",
    "Transform",
    "find_images",
    "load_digits",
    "load_splits",
    "open_image",
    "read_images",
    "seeded",
]
