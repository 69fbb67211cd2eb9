import copy
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from scenes import write_scenes
from vision_ssm.data import EpochSampler
from vision_ssm.data.coco import load_coco, outlines
from vision_ssm.data.dataset import Ragged
from vision_ssm.data.rle import to_rle
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import DataConfig


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def load(data, seed=0, filter_empty=False, **options):
    return load_coco(DataConfig(data=str(data), **options), seed, filter_empty=filter_empty)


def content(root, split="train2017"):
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


def ids(images):
    return [images.id(key) for key in range(len(images))]


# Layouts


def roboflow(scenes, root):
    for name, split in (("train", "train2017"), ("valid", "val2017")):
        shutil.copytree(scenes / split, root / name)
        shutil.copy(scenes / f"annotations/instances_{split}.json", root / name / "_annotations.coco.json")
    return {"data": root}


def images_in(folder):
    def layout(scenes, root):
        shutil.copytree(scenes / "annotations", root / "annotations")
        for split in ("train2017", "val2017"):
            place = root / folder.format(split=split)
            shutil.copytree(scenes / split, place, dirs_exist_ok=True)
        return {"data": root}

    return layout


def two_files(scenes, root):
    """Beside their images, whose names have folders."""
    for name, split in (("a", "train2017"), ("b", "val2017")):
        data = content(scenes, split)
        for image in data["images"]:
            image["file_name"] = f"{split}/{image['file_name']}"
        shutil.copytree(scenes / split, root / split)
        (root / f"{name}.json").write_text(json.dumps(data))
    return {"data": root / "a.json", "val_data": str(root / "b.json")}


LAYOUTS = {
    "coco": images_in("{split}"),
    "images, then splits": images_in("images/{split}"),
    "images": images_in("images"),
    "images beside annotations": images_in("."),
    "roboflow": roboflow,
    "two files": two_files,
    "other split": lambda scenes, root: {**images_in("{split}")(scenes, root), "val_split": "train"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognized(layout, scenes, tmp_path):
    splits = load(**LAYOUTS[layout](scenes, tmp_path))
    assert len(splits.train) == 8
    assert len(splits.val) == (8 if layout == "other split" else 4)
    sample = splits.val.sample(3)
    assert sample["image"].size == tuple(sample["original_size"][::-1])


def test_a_share_is_held_out_where_there_is_no_validation_split(scenes, tmp_path):
    shutil.copy(scenes / "annotations/instances_train2017.json", scenes / "train2017/labels.json")
    first, again, other = (load(scenes / "train2017", seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.val)) == (7, 1)
    assert ids(first.val) == ids(again.val) != ids(other.val)
    assert not set(ids(first.train)) & set(ids(first.val))
    assert first.val.category_ids == first.train.category_ids == (3, 7, 9)
    assert len(load(scenes, val_fraction=0.5).val) == 4


# Targets


def test_targets_are_those_of_the_file(scenes):
    images, data = load(scenes).train, content(scenes)
    assert images.classes == ("disc", "square", "triangle")
    assert images.category_ids == (3, 7, 9)
    assert images.notes == []
    crowds = 0
    for key, image in enumerate(data["images"]):
        sample = images.sample(key)
        entries = [entry for entry in data["annotations"] if entry["image_id"] == image["id"]]
        boxes = np.array([entry["bbox"] for entry in entries])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(sample["boxes"], boxes, atol=1e-5)
        assert [images.category_ids[label] for label in sample["labels"]] == [e["category_id"] for e in entries]
        assert sample["area"].tolist() == [entry["area"] for entry in entries]
        assert outlines(sample["masks"]) == [entry["segmentation"] for entry in entries]
        assert {name: sample[name].dtype.name for name in ("boxes", "labels", "crowd", "area")} == {
            "boxes": "float32", "labels": "int64", "crowd": "bool", "area": "float64"}  # fmt: skip
        crowds += sample["crowd"].sum()
    assert crowds == 1
    assert sum(images.counts()) == len(data["annotations"]) - 1


def test_polygons_are_filled_as_pycocotools_does():
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for _ in range(50):
        polygons = [rng.uniform(-5, 45, 2 * rng.integers(3, 9)).round(2).tolist() for _ in range(rng.integers(1, 4))]
        expected = mask.merge(mask.frPyObjects(polygons, 30, 40))
        assert to_rle(polygons, 30, 40) == {"size": [30, 40], "counts": expected["counts"].decode()}


def test_fingerprint_and_subsets_follow_the_objects(scenes, tmp_path):
    images = load(scenes).train
    assert images.fingerprint == load(scenes).train.fingerprint
    part = images.subset([3, 1])
    assert part.fingerprint not in (images.fingerprint, images.subset([1, 3]).fingerprint)
    assert part.counts() == np.add(images.subset([1]).counts(), images.subset([3]).counts()).tolist()
    root, data = copied(scenes, tmp_path)
    data["annotations"][2]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    assert load(write(root, data)).train.fingerprint != images.fingerprint


def test_ragged_arrays():
    ragged = Ragged(np.arange(12).reshape(6, 2), [2, 0, 3, 1])
    assert [len(part) for part in ragged] == [2, 0, 3, 1]
    assert pickle.loads(pickle.dumps(ragged))[2].tolist() == [[4, 5], [6, 7], [8, 9]]
    some = ragged[np.array([3, 1, 0])]
    assert some.values.tolist() == [[10, 11], [0, 1], [2, 3]]
    assert some.ends.tolist() == [0, 1, 1, 3]
    assert ragged[np.array([], np.int64)].values.shape == (0, 2)


def test_images_without_objects_are_kept_unless_they_are_filtered(scenes, tmp_path):
    root, data = copied(scenes, tmp_path)
    crowded = data["images"][1]["id"]
    data["annotations"] = [
        entry for entry in data["annotations"] if entry["image_id"] != crowded or entry["iscrowd"]
    ]  # fmt: skip
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] != data["images"][4]["id"]]
    Image.new("RGB", (200, 31)).save(root / "train2017" / data["images"][5]["file_name"])
    data["images"][5] |= {"height": 31, "width": 200}
    data["annotations"] = [e for e in data["annotations"] if e["image_id"] != data["images"][5]["id"]]
    data["annotations"].append({"id": 999, "image_id": data["images"][5]["id"], "category_id": 3, "bbox": [1, 1, 9, 9],
                                "segmentation": [[1, 1, 9, 1, 9, 9]]})  # fmt: skip
    write(root, data)
    assert len(load(root).train) == 8
    assert load(root).train.sample(4)["boxes"].shape == (0, 4)
    assert outlines(load(root).train.sample(4)["masks"]) == []
    filtered = load(root, filter_empty=True)
    assert ids(filtered.train) == [data["images"][i]["file_name"] for i in (0, 2, 3, 6, 7)]
    assert filtered.train.notes == ["3 training images without objects or below 32 pixels, left out"]
    assert len(filtered.val) == 4


# Order


def kinds(images, keys):
    sizes = images.targets["original_size"]
    return [bool(sizes[key, 1] >= sizes[key, 0]) for key in keys]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_hold_one_orientation(world, tmp_path):
    sizes = ((20, 30), (30, 20), (24, 24), (28, 18), (18, 29))
    images = load(write_scenes(tmp_path, {"train": 42, "val": 1}, sizes=sizes, masks=False)).train
    free = [list(images.order(3, 1, 0, 42 // world, rank, world)) for rank in range(world)]
    images.grouped = 4
    orders = [list(images.order(3, 1, 0, 42 // world, rank, world)) for rank in range(world)]
    assert list(map(sorted, orders)) == list(map(sorted, free))
    assert orders != free
    assert orders[0] != list(images.order(3, 2, 0, 42 // world, 0, world))
    for order in orders:
        batches = [kinds(images, order[start : start + 4]) for start in range(0, len(order), 4)]
        full = [batch for batch in batches if len(set(batch)) == 1]
        assert batches[: len(full)] == full
        assert len(batches) - len(full) <= 2  # what is left of both
        assert {batch[0] for batch in full} == {True, False}
        assert full != sorted(full)
    sampler = EpochSampler(images, 3, 1, start=8, used=42 // world, rank=world - 1, world=world)
    assert [key for _, key in sampler] == orders[-1][8:]


# Annotations that are wrong


def copied(scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "copy")
    return root, content(root)


def write(root, data, split="train2017"):
    (root / f"annotations/instances_{split}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return root


def setting(**values):
    def change(data):
        data["annotations"][0] |= values

    return change


def dropping(name):
    return lambda data: data["annotations"][0].pop(name)


def twice(kind):
    return lambda data: data[kind].append(copy.deepcopy(data[kind][0]))


RLE = {"size": [96, 128], "counts": "0"}
REFUSED = {
    "image unknown": (setting(image_id=99), "annotation 1: there is no image 99"),
    "category unknown": (setting(category_id=4), "annotation 1: there is no category 4"),
    "image twice": (twice("images"), "image 11 comes twice"),
    "annotation twice": (twice("annotations"), "annotation 1 comes twice"),
    "category twice": (twice("categories"), "category 3 comes twice"),
    "one name": (lambda d: d["categories"].append({"id": 99, "name": "disc"}), "category disc is named twice"),
    "no box": (dropping("bbox"), "annotation 1: bbox must be a list, got None"),
    "no id": (dropping("id"), "annotation number 0: id must be a whole number, got None"),
    "not an object": (lambda d: d["annotations"].append(7), "annotation number {count} is not an object"),
    "three numbers": (setting(bbox=[1, 2, 3]), "box [1, 2, 3] must be four finite numbers"),
    "text in box": (setting(bbox=[1, 2, 3, "x"]), "must be four finite numbers"),
    "infinite": (setting(bbox=[1, 2, 3, float("inf")]), "must be four finite numbers"),
    "huge": (setting(bbox=[1, 2, 3, 10**400]), "must be four finite numbers"),
    "outside": (setting(bbox=[128, 5, 9, 9]), "box [128, 5, 9, 9] is outside of its image (128x96)"),
    "above": (setting(bbox=[5, -9, 9, 9]), "is outside of its image"),
    "iscrowd": (setting(iscrowd=2), "iscrowd 2, must be 0 or 1"),
    "odd polygon": (setting(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "must be an even number of finite numbers"),
    "NaN in polygon": (setting(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "must be an even number of finite"),
    "points": (setting(segmentation=[[[1, 2], [3, 4], [5, 6]]]), "must be an even number of finite numbers"),
    "flat polygon": (setting(segmentation=[1, 2, 3, 4, 5, 6]), "polygon 1 must be"),
    "far": (setting(segmentation=[[1, 2, 1e9, 4, 5, 6]]), "is far outside of its image (128x96)"),
    "no counts": (setting(segmentation={"size": [96, 128]}), "must be run lengths, got None"),
    "short run lengths": (setting(segmentation=RLE), "the run lengths of the mask do not decode"),
    "damaged run lengths": (setting(segmentation={**RLE, "counts": "~~é"}), "do not decode"),
    "negative run lengths": (setting(segmentation={**RLE, "counts": [5, -5, 96 * 128]}), "do not decode"),
    "long run lengths": (setting(segmentation={**RLE, "counts": [5, 96 * 128]}), "do not decode"),
    "mask of other size": (setting(segmentation={**RLE, "size": [9, 9]}), "mask of size [9, 9], but the image has"),
    "no width": (lambda d: d["images"][0].pop("width"), "image 11: width must be a whole number, got None"),
    "size zero": (lambda d: d["images"][0].update(width=0), "image 11: size 0x96, must be 1 to 1,000,000"),
    "no file": (lambda d: d["images"][2].update(file_name="x.png"), "image 13: no file "),
    "no name": (lambda d: d["images"][2].update(file_name="a\0b"), "cannot be the name of a file"),
    "no files": (lambda d: [i.update(file_name=f"x{i['id']}") for i in d["images"]], "found none of its images"),
    "no objects": (lambda d: d.update(annotations=[]), "the training images hold no objects"),
    "only crowds": (lambda d: [e.update(iscrowd=1) for e in d["annotations"]], "training images hold no objects"),
    "no images": (lambda d: d.update(images=[]), "the list of images is empty"),
    "no list": (lambda d: d.pop("annotations"), "it has no list of annotations"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_annotations_are_refused(name, scenes, tmp_path):
    change, message = REFUSED[name]
    root, data = copied(scenes, tmp_path)
    message = message.format(count=len(data["annotations"]))
    change(data)
    with pytest.raises(InputError) as caught:
        load(write(root, data))
    assert message in caught.value.line
    assert "instances_train2017.json" in caught.value.line or "hold no objects" in message


@pytest.mark.parametrize(
    "text", ["{", "[1]", '"text"', "{} x", "[" * 100_000], ids=["{", "list", "text", "more", "deep"]
)
def test_files_of_other_formats_are_refused(text, scenes, tmp_path):
    root, _ = copied(scenes, tmp_path)
    with pytest.raises(InputError, match=r"instances_train2017\.json is not"):
        load(write(root, text))


def test_all_bad_entries_are_listed_at_once(scenes, tmp_path):
    root, data = copied(scenes, tmp_path)
    for entry in data["annotations"]:
        entry["bbox"] = [500, 500, 5, 5]
    write(root, data)
    other = content(root, "val2017")
    other["annotations"][0]["category_id"] = 1
    with pytest.raises(InputError) as caught:
        load(write(root, other, "val2017"))
    count = len(data["annotations"]) + 1
    assert caught.value.line.count("is outside of its image") == min(20, count - 1)
    assert caught.value.line.endswith(f" and {count - 20} more") or "val2017.json: annotation 1" in caught.value.line


FIXED = {
    "flat": (setting(bbox=[5, 5, 0, 9]), 1, "1 boxes without width or height, dropped"),
    "negative": (setting(bbox=[5, 5, 9, -2]), 1, "1 boxes without width or height, dropped"),
    "over the edge": (setting(bbox=[-7, 50, 500, 20]), 0, "1 boxes that extend beyond their image, clipped"),
    "just over the edge": (setting(bbox=[-0.5, 50, 128, 20]), 0, None),
    "no area": (dropping("area"), 0, None),
    "area zero": (setting(area=0), 0, "1 areas that are not positive, replaced by those of the boxes"),
    "no crowd": (dropping("iscrowd"), 0, None),
    "line": (setting(segmentation=[[1, 2, 3, 4]]), 1,
             "1 objects whose outlines have fewer than three points, dropped"),
    "line too": (setting(segmentation=[[1, 2, 3, 4], [1, 1, 9, 1, 9, 9]]), 0, None),
    "run lengths": (setting(segmentation={**RLE, "counts": [96 * 128 - 9, 9]}), 0, None),
    "no outline": (dropping("segmentation"), 0, "1 of {count} objects have no outline: masks are not used"),
    "empty outline": (setting(segmentation=[[]]), 0, "1 of {count} objects have no outline: masks are not used"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_annotations_are_put_right(name, scenes, tmp_path):
    change, left_out, note = FIXED[name]
    root, data = copied(scenes, tmp_path)
    count = len(data["annotations"])
    change(data)
    images = load(write(root, data)).train
    assert images.notes == ([] if note is None else [note.format(count=count)])
    assert len(images.targets["boxes"].values) == count - left_out
    assert ("masks" in images.targets) == ("no outline" not in (note or ""))
    sample = images.sample(0)
    if name == "over the edge":
        assert sample["boxes"][0].tolist() == [0, 50, 128, 70]
    if "area" in name:
        assert sample["area"][0] == pytest.approx(np.prod(data["annotations"][0]["bbox"][2:]))
    if "masks" in sample:
        masks = outlines(sample["masks"])
        assert len(masks) == len(sample["boxes"])
        assert name != "line too" or masks[0] == [[1, 1, 9, 1, 9, 9]]


def test_data_without_outlines_have_no_masks(tmp_path):
    images = load(write_scenes(tmp_path, masks=False)).train
    assert "masks" not in images.targets
    assert images.notes == []


def test_missing_data_are_named(scenes, tmp_path):
    looked_for = r"looked for annotations/instances_train\*\.json and train/_annotations\.coco\.json, or one \.json"
    with pytest.raises(InputError, match=looked_for):
        load(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "x")
    with pytest.raises(InputError, match="no images given"):
        load("")
    with pytest.raises(InputError, match="has no split x"):
        load(scenes, val_split="x")
    with pytest.raises(InputError, match="instances_x"):
        load(scenes, train_split="x")
    with pytest.raises(InputError, match="holds no COCO annotations of val"):
        load(scenes, val_data=str(tmp_path))
    shutil.copytree(scenes, tmp_path / "two")
    shutil.copy(
        tmp_path / "two/annotations/instances_train2017.json", tmp_path / "two/annotations/instances_train.json"
    )
    assert len(load(tmp_path / "two").train) == 8  # an exact name
    (tmp_path / "two/annotations/instances_train.json").rename(tmp_path / "two/annotations/instances_train3.json")
    with pytest.raises(InputError, match=r"several files of split train .*instances_train2017.*--train-split"):
        load(tmp_path / "two")


def test_other_categories_in_validation_are_refused(scenes, tmp_path):
    root, _ = copied(scenes, tmp_path)
    other = content(root, "val2017")
    other["categories"][0]["name"] = "ball"
    with pytest.raises(InputError, match=r"instances_val2017\.json has other categories than"):
        load(write(root, other, "val2017"))


def test_annotations_of_an_image_with_a_bad_field_are_not_said_to_have_none(scenes, tmp_path):
    root, data = copied(scenes, tmp_path)
    data["images"][0]["width"] = "wide"
    with pytest.raises(InputError) as caught:
        load(write(root, data))
    assert "width must be a whole number" in caught.value.line
    assert "there is no image" not in caught.value.line


def test_a_wrong_size_is_found_beforehand_or_in_large_data_sets_when_the_image_is_read(scenes, tmp_path, monkeypatch):
    root, _ = copied(scenes, tmp_path)
    Image.new("RGB", (50, 40)).save(root / "train2017/0002.png")
    with pytest.raises(InputError, match="image 13: it has 50x40 pixels, not 112x112"):
        load(root)
    monkeypatch.setattr("vision_ssm.data.coco._MEASURED", 7)
    images = load(root).train
    with pytest.raises(InputError, match=r"0002\.png: it has 50x40 pixels, the annotations say 112x112"):
        images.sample(2)


@pytest.mark.parametrize("size", [(96, 128), (128, 96)], ids=["as stored", "as shown"])
def test_orientation_is_the_one_that_the_annotations_were_made_in(size, scenes, tmp_path):
    """The stored image is 128 wide and 96 high; its tag turns it."""
    root, data = copied(scenes, tmp_path)
    stored = Image.open(root / "train2017/0000.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(root / "train2017/0000.png", exif=exif)
    data["images"][0] |= {"height": size[0], "width": size[1]}
    for entry in data["annotations"]:
        entry["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        entry["bbox"] = [1, 1, 9, 9]
    image = load(write(root, data)).train.sample(0)["image"]
    expected = stored if size == (96, 128) else stored.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(image, expected)
