"""Each normalizer against its definition, written out in float64."""

import math

import pytest
import torch

from oasis_attn import UserError
from oasis_attn.ops.normalizers import NORMALIZERS, WITH_NULL_LOGIT, normalize, with_length

X = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-3.0, -4.0, -2.0, -9.0]], dtype=torch.float64)


def definition(name, x, c=0.3, gamma=-0.1):
    e = x.exp()
    if name == "softmax":
        return e / e.sum(-1, keepdim=True)
    if name in WITH_NULL_LOGIT:
        return e / (math.exp(c) + e.sum(-1, keepdim=True))
    if name == "clipped_softmax":
        return ((1 - gamma) * e / e.sum(-1, keepdim=True) + gamma).clamp(0, 1)
    if name == "softpick":
        return (e - 1).clamp(min=0) / (e - 1).abs().sum(-1, keepdim=True)
    if name == "sigmoid":
        return 1 / (1 + (-x).exp())
    raise KeyError(name)


def with_arguments(name):
    return {"name": name, "gamma": -0.1} if name == "clipped_softmax" else name


def test_clipped_softmax_with_alpha_and_length_is_that_with_their_gamma():
    by_alpha = {"name": "clipped_softmax", "alpha": 3, "length": 30}
    for one, other in zip(
        normalize(X, by_alpha), normalize(X, with_arguments("clipped_softmax")), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)
    with pytest.raises(UserError, match="it needs either 'gamma', or 'alpha' and 'length'"):
        normalize(X, {"name": "clipped_softmax", "alpha": 3})
    assert with_length({"name": "clipped_softmax", "alpha": 3}, 30) == by_alpha
    assert with_length(by_alpha, 5) == by_alpha
    assert with_length("softmax", 5) == "softmax"


@pytest.mark.parametrize("name", [n for n in NORMALIZERS if n not in ("sparsemax", "entmax15")])
def test_equals_its_definition(name):
    weights, null = normalize(X, with_arguments(name), null_logit=0.3)
    torch.testing.assert_close(weights, definition(name, X), rtol=0, atol=1e-12)
    if name != "sigmoid":
        torch.testing.assert_close(null, 1 - weights.sum(-1), rtol=0, atol=1e-12)


def test_sparsemax_is_the_projection_on_the_simplex():
    weights, null = normalize(X, "sparsemax")
    for row, scores in zip(weights, X, strict=True):
        support = scores[row > 0]
        threshold = (support.sum() - 1) / len(support)
        torch.testing.assert_close(row, (scores - threshold).clamp(min=0), rtol=0, atol=1e-12)
    assert null.eq(0).all()


def test_entmax15_solves_its_fixed_point():
    weights, _ = normalize(X, "entmax15")
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, dtype=torch.float64))
    for row, scores in zip(weights, X, strict=True):
        threshold = (scores / 2 - row.sqrt())[row > 0]
        torch.testing.assert_close(threshold, threshold[:1].expand_as(threshold), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_masked_keys_get_nothing_and_change_nothing(name):
    mask = torch.tensor([True, True, False, True])
    weights, null = normalize(X, with_arguments(name), mask=mask)
    without, null_without = normalize(X[:, mask], with_arguments(name))
    assert weights[:, 2].eq(0).all()
    torch.testing.assert_close(weights[:, mask], without, rtol=0, atol=1e-12)
    torch.testing.assert_close(null, null_without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_and_blind_rows_stay_finite(name, dtype):
    rows = torch.tensor(
        [[1e4, -1e4, 0, 1], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4], [0, 0, 0, 0]],
        dtype=dtype,
    ).requires_grad_()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3] = False
    weights, null = normalize(rows, with_arguments(name), mask=mask)
    assert weights.isfinite().all()
    assert weights[3].eq(0).all()
    assert null[3] == 1
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), rows)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["softmax1", "softpick", "clipped_softmax", "softmax", "sigmoid"])
def test_gradcheck(name):
    def both(x):
        return normalize(x, with_arguments(name))

    assert torch.autograd.gradcheck(both, (X + 0.1).requires_grad_())  # softpick has a kink at 0


@pytest.mark.parametrize("nulls", [0, 1.5, 65])
def test_the_number_of_nulls_is_a_whole_number(nulls):
    with pytest.raises(UserError, match=f"nulls: {nulls} is not a whole number from 1 to 64"):
        normalize(X, {"name": "key_value_null", "nulls": nulls})


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'softmax1'"):
        normalize(X, "softmax_1")
