import pytest

from short_runs import SHORT
from vision_ssm.recipes import small


@pytest.fixture
def config(images):
    """A run of a few seconds in which everything draws at random."""
    random = dict(drop_path_rate=0.2, mixup=0.5, cutmix=0.5, auto_augment="rand-m5", ema_decay=0.8)
    return small(data=str(images), **SHORT | dict(epochs=3, batch_size=8, warmup_epochs=1), **random)
