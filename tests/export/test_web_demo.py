"""The web demo: in a browser from upload to answer, and its functions for every task."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vision_ssm
from browsers import BROWSER, needs_browser
from vision_ssm.cli import main
from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec
from vision_ssm.tasks.detection import Detection, DetectorSpec
from vision_ssm.tasks.segmentation import Segmentation, SegmenterSpec

gradio = pytest.importorskip("gradio")

ARGS = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
CLASSES = ("cat [tame]", "<b>dog", "hare")
DENSE = dict(model="vmamba_atto", model_args=ARGS, width=16, test_size=(96, 72), classes=CLASSES)


def saved(kind, spec, folder, **how):
    torch.manual_seed(0)
    save_weights(folder / "w.safetensors", kind.create_model(spec).state_dict(), kind.name, spec)
    return vision_ssm.load(folder / "w.safetensors", "cpu", **how)


def classifier(folder, model="vmamba_atto", *, optimized=False):
    args = ARGS if model == "vmamba_atto" else {}
    spec = ClassifierSpec.from_config(small(model=model, model_args=args, img_size=32), CLASSES)
    return saved(Classification, spec, folder, optimized=optimized)


def functions(predictor, **options):
    """What the page calls for a picture and for a click, whose answers are by the component's name here."""
    from vision_ssm.export import demo

    page = demo(predictor, **options)
    found = {}
    for each in page.fns.values():
        found[each.name] = lambda *given, call=each.fn: {
            getattr(item, "label", "inside"): value for item, value in call(*given).items()
        }
    return found["predict"], found["explain"], page


def said(answer):
    return answer["Message"].get("value", "")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Address and weights file of a page that the command serves; Ctrl-C ends it."""
    folder = tmp_path_factory.mktemp("served")
    classifier(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["demo", str(folder / "w.safetensors"), "--device", "cpu", "--port", str(port), "--max-megabytes", "0.1"]
    uploads = folder / "uploads"
    how = dict(stdout=subprocess.PIPE, text=True, env={**os.environ, "GRADIO_TEMP_DIR": str(uploads)})
    process = subprocess.Popen([sys.executable, "-m", "vision_ssm", *words], **how)
    address = process.stdout.readline().partition(" ")[0]
    assert address == f"http://127.0.0.1:{port}/"
    yield address, folder / "w.safetensors"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not [path for path in uploads.rglob("*") if path.is_file()]


@needs_browser
def test_a_browser_goes_from_upload_to_answer(command, picture, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    address, _ = command
    (tmp_path / "no.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(100_000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))

        def no_overflow(width):
            page.set_viewport_size({"width": width, "height": 900})
            return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

        page.goto(address)
        upload = page.locator("input[type=file]")
        upload.set_input_files(tmp_path / "no.png")
        says = "text => [...document.querySelectorAll('textarea')].some(box => box.value.includes(text))"
        page.wait_for_function(says, arg="not an image")
        page.get_by_label("Remove Image").click()
        upload.set_input_files(tmp_path / "large.png")
        page.wait_for_function(says, arg="0.2 MB; at most 0.1 are taken here")
        (tmp_path / "large.png").write_bytes(bytes(2_000_000))
        page.get_by_label("Remove Image").click()
        upload.set_input_files(tmp_path / "large.png")
        page.get_by_text("maximum allowed size").first.wait_for()
        page.goto(address)
        fits = [no_overflow(width) for width in (1200, 390)]
        upload.set_input_files(picture)
        page.get_by_text("As the model sees it").wait_for()
        for name in CLASSES:
            page.get_by_text(name).first.wait_for()
        page.locator("img").nth(1).click(position={"x": 40, "y": 70})
        for what in ("Effective receptive field", "Scan attention"):
            shown = page.get_by_alt_text(what)
            shown.wait_for()
            assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") > 800
        assert all([*fits, *map(no_overflow, (1200, 390))])
        browser.close()
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    assert errors == []


def test_a_port_in_use_and_other_bad_input(command, capsys):
    address, weights = command
    port = address.rstrip("/").rpartition(":")[2]
    for words, message in (
        (["--port", port], f"cannot listen at 127.0.0.1, port {port}: Address already in use"),
        (["--host", "nowhere.invalid"], "cannot listen at nowhere.invalid"),
        (["--port", "0"], "--port must be at least 1"),
        (["--max-megabytes", "0"], "--max-megabytes must be above 0"),
        (["--port", "1" + port[1:], "--tta"], "which has no tta"),
    ):
        assert main(["demo", str(weights), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_detector_shows_its_objects(picture, tmp_path):
    spec = DetectorSpec(detector="mask-rcnn", category_ids=(1, 2, 3), **DENSE)
    predict, explain, _ = functions(saved(Detection, spec, tmp_path, optimized=False), threshold=0.0)
    answer = predict({"path": str(picture)})
    assert answer["Prediction"].size == (90, 60)
    assert answer["Table"][0][0] in CLASSES
    assert answer["Table"][0][1].endswith("%")
    assert max(answer["Seen"].size) >= 480 - 96
    shown = explain({"path": str(picture)}, SimpleNamespace(index=[0, 0]))
    assert shown["Seen"].size == answer["Seen"].size
    predict, *_ = functions(vision_ssm.load(tmp_path / "w.safetensors", "cpu"), threshold=1.0)
    assert said(predict({"path": str(picture)})) == "nothing was found"


def test_a_segmenter_shows_its_classes(picture, tmp_path):
    spec = SegmenterSpec(decoder="upernet", labels=(0, 1, 2), **DENSE)
    predict, explain, _ = functions(saved(Segmentation, spec, tmp_path, optimized=False))
    answer = predict({"path": str(picture)})
    assert answer["Prediction"].width == 90
    assert sum(int(row[1].replace(",", "")) for row in answer["Table"]) == 60 * 90
    shown = explain({"path": str(picture)}, SimpleNamespace(index=[5, 100]))
    assert all("data:image/png" in shown[what] for what in ("Scan attention", "Effective receptive field"))


def test_pictures_are_read_as_predict_reads_them_or_refused(picture, tmp_path):
    task = classifier(tmp_path)
    predict, *_ = functions(task, top=2, max_pixels=10_000, max_megabytes=0.5)
    image, exif = Image.open(picture), Image.Exif()
    exif[0x0112] = 6  # turned
    files = {name: tmp_path / name for name in ("gray.png", "alpha.png", "deep.png", "turned.jpg")}
    image.convert("L").save(files["gray.png"])
    image.convert("RGBA").rotate(10).save(files["alpha.png"])
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(files["deep.png"])
    image.save(files["turned.jpg"], exif=exif)
    for path in files.values():
        assert predict({"path": str(path)})["Prediction"] == dict(task.predict(path)[0].top(2))
    Image.new("1", (400, 400)).save(tmp_path / "pixels.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "bytes.png").write_bytes(bytes(600_000))
    (tmp_path / "x.svg").write_text("<svg/>")
    for name, message in (
        ("pixels.png", "pixels.png has 160,000 pixels, at most 10,000 are allowed"),
        ("bomb.png", "bomb.png has 400,000,000 pixels, at most 10,000 are allowed"),
        ("bytes.png", "bytes.png has 0.6 MB; at most 0.5 are taken here"),
        ("x.svg", "cannot read image x.svg: not an image, or damaged"),
    ):
        answer = predict({"path": str(tmp_path / name), "orig_name": name})
        assert message in said(answer)
        assert answer["Prediction"] is None
    assert said(predict(None)) == ""


def test_what_cannot_be_looked_into_says_why(picture, tmp_path):
    *_, page = functions(classifier(tmp_path, optimized=True))
    assert "An optimized copy only predicts" in str(page.config)
    predict, explain, page = functions(classifier(tmp_path, "test_convnext"), threshold=1.0)
    assert "only predicts" not in str(page.config)
    assert said(predict({"path": str(picture)})) == "unsure: no class is as probable as 100%"
    assert (
        "has no layer that scans" in explain({"path": str(picture)}, SimpleNamespace(index=[10, 10]))["Scan attention"]
    )


def test_two_requests_at_once_do_not_mix(tmp_path):
    from gradio_client import Client, handle_file

    task = classifier(tmp_path)
    *_, page = functions(task)
    files = [tmp_path / f"{color}.png" for color in ("red", "lime", "blue", "white")]
    for path in files:
        Image.new("RGB", (40, 40), path.stem).save(path)
    with contextlib.closing(page):
        page.launch(prevent_thread_lock=True, quiet=True, share=False)
        clients = [Client(page.local_url, verbose=False) for _ in range(2)]

        def ask(number):
            answer = clients[number % 2].predict(handle_file(files[number % 4]), api_name="/predict")[0]
            return {each["label"]: each["confidence"] for each in answer["confidences"]}

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(8)))
    expected = [dict(found.top()) for found in task.predict(files)]
    assert len({str(each) for each in expected}) == 4
    for number, answer in enumerate(answers):
        assert answer == pytest.approx(expected[number % 4])
