"""The models inside segmentation_models_pytorch and transformers, without a network."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import timm
import torch

import vision_ssm  # noqa: F401  (registers the models)

FAMILIES = ["efficient_vmamba", "group_mamba", "sparx_mamba", "sparx_swin", "vim2", "viqs", "vmamba"]
DEPTH_4 = dict(encoder_depth=4, encoder_weights=None, classes=3)
BLOCKS = dict(decoder_channels=(16, 12, 8, 8))  # Unet and its like have as many as the encoder is deep
DECODERS: dict[str, dict[str, Any]] = {
    "unet": BLOCKS,
    "unetplusplus": BLOCKS,
    "manet": BLOCKS,
    "linknet": {},
    "fpn": {"upsampling": 2, "decoder_pyramid_channels": 16},
    "pspnet": {"upsampling": 16},
    "upernet": {"decoder_channels": 16},
    "segformer": {"decoder_segmentation_channels": 16},
    "dpt": {},
}
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_decoders_of_smp(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    image = torch.zeros(1, 3, 64, 96)
    encoder = smp.encoders.get_encoder(f"tu-{family}_atto", depth=4, weights=None).eval()
    maps = encoder(image)
    # One encoder and its maps for all decoders: they are what takes seconds.
    monkeypatch.setattr(smp.encoders, "TimmUniversalEncoder", lambda **_: encoder)
    monkeypatch.setattr(encoder, "forward", lambda _: maps)
    shapes = {}
    for decoder, options in DECODERS.items():
        model = smp.create_model(decoder, f"tu-{family}_atto", **DEPTH_4, **options).eval()
        with torch.no_grad():
            shapes[decoder] = tuple(model(image).shape)
    assert shapes == dict.fromkeys(DECODERS, (1, 3, 64, 96))


def test_a_fifth_map_is_refused_with_what_to_use() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ValueError, match=r"4 maps, of strides 2, 4, 8, 16; .* with encoder_depth=4$"):
        smp.Unet("tu-vmamba_atto", encoder_weights=None)


@families
def test_pan_at_stride_32(family: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    with torch.device("meta"):
        model = smp.PAN(f"tu-{family}_tiny", encoder_weights=None, encoder_output_stride=32).eval()
        assert tuple(model(torch.zeros(1, 3, 256, 256)).shape) == (1, 1, 256, 256)


@pytest.mark.parametrize(("decoder", "stride"), [("deeplabv3", 8), ("deeplabv3plus", 16), ("pan", 16)])
def test_dilation_is_refused(decoder: str, stride: int) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ValueError, match=rf"must be 32, the network's own, got {stride}: .* use a decoder") as caught:
        smp.create_model(decoder, "tu-vmamba_tiny", encoder_weights=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["group_mamba", "vmamba"])
def test_backbone_and_upernet_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(socket.socket, "connect", None)
    name, image = f"{family}_atto", torch.randn(2, 3, 32, 48)
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    backbone = transformers.TimmBackbone(config).eval()
    other = timm.create_model(name, features_only=True).eval()
    other.load_state_dict(backbone._backbone.state_dict())
    for found, expected in zip(backbone(image).feature_maps, other(image), strict=True):
        assert torch.equal(found, expected)
    heads: dict[str, Any] = dict(hidden_size=8, num_labels=4, auxiliary_channels=8)
    heads["auxiliary_in_channels"] = backbone.channels[2]
    model = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, **heads))
    assert model(image, labels=torch.zeros(2, 32, 48, dtype=torch.long)).logits.shape == (2, 4, 32, 48)
