"""Streams: Hugging Face datasets from parquet files, webdataset shards from a real server on this machine."""

import dataclasses
import functools
import http.server
import io
import itertools
import json
import sys
import tarfile
import threading

import pytest
import safetensors.torch
import torch
from pictures import CLASSES, Number, fit_in_two_processes, number_of, picture, write_tar
from rich.console import Console

import vision_ssm.engine.fit as engine
from short_runs import SHORT, interrupt
from vision_ssm.cli import main
from vision_ssm.data import ImageStream, load_splits, shards
from vision_ssm.data.module import ImageData
from vision_ssm.data.streams import read_ahead, share
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.recipes.config import ClassDataConfig
from vision_ssm.tasks import train

TRAIN = ((0, 5), (5, 9), (9, 12), (12, 13), (13, 19))  # 19 pictures in 5 uneven shards
VAL = ((100, 105),)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; the first answers to a file of `cut` stop after so many bytes."""

    def __init__(self, folder):
        self.cut = {}
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))


class Handler(http.server.SimpleHTTPRequestHandler):
    def copyfile(self, source, outputfile):
        cuts = self.server.cut.get(self.path[1:])
        outputfile.write(source.read(cuts.pop(0) if cuts else -1))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def content(number, broken):
    return b"no picture" if number in broken else picture(number)


@pytest.fixture
def urls(tmp_path, server):
    def make(train=TRAIN, val=VAL, broken=()):
        for split, parts in (("train", train), ("val", val)):
            for s, numbers in enumerate(parts):
                members = {}
                for n in range(*numbers):
                    members |= {
                        f"{n:04}.json": b"{}",
                        f"{n:04}.PNG": content(n, broken),
                        f"{n:04}.cls": b"%d" % (n % 3),
                    }
                write_tar(tmp_path / "served" / f"{split}-{s}.tar", members)
        names = tmp_path / "names.txt"
        names.write_text("\n".join(CLASSES))
        place, last = f"http://127.0.0.1:{server.server_port}", len(train) - 1
        splits = dict(data=f"{place}/train-{{0..{last}}}.tar", val_data=f"{place}/val-0.tar")
        return ClassDataConfig(class_map=names, train_num_samples=19, shuffle_buffer=4, **splits)

    return make


@pytest.fixture
def table(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})

    def make(train=TRAIN, val=VAL, broken=()):
        root = tmp_path / "table"
        root.mkdir()
        for split, parts in (("train", train), ("validation", val)):
            for s, numbers in enumerate(parts):
                images = [{"bytes": content(n, broken), "path": f"{n}.png"} for n in range(*numbers)]
                columns = {"image": images, "label": [n % 3 for n in range(*numbers)]}
                made = datasets.Dataset.from_dict(columns, features=features)
                made.to_parquet(root / f"{split}-{s:05}-of-{len(parts):05}.parquet")
        return ClassDataConfig(
            data=f"hfids/{root}", cache_dir=tmp_path / "cache", train_num_samples=19, shuffle_buffer=4
        )

    return make


@pytest.fixture(params=["table", "urls"])
def make(request):
    return request.getfixturevalue(request.param)


@dataclasses.dataclass
class Listed:
    """A shard of pictures in memory, which counts how often it is read."""

    name: str
    numbers: range
    reads: int = 0

    def __iter__(self):
        self.reads += 1
        for number in self.numbers:
            yield str(number), number % 3, picture(number)


def stream(parts=TRAIN, buffer=4):
    shards = [Listed(f"shard {i}", range(*numbers)) for i, numbers in enumerate(parts)]
    return ImageStream(shards, CLASSES, sum(len(shard.numbers) for shard in shards), buffer)


def names(images, count=None):
    return [int(image.id) for image in itertools.islice(images, count)]


def config_for(data):
    return small(**dataclasses.asdict(data) | SHORT)


def test_every_image_with_its_class(make):
    splits = load_splits(make())
    assert splits.train.classes == splits.val.classes == CLASSES
    assert len(splits.train) == 19
    for images, numbers in ((splits.train, range(19)), (splits.val, range(100, 105))):
        found = list(images.in_order())
        assert [number_of(images.sample(key)["image"]) for key in found] == list(numbers)
        assert [key.label for key in found] == [n % 3 for n in numbers]
        assert len({key.id for key in found}) == len(found)
    assert [number_of(sample["image"]) for sample in splits.val.pick([3, 0, 3])] == [103, 100, 103]


@pytest.mark.parametrize("world", [1, 2, 5, 7, 30])
def test_processes_share_every_image_once(world):
    images = stream()
    parts = [names(images.in_order(rank, world)) for rank in range(world)]
    assert sorted(n for part in parts for n in part) == list(range(19))
    shards = [shard for rank in range(world) for shard, _ in share(range(5), rank, world)]
    assert len(shards) == max(world, 5)


def test_order_is_a_function_of_seed_and_epoch():
    orders = [names(stream().order(seed, epoch, 0, 19)) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == list(range(19))
        places = [next(i for i, (first, last) in enumerate(TRAIN) if first <= n < last) for n in order]
        assert len(list(itertools.groupby(places))) == 5  # shard after shard
    straight = names(stream(buffer=1).order(0, 0, 0, 19))
    assert straight != orders[0]
    assert all(b == a + 1 for a, b in itertools.pairwise(straight) if b not in {first for first, _ in TRAIN})


def test_process_that_runs_out_begins_again():
    images = stream()
    parts = [names(images.order(0, 3, 0, 30, rank, 2)) for rank in (0, 1)]
    own = [set(part) for part in parts]
    assert own[0] | own[1] == set(range(19))
    assert not own[0] & own[1]
    for part, numbers in zip(parts, own, strict=True):
        assert set(part[: len(numbers)]) == numbers
        assert part[len(numbers) :] == (part * 4)[: 30 - len(numbers)]


@pytest.mark.parametrize("world", [1, 2, 7])
@pytest.mark.parametrize("known", [False, True], ids=["unread", "read-before"])
def test_resumes_at_the_exact_image(world, known):
    parts = TRAIN if world < 5 else TRAIN[:2]
    whole = names(stream(parts).order(0, 1, 0, 25, world - 1, world))
    for used in range(25):
        images = stream(parts)
        if known:
            list(images.in_order())
        for shard in images.shards:
            shard.reads = 0
        assert names(images.order(0, 1, used, 25, world - 1, world)) == whole[used:]
    if known and world == 1:  # shards of known length are not read to skip them
        for shard in images.shards:
            shard.reads = 0
        names(images.order(0, 1, 18, 19))
        assert sum(shard.reads for shard in images.shards) == 1


def test_process_without_an_image_is_refused():
    with pytest.raises(InputError, match="holds no images for one of the processes"):
        names(stream(parts=((0, 1),)).order(0, 0, 0, 1, 1, 2))
    with pytest.raises(InputError, match="no images in shard 0"):
        list(stream(parts=((0, 0),)).in_order())


def test_shard_that_changes_is_noticed():
    images = stream()
    list(images.in_order())
    images.shards[3].numbers = range(12, 15)
    with pytest.raises(InputError, match="shard 3 had 1 images before, and has 3 now"):
        list(images.in_order())


def test_reading_ahead_ends_with_its_reader_and_passes_errors_on():
    before = threading.active_count()
    numbers = itertools.count()
    ahead = read_ahead(numbers, 5)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert threading.active_count() == before
    assert next(numbers) <= 8
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(1 // n for n in (1, 0, 1)))


def batches(data, workers, epoch=0):
    loader = ImageData(
        load_splits(data), Number(), Number(), small(batch_size=4, num_workers=workers)
    ).train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [(b["image"].flatten().tolist(), b["label"].tolist(), b["unreadable"]) for b in loader]


def test_workers_change_nothing(make):
    data = make(broken=(7, 15))
    alone = batches(data, 0)
    assert alone == batches(data, 2)
    assert alone != batches(data, 0, epoch=1)
    assert [len(images) for images, *_ in alone] == [4, 4, 4, 4, 2]  # 19 images, an even number of them
    assert all(n % 3 == target for images, targets, _ in alone for n, target in zip(images, targets, strict=True))
    seen = [int(n) for images, *_ in alone for n in images]
    assert not {7, 15} & set(seen)
    assert len(set(seen)) >= 14


def test_two_processes_see_every_image_once(make, tmp_path):
    data = ImageData(load_splits(make()), Number(), Number(), small(batch_size=2, num_workers=1))
    fit_in_two_processes(data, tmp_path)
    for epoch in (0, 1):
        read = {(k, r): (tmp_path / f"{k}-{epoch}-{r}").read_text().split() for k in ("train", "val") for r in (0, 1)}
        assert sorted(int(n) for rank in (0, 1) for n in read["val", rank]) == list(range(100, 105))
        assert [len(read["train", rank]) for rank in (0, 1)] == [8, 8]
        assert not set(read["train", 0]) & set(read["train", 1])


@pytest.mark.parametrize(("source", "workers"), [("table", 2), ("urls", 0)])
def test_stopped_and_resumed_run_is_bit_identical(source, workers, request, tmp_path, monkeypatch):
    config = config_for(request.getfixturevalue(source)())
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    result = train(config, whole)
    assert len(result.records) == 5
    interrupt(monkeypatch, 0, 1)
    with pytest.raises(Stopped):
        train(dataclasses.replace(config, num_workers=workers), parts)
    interrupt(monkeypatch, 0, 3)  # the end of an epoch
    with pytest.raises(Stopped):
        train(config, parts, resume=True)
    interrupt(monkeypatch, 1, 2)
    with pytest.raises(Stopped):
        train(config, parts, resume=True)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    train(dataclasses.replace(config, num_workers=2 - workers), parts, resume=True)
    one, other = (safetensors.torch.load_file(f.last) for f in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_unreadable_images_are_named_counted_and_limited(make, tmp_path):
    config = config_for(make(broken=(7, 15)))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"2 of 19 training images cannot be read, --max-unreadable 0.01 allows 1"):
        train(config, folder)
    console = Console(record=True, width=400, file=io.StringIO())
    config = dataclasses.replace(config, max_unreadable=0.2)
    train(config, folder, overwrite=True, console=console)
    assert len(folder.unreadable.read_text().splitlines()) == 2
    shown = console.export_text()
    assert shown.count("another image takes its place") == 2
    assert shown.count("2 of 19 training images cannot be read") == 1
    assert "19 training and an unknown number of validation images in 3 classes" in shown
    assert "training images are read as a stream, shards: 5" in shown


def test_unreadable_validation_images_are_refused(make, tmp_path):
    with pytest.raises(InputError, match="repair or remove"):
        train(config_for(make(broken=(102,))), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_batch_without_a_readable_image_stops_the_run(make, tmp_path):
    with pytest.raises(InputError, match="hardly any training image can be read; the first one: cannot read image"):
        train(config_for(make(broken=range(19))), RunFolder(tmp_path / "run"))


def test_command_trains_resumes_and_is_evaluated(table, tmp_path, monkeypatch, capsys):
    table()
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
    words += ["--data", "hfids/table", "--cache-dir", "cache", "--train-num-samples", "19", "--epochs", "1"]
    assert main(["train", "classify", *words, "--out", "run"]) == 0
    monkeypatch.chdir(tmp_path / "table")
    capsys.readouterr()
    assert main(["eval", "../run", "--json", "--plots", "../pictures"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 5
    assert main(["train", "--resume", "../run"]) == 0


def test_folders_of_images_stream_too(tmp_path):
    pytest.importorskip("datasets")
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        for n in numbers:
            (tmp_path / split / CLASSES[n % 3]).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / CLASSES[n % 3] / f"{n}.png").write_bytes(picture(n))
    splits = load_splits(ClassDataConfig(data=f"hfids/{tmp_path}", cache_dir=tmp_path / "cache", train_num_samples=6))
    assert splits.train.classes == CLASSES
    assert sorted((number_of(s["image"]), s["label"]) for s in map(splits.train.sample, splits.train.in_order())) == [
        (n, n % 3) for n in range(6)
    ]


def test_class_names_of_a_file_are_found_by_name(table, tmp_path):
    (tmp_path / "other.txt").write_text("fir\nyew\noak\nash\n")
    data = dataclasses.replace(table(), class_map=tmp_path / "other.txt")
    assert [key.label for key in load_splits(data).val.in_order()] == [3 - n % 3 for n in range(100, 105)]


def test_lost_connection_is_taken_up_again(urls, server, monkeypatch):
    monkeypatch.setattr(shards, "_WAITS", (0.0, 0.0))
    data = urls()
    size = (len(picture(0)) // 512 + 4) * 512
    server.cut["val-0.tar"] = [3 * 512, 5 * size]
    splits = load_splits(data)
    assert [number_of(splits.val.sample(key)["image"]) for key in splits.val.in_order()] == list(range(100, 105))
    assert server.cut["val-0.tar"] == []
    server.cut["val-0.tar"] = [700, 0, 1024]
    with pytest.raises(InputError, match=r"cannot read http.*/val-0.tar: the connection was lost"):
        list(splits.val.in_order())


@pytest.mark.parametrize("damage", ["cut", "header", "compressed", "text", "missing"])
def test_damaged_shards(damage, urls, tmp_path):
    data = urls()
    path = tmp_path / "served" / "val-0.tar"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tmp_path / "names.txt", "names.txt")
    else:
        header = whole[:1024] + b"?" * 512 + whole[1536:]
        path.write_bytes({"cut": whole[:2048], "header": header, "text": b"hello" * 500}[damage])
    message = "404" if damage == "missing" else "as an uncompressed tar file"
    with pytest.raises(InputError, match=message):
        list(load_splits(data).val.in_order())


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        pytest.param("table", {"train_num_samples": None}, "give it with --train-num-samples", id="n"),
        pytest.param("table", {"val_fraction": 0.1}, "no share of a stream can be held out", id="fraction"),
        pytest.param("table", {"train_split": "trian"}, "has no split trian", id="split"),
        pytest.param("table", {"input_key": "img"}, "no column img; --input-key takes image, label", id="column"),
        pytest.param("table", {"data": "hfids/./nowhere"}, "cannot read the splits of hfids/./nowhere", id="nowhere"),
        pytest.param("urls", {"class_map": None}, "give --num-classes or --class-map", id="unnamed-classes"),
        pytest.param("urls", {"train_num_samples": None}, "--train-num-samples", id="no-number-of-shards"),
    ],
)
def test_bad_streams_get_one_line(source, changes, message, request, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = dataclasses.replace(request.getfixturevalue(source)(), **changes)
    with pytest.raises(InputError) as caught:
        load_splits(data)
    assert message in caught.value.line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"class_map": None, "num_classes": 2}, "has label 2, but there are 2 classes", id="too-few-classes"
        ),
        pytest.param({"target_key": "label"}, "no class in .json under label", id="no-field"),
        pytest.param({"target_key": "cls", "input_key": "webp"}, "no images in http", id="no-images"),
    ],
)
def test_bad_samples_get_one_line(changes, message, urls):
    splits = load_splits(dataclasses.replace(urls(), **changes))
    with pytest.raises(InputError) as caught:
        list(splits.val.in_order())
    assert message in caught.value.line


def test_missing_library(table, monkeypatch):
    data = table()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vision-ssm\[data\]'"):
        load_splits(data)
