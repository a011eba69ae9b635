"""The operations against oracles in float64 that share no code with them, on drawn inputs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oasis_attn.ops import depth_mix, null_attention

bounded = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}
NULL_LOGITS = (0.0, -math.inf, math.inf, 4.5, -40.0, 300.0)


@st.composite
def attention_calls(draw):
    """The tensors of a call, its other arguments, and where a query may see a key."""
    G, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    B, T, S = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(0, 11))
    width, own = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    tensors = [
        torch.randn(B, G * groups, T, width).to(dtype),
        torch.randn(B, G, S, width).to(dtype),
        torch.randn(B, G, S, own).to(dtype),
    ]
    if draw(st.booleans()):
        c = torch.randn(G * groups, dtype=torch.float64) * draw(st.sampled_from([1, 30]))
    else:
        c = torch.tensor(draw(st.sampled_from(NULL_LOGITS)), dtype=torch.float64)
    keywords = {
        "is_causal": draw(st.booleans()),
        # In bfloat16, steep logits multiply the rounding of the output, which gradients read.
        "scale": draw(st.sampled_from([None, 0.3, 0.0, -0.7] + [6.0] * (dtype != torch.bfloat16))),
    }
    visible = torch.ones(T, S, dtype=torch.bool)
    if keywords["is_causal"]:
        visible = visible.tril(S - T)
    added = torch.zeros(())
    kind = draw(st.sampled_from(["none", "boolean", "additive", "finite"]))
    if kind != "none":
        axes = draw(st.integers(1, 4))
        full = (B, G * groups, T, S)[4 - axes :]
        shape = [draw(st.sampled_from([1, size])) for size in full]
        mask = torch.rand(shape) > 0.4
        if axes > 1 and draw(st.booleans()):
            mask[..., 0, :] = False  # a row that sees nothing
        if kind == "boolean":
            keywords["attn_mask"] = mask
            visible = visible & mask
        else:
            # -1e9 + s is a rounding of its own in float32; with the other, none keeps any of s.
            finite = -1e9 if dtype == torch.float64 else torch.finfo(torch.float32).min
            fill = -math.inf if kind == "additive" else finite
            added = torch.randn(shape).masked_fill(~mask, fill)
            added = added.to(draw(st.sampled_from([torch.float32, torch.float64])))
            keywords["attn_mask"] = added
    needs = draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
    grads = draw(st.sampled_from(["both", "out", "null", "zero out"]))
    return tensors, c, keywords, visible, added, needs, grads


def attention_oracle(query, key, value, c, visible, added, scale, softcap):
    """Concatenate the null logit, softmax, drop the column; in the precision of the tensors."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + added.to(scores.dtype)).masked_fill(~visible, -math.inf)
    column = c.to(scores.dtype).reshape(-1, 1).expand(scores.shape[:-1]).unsqueeze(-1)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    certain = blind | (column == math.inf)  # all on the null
    joint = torch.cat([scores, column], -1)
    p = torch.where(certain, 0, joint.masked_fill(certain, 0)).softmax(-1)
    p = torch.where(certain, torch.zeros_like(p), p)
    null = torch.where(certain.squeeze(-1), 1, p[..., -1])
    return p[..., :-1] @ value, null


def close(got, wanted, dtype):
    """Equal up to the dtype's rounding, relative to the largest entry."""
    assert got.isfinite().all()
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCES[dtype] * scale)


def compare(call, backend, softcap=None):
    tensors, c, keywords, visible, added, needs, grads = call
    dtype = tensors[0].dtype
    keywords = keywords | {"softcap": softcap, "backend": backend}
    outputs, leaves = [], []
    for exact in (False, True):
        inputs = [x.double() if exact else x.clone() for x in (*tensors, c)]
        inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        leaves.append([x for x in inputs if x.requires_grad])
        if exact:
            scale = keywords["scale"]
            outputs.append(attention_oracle(*inputs, visible, added, scale, softcap))
        else:
            outputs.append(null_attention(*inputs[:3], null_logit=inputs[3], **keywords))
    for got, wanted in zip(*outputs, strict=True):
        close(got.detach(), wanted.detach(), dtype)
    upstream = [torch.randn_like(outputs[1][0]).to(dtype), torch.randn_like(outputs[1][1])]
    if grads == "zero out":
        upstream[0].zero_()
    picked = [
        (index, grad)
        for index, grad in enumerate(upstream)
        if grads in ("both", "zero out") or grads == ("out", "null")[index]
        if outputs[0][index].requires_grad and outputs[1][index].requires_grad
    ]
    if not picked:
        return
    results = []
    for output, inputs in zip(outputs, leaves, strict=True):
        given = [grad.to(output[index].dtype) for index, grad in picked]
        before = [grad.clone() for grad in given]
        chosen = [output[index] for index, _ in picked]
        results.append(torch.autograd.grad(chosen, inputs, given, allow_unused=True))
        assert all(map(torch.equal, given, before))
    for got, wanted in zip(*results, strict=True):
        nothing = torch.zeros(()) if wanted is None else torch.zeros_like(wanted)
        wanted = nothing.double() if wanted is None else wanted
        close(torch.zeros_like(wanted) if got is None else got, wanted.expand_as(nothing), dtype)


@pytest.mark.filterwarnings("ignore:null_attention computes this gradient")
@bounded
@given(attention_calls())
def test_cpu_flash(call):
    compare(call, "cpu_flash")


@bounded
@given(attention_calls(), st.sampled_from([None, 0.5, 20.0]))
def test_naive(call, softcap):
    compare(call, "naive", softcap)


@st.composite
def mixes(draw):
    S, T, D = draw(st.integers(1, 5)), draw(st.integers(0, 5)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    sources = [torch.randn(2, T, D).to(dtype) for _ in range(S)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    evidence = [torch.rand(2, T).to(wide) for _ in range(S)] if draw(st.booleans()) else None
    scale = draw(st.sampled_from([0, 1, 20]))
    if scale < 20 and draw(st.booleans()):  # its gradient is a thousand times its query's size
        sources[draw(st.integers(0, S - 1))].zero_()
    vectors = torch.randn(D) * scale, torch.randn(D), torch.rand(())
    query, gain, beta = (x.to(wide) for x in vectors)
    normalizer = draw(st.sampled_from(["softmax", "softmax1", "sigmoid"]))
    needs = draw(st.lists(st.booleans(), min_size=S + 3, max_size=S + 3).filter(any))
    return sources, evidence, query, gain, beta, normalizer, needs


def mix_oracle(sources, evidence, query, gain, beta, normalizer):
    scores = torch.stack(
        [(v * gain * query).sum(-1) / (v**2).mean(-1).add(1e-6).sqrt() for v in sources], -1
    )
    if evidence is not None:
        psi = torch.stack(evidence, -1).double()
        scores = scores - beta * (psi - psi.mean(-1, keepdim=True))
    if normalizer == "sigmoid":
        weights = scores.sigmoid()
    else:
        joint = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
        weights = joint.softmax(-1)[..., :-1] if normalizer == "softmax1" else scores.softmax(-1)
    return sum(weights[..., i, None] * v for i, v in enumerate(sources)), weights


@pytest.mark.parametrize("backend", ["fused", "naive"])
@bounded
@given(mixes())
def test_depth_mix(backend, mix):
    sources, evidence, *vectors, normalizer, needs = mix
    dtype, S = sources[0].dtype, len(sources)
    outputs, leaves = [], []
    for exact in (False, True):
        inputs = [x.double() if exact else x.clone() for x in (*sources, *vectors)]
        inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        leaves.append([x for x in inputs if x.requires_grad])
        query, gain, beta = inputs[S:]
        if exact:
            outputs.append(mix_oracle(inputs[:S], evidence, query, gain, beta, normalizer))
        else:
            outputs.append(
                depth_mix(
                    inputs[:S], query, key_norm_weight=gain, null_evidence=evidence, beta=beta,
                    normalizer=normalizer, backend=backend,
                )
            )  # fmt: skip
    for got, wanted in zip(*outputs, strict=True):
        close(got.detach(), wanted.detach(), dtype)
    upstream = [torch.randn_like(x) for x in outputs[1]]
    if not outputs[0][0].requires_grad:
        return
    kept = [index for index in (0, 1) if outputs[0][index].requires_grad]
    results = []
    for output, inputs in zip(outputs, leaves, strict=True):
        given = [upstream[index].to(output[index].dtype) for index in kept]
        before = [grad.clone() for grad in given]
        chosen = [output[index] for index in kept]
        results.append(torch.autograd.grad(chosen, inputs, given, allow_unused=True))
        assert all(map(torch.equal, given, before))
    for got, wanted in zip(*results, strict=True):
        if wanted is None:
            assert got is None or got.eq(0).all()
        else:
            close(torch.zeros_like(wanted) if got is None else got, wanted, dtype)
