"""Losses against closed forms, and the adaptive weight against the gradients themselves."""

import pytest
import torch
from torch import multiprocessing

from dae.config import LossConfig
from dae.losses import adaptive_weight, discriminator_loss, generator_loss, reconstruction_loss


@pytest.mark.parametrize("l1, l2", [(0.0, 1.0), (1.0, 0.0), (0.3, 2.0), (0.0, 0.0)])
def test_reconstruction(l1, l2):
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.5]], requires_grad=True)
    b = torch.tensor([[0.5, 1.0], [1.0, 0.5]])
    loss = reconstruction_loss(a, b, LossConfig(l1=l1, l2=l2))
    torch.testing.assert_close(loss, torch.tensor(l1 * 2.5 / 4 + l2 * 4.25 / 4))
    (gradient,) = torch.autograd.grad(loss, a)
    torch.testing.assert_close(gradient, (l1 * (a - b).sign() + l2 * 2 * (a - b)).detach() / 4)


def test_reconstruction_is_computed_in_fp32():
    a = torch.full((2, 1, 4, 4), 0.1, dtype=torch.bfloat16)
    loss = reconstruction_loss(a, torch.zeros(2, 1, 4, 4), LossConfig())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, a.float()[0, 0, 0, 0].square())


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3)))
    torch.testing.assert_close(generator_loss(fake), torch.tensor(-1 / 3))
    perfect = torch.full((3,), 1.0, requires_grad=True)
    loss = discriminator_loss(perfect, -perfect)
    assert loss == 0 and torch.autograd.grad(loss, perfect)[0].eq(0).all()


def test_adaptive_weight_is_the_ratio_of_gradients():
    torch.manual_seed(0)
    layer, z, target = torch.nn.Linear(4, 6), torch.randn(5, 4), torch.randn(5, 6)
    sample = layer(z)
    reconstruction, adversarial = (sample - target).square().mean(), -(sample.sin() * target).mean()
    weight = adaptive_weight(reconstruction, adversarial, sample)
    by_hand = (2 * (sample - target) / 30).norm() / (sample.cos() * target / 30).norm()
    torch.testing.assert_close(weight, by_hand.detach())
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()  # the graph is still there
    assert layer.weight.grad is not None


def test_adaptive_weight_has_a_ceiling():
    sample = torch.randn(3, requires_grad=True)
    assert adaptive_weight(sample.sum(), 0 * sample.sum(), sample) == 1e4
    assert adaptive_weight(0 * sample.sum(), sample.sum(), sample) == 0
    assert adaptive_weight(1e6 * sample.sum(), 1e-3 * sample.sum(), sample) == 1e4


def weigh(rank: int, world: int, store: str, results) -> None:
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    sample, target = torch.randn(2, 8, 3, generator=generator)[:, rank::world]
    sample.requires_grad_()
    weight = adaptive_weight((sample - target).square().mean(), sample.sin().mean(), sample)
    if world > 1:
        torch.distributed.destroy_process_group()
    results.put(weight.item())


def test_adaptive_weight_is_of_the_global_batch(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    weigh(0, 1, "", results)
    expected = results.get()
    workers = [context.Process(target=weigh, args=(r, 2, str(tmp_path / "store"), results)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    one, two = results.get(), results.get()
    assert one == two and abs(one / expected - 1) < 1e-6
