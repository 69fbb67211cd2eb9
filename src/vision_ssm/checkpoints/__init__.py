"""Official checkpoints: safe reading, and the mapping of their keys to ours."""

from vision_ssm.checkpoints.detectors import convert_detector, detector_no_decay, detector_of, trace_detector
from vision_ssm.checkpoints.families import (
    address_note,
    can_convert,
    convert_official,
    options_of,
    published,
    published_names,
    same_family,
    trace_official,
)
from vision_ssm.checkpoints.pretrained import build_from_official, check_fit, classifier_names, load_strict
from vision_ssm.checkpoints.reader import (
    Checkpoint,
    CheckpointError,
    load_checkpoint_file,
    read_checkpoint,
    take_backbone,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "address_note",
    "build_from_official",
    "can_convert",
    "check_fit",
    "classifier_names",
    "convert_detector",
    "convert_official",
    "detector_no_decay",
    "detector_of",
    "load_checkpoint_file",
    "load_strict",
    "options_of",
    "published",
    "published_names",
    "read_checkpoint",
    "same_family",
    "take_backbone",
    "trace_detector",
    "trace_official",
]
