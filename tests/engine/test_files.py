import resource
from contextlib import contextmanager

import pytest
import torch

from vision_ssm.engine.files import atomic_write, write_text
from vision_ssm.engine.recorder import SafeCheckpointIO
from vision_ssm.errors import InputError


@contextmanager
def full_disk(room):
    # A real failed write: the system refuses to let any file grow beyond `room` bytes.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("older", [True, False], ids=["over-an-older-file", "new"])
def test_failed_checkpoint_leaves_nothing_half_written(older, tmp_path):
    path = tmp_path / "last.ckpt"
    writer = SafeCheckpointIO()
    if older:
        writer.save_checkpoint({"step": 1}, path)
    with full_disk(50_000), pytest.raises(OSError):
        writer.save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert [p.name for p in tmp_path.iterdir()] == (["last.ckpt"] if older else [])
    if older:
        assert writer.load_checkpoint(path) == {"step": 1}


def test_interruption_leaves_the_older_file(tmp_path):
    path = tmp_path / "metrics.csv"
    write_text(path, "old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_resume_state_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="damaged"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()
