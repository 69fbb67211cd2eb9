import pickle

import numpy as np
import pytest
from PIL import Image

from vision_ssm.data import load_digits, load_splits
from vision_ssm.data.dataset import Strings
from vision_ssm.data.sources import read_folder
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import ClassDataConfig


def fill(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(folder / name / f"{i:03}.png")
    return folder


def load(root, **options):
    return load_splits(ClassDataConfig(data=str(root), **options))


def ids(images):
    return {images.id(i) for i in range(len(images))}


def test_strings_are_kept_as_arrays():
    names = ["a.png", "", "größe/日本.jpg", "\udcff.png", "line\nbreak"]
    strings = Strings(names)
    assert list(strings) == names
    assert pickle.loads(pickle.dumps(strings))[2] == names[2]
    with pytest.raises(IndexError):
        strings[5]


def test_a_million_names_cost_their_bytes():
    strings = Strings(f"class {i % 1000}/{i}.jpg" for i in range(100_000))
    assert len(pickle.dumps(strings)) < 100_000 * 28


def test_digits_keep_their_split():
    splits = load_digits()
    assert (len(splits.train), len(splits.val)) == (1437, 360)
    assert not ids(splits.train) & ids(splits.val)
    assert min(splits.val.counts()) >= 35
    assert splits.val.fingerprint == load_digits().val.fingerprint
    assert max(np.asarray(splits.train.sample(i)["image"]).max() for i in range(20)) == 255


def test_held_out_share_is_stratified_and_disjoint(tmp_path):
    splits = load(fill(tmp_path, cat=40, dog=10, owl=1), val_fraction=0.2)
    assert splits.train.classes == ("cat", "dog", "owl")
    assert splits.train.counts() == [32, 8, 1]
    assert splits.val.counts() == [8, 2, 0]
    assert not ids(splits.train) & ids(splits.val)
    again = load(tmp_path, val_fraction=0.2)
    other = load_splits(ClassDataConfig(data=str(tmp_path), val_fraction=0.2), seed=1)
    assert ids(splits.val) == ids(again.val) != ids(other.val)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders_are_recognised(name, tmp_path):
    fill(tmp_path / "train", cat=3, dog=3)
    fill(tmp_path / name, dog=2)
    splits = load(tmp_path)
    assert (len(splits.train), splits.val.counts()) == (6, [0, 2])


def test_nested_hidden_and_other_files(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    fill(tmp_path / "cat" / "2024", deep=1)
    fill(tmp_path, **{".cache": 1, "__MACOSX": 1})
    (tmp_path / "cat" / "notes.txt").write_text("")
    assert read_folder(tmp_path).counts() == [3, 2]


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        pytest.param({}, {}, "no class folders", id="empty"),
        pytest.param({"cat": 3}, {}, "one class only", id="one-class"),
        pytest.param({"cat": 0, "dog": 0}, {}, "no images", id="no-images"),
        pytest.param({"cat": 3, "dog": 0}, {}, "no images in .* for dog", id="empty-class"),
        pytest.param(
            {"cat": 3, "dog": 3}, {"val_fraction": 1.5}, "--val-fraction must be above 0 and below 1", id="bad-fraction"
        ),
        pytest.param({"cat": 1, "dog": 1}, {"val_fraction": 0.5}, "too few images", id="too-few"),
    ],
)
def test_unusable_folders(layout, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(fill(tmp_path, **layout), **options)


def test_missing_folder_and_unknown_validation_class(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    root, val = fill(tmp_path / "a", cat=2, dog=2), fill(tmp_path / "b", cat=1, yak=1)
    with pytest.raises(InputError, match="yak"):
        load(root, val_data=str(val))
