import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scenes import write_masks
from vision_ssm.data.pixels import train_transform
from vision_ssm.data.segmentation import MaskFormat, class_colors, load_masks, read_mask, read_masks
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import MaskDataConfig


@pytest.fixture
def scenes(tmp_path):
    return write_masks(tmp_path / "scenes", {"train": 3, "val": 2})


def load(data, **options):
    return load_masks(MaskDataConfig(data=str(data), **options))


def mask_of(images, key):
    return images.sample(key)["mask"]


def save(array, path, **options):
    Image.fromarray(np.asarray(array)).save(path, **options)


def move(root, image, mask):
    """Rename images/SPLIT and masks/SPLIT."""
    for split in ("train", "val"):
        for folder, pattern in (("images", image), ("masks", mask)):
            target = root / pattern.format(split=split)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / folder / split, target)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{split}", "annotations/{split}"),
        ("{split}/images", "{split}/masks"),
        ("{split}ing/image", "{split}ing/labels"),
        ("JPEGImages/{split}", "SegmentationClass/{split}"),
    ],
)
def test_layouts(scenes, image, mask):
    if "ing" in image:
        image, mask = (pattern.replace("ing", "") for pattern in (image, mask))
    move(scenes, image, mask)
    splits = load(scenes)
    assert (len(splits.train), len(splits.val)) == (3, 2)
    assert splits.train.classes == ("ground", "disc", "square", "triangle")
    sample = splits.val.sample(1)
    assert sample["mask"].shape == sample["image"].size[::-1]
    assert set(np.unique(sample["mask"])) <= {-1, 0, 1, 2, 3}
    masks = np.concatenate([mask_of(splits.train, key).ravel() for key in range(3)])
    assert splits.train.counts() == [(masks == label).sum() for label in range(4)]


def test_one_folder_endings_and_subfolders(scenes, tmp_path):
    root = tmp_path / "other"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for path in (scenes / "images" / "train").iterdir():
        (root / "images" / "deep").mkdir(exist_ok=True)
        (root / "masks" / "deep").mkdir(exist_ok=True)
        shutil.copy(path, root / "images" / "deep")
        shutil.copy(scenes / "masks" / "train" / f"{path.stem}.png", root / "masks" / "deep" / f"{path.stem}_mask.png")
    splits = load(root, val_fraction=0.34)
    assert (len(splits.train), len(splits.val)) == (2, 1)
    assert splits.train.classes == ("0", "1", "2")  # the labels that occur
    alone = read_masks(root / "images", splits.train.targets["mask"].format, splits.train.classes)
    assert len(alone) == 3


def test_labels_are_read_as_the_files_hold_them(tmp_path):
    labels = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    palette.putdata(labels.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    save(labels, tmp_path / "gray.png")
    save(labels.astype(np.uint16) * 200, tmp_path / "deep.png")
    save(np.repeat(labels[..., None], 3, 2), tmp_path / "equal.png")
    save(labels == 1, tmp_path / "bits.png")
    for name in ("palette", "gray", "equal"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png"), labels), name
    assert read_mask(tmp_path / "deep.png").max() == 51_000
    assert read_mask(tmp_path / "bits.png").tolist() == [[0, 1, 0], [0, 0, 1]]
    save(np.dstack([labels, labels, labels * 0]), tmp_path / "color.png")
    with pytest.raises(InputError, match=r"color\.png is a color image; list its colors"):
        read_mask(tmp_path / "color.png")


def test_colors(scenes):
    colors = {0: (10, 20, 30), 1: (200, 0, 0), 2: (0, 200, 0), 3: (0, 0, 200), 255: (0, 0, 0)}
    expected = [mask_of(load(scenes).train, key) for key in range(3)]
    for path in scenes.glob("masks/*/*.png"):
        labels = np.asarray(Image.open(path))
        save(np.array([colors.get(i, (1, 1, 1)) for i in range(256)], np.uint8)[labels], path)
    lines = ["10 20 30 ground", "200 0 0 disc", "0,200,0,square", "0\t0\t200\ttriangle", "0 0 0"]
    (scenes / "classes.txt").write_text("\n".join(lines))
    splits = load(scenes)
    assert splits.train.classes == ("ground", "disc", "square", "triangle")
    for key, mask in enumerate(expected):
        assert np.array_equal(mask_of(splits.train, key), mask)
    assert class_colors(MaskDataConfig(data=str(scenes)))[:2] == ("#0a141e", "#c80000")
    format = splits.train.targets["mask"].format
    assert np.array_equal(np.asarray(format.write(np.array([[0, 3]]))), [[0, 3]])
    again = read_masks(scenes, format, splits.train.classes)
    assert np.array_equal(mask_of(again, 0), mask_of(splits.val, 0))
    (scenes / "classes.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"masks.train.0000\.png holds unknown colors 10 20 30"):
        load(scenes)


def test_ignored_labels_leave_the_others_in_order(scenes):
    (scenes / "classes.txt").write_text("disc\nsquare\ntriangle\n")
    before = np.asarray(Image.open(scenes / "masks" / "train" / "0000.png"))
    splits = load(scenes, ignore_labels=(0, 255))
    assert splits.train.targets["mask"].format == MaskFormat((1, 2, 3), (0, 255))
    mask = mask_of(splits.train, 0)
    assert np.array_equal(mask == -1, (before == 0) | (before == 255))
    assert np.array_equal(mask[before == 2], np.ones((before == 2).sum()))
    assert np.array_equal(np.asarray(splits.train.targets["mask"].format.write(np.array([[0, 2]]))), [[1, 3]])


def test_labels_besides_255_and_all_of_them(scenes):
    (scenes / "classes.txt").write_text("ground\ndisc\nsquare\n")
    assert load(scenes, ignore_labels=(3,)).train.targets["mask"].format == MaskFormat((0, 1, 2), (3, 255))
    for path in scenes.glob("masks/*/*.png"):
        save(np.where(np.asarray(Image.open(path)) > 0, np.uint8(255), np.uint8(0)), path)
    (scenes / "classes.txt").write_text("ground\nshape\n")
    splits = load(scenes, ignore_labels=())
    assert splits.train.targets["mask"].format == MaskFormat((0, 255))
    assert splits.train.classes == ("ground", "shape")
    assert set(np.unique(mask_of(splits.train, 0))) == {0, 1}


def test_all_that_is_wrong_is_reported_together(scenes):
    train = scenes / "masks" / "train"
    save(np.zeros((5, 7), np.uint8), train / "0000.png")
    save(np.full_like(np.asarray(Image.open(train / "0001.png")), 9), train / "0001.png")
    (train / "0002.png").write_bytes(b"nothing")
    (scenes / "images" / "val" / "0000.jpg").unlink()
    shutil.copy(scenes / "images" / "val" / "0001.jpg", scenes / "images" / "val" / "more.jpg")
    shutil.copy(scenes / "images" / "val" / "0001.jpg", scenes / "images" / "val" / "0001.png")
    with pytest.raises(InputError) as caught:
        load(scenes)
    for part in (
        "0000.png has 7x5 pixels, its image 128x96",
        "0001.png holds unknown labels 9",
        "cannot read mask",
        "no image for mask",
        "no mask for image",
        "have the same name",
    ):
        assert part in caught.value.line


def test_masks_without_a_pixel_that_counts(scenes):
    for split in ("train", "val"):
        path = scenes / "masks" / split / "0001.png"
        save(np.full_like(np.asarray(Image.open(path)), 255), path)
    with pytest.raises(InputError, match=r"0001\.png has only ignored pixels.*0001\.png has"):
        load(scenes)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda root: shutil.rmtree(root / "masks"), {}, "holds no images and masks; looked for"),
        (lambda root: None, {"val_split": "dev"}, "holds no images and masks of dev"),
        (lambda root: (root / "classes.txt").write_text("one"), {}, "must name at least two classes"),
        (lambda root: (root / "classes.txt").write_text("a\na\nb"), {}, "names a twice"),
        (lambda root: (root / "classes.txt").write_text("1 2 3 a\nb"), {}, "has colors in some lines only"),
        (lambda root: (root / "classes.txt").write_text("1 2 3 a\n1 2 3 b"), {}, "lists a color twice"),
        (lambda root: (root / "classes.txt").write_text("a\nb"), {}, "holds unknown labels 2"),
        (
            lambda root: (root / "classes.txt").unlink(),
            {"ignore_labels": (0, 1, 2, 255)},
            "1 label that is not ignored",
        ),
    ],
    ids=["no-masks", "no-split", "one-class", "twice", "some-colors", "equal-colors", "few-classes", "one-label"],
)
def test_what_is_refused(scenes, change, options, message):
    change(scenes)
    with pytest.raises(InputError, match=message):
        load(scenes, **options)


def test_orientation_of_an_image_and_its_mask(scenes):
    path = scenes / "images" / "train" / "0000.jpg"
    image = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright, the image has 96x128 pixels
    image.save(path, exif=exif)
    assert load(scenes).train.sample(0)["image"].size == image.size  # the mask is as stored
    mask = scenes / "masks" / "train" / "0000.png"
    save(np.rot90(np.asarray(Image.open(mask)), -1), mask)
    assert load(scenes).train.sample(0)["image"].size == image.size[::-1]


def test_change_of_the_masks_changes_the_fingerprint(scenes):
    before = load(scenes).train.fingerprint
    assert load(scenes).train.fingerprint == before
    path = scenes / "masks" / "train" / "0000.png"
    labels = np.array(Image.open(path))
    labels[50:60, 50:60] = 3
    save(labels, path)
    assert load(scenes).train.fingerprint != before


def sample(height, width, label=0):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return {"image": image, "id": "x", "mask": np.full((height, width), label, np.int16)}


@pytest.mark.parametrize("size", [(40, 50), (90, 31), (64, 64), (200, 333)])
def test_training_samples_have_one_size(size):
    how = dict(mean=(0.5,) * 3, std=(0.2,) * 3, test_size=(96, 64), scale=(0.5, 2.0), crop_size=64)
    change = train_transform(**how, max_class_share=0.75, photometric=True, hflip=0.5)
    for _ in range(5):
        changed = change(sample(*size, label=2))
        assert changed["image"].shape == (3, 64, 64)
        assert changed["mask"].shape == (64, 64)
        assert set(changed["mask"].unique().tolist()) <= {-1, 2}
        added = changed["mask"] == -1
        assert (changed["image"][:, added] == 0).all()


def test_image_and_mask_move_together():
    content = sample(60, 80)
    content["mask"] = np.asarray(content["image"])[..., 0].astype(np.int16)
    how = dict(mean=(0.0,) * 3, std=(1.0,) * 3, test_size=(80, 60), scale=(1.0, 1.0), crop_size=32)
    change = train_transform(**how, max_class_share=1.0, photometric=False, hflip=0.5)
    for seed in range(4):
        torch.manual_seed(seed)
        changed = change(dict(content))
        assert torch.equal((255 * changed["image"][0]).round().long(), changed["mask"])


def test_crops_without_a_dominant_class_are_sought():
    mask = np.zeros((64, 256), np.int16)
    mask[:, 200:] = 1
    change = train_transform(
        mean=(0.5,) * 3, std=(0.2,) * 3, test_size=(256, 64), scale=(1.0, 1.0), crop_size=64, max_class_share=0.75,
        photometric=False, hflip=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    crops = [change({**sample(64, 256), "mask": mask})["mask"] for _ in range(20)]
    mixed = sum(bool(0.25 <= (crop == 1).float().mean() <= 0.75) for crop in crops)
    assert mixed > 14  # without seeking about 4
