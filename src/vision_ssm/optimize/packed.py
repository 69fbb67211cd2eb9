"""Linear layers and convolutions on oneDNN's fused products, with weights packed for them.

torch has these products for its compiler; they have no gradient. A packed layer keeps its weight, from which the packed
form can be made again, and replaces the original layer under the same name.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU as TimmGELU
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vision_ssm.layers.mamba_mixer import DilatedConv
from vision_ssm.scan.transforms import transformed

DTYPES = (torch.float32, torch.bfloat16)


@cache
def serves(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has products of a dtype on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def own_forward(module: nn.Module) -> bool:
    """Return whether ``forward`` is the one of the class, not replaced on the instance."""
    return "forward" not in module.__dict__


def activation_of(module: nn.Module | None) -> tuple[str, str] | None:
    """Return oneDNN's name and variant of an activation; ``None`` where it has none."""
    # By exact type: a subclass may compute something else.
    if type(module) is nn.GELU:
        return "gelu", module.approximate
    names = {type(None): "none", TimmGELU: "gelu", nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}
    return (names[type(module)], "none") if type(module) in names else None


class Frozen(nn.Module):
    """Base of an optimized copy and its layers: no training, no change of weights, device or dtype."""

    def __init_subclass__(cls) -> None:
        """Skip the hooks of base classes, which may register their subclasses."""

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode.

        Raises:
            RuntimeError: If ``mode`` is true.
        """
        if mode:
            raise _refusal("train")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Keep all parameters without gradients.

        Raises:
            RuntimeError: If ``requires_grad`` is true.
        """
        if requires_grad:
            raise _refusal("require gradients")
        return super().requires_grad_(False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse other weights.

        Raises:
            RuntimeError: Always.
        """
        raise _refusal("load weights")

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        for tensor in {(t.device, t.dtype): t for t in (*self.parameters(), *self.buffers())}.values():
            try:
                moved = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            except (RuntimeError, AssertionError):  # a device that does not exist here
                raise _refusal("move to another device") from None
            if (moved.device, moved.dtype) != (tensor.device, tensor.dtype):
                to = moved.device if moved.device != tensor.device else moved.dtype
                raise _refusal(f"move to {to}")
        return super()._apply(fn, recurse)


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(
        f"an optimized copy cannot {what}: it is for inference on a CPU; change the model instead, and call "
        "vision_ssm.optimize(model, dtype=...) again"
    )


@cache
def frozen(kind: Any) -> Any:
    """Return a subclass that adds :class:`Frozen`; its instances pickle by the original class."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _empty, (kind,), super(made, self).__reduce_ex__(2)[2]

    made: Any = type(kind.__name__, (Frozen, kind), {"__module__": kind.__module__, "__reduce_ex__": reduce})
    return made


def _empty(kind: Any) -> Any:
    return frozen(kind).__new__(frozen(kind))


class _Packed(Frozen):
    """A layer whose weight is packed at its first use. Anything that observes the call gets torch's operators.

    So does a dtype that oneDNN does not have on this machine.
    """

    weight: Tensor
    bias: Tensor | None
    activation: tuple[str, str]
    packed: Tensor | None
    packed_from: tuple[int, int]  # address and version of the weight
    dims: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its activation to a tensor of any floating-point dtype."""
        if torch.compiler.is_compiling():
            return self._activate(self._plain(x.to(self.weight.dtype)))
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            raise _refusal("give gradients")
        if x.dtype != self.weight.dtype and x.is_floating_point():
            x = x.to(self.weight.dtype)
        fits = x.numel() > 0 and x.dim() in self.dims and x.dtype == self.weight.dtype
        if not fits or not serves(x.dtype) or not _eager(x):
            return self._activate(self._plain(x))
        source = self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version
        if self.packed is None or source != self.packed_from:
            packed = self._pack(self.weight.detach().contiguous(), x)
            # Padded to whole blocks, the weight of a narrow layer could take too much memory for what it saves.
            self.packed = packed if torch.ops.mkldnn._nbytes(packed) <= self.weight.nbytes else self.weight.detach()
            self.packed_from = source
        name, variant = self.activation
        try:
            # oneDNN's own ReLU turns NaN into zero.
            y = self._run(x, self.packed, "none" if name == "relu" else name, variant)
        except RuntimeError:
            self._plain(x)  # raises torch's own error for what does not fit
            raise
        return y.relu_() if name == "relu" else y

    def _activate(self, y: Tensor) -> Tensor:
        name, variant = self.activation
        if name == "gelu":
            return F.gelu(y, approximate=variant)
        of: dict[str, Any] = {"relu": F.relu, "swish": F.silu, "hardswish": F.hardswish}
        return y if name == "none" else of[name](y)

    def _plain(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _pack(self, weight: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor, weight: Tensor, act: str, variant: str) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise _refusal("load weights")

    def extra_repr(self) -> str:
        """Name the weight's shape and the activation."""
        return f"{tuple(self.weight.shape)}, activation={self.activation[0]}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed weight, which is made again when needed."""
        return {**self.__dict__, "packed": None}


def _eager(x: Tensor) -> bool:
    """Return whether no tracer, dispatch mode (such as a FLOP counter), transform or subclass observes the call."""
    return (
        type(x) is Tensor and _get_current_dispatch_mode() is None and not transformed() and not torch.jit.is_tracing()
    )


class PackedLinear(_Packed):
    """See :class:`torch.nn.Linear`."""

    dims = (1, 2, 3, 4, 5)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _pack(self, weight: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def _run(self, x: Tensor, weight: Tensor, act: str, variant: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, act, [], variant)


_CACHE = 2**25  # bytes; a larger weight is taken not to fit into the caches


class PackedConv2d(_Packed):
    """See :class:`torch.nn.Conv2d`."""

    dims = (4,)
    sizes: tuple[Any, ...]
    """Padding, stride, dilation and groups."""

    def _plain(self, x: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.sizes
        return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)

    def _pack(self, weight: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.sizes, x.shape)

    def _run(self, x: Tensor, weight: Tensor, act: str, variant: str) -> Tensor:
        # These products are fastest in channels-last layout, except for large maps where the weight does not fit into
        # the caches: the fusion of a UPerNet, 2048 channels to 512 at 128x128, takes 2.3 s in it and 1.5 s without.
        if self.weight.nbytes > _CACHE and x.shape[-2:].numel() >= 32 * 32:
            x, weight = x.contiguous(), self.weight
        else:
            x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.sizes, act, [], variant)


def can_be_packed(layer: nn.Module) -> bool:
    """Return whether a module is exactly torch's linear layer or 2-D convolution, of a dtype that copies can have."""
    if (
        type(layer) not in (nn.Linear, nn.Conv2d, DilatedConv)
        or type(layer.weight) is not nn.Parameter
        or layer._forward_pre_hooks
        or not own_forward(layer)
    ):
        return False
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    return layer.weight.numel() > 0 and layer.weight.dtype in DTYPES


def pack(layer: Any, activation: tuple[str, str]) -> None:
    """Turn a layer into its packed form, in place, with the activation that follows it."""
    if type(layer) is not nn.Linear:
        layer.sizes = layer.padding, layer.stride, layer.dilation, layer.groups
    layer.__class__ = PackedLinear if type(layer) is nn.Linear else PackedConv2d
    layer.activation, layer.packed, layer.packed_from = activation, None, (0, 0)
