"""The loss of distillation equals the formula, gradients included."""

import pytest
import torch

from oasis_attn.ops.divergence import CHUNK, divergence


def formula(aim, logits):
    p, log_q = aim.softmax(-1), logits.log_softmax(-1)
    return (p * (p.log() - log_q)).sum(-1).mean()


@pytest.mark.parametrize("tokens", [1, CHUNK // 2, CHUNK + 3])
def test_is_the_formula(tokens):
    torch.manual_seed(0)
    aim, logits = (3 * torch.randn(2, tokens, 7, dtype=torch.float64) for _ in "ab")
    logits.requires_grad_()
    expected = formula(aim, logits)
    found = divergence(aim, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted, grad = (torch.autograd.grad(3 * x, logits)[0] for x in (expected, found))
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-16)


def test_gradcheck():
    torch.manual_seed(0)
    aim, logits = (torch.randn(1, 5, 4, dtype=torch.float64) for _ in "ab")
    assert torch.autograd.gradcheck(lambda x: divergence(aim, x), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    aim, logits = (torch.randn(2, 9, 50).to(dtype) for _ in "ab")
    logits.requires_grad_()
    found = divergence(aim, logits)
    assert found.dtype == torch.float32
    expected = formula(aim.double(), logits.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    wanted, grad = (torch.autograd.grad(x, logits)[0] for x in (expected, found))
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, wanted, rtol=1e-2, atol=1e-6)


def test_a_scaled_loss_keeps_its_gradient_in_float16():
    torch.manual_seed(0)
    aim = torch.randn(1, 4096, 50)
    logits = (aim + 1e-3 * torch.randn_like(aim)).half().requires_grad_()
    (grad,) = torch.autograd.grad(2.0**16 * divergence(aim, logits), logits)
    precise = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(2.0**16 * divergence(aim.double(), precise), precise)
    assert (grad - wanted).norm() < 0.01 * wanted.norm()


def test_no_gradient_is_kept_without_need():
    aim = torch.randn(2, 3, 4)
    assert divergence(aim, aim).item() == pytest.approx(0, abs=1e-6)
    assert not divergence(aim, aim).requires_grad
    logits = aim.clone().requires_grad_()
    assert torch.autograd.grad(divergence(logits, logits), logits)[0].abs().max() < 1e-7
    assert not divergence(logits, aim).requires_grad


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"aim_BTV: shape \(3, 2, 4\) is not that of the logits"):
        divergence(torch.randn(3, 2, 4), torch.randn(2, 3, 4))
