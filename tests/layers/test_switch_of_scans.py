from __future__ import annotations

import pytest
import torch

from vision_ssm.layers import SCAN_POOL, SwitchOfScans


def trained(k: int) -> SwitchOfScans:
    switch = SwitchOfScans(8, k=k)
    torch.nn.init.normal_(switch.router.weight)
    torch.nn.init.normal_(switch.router.bias)
    return switch


def test_pool_holds_permutations() -> None:
    for path in SCAN_POOL:
        for height, width in ((1, 1), (3, 5), (8, 8), (1, 9), (7, 2)):
            assert path.tokens(height, width).sort().values.tolist() == list(range(height * width))


def test_evaluation_takes_the_best_and_repeats() -> None:
    switch, x = trained(2).eval(), torch.randn(5, 6, 4, 8)
    index, weight, balance = switch(x)
    assert balance is None
    again = switch(x)
    assert torch.equal(index, again[0])
    assert torch.equal(weight, again[1])
    p = switch.router(x.mean((1, 2))).softmax(-1)
    assert torch.equal(index.sort().values, p.topk(2).indices.sort().values)
    chosen = p.gather(1, index)
    torch.testing.assert_close(weight, chosen / chosen.sum(1, keepdim=True))


def test_training_draws_by_probability_without_replacement() -> None:
    switch = SwitchOfScans(1, k=2).train()
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    with torch.no_grad():
        switch.router.bias.copy_(p.log())
    index, weight, _ = switch(torch.zeros(20_000, 1, 1, 1))
    first = torch.bincount(index[:, 0], minlength=4) / len(index)
    torch.testing.assert_close(first, p, rtol=0, atol=0.015)
    assert bool((index[:, 0] != index[:, 1]).all())
    torch.testing.assert_close(weight.sum(1), torch.ones(len(index)))


def test_all_paths_are_the_soft_mixture() -> None:
    switch, x = trained(4).train(), torch.randn(3, 2, 5, 8)
    index, weight, _ = switch(x)
    p = switch.router(x.mean((1, 2))).softmax(-1)
    torch.testing.assert_close(torch.zeros(3, 4).scatter(1, index, weight), p)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_router_learns_through_the_weights(k: int) -> None:
    switch = trained(k).train()
    _, weight, _ = switch(torch.randn(3, 4, 4, 8))
    (weight * torch.rand(3, k)).sum().backward()
    assert switch.router.weight.grad.abs().max() > 0
    assert switch.router.bias.grad.abs().max() > 0


def test_balance_is_one_where_paths_are_used_alike() -> None:
    _, _, balance = SwitchOfScans(8)(torch.randn(16, 2, 2, 8))  # equal probabilities
    assert balance.item() == pytest.approx(1)
    switch = SwitchOfScans(8, k=1)
    with torch.no_grad():
        switch.router.bias[2] = 50.0
    _, _, balance = switch(torch.randn(16, 2, 2, 8))
    assert balance.item() == pytest.approx(4)


def test_balance_term_spreads_the_choice() -> None:
    switch, x = trained(2).train(), torch.randn(64, 2, 2, 8)
    optimizer = torch.optim.SGD(switch.parameters(), lr=1.0)
    before = switch(x)[2].item()
    for _ in range(30):
        loss = switch(x)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(switch(x)[2].item() - 1) < 0.3 * abs(before - 1)


@pytest.mark.parametrize(
    ("options", "message"), [(dict(k=0), "got 0"), (dict(k=5), "between 1 and 4"), (dict(paths=()), "none")]
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwitchOfScans(8, **options)
