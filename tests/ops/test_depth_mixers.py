"""Each implementation of a model's mixes over depth against the naive form, in float64."""

import pytest
import torch

from oasis_attn.ops import c_kernels
from oasis_attn.ops.depth_mix import AutogradMixer, Routers, TwoPhaseMixer
from oasis_attn.ops.depth_mix.c_mixer import CMixer
from oasis_attn.ops.depth_mix.naive import naive_scores, naive_sum

B, T, D, R = 2, 5, 16, 9
compiled = pytest.mark.skipif(c_kernels.library() is None, reason="there is no C compiler")


def naive_mixes(branches, psi, routers):
    """What every router reads, from stacked sources, as the equations stand."""
    mixes = []
    for router in range(R):
        blocks = [
            range(start, min(start + routers.block_size, router + 1))
            for start in range(1, router + 1, routers.block_size)
        ]
        sources = [branches[0], *(sum(branches[i] for i in block) for block in blocks)]
        evidence = [psi[0], *(sum(psi[i] for i in block) / len(block) for block in blocks)]
        query = routers.queries_RD[router : router + 1]
        g = torch.cat([naive_scores(source, query, routers.eps) for source in sources], -1)
        if routers.beta_R is not None:
            psi_BTS = torch.stack(evidence, -1)
            g = g - routers.beta_R[router] * (psi_BTS - psi_BTS.mean(-1, keepdim=True))
        exponentials = g.exp()
        total = exponentials.sum(-1, keepdim=True) + (routers.normalizer == "softmax1")
        weights = g.sigmoid() if routers.normalizer == "sigmoid" else exponentials / total
        mix = naive_sum(sources, weights)
        if routers.mix_scale == "sum":
            S = len(sources)
            mix = mix * {"softmax": S, "softmax1": S + 1, "sigmoid": 2}[routers.normalizer]
        elif routers.mix_scale == "rms":
            mix = mix / (mix.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        mixes.append(mix)
    return mixes


def problem(dtype=torch.float64, **routers):
    torch.manual_seed(0)
    branches = [torch.randn(B, T, D, dtype=dtype, requires_grad=True) for _ in range(R)]
    psi = [torch.rand(B, T, dtype=dtype) for _ in range(R)]
    psi[0] = torch.zeros_like(psi[0])
    queries = torch.randn(R, D, dtype=dtype, requires_grad=True)
    beta = torch.rand(R, dtype=dtype).mul(3).requires_grad_()
    signal = routers.pop("signal", True)
    return branches, psi, Routers(queries, beta if signal else None, 1e-6, **routers)


def run(mixer, branches, psi):
    return [mixer.update(branches[0], None, 0)] + [
        mixer.update(branches[router], psi[router], router) for router in range(1, R)
    ]


CASES = [
    {},
    {"normalizer": "softmax1"},
    {"normalizer": "softmax1", "mix_scale": "sum", "block_size": 3},
    {"mix_scale": "rms", "block_size": 2},
    {"normalizer": "softmax1", "signal": False, "block_size": 4},
    {"mix_scale": "sum", "block_size": 100},
]
AUTOGRAD_ONLY = [
    {"normalizer": "sigmoid"},
    {"normalizer": "sigmoid", "mix_scale": "sum", "block_size": 3},
]


@pytest.mark.parametrize("case", CASES + AUTOGRAD_ONLY, ids=str)
def test_autograd_equals_naive_with_every_gradient(case):
    branches, psi, routers = problem(**case)
    leaves = [*branches, *psi[1:], routers.queries_RD]
    leaves += [] if routers.beta_R is None else [routers.beta_R]
    for tensor in psi[1:]:
        tensor.requires_grad_()
    expected = naive_mixes(branches, psi, routers)
    actual = run(AutogradMixer(routers), branches, psi)
    upstream = [torch.randn_like(mix) for mix in expected]
    both = [
        torch.autograd.grad(mixes, leaves, upstream, allow_unused=True)
        for mixes in (actual, expected)
    ]
    for got, wanted in [*zip(actual, expected, strict=True), *zip(*both, strict=True)]:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_two_phase_equals_naive(case):
    branches, psi, routers = problem(**case)
    expected = naive_mixes(branches, psi, routers)
    actual = run(TwoPhaseMixer(branches[0], routers), branches, psi)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@compiled
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_c_equals_naive(case):
    branches, psi, routers = problem(**case)
    expected = naive_mixes(branches, psi, routers)
    branches, psi = ([x.float() for x in tensors] for tensors in (branches, psi))
    beta_R = None if routers.beta_R is None else routers.beta_R.float()
    routers = routers._replace(queries_RD=routers.queries_RD.float(), beta_R=beta_R)
    actual = run(CMixer(branches[0], routers), branches, psi)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_a_layer_that_runs_again_reads_what_it_read_first(case):
    """As activation checkpointing runs it, from the last layer to the first."""
    branches, psi, routers = problem(**case)
    mixer = AutogradMixer(routers)
    first = run(mixer, branches, psi)
    for layer in reversed(range(R // 2)):
        for router in (2 * layer + 1, 2 * layer + 2):
            again = mixer.update(branches[router], psi[router], router)
            assert torch.equal(again, first[router])
