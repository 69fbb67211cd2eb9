"""The drop-in for mamba-ssm's ``selective_scan_fn`` against its definition."""

import pytest
import torch
import torch.nn.functional as F

from vision_ssm.scan import selective_scan_fn, use_backend


def definition(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """What mamba-ssm documents, one step after another, in the dtype of the inputs."""
    batch, channels, steps = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def at(matrix, t):
        if matrix.dim() == 2:
            return matrix.expand(batch, -1, -1)
        if matrix.dim() == 3:
            return matrix[:, None, :, t]
        return matrix[..., t].repeat_interleave(channels // matrix.shape[1], dim=1)

    h, outputs = u.new_zeros(batch, channels, A.shape[1]), []
    for t in range(steps):
        d = delta[:, :, t, None]
        h = torch.exp(d * A) * h + d * at(B, t) * u[:, :, t, None]
        outputs.append((h * at(C, t)).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def draw(b_form="state", c_form="state", dtype=torch.float64, options=True):
    torch.manual_seed(0)
    batch, channels, steps, states = 2, 6, 11, 3
    shapes = {
        "state": (batch, states, steps),
        "group": (batch, 3, states, steps),
        "two groups": (batch, 2, states, steps),
        "constant": (channels, states),
    }
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = dict(
        u=torch.randn(batch, channels, steps, dtype=dtype),
        delta=torch.rand(batch, channels, steps, dtype=dtype),
        A=-torch.rand(channels, states, dtype=exact),
        B=torch.randn(shapes[b_form], dtype=exact if b_form == "constant" else dtype),
        C=torch.randn(shapes[c_form], dtype=exact if c_form == "constant" else dtype),
        D=torch.randn(channels, dtype=exact) if options else None,
        z=torch.randn(batch, channels, steps, dtype=dtype) if options else None,
        delta_bias=torch.rand(channels, dtype=exact) if options else None,
    )
    return {name: None if t is None else t.requires_grad_() for name, t in tensors.items()}


FORMS = ["state", "group", "two groups", "constant"]


@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
@pytest.mark.parametrize("options", [True, False], ids=["all options", "no options"])
@pytest.mark.parametrize("c_form", FORMS)
@pytest.mark.parametrize("b_form", FORMS)
def test_equals_the_definition(b_form, c_form, options, softplus):
    tensors = draw(b_form, c_form, options=options)
    leaves = [t for t in tensors.values() if t is not None]
    expected = definition(**tensors, delta_softplus=softplus)
    found = selective_scan_fn(**tensors, delta_softplus=softplus, return_last_state=True)
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    tensors = draw(dtype=dtype)
    y, state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    wide = {name: t.double() for name, t in tensors.items()}
    expected, expected_state = definition(**wide, delta_softplus=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert (y.double() - expected).norm() <= torch.finfo(dtype).eps * 4 * expected.norm()
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-5)


def test_output_alone_and_on_the_reference():
    tensors = draw()
    with use_backend("reference"):
        expected = selective_scan_fn(**tensors)
    torch.testing.assert_close(selective_scan_fn(**tensors), expected)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("A", torch.ones(6, 3, dtype=torch.complex64), TypeError, "A is complex .*only real"),
        ("A", torch.ones(5, 3), ValueError, r"A must have shape \(6, states\), got \(5, 3\)"),
        ("B", torch.ones(2, 4, 3, 11), ValueError, "B must have shape .* groups dividing 6"),
        ("C", torch.ones(2, 3, 10), ValueError, r"C must have shape .*got \(2, 3, 10\)"),
        ("delta", torch.ones(2, 6, 10), ValueError, r"delta must have the shape of u, \(2, 6, 11\)"),
        ("D", torch.ones(5), ValueError, r"D must have shape \(6,\), got \(5,\)"),
        ("z", torch.ones(2, 6), ValueError, "z must have the shape of u"),
        ("u", torch.ones(6, 11), ValueError, r"u must have shape \(batch, channels, steps\), got \(6, 11\)"),
        ("u", torch.ones(2, 6, 0), ValueError, r"u must have at least one step, got shape \(2, 6, 0\)"),
        ("u", torch.ones(2, 6, 11, dtype=torch.int64), TypeError, "u must be a floating-point tensor, got torch.int64"),
        ("B", None, TypeError, "B must be a tensor, got NoneType"),
        ("A", torch.ones(6, 3, device="meta"), ValueError, "A is on meta and u on cpu"),
    ],
)
def test_bad_input(name, value, error, message):
    with pytest.raises(error, match=message):
        selective_scan_fn(**{**draw(), name: value})
