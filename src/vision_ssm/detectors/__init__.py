"""Object detection and instance segmentation, as the published detectors of mmdet compute them."""

from vision_ssm.detectors.create import DETECTORS, create_detector
from vision_ssm.detectors.detections import Detections, paste_mask
from vision_ssm.detectors.detector import Detector
from vision_ssm.detectors.retinanet import RetinaNet
from vision_ssm.detectors.two_stage import FasterRCNN, MaskRCNN

__all__ = [
    "DETECTORS",
    "Detections",
    "Detector",
    "FasterRCNN",
    "MaskRCNN",
    "RetinaNet",
    "create_detector",
    "paste_mask",
]
