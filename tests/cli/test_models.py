"""The commands about models, as a user calls them."""

import csv
import json

import pytest
import timm
import torch

from vision_ssm.checkpoints import address_note, published
from vision_ssm.cli import main


def run(capsys, *words):
    code = main(words)
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out, output.err


def test_models(capsys):
    code, out, _ = run(capsys, "models", "vmamba_t*", "--json")
    rows = {row["model"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == {"vmamba_tiny", "vmamba_tiny_s2l5"}
    tiny = rows["vmamba_tiny"]
    assert (tiny["parameters"], tiny["macs"], tiny["paper_ops"]) == (30_249_064, 4_812_621_312, 4_905_609_984)
    assert (tiny["published_top1"], tiny["weights_by"], tiny["weights_license"]) == (82.6, "MzeroMiko/VMamba", "mit")
    assert tiny["weights"].endswith(f"/{tiny['weights_file']}")
    assert tiny["weights_file"] == "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    assert not tiny["weights_inferred"]
    assert tiny["pretrained"]
    assert tiny["convertible"]


def test_models_of_which_nothing_is_published(capsys):
    (row,) = json.loads(run(capsys, "models", "vmamba_atto", "--json")[1])
    empty = ("published_top1", "weights_by", "weights_file", "weights_license", "weights")
    assert [row[key] for key in empty] == [None] * len(empty)
    assert not row["pretrained"]
    assert not row["convertible"]


@pytest.mark.parametrize("columns", [80, 120])
def test_models_fit_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, "models", "vmamba_*t*")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= columns
    lines = [line.split() for line in out.splitlines() if line.startswith("vmamba_")]
    assert lines[0] == ["vmamba_atto", "0.90", "M", "0.02", "G", "0.02", "G", "32", "-", "-"]
    assert lines[1][:9] == ["vmamba_tiny", "30.25", "M", "4.81", "G", "4.91", "G", "224", "82.6"]
    assert lines[1][9:] == ["pretrained", "vssm1_tiny_0230s_ckpt_epoch_264.pth"][: 1 if columns == 80 else 2]
    assert "weights: MzeroMiko/VMamba; license: mit" in out


def test_inferred_addresses_are_marked():
    rows = [
        published(name, timm.models.get_pretrained_cfg(name).to_dict())
        for name in ("group_mamba_tiny", "group_mamba_small", "group_mamba_base")
    ]
    assert [row["weights_inferred"] for row in rows] == [False, False, True]
    assert address_note(rows[2]["weights"]) == " (address inferred, not seen)"


def test_published_detectors(capsys):
    rows = json.loads(run(capsys, "models", "efficient_vmamba_tiny", "--task", "detect", "--json")[1])
    assert [(row["detector"], row["schedule"], row["box_ap"], row["mask_ap"]) for row in rows] == [
        ("mask-rcnn", "1x", 35.6, 33.2),
        ("mask-rcnn", "3x", 38.3, 35.3),
        ("retinanet", "1x", 37.5, None),
    ]
    assert [row["parameters"] for row in rows] == [26_198_916, 26_198_916, 15_990_664]
    assert (rows[0]["published_parameters"], rows[0]["published_flops"], rows[0]["weights"]) == (11, 60, None)
    assert all("does not fit" in row["note"] for row in rows)


@pytest.mark.parametrize("columns", [80, 140])
def test_published_detectors_fit_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("vision_ssm.cli.detectors._on_meta", lambda *_: torch.nn.Linear(10_000, 10_000, device="meta"))
    code, out, _ = run(capsys, "models", "--task", "detect")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= columns
    lines = [line.split() for line in out.splitlines() if line.startswith("vmamba_tiny ")]
    assert lines[0][:11] == ["vmamba_tiny", "1x", "47.3", "/", "42.7", "100.01", "M", "50", "M,", "271", "G"]
    assert lines[0][11:] == ["convert*", "mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth"][: 1 if columns == 80 else 2]
    assert "vmamba_small 3x: its published FLOPs do not fit the network" in out
    assert "AP: in %, of the weights of the papers' authors, not of this package's training." in out


def test_info_on_a_published_detector(capsys):
    out = run(capsys, "info", "vmamba_tiny", "--task", "detect")[1]
    assert "49,755,312 -0.5 % from the published 50 M" in " ".join(out.split())
    assert "271,141,872,640 +0.1 % from the published 271 G" in " ".join(out.split())
    assert "published 3x: 48.8 / 43.7 box/mask AP, weights: https://github.com/MzeroMiko/VMamba/" in out
    assert ".pth (address inferred, not seen)\n" in out


def test_info_on_a_detector_of_which_nothing_is_published(capsys):
    words = ("info", "resnet18", "--task", "detect", "--detector", "retinanet", "--size", "96", "--num-classes", "3")
    values = json.loads(run(capsys, *words, "--json")[1])
    assert (values["detector"], values["input_size"], values["num_classes"]) == ("retinanet", [3, 96, 96], 3)
    assert (values["published"], values["flops_difference"]) == ([], None)
    assert "published" not in run(capsys, *words)[1]


def test_published_segmenters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("vision_ssm.cli.detectors._on_meta", lambda *_: torch.nn.Linear(10_000, 10_000, device="meta"))
    out = run(capsys, "models", "--task", "segment")[1]
    assert max(len(line) for line in out.splitlines()) <= 80
    assert ["vim2_tiny", "160k", "48.6", "/", "49.9", "100.01", "M", "51", "M", "-"] in map(str.split, out.splitlines())
    rows = json.loads(run(capsys, "models", "sparx*", "--task", "segment", "--json")[1])
    assert [(row["miou"], row["miou_ms"]) for row in rows] == [(50.2, None), (51.4, None), (52.5, None)]


def test_info_on_a_segmenter(capsys):
    out = run(capsys, "info", "vmamba_tiny", "--task", "segment")[1]
    assert "61,902,572 -0.2 % from the published 62 M" in " ".join(out.split())
    assert "-0.1 % from the published 949 G" in " ".join(out.split())
    words = (
        "info",
        "resnet18",
        "--task",
        "segment",
        "--decoder",
        "unet",
        "--size",
        "96",
        "--num-classes",
        "3",
        "--json",
    )
    values = json.loads(run(capsys, *words)[1])
    assert (values["decoder"], values["input_size"], values["published"]) == ("unet", [3, 96, 96], [])


def test_models_that_do_not_exist(capsys):
    code, _, err = run(capsys, "models", "resnet*")
    assert code == 2
    assert "no model matches resnet*; there are " in err
    assert "vmamba_atto" in err


def test_info(capsys):
    code, out, _ = run(capsys, "info", "vmamba_tiny", "--size", "97", "130", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["input_size"] == [3, 97, 130]
    assert [(s["height"], s["width"]) for s in values["stages"]] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    assert "30,249,064" in run(capsys, "info", "vmamba_tiny")[1]


def test_bench(capsys, tmp_path):
    words = "bench vmamba_atto --size 24 32 --batch 1 2 --seconds 0.01 --csv"
    code, out, _ = run(capsys, *words.split(), str(tmp_path / "b.csv"))
    assert code == 0
    for setting in ("threads:", "dtype: float32", "torch.compile: off", "vision_ssm: 0.", "scan backend: "):
        assert setting in out
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["infer_batch_size"] for row in rows] == ["1", "2"]
    assert (rows[0]["infer_img_size"], rows[0]["height"], rows[0]["torch"]) == ("32", "24", torch.__version__)
    assert float(rows[0]["spread"]) < 10


def test_bench_over_sizes_goes_on_after_one_that_fails(capsys, tmp_path):
    words = "bench test_vit --sizes 160,99 --batch 1,2 --seconds 0.01 --dtype bfloat16 --train"
    words += f" --amp --csv {tmp_path / 'b.csv'} --plot {tmp_path / 'b.png'} --json"
    code, out, err = run(capsys, *words.split())
    assert code == 0
    rows = json.loads(out)["rows"]
    assert list(rows[0])[:6] == [
        *("model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count")
    ]
    sizes = [(row["train_img_size"], row["train_batch_size"], bool(row["error"])) for row in rows]
    assert sizes == [(160, 1, False), (160, 2, False), (99, 1, True), (99, 2, True)]
    assert rows[1]["peak_memory_mib"] > 1.5 * rows[0]["peak_memory_mib"] > 0
    assert "warning: test_vit fails on 1 images of 99x99: " in err
    assert (tmp_path / "b.csv").read_text().count("float32 under autocast to bfloat16") == 4
    assert (tmp_path / "b.png").stat().st_size > 10_000
    code, _, err = run(capsys, "bench", "test_vit", "--size", "99", "--batch", "1")
    assert code == 2
    assert "no model could be measured; test_vit fails: " in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "vmamba_tinny"), "unknown model vmamba_tinny; did you mean vmamba_tiny"),
        (("info", "vmamba_tiny", "--size", "0"), "--size must be at least 1, got 0"),
        (("info", "vmamba_tiny", "--size", "1", "2", "3"), "got 1 2 3"),
        (("info", "vit_tiny_patch16_224", "--task", "detect"), "gives maps of strides 16, 16, 16, 16"),
        (("info", "vmamba_atto", "--task", "detect", "--num-classes", "0"), "a detector needs at least one class"),
        (("models", "resnet*", "--task", "detect"), "no backbone of a published detector matches resnet*; there are"),
        (("bench",), "name at least one model"),
        (("bench", "vmamba_atto", "--sizes", "32", "--size", "32"), "--size and --sizes exclude each other"),
        (("bench", "vmamba_atto", "--amp"), "--amp needs --dtype bfloat16 or float16"),
        (("bench", "vmamba_atto", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("bench", "vmamba_atto", "--seconds", "-1"), "--seconds must be above 0, got -1.0"),
        (("bench", "vmamba_atto", "--device", "cuda:77"), "no device cuda:77"),
        (("frobnicate",), "no command frobnicate; there are train"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(words, message, capsys):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
