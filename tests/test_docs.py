"""Every Python block of the README and of docs/ runs as it stands.

The blocks of a file share their names, from top to bottom. A block directly below the line ``<!-- not run -->`` is
left out. They run in an empty folder that has the reader's pictures, ``photos/cat`` and ``photos/dog``, ``people`` in
COCO's format, ``streets`` with masks, and ``street.jpg``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from scenes import write_masks, write_scenes

ROOT = Path(__file__).parent.parent
FILES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
BLOCK = re.compile(r"^(<!-- not run -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(text: str, name: str) -> dict[str, object]:
    """Run the blocks of a Markdown text; return what they defined. Errors point at the line in the file."""
    module = sys.modules["__docs__"] = ModuleType("__docs__")  # timm's registry looks for the module of a function
    names: dict[str, object] = vars(module)
    for match in BLOCK.finditer(text):
        if match[1] is None:
            before = text[: match.start(2)].count("\n")
            exec(compile("\n" * before + match[2], name, "exec"), names)
    return names


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        folder = tmp_path / "photos" / kind
        folder.mkdir(parents=True)
        for i in range(40):
            Image.fromarray(pixels.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    write_scenes(tmp_path / "people")
    write_masks(tmp_path / "streets")
    Image.open(tmp_path / "people" / "val2017" / "0000.png").save(tmp_path / "street.jpg")


@pytest.mark.usefixtures("readers_folder")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_blocks_run(path: Path) -> None:
    run_blocks(path.read_text(encoding="utf-8"), str(path))


def test_blocks_share_names_and_can_be_left_out() -> None:
    text = """
```python
a = 1
```
<!-- not run -->
```python
raise SystemExit
```
```bash
exit 1
```
```python
b = a + 1
```
"""
    assert run_blocks(text, "text")["b"] == 2


def test_errors_name_the_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks("one\n\n```python\na = 1\n1 / 0\n```\n", "page.md")
    assert str(caught.traceback[-1].path) == "page.md"
    assert caught.traceback[-1].lineno + 1 == 5
