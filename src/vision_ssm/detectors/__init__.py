"""Object detection, instance and semantic segmentation, as the published networks of mmdet and mmseg compute them."""

from vision_ssm.detectors.create import DETECTORS, SMP_DECODERS, create_detector, create_segmenter
from vision_ssm.detectors.detections import Detections, paste_mask
from vision_ssm.detectors.detector import Detector
from vision_ssm.detectors.retinanet import RetinaNet
from vision_ssm.detectors.segmenter import Segmenter, UperNet
from vision_ssm.detectors.two_stage import FasterRCNN, MaskRCNN

__all__ = [
    "DETECTORS",
    "SMP_DECODERS",
    "Detections",
    "Detector",
    "FasterRCNN",
    "MaskRCNN",
    "RetinaNet",
    "Segmenter",
    "UperNet",
    "create_detector",
    "create_segmenter",
    "paste_mask",
]
