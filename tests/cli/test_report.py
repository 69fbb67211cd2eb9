"""The report as a file, and in a browser where there is one."""

import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from browsers import BROWSER, needs_browser
from short_runs import SHORT
from vision_ssm.cli import main
from vision_ssm.recipes import small
from vision_ssm.tasks import train

EVIL = '<b>&"it\'s"'


class Page(html.parser.HTMLParser):
    """A page's text and elements; that they are nested as they should be is checked on the way."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.headings, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.open[-1:] in (["h2"], ["h3"]):
            self.headings.append(data)

    def all(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and one whose images are gone."""
    root = tmp_path_factory.mktemp("report")
    generator = np.random.default_rng(0)
    for label, name in enumerate((EVIL, "grass")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8) // (1 + label)
            file = os.fsencode(root / "images" / name) + b"/%d<i>\xff.png" % i
            Image.fromarray(pixels).save(os.fsdecode(file), "PNG")
    first, gone = root / "first <run>", root / "gone"
    # The learning rate is too small to learn, so that there are mistakes.
    config = small(data=str(root / "images"), val_fraction=0.5, **{**SHORT, "lr": 1e-5, "min_lr": 1e-5})
    train(config, first, about={"recipe": "small", "command": f"vision-ssm train classify --data {EVIL}"})
    shutil.copytree(first, gone)
    record = json.loads((gone / "config.json").read_text())
    record["config"]["data"] = "/no/such/images"
    (gone / "config.json").write_text(json.dumps(record))
    return first, gone


@pytest.fixture(scope="module")
def report(runs):
    out = runs[0].parent / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out), "--device", "cpu", "--num-workers", "0"]) == 0
    return out


def test_a_report_holds_all_of_two_runs_and_compares_them(report):
    page = Page(report)
    known = ["Overview", "Configuration", "Curves", "Metrics", "Classes", "Confusion", "Worst mistakes", "Samples"]
    field = "Effective receptive field"  # only where there are images
    assert page.headings == ["Comparison", "first <run>", *known, field, "Speed", "gone", *known, "Speed"]
    for text in ("parameters", "MACs", "ms per image", "--lr", "--min-lr", "All options", "precision", "recall", "F1"):
        assert text in page.text
    assert "Not measured again, because no such file or folder: /no/such/images" in page.text
    assert page.text.count("The best weights on 12 images") == 1
    assert page.text.count(f"{EVIL}, taken for grass") + page.text.count(f"grass, taken for {EVIL}") > 0
    assert "<i>\\udcff.png" in page.text
    assert report.stat().st_size < 3e6


def test_a_report_is_one_file_that_loads_nothing(report):
    page = Page(report)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "object", "embed", "base", "b", "i"})
    assert all(source.startswith("data:image/") for source in page.all("src"))
    targets = [link for link in page.all("href") if link != "data:,"]
    assert {link.removeprefix("#") for link in targets} <= set(page.all("id"))
    assert len(set(page.all("id"))) == len(page.all("id"))
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    assert not re.search("https?://", report.read_text(encoding="utf-8"))


def test_one_run_on_other_images(runs, tmp_path, capsys):
    out, few = tmp_path / "one.html", tmp_path / "few"
    for name in (EVIL, "grass"):
        (few / name).mkdir(parents=True)
        Image.new("RGB", (24, 32), "red").save(few / name / "red.png")
    words = ["report", str(runs[1]), "--out", str(out), "--device", "cpu", "--num-workers", "0"]
    assert main([*words, "--data", str(few)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}, 0.")
    page = Page(out)
    assert "Comparison" not in page.headings
    assert "The best weights on 2 images" in page.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "name at least one folder of a run"),
        ("nowhere", "no such run folder: nowhere"),
        ("empty", "empty is not a run folder"),
        ("begun", "begun has no metrics.csv; its first epoch was never finished"),
        ("torn", "cannot read torn/metrics.csv"),
        ("wrong", "cannot read wrong/results.json"),
        ("gone --out no/r.html", "no such folder: no"),
        ("gone --out empty", "empty is a folder"),
        ("gone --data nothing", "nothing"),
        ("gone --device nonsense", "no device nonsense here"),
    ],
    ids=str,
)
def test_bad_input_gives_one_line_and_no_file(words, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("begun", "torn", "wrong", "gone"):
        shutil.copytree(runs[1], name)
    os.mkdir("empty")
    os.remove("begun/metrics.csv")
    (tmp_path / "torn" / "metrics.csv").write_text("epoch,step\n1,x\n")
    (tmp_path / "wrong" / "results.json").write_text("{")
    assert main(["report", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html*"))


def browse(page, folder, *options):
    """Open a page without a network; returns its DOM, messages on the console, and what it asked for elsewhere."""
    log = folder / "net.json"
    quiet = ("background-networking", "component-update", "default-apps", "sync", "extensions", "dev-shm-usage", "gpu")
    words = [*(f"--disable-{name}" for name in quiet), "--headless=new", "--no-sandbox", "--no-first-run"]
    words += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += ["--enable-logging=stderr", "--v=0", "--allow-file-access-from-files", "--virtual-time-budget=20000"]
    done = subprocess.run([BROWSER, *words, *options, page.as_uri()], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    asked = [event["params"] for event in json.loads(log.read_text())["events"] if "url" in event.get("params", {})]
    # What the browser itself looks for has no page as its initiator.
    outside = {each["url"] for each in asked if each.get("initiator", "").startswith(("file:", "null", "opaque"))}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, {url for url in outside if not url.startswith(("file:", "data:"))}


MEASURE = """<!DOCTYPE html><meta charset="utf-8"><title>measures</title>
<iframe src="report.html" style="width: 1280px; height: 2000px"></iframe>
<iframe src="report.html" style="width: 390px; height: 2000px"></iframe>
<pre></pre>
<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const texts = [...page.querySelectorAll("main *")].filter(each => each.innerText);
    const sizes = texts.map(each => parseFloat(frame.contentWindow.getComputedStyle(each).fontSize));
    return {window: root.clientWidth, page: root.scrollWidth, letters: Math.min(...sizes), texts: texts.length,
            broken: [...page.images].filter(each => !each.complete || !each.naturalWidth).length};
  });
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>
"""


@needs_browser
def test_a_browser_shows_the_report_on_desktops_and_phones(report, tmp_path):
    shutil.copy(report, tmp_path / "report.html")
    (tmp_path / "measure.html").write_text(MEASURE)
    dom, console, outside = browse(tmp_path / "measure.html", tmp_path, "--window-size=1400,2000", "--dump-dom")
    measures = json.loads(re.search("<pre>(.+)</pre>", dom)[1])
    assert [each["window"] > width - 20 for each, width in zip(measures, (1280, 390), strict=True)] == [True, True]
    for each in measures:
        assert each["page"] <= each["window"]
        assert each["letters"] >= 13
        assert each["texts"] > 100
        assert each["broken"] == 0
    assert (console, outside) == ([], set())


@needs_browser
def test_a_browser_would_have_told(tmp_path):
    """The control of the test above: a page that asks for something outside, and fails."""
    (tmp_path / "bad.html").write_text('<img src="http://outside.test/x.png"><script>nothing.here()</script>')
    _, console, outside = browse(tmp_path / "bad.html", tmp_path, "--dump-dom")
    assert any("nothing is not defined" in line for line in console)
    assert outside == {"http://outside.test/x.png"}


@needs_browser
def test_a_browser_prints_the_report(report, tmp_path):
    pdf = tmp_path / "report.pdf"
    _, console, outside = browse(report, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert max(map(int, re.findall(rb"/Count (\d+)", content))) >= 4  # contents, and each run from a new page on
    assert (console, outside) == ([], set())
