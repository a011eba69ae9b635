"""depth_mix: the fused form against the naive one, and both against the equations."""

import pytest
import torch

from oasis_attn import UserError
from oasis_attn.ops import depth_mix
from oasis_attn.ops.depth_mix.autograd import (
    carried_sum,
    depth_scores,
    depth_weights,
    weighted_sum,
)
from oasis_attn.ops.depth_mix.two_phase import fold_sources, merge_recent


def inputs(S=5, T=7, D=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(list(shape), generator=generator, dtype=dtype).requires_grad_()

    sources = [draw(2, T, D) for _ in range(S)]
    evidence = [draw(2, T).detach().sigmoid().requires_grad_() for _ in range(S)]
    return sources, evidence, draw(D), draw(D), draw()


def by_hand(sources, evidence, query, gain, beta, normalizer, eps=1e-6):
    """Token by token, source by source, as the equations stand."""
    scores = []
    for source, psi in zip(sources, evidence, strict=True):
        rms = (source**2).mean(-1).add(eps).sqrt()
        scores.append(
            (source * gain * query).sum(-1) / rms - beta * (psi - sum(evidence) / len(evidence))
        )
    exponentials = [score.exp() for score in scores]
    if normalizer == "sigmoid":
        weights = [1 / (1 + 1 / e) for e in exponentials]
    else:
        total = sum(exponentials) + (1 if normalizer == "softmax1" else 0)
        weights = [e / total for e in exponentials]
    return sum(w[..., None] * v for w, v in zip(weights, sources, strict=True)), torch.stack(
        weights, -1
    )


@pytest.mark.parametrize("backend", ["naive", "fused"])
@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "sigmoid"])
@pytest.mark.parametrize("S", [1, 2, 6])
def test_values_and_gradients_equal_the_equations(backend, normalizer, S):
    sources, evidence, query, gain, beta = inputs(S)
    leaves = [*sources, *evidence, query, gain, beta]
    expected = by_hand(sources, evidence, query, gain, beta, normalizer)
    actual = depth_mix(
        sources, query, key_norm_weight=gain, null_evidence=evidence, beta=beta,
        normalizer=normalizer, backend=backend,
    )  # fmt: skip
    upstream = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad(pair, leaves, upstream, allow_unused=True)
        for pair in (actual, expected)
    ]
    for got, wanted in [*zip(actual, expected, strict=True), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_gradcheck():
    sources, evidence, query, gain, beta = inputs(3, T=2, D=4)

    def mix(query, gain, beta, *rest):
        return depth_mix(
            rest[:3], query, key_norm_weight=gain, null_evidence=rest[3:], beta=beta,
            normalizer="softmax1", backend="fused",
        )  # fmt: skip

    assert torch.autograd.gradcheck(mix, (query, gain, beta, *sources, *evidence))


@pytest.mark.parametrize("T", [1, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_naive_at_odd_sizes(T, dtype):
    sources, evidence, query, gain, beta = inputs(4, T=T, D=129, dtype=torch.float32)
    sources = [source.detach().to(dtype).requires_grad_() for source in sources]
    results = []
    for backend in ("fused", "naive"):
        mixed, weights = depth_mix(
            sources,
            query,
            key_norm_weight=gain,
            null_evidence=evidence,
            beta=beta,
            backend=backend,
        )
        assert mixed.dtype == dtype
        assert weights.dtype == torch.float32
        gradients = torch.autograd.grad(mixed.float().square().mean(), [*sources, query, beta])
        results.append((mixed, weights, *gradients))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_zero_query_is_the_mean():
    sources, *_ = inputs(6)
    mixed, weights = depth_mix(sources, torch.zeros(9, dtype=torch.float64))
    torch.testing.assert_close(mixed, torch.stack(sources).mean(0))
    assert weights.sub(1 / 6).abs().max() < 1e-15


def test_softmax1_only_rescales_a_token_so_a_norm_cannot_tell():
    sources, _, query, gain, _ = inputs(6)
    plain, with_null = (
        depth_mix(sources, query, key_norm_weight=gain, normalizer=name)[0]
        for name in ("softmax", "softmax1")
    )
    direction = [torch.nn.functional.normalize(x, dim=-1) for x in (plain, with_null)]
    assert not torch.allclose(plain, with_null)
    torch.testing.assert_close(*direction, rtol=0, atol=1e-12)


def test_the_signal_moves_weight_away_from_null_branches():
    sources, _, query, gain, _ = inputs(3)
    evidence = [torch.full((2, 7), psi, dtype=torch.float64) for psi in (0.0, 0.9, 0.1)]
    before = depth_mix(sources, query, key_norm_weight=gain)[1]
    after = depth_mix(sources, query, key_norm_weight=gain, null_evidence=evidence, beta=2.0)[1]
    assert (after[..., 1] < before[..., 1]).all()


def test_a_source_of_zeros_has_finite_gradients():
    sources, _, query, gain, _ = inputs(2)
    sources[0] = torch.zeros_like(sources[0]).requires_grad_()
    mixed, _ = depth_mix(sources, query, key_norm_weight=gain)
    assert all(g.isfinite().all() for g in torch.autograd.grad(mixed.sum(), [*sources, query]))


def test_nothing_of_the_sources_is_copied_for_backward():
    sources, _, query, _, _ = inputs(8, T=64, D=32)
    known = {source.data_ptr() for source in sources}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        depth_mix(sources, query)
    wide = [x for x in saved if x.numel() >= sources[0].numel()]
    assert wide
    assert all(x.data_ptr() in known for x in wide)


@pytest.mark.parametrize("recent", [0, 1, 3])
@pytest.mark.parametrize("signal", [False, True])
@pytest.mark.parametrize("normalizer", ["softmax", "softmax1"])
def test_two_phase_inference_equals_one_mix(normalizer, signal, recent):
    sources, evidence, *_ = inputs(5)
    queries = torch.randn(3, 9, dtype=torch.float64)
    beta = torch.rand(3, dtype=torch.float64) if signal else torch.zeros(3, dtype=torch.float64)
    scores_SBTR = torch.stack([depth_scores(v, queries, 1e-6) for v in sources])
    psi_BTS = torch.stack(evidence, -1)
    logits_SBTR = scores_SBTR - beta * psi_BTS.movedim(-1, 0).unsqueeze(-1)  # psi uncentered
    stacked, folded, scales = torch.stack(sources), 5 - recent, torch.tensor([1.0, 5.0, 6.0])
    mixes, lses = fold_sources(stacked[:folded], logits_SBTR[:folded], scales)
    for r in range(3):
        scores_BTS = scores_SBTR[..., r].movedim(0, -1)
        weights, _ = depth_weights(scores_BTS, psi_BTS, beta[r], normalizer)
        logits = [lses[..., r : r + 1]]
        if normalizer == "softmax1":
            logits.append(-beta[r] * psi_BTS.mean(-1, keepdim=True))
        logits += logits_SBTR[folded:, ..., r].unsqueeze(-1)
        scale = float(scales[r])
        merged = merge_recent(mixes[:, :, r], sources[folded:], torch.cat(logits, -1), scale)
        expected = weighted_sum(sources, weights) * scale
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources: none given"),
        (
            {"sources": [torch.zeros(2, 3, 9), torch.zeros(2, 4, 9)]},
            r"sources: number 1 is \[2, 4, 9\]",
        ),
        ({"query_D": torch.zeros(8)}, r"query_D: shape \[8\] is not \[9\]"),
        ({"key_norm_weight": torch.zeros(8)}, "key_norm_weight: shape"),
        ({"null_evidence": [torch.zeros(2, 3)]}, "null_evidence: 1 tensors"),
        ({"sources": [torch.zeros(2, 3, 9).int()]}, "sources: dtype torch.int32"),
        ({"sources": [torch.zeros(2, 3, 0)]}, "sources: width 0"),
        ({"beta": torch.zeros(2)}, r"beta: shape \[2\]"),
        ({"beta": float("nan")}, "beta: nan is not a finite number"),
        ({"eps": 0.0}, "eps: 0.0 is not a finite number above 0"),
        ({"normalizer": "softmax2"}, "normalizer: 'softmax2' is not one of"),
        ({"backend": "triton"}, "backend: 'triton' is not one of auto, naive, fused"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    keywords = {"sources": [torch.zeros(2, 3, 9)] * 2, "query_D": torch.zeros(9)} | change
    with pytest.raises(UserError, match=message):
        depth_mix(**keywords)


def test_a_chain_of_carried_sums_has_the_gradients_of_separate_ones():
    sources, *_ = inputs(4)
    weights = [torch.rand(2, 7, S, dtype=torch.float64, requires_grad=True) for S in (2, 3, 4)]
    upstream = [torch.randn(2, 7, 9, dtype=torch.float64) for _ in weights]
    gradients = []
    for carried in (True, False):
        loss, chain = 0, []
        for S, weight, grad in zip((2, 3, 4), weights, upstream, strict=True):
            chain = [*chain, *sources[len(chain) : S]]
            mixed, handed_on = carried_sum(chain, weight, len(chain))
            chain = handed_on if carried else sources[:S]
            loss = loss + (mixed * grad).sum()
        gradients.append(torch.autograd.grad(loss, [*sources, *weights]))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
