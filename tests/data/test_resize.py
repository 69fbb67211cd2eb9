import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import goldens
from goldens.fill_dense import picture
from vision_ssm.data.joint import collate, eval_transform
from vision_ssm.data.resize import fit_size, resize

GOLDEN = goldens.load("maskrcnn")
CASES = list(enumerate(GOLDEN.facts["pre"]))


def test_sizes_are_mmcvs():
    for height, width, *expected in GOLDEN.arrays["resize_sizes"].tolist():
        assert list(fit_size(height, width, (1333, 800))) == expected
    assert fit_size(1, 5000, (1333, 800)) == (1, 1333)


@pytest.mark.parametrize(("number", "case"), CASES, ids=[str(case["size"]) for _, case in CASES])
def test_preprocessing_is_mmdets(number, case):
    """Every pixel of the resized image; then the padded, normalized input, without a difference."""
    image = picture(*case["size"], case["seed"])  # BGR
    resized = resize(image, fit_size(*case["size"], (1333, 800)))
    assert zlib.crc32(resized.tobytes()) == case["resized_crc32"]
    assert np.array_equal(resized[::61, ::67], GOLDEN.arrays[f"pre{number}.resized"])

    transform = eval_transform(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), test_size=(1333, 800))
    batch = collate([transform({"image": Image.fromarray(image[..., ::-1].copy()), "id": "a"})])
    assert list(batch["image"].shape[2:]) == case["padded"]
    assert batch["size"].tolist() == [case["resized"]]
    assert batch["original_size"].tolist() == [case["size"]]
    assert np.array_equal(batch["image"][0, :, ::61, ::67], GOLDEN.arrays[f"pre{number}.input"])
    wide = batch["image"].double()
    stat = torch.stack([wide.mean(), wide.std(), wide.abs().mean()])
    np.testing.assert_allclose(stat, GOLDEN.arrays[f"pre{number}.stat"], rtol=1e-12)


# Computed with OpenCV 5.0: cv2.resize(picture(height, width), (columns, rows)).
OPENCV = [
    ((37, 53), (64, 91), 3365420510),
    ((64, 90), (32, 45), 2433318582),  # both sides halved
    ((64, 90), (32, 46), 1337038501),
    ((131, 97), (20, 15), 776580654),
    ((1, 7), (5, 3), 2350052455),
    ((9, 1), (4, 6), 2885104803),
    ((33, 47), (33, 20), 584624392),
]


@pytest.mark.parametrize(("old", "new", "crc32"), OPENCV, ids=[f"{old}-{new}" for old, new, _ in OPENCV])
def test_resizing_is_opencvs(old, new, crc32):
    assert zlib.crc32(resize(picture(*old), new).tobytes()) == crc32


def test_same_size_is_a_copy():
    image = picture(8, 9)
    same = resize(image, (8, 9))
    assert np.array_equal(same, image)
    assert not np.shares_memory(same, image)
