import lightning
import timm
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from short_runs import QUIET
from vision_ssm.engine.module import TrainingModule
from vision_ssm.recipes import ClassificationConfig
from vision_ssm.scan import selective_scan_fn
from vision_ssm.tasks.classification import Classification, ClassifierSpec


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


def test_the_loss_scale_of_float16_finds_its_way_without_counting_as_skipped(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    trainer = lightning.Trainer(
        **QUIET,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        max_epochs=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    torch.manual_seed(0)
    model = timm.create_model("vmamba_atto", num_classes=3)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    config = ClassificationConfig(model="vmamba_atto", lr=1e-3, warmup_epochs=0, epochs=1, max_skipped=1)
    task = Classification(model, ClassifierSpec.from_config(config, ("a", "b", "c")), config)
    module = TrainingModule(task, config)
    samples = [{"image": torch.randn(3, 32, 32), "label": i % 3, "id": str(i)} for i in range(80)]
    trainer.fit(module, DataLoader(samples, batch_size=4))
    assert scaler.get_scale() < 2.0**29
    assert module.skipped == 0
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert any(not torch.equal(first[name], value) for name, value in model.state_dict().items())
