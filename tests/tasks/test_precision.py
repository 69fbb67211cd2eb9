import torch

from vision_ssm.scan import selective_scan_fn


def test_the_state_overflows_in_half_precision_but_not_in_the_scan():
    steps = 4000
    u = torch.full((1, 1, steps), 100.0, dtype=torch.float16)
    delta, B, C = torch.ones_like(u), torch.ones_like(u), torch.full_like(u, 1e-4)
    A = torch.full((1, 1), -1e-4)

    state, decay = torch.zeros((), dtype=torch.float16), A[0, 0].exp().half()
    for _ in range(steps):
        state = decay * state + u[0, 0, 0]
    assert state.isinf()

    leaves = [x.requires_grad_() for x in (u, delta, B, C)]
    y, last = selective_scan_fn(u, delta, A, B, C, return_last_state=True)
    assert y.dtype == torch.float16
    assert last.item() > torch.finfo(torch.float16).max
    exact = 1e-4 * 100 * torch.exp(-1e-4 * torch.arange(steps, dtype=torch.float64)).cumsum(0)
    torch.testing.assert_close(y[0, 0].double(), exact, rtol=2e-3, atol=0)
    gradients = torch.autograd.grad(y.float().mean(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
