"""The implied attention of scans gives their outputs; layers are found and drawn in models of every family."""

import numpy as np
import pytest
import timm
import torch

from scan.cases import CASES, Case
from vision_ssm.analysis import attention_row, channel_attention, find_scan_layers, scan_attention, switch_choices
from vision_ssm.analysis.attention import _arguments, step_sizes
from vision_ssm.errors import InputError
from vision_ssm.scan import use_backend
from vision_ssm.scan.arguments import ScanArguments

MORE = [
    Case(states=16, paths="atrous"),
    Case(states=1, paths="atrous", height=4, width=7),
    Case(states=16, side_by_side=True, shared=True, height=5, width=2),
    Case(states=1, paths="shifted"),
    Case(states=16, paths="shifted", height=4, width=3, skip=False, weighted=True),
    Case(states=16, chosen=2, weighted=True, inclusive=False, skip=False, shared=True, rank=0),
]
SCANS = {
    "vmamba_atto": ("stages.0.blocks.0.ss2d", 4),
    "sparx_mamba_atto": ("stages.1.blocks.1.ss2d", 4),
    "efficient_vmamba_atto": ("stages.0.blocks.0.ss2d", 4),
    "group_mamba_atto": ("stages.2.blocks.0.mixer.ss2d", 4),
    "vim2_atto": ("stages.1.blocks.0", 4),
    "viqs_atto": ("stages.1.blocks.0", 4),
}


def arguments(call):
    routes, tensors = call.routes, call.tensors
    return ScanArguments(read=routes.read, write=routes.write, complete=routes.complete, **tensors, **call.switches)


def assert_rows_give_the_output(args, y, tokens):
    x = args.x.double()
    for image in range(len(x)):
        chosen = range(args.routes) if args.route_index is None else args.route_index[image].tolist()
        for token in tokens:
            rows = attention_row(args, image, token)
            expected = (rows * x[image]).sum((0, 1))
            for slot, k in enumerate(chosen):
                for step in (args.write[k] == token).nonzero().flatten().tolist():
                    if args.D is None or args.read[k, step] < 0:
                        continue
                    width = args.channels_per_route
                    part = slice(k * width, (k + 1) * width) if args.side_by_side else slice(None)
                    weight = 1 if args.route_weight is None else args.route_weight[image, slot].double()
                    skip = args.D[k if len(args.D) > 1 else 0].double()
                    expected[part] += weight * skip * x[image, args.read[k, step], part]
            torch.testing.assert_close(y[image, token].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_attention_times_tokens_and_the_skip_are_the_output(case):
    call = case.make(torch.float32)
    y, _ = call.run()
    last = case.height * case.width - 1
    center = case.height // 2 * case.width + case.width // 2
    tokens = sorted({0, case.width - 1, center, max(0, last - case.width + 1), last})
    assert_rows_give_the_output(arguments(call), y, tokens)


def test_a_row_sees_no_token_after_its_own_and_none_of_other_quarters():
    args = arguments(Case(paths="atrous", height=5, width=7).make(torch.float32))
    rows = attention_row(args, 1, 16).abs().sum(2)  # row 2, column 2: on the first quarter grid alone
    seen = rows.nonzero().tolist()
    assert seen == [[0, row * 7 + column] for row in (0, 2) for column in (0, 2, 4, 6) if row * 7 + column <= 16]


def test_step_sizes_and_decays():
    args = arguments(Case(paths="atrous", states=3).make(torch.float64))
    steps, decays = step_sizes(args, 0)
    token = args.read[1] >= 0
    read = args.read[1][token].long()
    raw = args.dbc[0, read, 1, : args.rank] @ args.dt_weight[1] + args.dt_bias[1]
    delta = torch.nn.functional.softplus(raw)
    torch.testing.assert_close(steps[1, read], delta.mean(1))
    torch.testing.assert_close(decays[1, read], torch.exp(delta[..., None] * args.A[1]).mean((1, 2)))
    assert steps[1].isnan().sum() == 15 - len(read)


def first_image(height=32, width=48, count=1):
    return torch.randn(count, 3, height, width)


@pytest.mark.parametrize("name", SCANS)
def test_every_family_is_explained(name):
    model = timm.create_model(name, num_classes=10).eval()
    for parameter in model.parameters():  # so that switches choose, and nothing is zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    image = first_image()[0]
    layer, routes = SCANS[name]
    layers = find_scan_layers(model, image)
    assert layers[layer].kind == "scan"
    args = _arguments(model, image, None, layer)
    y = route_scan_again(args)
    height, width = layers[layer].grid
    assert height * width == args.x.shape[1]
    assert_rows_give_the_output(args, y, [0, width - 1, (height // 2) * width + width // 2, height * width - 1])
    found = scan_attention(model, image[None], layer, (1.0, 0.25), name=name, names=["noise"])
    item = found.images[0]
    assert item.token == (height - 1, width // 4)
    assert len(item.routes) == routes
    assert item.absolute.shape == (routes + 1, height, width)
    assert item.absolute[0].sum() > 0
    assert len(found.rows()) == (routes + 1) * height * width
    assert (np.abs(item.signed) <= item.absolute + 1e-12).all()
    row = attention_row(args, 0, item.token[0] * width + item.token[1])
    np.testing.assert_allclose(item.absolute[0].ravel(), row.sum(0).abs().mean(1))


def route_scan_again(args):
    names = ("x", "dbc", "A", "read", "write", "delta", "dt_weight", "dt_bias", "D", "route_index", "route_weight")
    names += ("softplus", "inclusive", "complete")
    return torch.ops.vision_ssm.route_scan(*(getattr(args, name) for name in names), False, False)[0]


def test_a_group_of_channels_sees_its_own_route_alone():
    model = timm.create_model("group_mamba_atto", num_classes=10).eval()
    args = _arguments(model, first_image()[0], None, "stages.0.blocks.0.mixer.ss2d")
    rows = attention_row(args, 0, 20)
    own = rows.unflatten(2, (4, -1)).abs().sum((1, 3))
    assert (own.diagonal() > 0).all()
    assert own.sum() == own.diagonal().sum()


def test_the_reference_backend_is_seen_too():
    model = timm.create_model("vmamba_atto", num_classes=10).eval()
    image = first_image(32, 32)[0]
    with use_backend("reference"):
        found = scan_attention(model, [image])
    assert found.layer == "stages.2.blocks.2.ss2d"  # the last of the third stage
    assert found.images[0].token == (found.images[0].absolute.shape[1] // 2,) * 2


def test_nothing_stays_in_the_model():
    model = timm.create_model("vmamba_atto", num_classes=10).eval()
    scan_attention(model, first_image())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_switches_and_their_weights():
    model = timm.create_model("vim2_atto", num_classes=10).eval()
    for module in model.modules():
        if hasattr(module, "router"):
            torch.nn.init.normal_(module.router.bias)
    found = switch_choices(model, first_image(count=2))
    assert found.paths == ("Rows", "Columns", "AntiDiagonal", "Diagonal")
    np.testing.assert_allclose(found.weights.sum(2), 1, rtol=1e-6)
    assert ((found.weights > 0).sum(2) == 2).all()
    layer = found.layers[-1].removesuffix(".switch")
    item = scan_attention(model, first_image(count=1), layer).images[0]
    assert sum(item.route_weights) == pytest.approx(2)  # both directions
    assert [row["path"] for row in found.rows()[:2]] == ["Rows", "Columns"]
    assert switch_choices(timm.create_model("vmamba_atto"), first_image()) is None


def test_channel_attention_of_a_ganglion_layer():
    model = timm.create_model("sparx_mamba_atto", num_classes=10).eval()
    images = first_image(count=2)
    layers = find_scan_layers(model, images[0])
    name = next(name for name, layer in layers.items() if layer.kind == "channel attention")
    module = model.get_submodule(name)
    seen = []
    module.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    found = channel_attention(model, images, name)
    (_, _, v), y = seen[-1]
    size = found.weights.shape[-1]
    assert found.weights.shape == (2, 4, v.shape[3] // 4, v.shape[3] // 4)
    np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-5)
    parts = v[0].unflatten(-1, (4, size))
    mixed = torch.einsum("hij,yxhj->yxhi", torch.from_numpy(found.weights[1]), parts).flatten(2)
    torch.testing.assert_close(mixed, y[0], rtol=1e-4, atol=1e-5)
    assert len(found.rows()) == 2 * 4 * size**2


@pytest.mark.parametrize(
    ("layer", "position", "message"),
    [
        ("stages.0.blocks.0.ss2", (0.5, 0.5), r"no layer stages.0.blocks.0.ss2 .*did you mean stages.0.blocks.0.ss2d"),
        ("stages.0.blocks.0.ss2d", (0.5, 1.5), "position must lie between 0 and 1.*got 0.5 1.5"),
    ],
    ids=["layer", "position"],
)
def test_bad_input(layer, position, message):
    with pytest.raises(InputError, match=message):
        scan_attention(timm.create_model("vmamba_atto").eval(), first_image(), layer, position)


def test_layers_that_mix_channels_have_no_position():
    model = timm.create_model("vim2_atto", num_classes=10).eval()
    image = first_image()
    across = next(name for name, layer in find_scan_layers(model, image[0]).items() if "across" in layer.kind)
    with pytest.raises(InputError, match="is a scan across channels"):
        scan_attention(model, image, across)
    with pytest.raises(InputError, match="has no channel attention"):
        channel_attention(model, image, across)
    with pytest.raises(InputError, match="has no layer that scans"):
        find_scan_layers(torch.nn.Conv2d(3, 4, 3), image[0])
