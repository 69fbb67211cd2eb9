"""What people have and do: splits, files, names, odd images, data that moved."""

import dataclasses
import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from short_runs import SHORT
from vision_ssm.data import load_splits, open_image
from vision_ssm.data.dataset import equal_images
from vision_ssm.data.module import epoch_images
from vision_ssm.data.sources import read_folder
from vision_ssm.errors import InputError, printable
from vision_ssm.recipes import small
from vision_ssm.recipes.config import ClassDataConfig
from vision_ssm.tasks import load, train


def fill(root, files, size=(8, 8)):
    generator = np.random.default_rng(0)
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg", ".jfif", ".avif", ".JPG"):
            pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
            form = {".jfif": "jpeg", ".jpg": "jpeg", ".JPG": "jpeg", ".avif": "avif"}.get(path.suffix, "png")
            Image.fromarray(pixels).save(path, form)
        else:
            path.write_text("")
    return root


def ids(images):
    return sorted(images.id(i) for i in range(len(images)))


def classes_of(*folders, each=3):
    return [f"{folder}/{i}.png" for folder in folders for i in range(each)]


@pytest.mark.parametrize(
    ("folders", "classes", "val"),
    [
        (["Training/cat", "Training/dog", "Testing/cat", "Testing/dog"], ("cat", "dog"), 6),
        (["Train/cat", "Train/dog", "Val/dog"], ("cat", "dog"), 3),
        (["TRAIN/a", "TRAIN/b", "valid/a"], ("a", "b"), 3),
        (["train/a", "train/b", "annotations/x"], ("a", "b"), None),
        (["train", "car", "bus"], ("bus", "car", "train"), None),
        (["train/2023", "car", "bus"], ("bus", "car", "train"), None),
        (["test", "control"], ("control", "test"), None),
    ],
    ids=["Training-Testing", "Train-Val", "upper-case", "others", "a-class-train", "deep-classes", "a-class-test"],
)
def test_splits_are_recognized_by_what_they_hold(folders, classes, val, tmp_path):
    names = [name for name in classes_of(*folders) if not name.startswith("annotations")]
    fill(tmp_path, names)
    (tmp_path / "annotations" / "x").mkdir(parents=True) if "annotations/x" in folders else None
    splits = load_splits(ClassDataConfig(data=str(tmp_path)))
    assert splits.train.classes == splits.val.classes == classes
    if val is not None:
        assert len(splits.val) == val


def test_files_that_count(tmp_path):
    root = fill(
        tmp_path / "data", [*classes_of("cat", "dog"), "cat/a.jfif", "cat/B.JPG", "cat/c.avif", "cat/notes.txt"]
    )
    fill(root, ["cat/.ipynb_checkpoints/0.png", "cat/._0.png", "__MACOSX/cat/0.png", "dog/Thumbs.db", "dog/x.txt"])
    elsewhere = fill(tmp_path / "elsewhere", ["linked.png", "deep/linked.png"])
    os.symlink(elsewhere, root / "cat" / "link")
    os.symlink(root / "cat", root / "cat" / "loop")
    os.symlink(root, root / "cat" / "up")
    os.symlink(root / "dog", root / "cat" / "other")
    os.symlink(fill(tmp_path / "owls", ["0.png"]), root / "owl")
    images = read_folder(root)
    assert images.classes == ("cat", "dog", "owl")
    assert [name for name in ids(images) if name.startswith("cat")] == [
        *("cat/0.png", "cat/1.png", "cat/2.png", "cat/B.JPG", "cat/a.jfif", "cat/c.avif"),
        *("cat/link/deep/linked.png", "cat/link/linked.png"),
    ]
    assert all(images.sample(i)["image"].mode == "RGB" for i in range(len(images)))
    assert images.notes == ["files that are not images, skipped: 2 .txt, 1 .db"]


def test_equal_training_and_validation_images_are_noticed(tmp_path):
    fill(tmp_path, classes_of("train/a", "train/b", "val/a", "val/b"))
    (tmp_path / "val" / "b" / "copy.png").write_bytes((tmp_path / "train" / "b" / "1.png").read_bytes())
    splits = load_splits(ClassDataConfig(data=str(tmp_path)))
    assert equal_images(splits.train, splits.val) == [(os.path.join("b", "1.png"), os.path.join("b", "copy.png"))]


NAMES = ["[tame]", "[x]", "größe", "日本語", "a b", 'quo"te', "line\nbreak", "\x1b[31mred", "semi;colon"]


def test_any_name_trains_resumes_and_predicts(tmp_path, capsys):
    root = tmp_path / "data"
    fill(root, [f"{name}/{i}.png" for name in NAMES for i in range(2)])
    os.makedirs(os.fsencode(root) + b"/bytes\xff")
    for i in range(2):
        with open(os.fsencode(root) + b"/bytes\xff/%d\xfe.png" % i, "wb") as file:
            Image.new("RGB", (8, 8)).save(file, "png")
    config = small(data=str(root), **SHORT | dict(epochs=1))
    results = train(config, tmp_path / "run")
    assert len(results.classes) == len(NAMES) + 1
    json.loads((tmp_path / "run" / "results.json").read_text(errors="surrogateescape"))
    train(config, tmp_path / "run", resume=True)
    task = load(tmp_path / "run", "cpu")
    assert set(task.spec.classes) == {*NAMES, os.fsdecode(b"bytes\xff")}


def test_control_characters_are_escaped():
    assert printable("a\nb\x1b[0m\udcff é 日") == "a\\nb\\x1b[0m\\udcff é 日"
    assert InputError("cannot read\x07 x").line == "cannot read\\x07 x"


def odd_exif(path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "no rational"
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    content = path.read_bytes()
    for description, resolution in (
        (b"\x01\x0e\x00\x02", b"\x01\x1a\x00\x02"),
        (b"\x0e\x01\x02\x00", b"\x1a\x01\x02\x00"),
    ):
        content = content.replace(description, resolution)  # a text where a number belongs
    path.write_bytes(content)


def test_exif_of_wrong_types_is_no_error(tmp_path):
    odd_exif(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.jpg").mode == "RGB"


def test_decoders_may_raise_anything(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: (_ for _ in ()).throw(RuntimeError("of a codec")))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: (_ for _ in ()).throw(RuntimeError("of a codec")))
    with pytest.raises(InputError, match=r"cannot read image .*a\.png: of a codec"):
        open_image(tmp_path / "a.png")


def test_images_beyond_the_limit_need_an_option(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="--max-pixels raises the limit"):
        open_image(tmp_path / "a.png", max_pixels=500)
    limit = Image.MAX_IMAGE_PIXELS
    assert open_image(tmp_path / "a.png", max_pixels=600).size == (30, 20)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("images", "batch", "accum", "world", "used"),
    [(180, 64, 1, 1, 180), (128, 64, 1, 1, 128), (131, 64, 1, 1, 128), (181, 64, 1, 1, 180), (180, 16, 4, 1, 128),
     (361, 64, 1, 2, 180)],
    ids=str,
)  # fmt: skip
def test_a_large_last_batch_is_kept(images, batch, accum, world, used):
    assert epoch_images(images, batch, accum, world) == used


def test_data_that_moved_is_taken_up_again(tmp_path, stop_at):
    from vision_ssm.engine.recorder import Stopped

    fill(tmp_path / "old", classes_of("cat", "dog", each=8))
    config = small(data=str(tmp_path / "old"), **SHORT)
    stop_at(0, 1)
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", about={"recipe": "mine"})
    (tmp_path / "old").rename(tmp_path / "new")
    moved = dataclasses.replace(config, data=str(tmp_path / "new"))
    Image.new("RGB", (50, 50)).save(tmp_path / "new" / "cat" / "0.png")  # another file of that name
    with pytest.raises(InputError, match="names, labels or file sizes of the images differ"):
        train(moved, tmp_path / "run", resume=True)
    fill(tmp_path / "new", classes_of("cat", "dog", each=8))
    train(moved, tmp_path / "run", resume=True)
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (values["config"]["data"], values["recipe"]) == (str(tmp_path / "new"), "mine")
