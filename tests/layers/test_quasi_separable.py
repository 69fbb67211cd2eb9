"""The quasi-separable scan against its matrix, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.layers import SCAN_POOL, quasi_separable_scan
from vision_ssm.scan import ROWS, AntiDiagonal, ScanPath, Snake, Windowed

TOLERANCE: dict[str, Any] = dict(rtol=0, atol=1e-12)
forms = pytest.mark.parametrize("aligned", [False, True], ids=["shift", "aligned"])


def matrices(step: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, aligned: bool) -> Tensor:
    """One image's matrices of one path, (channels, L, L), as the docstring has them; step is (2, L, channels)."""
    length = step.shape[1]
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            if i == j:
                row.append(D)
            elif j < i:
                at, between = (i, slice(j + 1, i + 1)) if aligned else (i - 1, slice(j + 1, i))
                decay = torch.exp(A * step[0, between].sum(0).unsqueeze(-1))  # (channels, N)
                row.append((C[0, at] * decay * B[0, j]).sum(-1) * step[0, j])
            else:
                at, between = (i, slice(i, j)) if aligned else (i + 1, slice(i + 1, j))
                decay = torch.exp(A * step[1, between].sum(0).unsqueeze(-1))
                row.append((C[1, at] * decay * B[1, j]).sum(-1) * step[1, j])
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rates(*shape: int) -> Tensor:
    return -random(*shape).detach().exp().requires_grad_()


def gradients(y: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return dict(zip(of, torch.autograd.grad((y * weight).sum(), list(of.values())), strict=True))


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-11, msg=name)


@forms
@pytest.mark.parametrize("path", [ROWS, AntiDiagonal(), Snake()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 7)], ids=str)
def test_shared_projections(path: ScanPath, size: tuple[int, int], aligned: bool) -> None:
    height, width, channels, states, rank, length = *size, 3, 2, 2, size[0] * size[1]
    of = dict(
        x=random(1, height, width, channels),
        dbc=random(1, height, width, rank + 2 * states),
        A=rates(1, channels, states),
        D=random(channels),
        dt_weight=random(1, rank, channels),
        dt_bias=random(2, 1, channels),
    )
    y = quasi_separable_scan(**of, paths=(path,), aligned=aligned)

    order = path.tokens(height, width)
    tokens, dbc = (of[name].flatten(0, 2)[order] for name in ("x", "dbc"))
    low_rank, B, C = dbc.split([rank, states, states], dim=-1)
    step = F.softplus(low_rank @ of["dt_weight"][0] + of["dt_bias"])  # (2, L, channels)
    M = matrices(step, B.expand(2, -1, -1), C.expand(2, -1, -1), of["A"][0], of["D"], aligned)
    expected = torch.einsum("cij,jc->ic", M, tokens)[order.argsort()].view(1, height, width, channels)
    if length == 1:  # the diagonal alone
        torch.testing.assert_close(y, expected, **TOLERANCE)
        return
    assert_equal((y, gradients(y, of)), (expected, gradients(expected, of)))


@forms
def test_one_direction_is_the_lower_half_of_the_matrix(aligned: bool) -> None:
    channels, length = 3, 7
    of = dict(x=random(2, 1, length, channels), dbc=random(2, 1, length, 1 + 2 * 2), A=rates(1, channels, 2))
    options: dict[str, Any] = dict(D=random(channels), dt_weight=random(1, 1, channels), aligned=aligned)
    bias = random(1, 1, channels)
    y = quasi_separable_scan(**of, **options, dt_bias=bias, paths=(ROWS,), bidirectional=False)
    # The other direction has no part in it where its step sizes are zero.
    still = torch.cat([bias, torch.full_like(bias, -1e3)])
    expected = quasi_separable_scan(**of, **options, dt_bias=still, paths=(ROWS,))
    torch.testing.assert_close(y, expected, **TOLERANCE)
    index, weight = torch.tensor([[1], [0]]), torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    two: dict[str, Any] = dict(dt_bias=bias.expand(-1, 2, -1), path_index=index, path_weight=weight)
    chosen = quasi_separable_scan(**of, **options, **two, paths=(ROWS, ROWS), bidirectional=False)
    diagonal = of["x"] * options["D"]
    torch.testing.assert_close(chosen - diagonal, (y - diagonal) * weight.view(2, 1, 1, 1), **TOLERANCE)


@forms
def test_projections_of_their_own(aligned: bool) -> None:
    channels, states, length = 2, 3, 6
    of = dict(
        x=random(1, 1, length, channels),
        dbc=random(1, 1, length, 2, 1 + 2 * states),  # forward, backward
        A=rates(1, channels, states),
        D=random(channels),
        dt_weight=random(1, 1, channels),
    )
    y = quasi_separable_scan(**of, paths=(ROWS,), aligned=aligned)
    low_rank, B, C = of["dbc"].view(length, 2, -1).transpose(0, 1).split([1, states, states], dim=-1)
    M = matrices(F.softplus(low_rank @ of["dt_weight"][0]), B, C, of["A"][0], of["D"], aligned)
    expected = torch.einsum("cij,jc->ic", M, of["x"][0, 0])[None, None]
    assert_equal((y, gradients(y, of)), (expected, gradients(expected, of)))


@forms
def test_off_diagonal_blocks_have_rank_n(aligned: bool) -> None:
    states, length = 4, 15
    options: dict[str, Any] = dict(
        dbc=torch.randn(1, 1, length, 2 * states, dtype=torch.float64),
        A=rates(1, 1, states),
        delta=torch.randn(1, 1, length, 1, dtype=torch.float64),
        dt_bias=torch.randn(2, 1, 1, dtype=torch.float64),
        D=torch.ones(1, dtype=torch.float64),
    )
    unit = torch.eye(length, dtype=torch.float64).view(length, 1, length, 1)
    columns = [quasi_separable_scan(e[None], paths=(ROWS,), aligned=aligned, **options).flatten() for e in unit]
    M = torch.stack(columns, dim=1)
    ranks = [
        int(torch.linalg.matrix_rank(block, rtol=1e-9)) for i in range(1, length) for block in (M[i:, :i], M[:i, i:])
    ]
    assert max(ranks) == states
    torch.testing.assert_close(M.diagonal(), torch.ones(length, dtype=torch.float64), **TOLERANCE)


@forms
def test_reversed_input_gives_reversed_output(aligned: bool) -> None:
    x, dbc = random(2, 1, 9, 3), random(2, 1, 9, 4)
    delta, bias = random(2, 1, 9, 3), random(1, 1, 3).expand(2, -1, -1)
    options: dict[str, Any] = dict(A=rates(1, 3, 2), D=random(3), dt_bias=bias, paths=(ROWS,), aligned=aligned)
    y = quasi_separable_scan(x, dbc, delta=delta, **options)
    flipped = quasi_separable_scan(x.flip(2), dbc.flip(2), delta=delta.flip(2), **options)
    torch.testing.assert_close(flipped, y.flip(2), **TOLERANCE)


def test_paths_are_chosen_and_weighted_per_image() -> None:
    height, width, channels, states = 4, 6, 3, 2
    of: dict[str, Any] = dict(
        x=random(3, height, width, channels),
        dbc=random(3, height, width, 2 * states),
        delta=random(3, height, width, channels),
    )
    A, bias, D = rates(4, channels, states), random(2, 4, channels), random(channels)
    index = torch.tensor([[0, 1], [3, 2], [2, 0]])
    weight = torch.rand(3, 2, dtype=torch.float64)
    y = quasi_separable_scan(**of, A=A, D=D, dt_bias=bias, paths=SCAN_POOL, path_index=index, path_weight=weight)
    for b in range(3):
        image = {name: tensor[b : b + 1] for name, tensor in of.items()}
        expected = image["x"] * D
        for k, w in zip(index[b].tolist(), weight[b], strict=True):
            alone = quasi_separable_scan(
                **image, A=A[k : k + 1], D=D * 0, dt_bias=bias[:, k : k + 1], paths=(SCAN_POOL[k],)
            )
            expected = expected + w * alone
        torch.testing.assert_close(y[b : b + 1], expected, **TOLERANCE)


def test_one_call_for_all_paths_is_one_call_per_path() -> None:
    paths = (*SCAN_POOL, Snake(), Windowed(3))
    x, dbc = random(1, 5, 7, 4), random(1, 5, 7, 4)
    A, bias, delta = rates(6, 4, 2), random(2, 6, 4), random(1, 5, 7, 4)
    zero = torch.zeros(4, dtype=torch.float64)
    y = quasi_separable_scan(x, dbc, A, zero, paths, dt_bias=bias, delta=delta)
    parts = [
        quasi_separable_scan(x, dbc, A[k : k + 1], zero, (path,), dt_bias=bias[:, k : k + 1], delta=delta)
        for k, path in enumerate(paths)
    ]
    torch.testing.assert_close(y, sum(parts), **TOLERANCE)
