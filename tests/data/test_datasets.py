import numpy as np
import pytest
from PIL import Image

from vision_ssm.data import load_digits, load_folder, read_folder
from vision_ssm.errors import InputError


def fill(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(folder / name / f"{i:03}.png")
    return folder


def test_digits_keep_their_split():
    splits = load_digits()
    assert (len(splits.train), len(splits.val)) == (1437, 360)
    assert not set(splits.train.names) & set(splits.val.names)
    assert min(splits.val.counts()) >= 35
    assert splits.val.fingerprint() == load_digits().val.fingerprint()
    assert max(np.asarray(splits.train.load(i)).max() for i in range(20)) == 255


def test_held_out_share_is_stratified_and_disjoint(tmp_path):
    splits = load_folder(fill(tmp_path, cat=40, dog=10, owl=1), val_fraction=0.2)
    assert splits.train.classes == ("cat", "dog", "owl")
    assert splits.train.counts() == [32, 8, 1]
    assert splits.val.counts() == [8, 2, 0]
    assert not set(splits.train.names) & set(splits.val.names)
    again = load_folder(tmp_path, val_fraction=0.2)
    other = load_folder(tmp_path, val_fraction=0.2, seed=1)
    assert splits.val.names == again.val.names != other.val.names


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders_are_recognised(name, tmp_path):
    fill(tmp_path / "train", cat=3, dog=3)
    fill(tmp_path / name, dog=2)
    splits = load_folder(tmp_path)
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
        pytest.param({"cat": 3, "dog": 3}, {"val_fraction": 1.5}, "between 0 and 1", id="bad-fraction"),
        pytest.param({"cat": 1, "dog": 1}, {"val_fraction": 0.5}, "too few images", id="too-few"),
    ],
)
def test_unusable_folders(layout, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_folder(fill(tmp_path, **layout), **options)


def test_missing_folder_and_unknown_validation_class(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_folder(tmp_path / "nowhere")
    root, val = fill(tmp_path / "a", cat=2, dog=2), fill(tmp_path / "b", cat=1, yak=1)
    with pytest.raises(InputError, match="yak"):
        load_folder(root, val)
