"""Official checkpoints: safe reading, and the mapping of their keys to ours."""

from vision_ssm.checkpoints.families import convert_official
from vision_ssm.checkpoints.pretrained import build_from_official, check_fit, load_strict
from vision_ssm.checkpoints.reader import Checkpoint, CheckpointError, load_checkpoint_file, read_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "build_from_official",
    "check_fit",
    "convert_official",
    "load_checkpoint_file",
    "load_strict",
    "read_checkpoint",
]
