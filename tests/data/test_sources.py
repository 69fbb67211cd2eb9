"""Tar files, webdataset shards and Hugging Face tables, made here from pictures, as training data."""

import dataclasses
import json
import sys
import tarfile

import pytest
import safetensors.torch
import torch
from pictures import CLASSES, Number, fit_in_two_processes, number_of, picture, write_tar

import vision_ssm.engine.fit as engine
from short_runs import SHORT, interrupt
from vision_ssm.cli import main
from vision_ssm.data import ImageDataset, ImageStream, Splits, load_splits
from vision_ssm.data.module import ImageData
from vision_ssm.data.sources import expand_braces
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.recipes.config import ClassDataConfig
from vision_ssm.tasks import train


def class_folders(start, each):
    return {f"{c}/{i}.png": picture(start + each * k + i) for k, c in enumerate(CLASSES) for i in range(each)}


def one_tar_per_split(root):
    write_tar(root / "train.tar", class_folders(0, 4))
    write_tar(root / "val.tar", class_folders(100, 2))
    return dict(data=str(root))


def one_tar_per_class(root):
    for split, start, each in (("training", 0, 4), ("validation", 100, 2)):
        for k, c in enumerate(CLASSES):
            write_tar(root / split / f"{c}.tar", {f"{i}.png": picture(start + each * k + i) for i in range(each)})
    return dict(data=str(root))


def tar_of_tars(root):
    for split, start, each in (("train", 0, 4), ("val", 100, 2)):
        parts = {}
        for k, c in enumerate(CLASSES):
            inner = write_tar(root / "x.tar", {f"{i}.png": picture(start + each * k + i) for i in range(each)})
            parts[f"{c}.tar"] = inner.read_bytes()
            inner.unlink()
        write_tar(root / f"{split}.tar", parts)
    return dict(data=str(root))


def shards(root):
    for split, start, each, count in (("train", 0, 4, 3), ("val", 100, 2, 1)):
        samples = [(start + each * k + i, k) for k in range(3) for i in range(each)]
        for s in range(count):
            members = {}
            for number, k in samples[s::count]:
                members[f"{number:04}.cls"] = str(k).encode()
                members[f"{number:04}.PNG"] = picture(number)
                members[f"{number:04}.seg.txt"] = b"else"
            write_tar(root / f"{split}-{s:02}.tar", members)
    names = root / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    splits = {"validation": {"filenames": ["val-00.tar"], "shard_lengths": [6], "num_samples": 6}}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return dict(data=str(root), train_split="train-{00..02}.tar", class_map=names)


def damaged_info(root):
    values = shards(root)
    (root / "_info.json").write_text("{")
    return {**values, "train_split": None}


def binary_names(root):
    values = shards(root)
    values["class_map"].write_bytes(b"\xff\xfe\x00")
    return values


def table(root):
    datasets = pytest.importorskip("datasets")
    for split, start, each in (("train", 0, 4), ("validation", 100, 2)):
        rows = [(start + each * k + i, k) for k in range(3) for i in range(each)]
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
        columns = {"image": [{"bytes": picture(n), "path": None} for n, _ in rows], "label": [k for _, k in rows]}
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        (root / "table").mkdir(exist_ok=True, parents=True)
        made.to_parquet(root / "table" / f"{split}.parquet")
    return dict(data=f"hfds/{root / 'table'}", cache_dir=root / "cache")


SOURCES = [one_tar_per_split, one_tar_per_class, tar_of_tars, shards, table]
every_source = pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)


def load(values):
    return load_splits(ClassDataConfig(**values))


def config_for(values):
    return small(**SHORT, **values)


@every_source
def test_every_image_with_its_class(make, tmp_path):
    splits = load(make(tmp_path))
    assert splits.train.classes == splits.val.classes == CLASSES
    for images, start, each in ((splits.train, 0, 4), (splits.val, 100, 2)):
        samples = [images.sample(i) for i in range(len(images))]
        found = {number_of(sample["image"]): sample["label"] for sample in samples}
        assert found == {start + each * k + i: k for k in range(3) for i in range(each)}
        assert len({sample["id"] for sample in samples}) == len(images)
    assert load(make(tmp_path / "again")).train.fingerprint == splits.train.fingerprint


@every_source
@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_twice_and_none_lost(make, workers, tmp_path):
    splits = load(make(tmp_path))

    data = ImageData(splits, Number(), Number(), small(batch_size=4, num_workers=workers))
    seen = [n for batch in data.train_dataloader() for n in batch["image"].flatten().tolist()]
    assert sorted(seen) == list(range(12))
    assert seen != sorted(seen)
    assert [n for batch in data.val_dataloader() for n in batch["image"].flatten().tolist()] == [*range(100, 106)]


@pytest.mark.parametrize("make", [one_tar_per_class, shards, table], ids=lambda make: make.__name__)
def test_stopped_and_resumed_run_is_bit_identical(make, tmp_path, monkeypatch):
    config = config_for(make(tmp_path / "data"))
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train(config, whole)

    interrupt(monkeypatch, 1, 0)
    with pytest.raises(Stopped):
        train(config, parts)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    train(dataclasses.replace(config, num_workers=2), parts, resume=True)
    one, other = (safetensors.torch.load_file(f.last) for f in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_source
def test_held_out_share(make, tmp_path):
    splits = load({**make(tmp_path), "val_fraction": 0.25})
    assert (splits.train.counts(), splits.val.counts()) == ([3, 3, 3], [1, 1, 1])
    train_ids, val_ids = ({images.id(i) for i in range(len(images))} for images in (splits.train, splits.val))
    assert not train_ids & val_ids


def test_unreadable_members_are_named_and_replaced(tmp_path):
    data = one_tar_per_split(tmp_path)
    write_tar(tmp_path / "train.tar", class_folders(0, 4) | {"oak/2.png": b"no picture"})
    folder = RunFolder(tmp_path / "run")
    train(config_for(data), folder)
    assert folder.unreadable.read_text().startswith("oak/2.png\tcannot read image oak/2.png: ")


def test_command_trains_resumes_and_is_evaluated(tmp_path, monkeypatch, capsys):
    data = one_tar_per_split(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    words = [
        "--model",
        "test_convnext",
        "--img-size",
        "32",
        "--batch-size",
        "4",
        "--num-workers",
        "0",
        "--device",
        "cpu",
    ]
    words += ["--data", "data", "--epochs", "1", "--out", "run"]
    assert main(["train", "classify", *words]) == 0
    assert "12 training and 6 validation images in 3 classes" in capsys.readouterr().out
    monkeypatch.chdir(data["data"])
    assert main(["eval", "../run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert main(["eval", "../run", "--data", "train.tar", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert main(["train", "--resume", "../run"]) == 0


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        pytest.param(None, {}, "give --data PATH", id="nowhere"),
        pytest.param(None, {"data": "nothing"}, "no such file or folder: nothing", id="no-folder"),
        pytest.param(one_tar_per_split, {"val_split": "check"}, "has no split check", id="no-split"),
        pytest.param(shards, {"class_map": None}, "give --num-classes or --class-map", id="unnamed-classes"),
        pytest.param(
            shards, {"class_map": None, "num_classes": 2}, "has label 2, but there are 2 classes", id="too-few-classes"
        ),
        pytest.param(shards, {"train_split": "train-{00..04}.tar"}, "train-03.tar, ", id="shards"),
        pytest.param(shards, {"train_split": "trian"}, "has no split trian", id="no-split-of-shards"),
        pytest.param(damaged_info, {}, "_info.json does not list the shards of splits", id="damaged-info"),
        pytest.param(binary_names, {}, "must name at least two classes", id="binary-class-map"),
        pytest.param(shards, {"target_key": "label"}, "has no .json", id="no-json"),
        pytest.param(table, {"train_split": "trian"}, "trian", id="no-split-of-a-table"),
        pytest.param(table, {"input_key": "img"}, "no column img; --input-key takes image, label", id="no-column"),
        pytest.param(table, {"data": "hfds/./nowhere"}, "cannot read the splits of hfds/./nowhere", id="no-table"),
    ],
)
def test_bad_sources_get_one_line(make, changes, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = make(tmp_path) if make else {}
    with pytest.raises(InputError) as caught:
        load(data | changes)
    assert message in caught.value.line


@pytest.mark.parametrize("damage", ["truncated-header", "truncated-content", "bad-header", "compressed", "text"])
def test_damaged_tars(damage, tmp_path):
    data = one_tar_per_split(tmp_path)
    path = tmp_path / "train.tar"
    if damage == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tmp_path / "val.tar", "val.tar")
    else:
        whole = path.read_bytes()
        half = whole[:1024] + b"?" * 512 + whole[1536:]
        parts = {"truncated-header": whole[:1500], "truncated-content": whole[:1700], "bad-header": half}
        path.write_bytes(parts.get(damage, b"hello" * 200))
    with pytest.raises(InputError, match="uncompressed tar file"):
        load(data)


def test_missing_library(tmp_path, monkeypatch):
    data = table(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vision-ssm\[data\]'"):
        load(data)


@pytest.mark.parametrize("pattern", [True, False], ids=["pattern", "by-their-names"])
def test_shards_are_found(pattern, tmp_path):
    values = shards(tmp_path)
    (tmp_path / "_info.json").unlink()
    if pattern:
        changes = dict(
            data=str(tmp_path / "train-{00..02}.tar"), val_data=str(tmp_path / "val-00.tar"), train_split=None
        )
    else:
        changes = dict(train_split=None)
    splits = load(values | changes)
    assert isinstance(splits.train, ImageDataset)
    assert (len(splits.train), len(splits.val)) == (12, 6)


def test_a_pattern_names_the_training_images_only(tmp_path):
    values = shards(tmp_path)
    for pattern in ("train-{00..02}.tar", "train-01.tar"):
        splits = load(dict(data=str(tmp_path / pattern), class_map=values["class_map"]))
        train_ids, val_ids = ({images.id(i) for i in range(len(images))} for images in (splits.train, splits.val))
        assert val_ids
        assert not train_ids & val_ids


def test_tables_have_any_splits_and_places(tmp_path):
    values = table(tmp_path)
    other = table(tmp_path / "other")
    both = load({**values, "val_data": other["data"]})
    assert both.val.fingerprint == load(other).val.fingerprint
    (tmp_path / "table" / "validation.parquet").rename(tmp_path / "table" / "test.parquet")
    assert len(load({**values, "cache_dir": tmp_path / "again"}).val) == 6
    (tmp_path / "table" / "test.parquet").unlink()
    assert len(load({**values, "cache_dir": tmp_path / "third"}).val) == 3  # held out
    forced = dict(data=str(tmp_path / "table"), data_format="hfids", val_data=other["data"], train_num_samples=12)
    assert isinstance(load({**forced, "cache_dir": tmp_path / "fourth"}).train, ImageStream)


def test_a_format_can_be_forced(tmp_path):
    with pytest.raises(InputError, match=r"train\.tar is not a folder"):
        load({**one_tar_per_split(tmp_path), "data_format": "folder"})


def test_braces():
    assert expand_braces("a-{008..011}.tar") == [f"a-{i:03}.tar" for i in range(8, 12)]
    assert expand_braces("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]


def test_two_processes_see_every_image_once(tmp_path):
    splits = load(one_tar_per_split(tmp_path))
    splits = Splits(splits.train, splits.val.subset(range(5)))  # an odd number, which must not be padded
    data = ImageData(splits, Number(), Number(), small(batch_size=2, num_workers=0))
    fit_in_two_processes(data, tmp_path)
    for epoch in (0, 1):
        for kind, numbers in (("train", range(12)), ("val", range(100, 105))):
            parts = [(tmp_path / f"{kind}-{epoch}-{rank}").read_text().split() for rank in (0, 1)]
            assert sorted(int(number) for part in parts for number in part) == list(numbers)
            assert abs(len(parts[0]) - len(parts[1])) <= 1
