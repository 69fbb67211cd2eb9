"""Files made to take time or memory: each is read or refused within bounds that depend on its size alone."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

# One process for all files, because a hostile one may crash it, and importing torch takes seconds. Sampled, because the
# peak that the system keeps has that of the parent process, too.
READ_ALL = """
import json, os, sys, threading, time
from vision_ssm.checkpoints import CheckpointError, convert_official, read_checkpoint
sys.setswitchinterval(1e-4)
peak = 0
def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def watch():
    global peak
    while True:
        peak = max(peak, used())
        time.sleep(2e-3)
threading.Thread(target=watch, daemon=True).start()
begin = time.thread_time()
for number in range(2_000_000):
    number + 1
print(json.dumps(["", time.thread_time() - begin]), flush=True)
for path in sys.argv[1:]:
    start = peak = used()
    state, begin = {}, time.thread_time()
    try:
        state = read_checkpoint(path).state
        said = f"read {len(state)}"
    except CheckpointError as error:
        said = str(error)
    seconds, peak = time.thread_time() - begin, max(peak, used())
    convert_official("vmamba_tiny", state)
    print(json.dumps([path, seconds, peak - start, said]), flush=True)
"""
MEMO = b"q\x00"  # keep what is on the stack as number 0, of which h\x00 gives another reference


def text(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def integers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(size: bytes = integers(4), stride: bytes = integers(1), record: str = "0", offset: int = 0) -> bytes:
    """The instructions that make a tensor of float32."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(record) + text("cpu") + integer(4) + b"tQ"
    parts = storage + integer(offset) + size + stride + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + parts + b"tR"


def archive(path: Path, body: bytes, records: dict[str, bytes] | None = None, deflated: str = "") -> None:
    """Write an archive whose pickle has these instructions."""
    records = {"data.pkl": b"\x80\x02" + body + b".", **({"data/0": bytes(16)} if records is None else records)}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(f"a/{name}", content, zipfile.ZIP_DEFLATED if name == deflated else zipfile.ZIP_STORED)


def weights(value: bytes, key: str = "w") -> bytes:
    return b"}" + text(key) + value + b"s"


def in_keys(key: bytes) -> bytes:
    """A state dict with another dict beside it, one of whose keys this is."""
    return b"}(" + text("w") + tensor() + text("other") + b"}" + key + b"Nsu"


def patched(path: Path, name: str, offset: int, value: bytes) -> None:
    """Change what the directory of an archive says about a record."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    content[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(content)


def lying_record(path: Path) -> None:
    archive(path, weights(tensor()))
    patched(path, "a/data/0", 20, struct.pack("<II", 2**31, 2**31))


def overlapping_records(path: Path) -> None:
    names = [f"{i:03}" for i in range(200)]
    body = b"}(" + b"".join(text(name) + tensor(record=name) for name in names) + b"u"
    archive(path, body, {f"data/{name}": bytes(10**6 if name == "000" else 0) for name in names})
    first = path.read_bytes()
    at = first.index(b"PK\x03\x04", first.index(b"PK\x03\x04") + 1)
    for name in names:
        patched(path, f"a/data/{name}", 20, struct.pack("<II", 10**6, 10**6))
        patched(path, f"a/data/{name}", 42, struct.pack("<I", at))


def extra_fields(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for i in range(30):
            info = zipfile.ZipInfo(f"a/{i}")
            info.extra = struct.pack("<HH", 0x7777, 0) * (2**14 - 2)
            file.writestr(info, b"")


def many_records(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for i in range(50_000):
            file.writestr(zipfile.ZipInfo(f"a/{i}"), b"")


def tensors(header: bytes, length: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)

    return write


def empty_tensors(count: int, name: str = "{}") -> Callable[[Path], None]:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return tensors(json.dumps({name.format(i): entry for i in range(count)}).encode())


def body(instructions: bytes, records: dict[str, bytes] | None = None, deflated: str = "") -> Callable[[Path], None]:
    return lambda path: archive(path, instructions, records, deflated)


def colliding() -> bytes:
    return b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(80_000))


# How to write each file, and what is said of it: "read N" where its weights are as they should be, or part of an error.
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "deep lists": (body(b"]" * 90_000 + b"a" * 89_999), "holds no weights"),
    "deeper lists": (body(b"]" * 10**6 + b"a" * (10**6 - 1)), "too many objects"),
    "deep dicts": (body((b"}" + text("model")) * 20_000 + b"N" + b"s" * 20_000), "recursion"),
    "marks": (body(b"(" * 10**6), "too many objects"),
    "lists": (body(b"]" * 150_000), "holds no weights"),
    "a dict in itself": (body(b"}" + MEMO + text("model") + b"h\x00s"), "holds no weights"),
    "shared dicts": (
        body(b"}" + b"".join(b"q\x00}(" + text("model") + b"h\x00" + text("ema") + b"h\x00u" for _ in range(300))),
        "holds no weights",
    ),
    "key of nested tuples": (body(in_keys(b")" + b"\x85" * 150_000)), "read 1"),
    "key of more nested tuples": (body(in_keys(b")" + b"\x85" * 10**6)), "too many objects"),
    "key of shared tuples": (body(in_keys(b")" + b"2\x86" * 1000)), "read 1"),
    "keys of one hash": (body(b"}(" + text("w") + tensor() + text("other") + b"}(" + colliding() + b"uu"), "read 1"),
    "set of shared tuples": (body(in_keys(b"\x8f()" + b"2\x86" * 1000 + b"\x90")), "read 1"),
    "prefixes": (body(weights(tensor(), "module." * 700)), "read 1"),
    "long prefixes": (body(weights(tensor(), "module." * 10**5)), "holds no weights"),
    "many prefixes": (
        body(b"}(" + b"".join(text("module." * 600 + f"{i}") + tensor() for i in range(1000)) + b"u"),
        "read 1000",
    ),
    "memo index": (body(b"]r\xff\xff\xff\xff0" + weights(tensor())), "read 1"),
    "length of bytes": (body(b"\x8e" + struct.pack("<Q", 2**60)), "not a readable"),
    "length of text": (body(b"\x8d" + struct.pack("<Q", 2**62)), "not a readable"),
    "length of bytearray": (body(b"\x96" + struct.pack("<Q", 2**36)), "not a readable"),
    "length of integer": (body(b"\x8b" + struct.pack("<i", 2**31 - 1)), "not a readable"),
    "length of frame": (body(b"\x95" + struct.pack("<Q", 2**62) + weights(tensor())), "read 1"),
    "length of a record": (lying_record, "longer than the file"),
    "digits": (body(b"L" + b"9" * 10**6 + b"L\n"), "not a readable"),
    "wide characters": (body(text("\U0001f600" + "a" * 3_900_000)), "holds no weights"),
    "deflated numbers": (
        body(weights(tensor(integers(2**25))), {"data/0": bytes(2**27)}, deflated="data/0"),
        "fewer numbers",
    ),
    "deflated storage": (body(weights(tensor()), {"data/0": bytes(2**27)}, deflated="data/0"), "data/0 is compressed"),
    "deflated pickle": (body(b"]" * 10**8, deflated="data.pkl"), "data.pkl is compressed"),
    "overlapping records": (overlapping_records, "longer than the file"),
    "directory": (many_records, "not a readable"),
    "extra fields": (extra_fields, "not a readable"),
    "expanded": (body(weights(tensor(integers(10**9, 10**6), integers(0, 0)), "head.weight")), "head.weight"),
    "expanded beyond 64 bits": (body(weights(tensor(integers(*[2**62] * 9), integers(*[0] * 9)))), "fewer numbers"),
    "storage too short": (body(weights(tensor(integers(1000)))), "fewer numbers"),
    "stride too large": (body(weights(tensor(integers(2), integers(2**62)))), "not a readable"),
    "negative": (body(weights(tensor(integers(-4), integers(-1)))), "describes a tensor wrongly"),
    "dimensions": (
        body(b"(" + b"K\x01" * 50_000 + b"tq\x000" + (tensor(b"h\x00", b"h\x00") + b"0") * 5000),
        "describes a tensor wrongly",
    ),
    "many views": (
        body(
            b"}(" + b"".join(text(f"{i}") + tensor(integers(2**16)) for i in range(3000)) + b"u",
            {"data/0": bytes(2**18)},
        ),
        "fewer numbers",
    ),
    "arguments": (
        body(b"(" + b"N" * 90_000 + b"tq\x000cbuiltins\nprint\nq\x010" + b"h\x01h\x00R0" * 25_000 + weights(tensor())),
        "read 1",
    ),
    "items": (
        body(
            b"("
            + b"NN\x86" * 30_000
            + b"tq\x000ccollections\nOrderedDict\nq\x010"
            + b"h\x01h\x00R0" * 25_000
            + weights(tensor())
        ),
        "read 1",
    ),
    "names": (
        body(
            b"".join(text("m" * 4000 + f"{i}") + b"q" + bytes([i]) + b"0" for i in range(250))
            + b"".join(b"h" + bytes([i % 250]) + b"h" + bytes([i // 250]) + b"\x93" for i in range(45_000))
        ),
        "holds no weights",
    ),
    "numbers set in a tensor": (
        body(tensor(integers(2**20)) + b"(" + b"NK\x01" * 50_000 + b"u", {"data/0": bytes(2**22)}),
        "found Tensor",
    ),
    "safetensors: length": (tensors(b"{}", 2**62), "header is too long"),
    "safetensors: shape": (
        tensors(b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', data=bytes(4)),
        "not a readable",
    ),
    "safetensors: nested": (tensors(b"[" * 900_000), "not a readable"),
    "safetensors: names": (empty_tensors(10_000), "read 10000"),
    "safetensors: more names": (empty_tensors(200_000), "header is too long"),
    "safetensors: prefixes": (empty_tensors(100, "module." * 1400 + "{}"), "read 100"),
    "safetensors: digits": (empty_tensors(10, "layers." + "9" * 90_000 + ".blocks.{}.op.Ds"), "read 10"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float, float, str]]:
    folder = tmp_path_factory.mktemp("hostile")
    paths = {}
    for name, (write, _) in FILES.items():
        paths[name] = folder / f"{name.replace(' ', '_')}{'.safetensors' if 'safetensors' in name else '.pth'}"
        write(paths[name])
    process = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths.values()], capture_output=True, text=True, check=False
    )
    found = {path: rest for path, *rest in map(json.loads, process.stdout.splitlines())}
    assert process.returncode == 0, (len(found), process.returncode, process.stderr[-2000:])
    # The bound is one for machines that loop two million times in 0.1 seconds; others get more time.
    slower = max(1.0, found[""][0] / 0.1)
    return {name: (path, found[str(path)][0] / slower, *found[str(path)][1:]) for name, path in paths.items()}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("name", FILES)
def test_bounds(results: dict[str, tuple[Path, float, float, str]], name: str) -> None:
    path, seconds, memory, said = results[name]
    size = path.stat().st_size
    assert seconds < 2 + size / 1e8
    assert memory < 3 * size + 64e6
    assert FILES[name][1] in said
    assert said.startswith(("read ", str(path)))
    assert said.isprintable()
