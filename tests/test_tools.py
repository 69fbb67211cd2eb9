"""What people put around a model: files, quantization, adapters, hooks, counters, averages.

One table, tool by family. timm's ConvNeXt is one more family: where a check fails on it, the check is wrong.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vision_ssm  # noqa: F401  (registers the models)

FAMILIES = ["efficient_vmamba", "group_mamba", "sparx_mamba", "sparx_swin", "vim2", "viqs", "vmamba", "convnext"]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.Identity)  # may be iterated over or left out; nothing is computed there
families = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> nn.Module:
    return timm.create_model(f"{family}_atto", num_classes=10).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not isinstance(module, CONTAINERS)}


def gradients(model: nn.Module, image: Tensor) -> Tensor:
    model.train().zero_grad()
    torch.manual_seed(0)  # some models draw random numbers in training
    model(image).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def safetensors(model: nn.Module, image: Tensor, folder: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    files.save_file(model.state_dict(), folder / "weights.safetensors")
    other = copy.deepcopy(model).apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    other.load_state_dict(files.load_file(folder / "weights.safetensors"))
    assert torch.equal(other(image), model(image))


def save_for_hf(model: nn.Module, image: Tensor, folder: Path) -> None:
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    assert (folder / "model.safetensors").exists()
    other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(other(image), model(image))


def flat_weights(model: nn.Module, image: Tensor, folder: Path) -> None:
    expected = model(image)
    for tensor in model.state_dict().values():
        tensor.view(-1)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())  # as views: torch sums otherwise where they lie otherwise
    torch.testing.assert_close(model(image), expected)


def torchao(config: str) -> Callable[..., None]:
    def check(model: nn.Module, image: Tensor, folder: Path) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        expected = model(image)
        quantization.quantize_(model, getattr(quantization, config)())
        assert [name for name, layer in linears(model).items() if type(layer.weight.data) is Tensor] == []
        assert 0 < distance(model(image), expected) < 0.05

    return check


def lora(model: nn.Module, image: Tensor, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    names = list(linears(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(image).square().mean().backward()
    optimizer.step()
    learned = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(learned) == len(names)
    assert [name for name, p in learned.items() if not p.any()] == []
    expected = adapted.eval()(image)
    torch.testing.assert_close(adapted.merge_and_unload()(image), expected, rtol=1e-4, atol=1e-5)


def forward_hooks(model: nn.Module, image: Tensor, folder: Path) -> None:
    expected, fired = model(image), set()
    for name, layer in layers(model).items():
        layer.register_forward_pre_hook(lambda *_: None)
        layer.register_forward_hook(lambda *_, name=name: fired.add(name))
    assert torch.equal(model(image), expected)
    assert layers(model).keys() - fired == set()


def backward_hooks(checkpointing: bool) -> Callable[..., None]:
    def check(model: nn.Module, image: Tensor, folder: Path) -> None:
        expected, fired = gradients(model, image.requires_grad_()), set()
        for name, layer in layers(model).items():
            layer.register_full_backward_pre_hook(lambda *_: None)
            layer.register_full_backward_hook(lambda *_, name=name: fired.add(name))
        model.set_grad_checkpointing(checkpointing)
        # torch adds up the gradients of a map that several layers read in another order.
        assert distance(gradients(model, image), expected) < 1e-5
        assert layers(model).keys() - fired == set()

    return check


def averages(model: nn.Module, image: Tensor, folder: Path) -> None:
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    swa = torch.optim.swa_utils.AveragedModel(model)
    swa.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    ema.update(model)
    swa.update_parameters(model)
    # both have averaged once over the old and the new parameters
    torch.testing.assert_close(swa.module(image), ema.module(image))
    assert not torch.equal(ema.module(image), model(image))


def channels_last(model: nn.Module, image: Tensor, folder: Path) -> None:
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other_image = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(other_image), model(image))
    assert distance(gradients(other, other_image), gradients(model, image)) < 1e-5


def dynamic_quantization(model: nn.Module, image: Tensor, folder: Path) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(found) == len(linears(model)) > 0
    assert distance(quantized(image), model(image)) < 0.05


def counted(count: Callable[[nn.Module, Tensor], float]) -> Callable[..., None]:
    def check(model: nn.Module, image: Tensor, folder: Path) -> None:
        with FlopCounterMode(display=False) as counter:
            model(image[:1])
        # Such a counter misses the scan, and counts norms and activations, which torch's does not.
        assert 0.95 < count(model, image[:1]) / (counter.get_total_flops() / 2) < 1.05

    return check


def thop(model: nn.Module, image: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("thop").profile(model, (image,), verbose=False)[0]


def ptflops(model: nn.Module, image: Tensor) -> float:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    options: dict[str, Any] = dict(as_strings=False, print_per_layer_stat=False, backend="pytorch")
    return count(model, tuple(image.shape[1:]), **options)[0]


TOOLS: dict[str, Callable[..., None]] = {
    "safetensors": safetensors,
    "save_for_hf": save_for_hf,
    "flat weights": flat_weights,
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "peft LoRA": lora,
    "forward hooks": forward_hooks,
    "backward hooks": backward_hooks(checkpointing=False),
    "backward hooks, checkpointing": backward_hooks(checkpointing=True),
    "averages": averages,
    "channels last": channels_last,
}
# No longer maintained, or of little use; for one family.
OTHERS: dict[str, Callable[..., None]] = {
    "torch dynamic quantization": dynamic_quantization,
    "thop": counted(thop),
    "ptflops": counted(ptflops),
}
TABLE = [(tool, family) for tool in TOOLS for family in FAMILIES]
TABLE += [(tool, family) for tool in OTHERS for family in ("vmamba", "convnext")]


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(("tool", "family"), TABLE)
def test_tool(tool: str, family: str, tmp_path: Path) -> None:
    (TOOLS | OTHERS)[tool](build(family), torch.randn(2, 3, 32, 40), tmp_path)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def hooked(model: nn.Module) -> Iterator[None]:
    handles = [layer.register_forward_hook(lambda *_: None) for layer in model.modules()]
    yield
    for handle in handles:
        handle.remove()


OBSERVERS: dict[str, Callable[[nn.Module], AbstractContextManager]] = {
    "no_grad": lambda _: torch.no_grad(),
    "inference_mode": lambda _: torch.inference_mode(),
    "forward hooks": hooked,
    "FlopCounterMode": lambda _: FlopCounterMode(display=False),
    "dispatch mode": lambda _: Watching(),
}


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_same_bits_however_observed(family: str, dtype: torch.dtype, autocast: bool) -> None:
    model, image = build(family).to(dtype), torch.randn(2, 3, 32, 40, dtype=dtype)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(image)

    expected = run()
    assert expected.requires_grad
    for name, observer in OBSERVERS.items():
        with observer(model):
            found = run()
            with torch.no_grad():
                again = run()
        assert torch.equal(found, expected), name
        assert torch.equal(again, expected), f"{name}, without gradients"
