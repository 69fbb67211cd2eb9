"""What is ViM2's and ViQS's own: sizes, the averaging of earlier outputs, the balance loss."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim

import vision_ssm
from vision_ssm.analysis import complexity
from vision_ssm.layers import QSTokenMixer, SelectiveChannelMixer, SelectiveTokenMixer
from vision_ssm.models import MambaMixer
from vision_ssm.models.mamba_mixer import MixerStage

TINY: dict[str, Any] = dict(dims=(16, 32), depths=(1, 2), num_classes=3, stem_stride=2, d_state=2)
both = pytest.mark.parametrize("name", ["vim2_atto", "viqs_atto"])


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "scalars"),
    [
        ("vim2_tiny", "20.35", "3.17", 107),
        ("vim2_small", "42.99", "7.40", 476),
        ("vim2_base", "74.80", "13.02", 476),
        ("viqs_tiny", "18.09", "2.75", 107),
        ("viqs_small", "31.13", "5.28", 476),
        ("viqs_base", "54.51", "9.29", 476),
    ],
)
def test_sizes(name: str, parameters: str, macs: str, scalars: int) -> None:
    model = timm.create_model(name, device="meta")
    cost = complexity(model)
    assert f"{cost.parameters / 1e6:.2f}" == parameters
    assert f"{cost.macs / 1e9:.2f}" == macs
    assert sum(p.numel() for key, p in model.named_parameters() if key.endswith("scalars")) == scalars


# The options of the ablations; None of their sizes is published but that of ViM2-MLP, whose token mixers were larger.
ABLATIONS: dict[str, dict[str, Any]] = {
    "mlp": dict(mlp_ratio=4.0),
    "sequential": dict(weighted_average=False),
    "vim2-mlp": dict(mlp_ratio=4.0, weighted_average=False),
    "fixed": dict(switch=False),
    "forward": dict(bidirectional=False),
    "all": dict(mlp_ratio=2.0, weighted_average=False, switch=False, bidirectional=False),
    "aligned": dict(switch=False, bidirectional=False, aligned=True),
}


@pytest.mark.parametrize("qs_mixer", [False, True], ids=["vim2", "viqs"])
@pytest.mark.parametrize("case", ABLATIONS)
def test_ablated_models_learn_and_can_be_optimized(case: str, qs_mixer: bool) -> None:
    model = MambaMixer(**TINY, **ABLATIONS[case], qs_mixer=qs_mixer).train()
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("scalars", "router.weight")):
                p.add_(0.1 * torch.randn_like(p))  # starts at zero
    loss = model(x).square().mean()
    assert (model.aux_loss is None) == (ABLATIONS[case].get("switch") is False)
    (loss if model.aux_loss is None else loss + model.aux_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # Without a choice of paths nothing is left unused.
    zero = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert zero == [] or model.aux_loss is not None
    with torch.no_grad():
        torch.testing.assert_close(vision_ssm.optimize(model)(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_ablations_in_numbers() -> None:
    def parameters(**options: Any) -> int:
        return sum(p.numel() for p in timm.create_model("vim2_tiny", device="meta", **options).parameters())

    whole, dims, mixers = parameters(), (96, 192, 384, 768), (2, 2, 6, 2)
    assert whole - parameters(weighted_average=False) == 107
    # Half of the biases of the step sizes: of token mixers 4 paths of 2 C channels, of half as many channel mixers C.
    assert whole - parameters(bidirectional=False) == sum(
        n * (4 * 2 + 1 / 2) * d for d, n in zip(dims, mixers, strict=True)
    )
    # No router, and rates and biases of two paths less, or of none.
    routers = sum(4 * (d + 1) * n for d, n in zip(dims, mixers, strict=True))
    assert whole - parameters(switch=False, scans=4) == routers
    paths = sum(2 * 2 * d * (16 + 2) * n for d, n in zip(dims, mixers, strict=True))
    assert whole - parameters(switch=False) == routers + paths
    mlp = parameters(mlp_ratio=4.0, weighted_average=False)
    token_mixers_and_rest = parameters(mlp_ratio=1.0, weighted_average=False) - sum(
        n // 2 * (2 * d * d + 2 * d) for d, n in zip(dims, mixers, strict=True)
    )
    assert mlp - token_mixers_and_rest == sum(n // 2 * (8 * d * d + 5 * d) for d, n in zip(dims, mixers, strict=True))


def test_fixed_scans_are_the_switch_with_the_same_choice_for_all() -> None:
    switched, fixed = (SelectiveTokenMixer(16, scans=2, switch=switch).eval() for switch in (True, False))
    state = switched.state_dict()
    with torch.no_grad():
        state["switch.router.bias"].copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    own = fixed.state_dict()
    state = {
        key: value[:, :2] if key == "dt_bias" else value[: len(own[key])] for key, value in state.items() if key in own
    }
    fixed.load_state_dict(state)
    x = torch.randn(3, 5, 4, 16)
    torch.testing.assert_close(fixed(x)[0], switched(x)[0])
    assert fixed.train()(x)[1] is None


def test_an_ablated_model_can_be_traced_and_exported() -> None:
    model = MambaMixer(**TINY | dict(dims=(32,), depths=(1,)), **ABLATIONS["all"]).eval()
    x, other = torch.randn(2, 3, 40, 56), torch.randn(3, 3, 33, 47)
    sizes = {0: Dim("batch", min=1, max=16), 2: Dim("height", min=32, max=512), 3: Dim("width", min=32, max=512)}
    exported = torch.export.export(model, (x,), dynamic_shapes=[sizes]).module()
    torch.testing.assert_close(exported(other), model(other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(other), model(other), rtol=1e-5, atol=1e-6)


@both
def test_atto_is_small(name: str) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) < 1e6


@pytest.mark.parametrize(
    ("name", "mixer", "gated"), [("vim2_tiny", SelectiveTokenMixer, True), ("viqs_tiny", QSTokenMixer, False)]
)
def test_two_token_mixers_to_a_channel_mixer(name: str, mixer: type[nn.Module], gated: bool) -> None:
    model = timm.create_model(name, device="meta")
    for stage, units in zip(model.stages, (1, 1, 3, 1), strict=True):
        assert [type(block) for block in stage.blocks] == [mixer, mixer, SelectiveChannelMixer] * units
        assert all((block.gate_proj is not None) == gated for block in stage.blocks[2::3])


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_stage_of_pairs_has_the_papers_number_of_scalars(length: int) -> None:
    stage = MixerStage([nn.Identity() for _ in range(2 * length)])
    scalars = sum(average.scalars.numel() for average in stage.averages)
    assert scalars == length * (2 * length + 3)
    assert stage.out_average.scalars.numel() == 2 * length + 2


@both
def test_a_new_stage_is_the_sequence_of_its_blocks(name: str) -> None:
    stage = timm.create_model(name, depths=(1, 2, 1, 1)).eval().stages[1]
    x = torch.randn(2, 8, 6, 32)
    expected = stage.downsample(x)
    for block in stage.blocks:
        result = block(expected)
        expected = result[0] if isinstance(result, tuple) else result
    assert torch.equal(stage(x), expected)


def test_a_stage_averages_all_earlier_outputs() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    stage = MixerStage([Double(), Double()])
    with torch.no_grad():
        for average, scalars in zip(
            (*stage.averages, stage.out_average), ([1, 2], [3, 4, 5], [6, 7, 8, 9]), strict=True
        ):
            average.scalars.copy_(torch.tensor(scalars))
    # y1 = 2 (1 + 2) x, y2 = 2 ((3 + 4) x + 5 y1), output (6 + 7) x + 8 y1 + 9 y2
    x = torch.ones(1, 1, 1, 4)
    assert stage(x).unique().tolist() == [13 + 8 * 6 + 9 * 2 * (7 + 5 * 6)]


@both
def test_balance_loss_only_in_training(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    assert model.aux_loss is None
    model.train()
    x = torch.randn(2, 3, 32, 48)
    model(x)
    assert model.aux_loss.item() == pytest.approx(0.01)  # a new router's probabilities are equal
    model.aux_loss.backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "router" in key)
    model.forward_intermediates(x, indices=[0], stop_early=True)
    assert model.aux_loss.item() == pytest.approx(0.01)
    model.eval()(x)
    assert model.aux_loss is None


def test_weight_of_the_balance_loss() -> None:
    model = MambaMixer(**TINY, aux_loss_weight=0.5, scans=1).train()
    for module in model.modules():
        if hasattr(module, "router"):
            nn.init.constant_(module.router.bias[:1], 50.0)
    model(torch.randn(2, 3, 32, 32))
    assert model.aux_loss.item() == pytest.approx(0.5 * 4)


@both
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_between_forward_and_backward(name: str, again: Any) -> None:
    model = timm.create_model(name, num_classes=3).train()
    loss = model(torch.randn(2, 3, 32, 32)).sum() + model.aux_loss
    other = again(model)
    assert other.aux_loss is None
    assert model.aux_loss is not None
    loss.backward()


@both
def test_checkpointing_repeats_the_choice(name: str) -> None:
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.3).train()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "router" in key or key.endswith("scalars"):
                p.add_(0.1 * torch.randn_like(p))
    x, runs = torch.randn(4, 3, 48, 32), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(x).square().mean() + model.aux_loss
        loss.backward()
        runs.append((loss.detach(), model.aux_loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert [k for k, grad in runs[0][2].items() if not torch.equal(grad, runs[1][2][k])] == []


def test_checkpointing_keeps_less() -> None:
    model = MambaMixer(**TINY | dict(depths=(3, 3))).train()
    kept = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.randn(2, 3, 64, 64))
        kept.append(total)
    assert kept[1] < kept[0] / 5


def test_a_trace_leaves_nothing_behind() -> None:
    model = MambaMixer(**TINY | dict(dims=(16,), depths=(1,))).train()
    torch.fx.symbolic_trace(model)
    assert model.aux_loss is None
    torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    assert model.aux_loss is None


def test_compiled_training_has_the_balance_loss() -> None:
    torch.compiler.reset()
    model = MambaMixer(**TINY | dict(depths=(1, 1))).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(torch.randn(2, 3, 32, 32)).sum() + compiled.aux_loss
    loss.backward()
    assert model.aux_loss.item() == pytest.approx(0.01)


@both
def test_evaluation_repeats_and_training_draws(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 48)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@both
def test_decay_spares_what_is_no_matrix(name: str) -> None:
    model = timm.create_model(name, device="meta")
    decayed = {
        key.rsplit(".", 1)[-1]
        for key, p in model.named_parameters()
        if key not in model.no_weight_decay() and p.dim() > 1
    }
    assert decayed <= {"weight", "dt_weight"}


@pytest.mark.parametrize("aligned", [False, True], ids=["shift", "aligned"])
@pytest.mark.parametrize("qs_mixer", [False, True], ids=["vim2", "viqs"])
def test_bfloat16_autocast_stays_finite(qs_mixer: bool, aligned: bool) -> None:
    model = MambaMixer(**TINY, qs_mixer=qs_mixer, aligned=aligned).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target) + model.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stem_stride=0), "stem_stride must be at least 1, got 0"),
        (dict(scans=5), "scans must be between 1 and 4, the number of paths, got 5"),
        (dict(qs_mixer=True, dims=(8, 16)), "multiple of 32"),
        (dict(dims=(8,)), "got 1 and 2"),
        (dict(d_state=0), "d_state must be at least 1, got 0"),
        (dict(mlp_ratio=0), "mlp_ratio must give 16 channels at least one hidden channel, got 0"),
        (dict(channel_expand=0), "channel_expand must give 16 channels at least one inner channel, got 0"),
        (dict(aux_loss_weight=-1), "aux_loss_weight must be at least 0, got -1"),
        (dict(drop_path_rate=1.5), "drop_path_rate must be between 0 and 1, got 1.5"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaMixer(**TINY | options)


def test_there_are_no_weights() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vim2_tiny", pretrained=True, device="meta")
