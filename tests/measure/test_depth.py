"""depth.* against the forward pass written out: stacked sources, one router after another."""

from __future__ import annotations

import math

import experiments.branch_norms  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from oasis_attn import register_null_signal
from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose
from oasis_attn.measure.depth import Depth
from oasis_attn.modeling.depth_cache import RouterCall
from tiny_models import VOCABULARY, tiny_model

from .models import native, ours


class LogAndHeads(nn.Module):
    """All that a null signal may be: with parameters, and another one for the MLP."""

    def __init__(self, config):
        super().__init__()
        self.weights = nn.Parameter(torch.rand(config.num_hidden_layers, 4))

    def forward(self, null_BHT, layer):
        logarithms = torch.log1p(null_BHT / 1e-3)
        return (logarithms * self.weights[layer].unsqueeze(-1)).mean(1), None


register_null_signal("test_log_and_heads", LogAndHeads)
MODELS = {
    "oasis": {},
    # 8 sublayers: the last block is partial
    "oasis_block": {"depth_block_size": 3, "branch_norm": "rms_mlp"},
    "attn_residual": {},
    "attn_residual_block": {"mix_scale": "sum"},
    "oasis_depth_sigmoid": {"mix_scale": "sum"},
    "oasis_depth_softmax": {"mix_scale": "rms", "branch_norm": "bounded"},
    "oasis_unit": {"null_signal": "test_log_and_heads", "branch_norm": "rms"},
}


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch):
    def forward(self, x):  # the family's own runs in float32 whatever it is given
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def tokens(windows=3, length=11):
    return torch.randint(VOCABULARY, (windows, length), generator=torch.manual_seed(5))


@torch.no_grad()
def written_out(model, ids_NT, dropped=None):
    """The losses [N], and each router's weights [N, T, S] and null probability [N, T]."""
    settings, core, routers = model.config, model.model, model.model.depth
    size = settings.depth_block_size
    embedding = core.embed_tokens(ids_NT)
    eps = {"rms": 1e-6, "bounded": 0.1, "rms_mlp": 1e-6}.get(settings.branch_norm)

    def scaled(x, mlp=False):
        same = eps is None or (settings.branch_norm == "rms_mlp" and not mlp)
        return x if same else x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    rotation = core.rotary_emb(embedding, torch.arange(ids_NT.shape[1])[None])
    branches, psis, routed = [], [], []

    def read():
        router = len(branches)
        starts = range(0, router, size)
        sources = [scaled(embedding), *(sum(branches[start : start + size]) for start in starts)]
        v = torch.stack(sources, -2)
        blocks = [torch.stack(psis[start : start + size]).mean(0) for start in starts]
        psi = torch.stack([torch.zeros(ids_NT.shape).double(), *blocks], -1)
        keys = v / (v.pow(2).mean(-1, keepdim=True) + routers.eps).sqrt()
        g = keys @ (routers.queries[router] * routers.key_norm[router])
        moved = torch.zeros_like(g)
        if routers.beta_raw is not None:
            moved = -F.softplus(routers.beta_raw[router]) * (psi - psi.mean(-1, keepdim=True))
        g = g + moved
        kept = [s for s in range(len(sources)) if s != dropped or len(sources) == 1]
        e, alpha = g[..., kept].exp(), torch.zeros_like(g)
        if settings.depth_normalizer == "sigmoid":
            one, null, scale = 1 + e, torch.zeros(ids_NT.shape).double(), 2
        else:
            null_weight = float(settings.depth_normalizer == "softmax1")
            one = null_weight + e.sum(-1, keepdim=True)
            null, scale = (null_weight / one).squeeze(-1), len(kept) + null_weight
        alpha[..., kept] = e / one
        routed.append((alpha, null, moved.std(-1, correction=0)))
        mixed = (alpha.unsqueeze(-1) * v).sum(-2)
        if settings.mix_scale == "rms":
            return mixed / mixed.pow(2).mean(-1, keepdim=True).sqrt()
        return mixed * scale if settings.mix_scale == "sum" else mixed

    def psi(null_BHT):
        if core.null_signal is not None:
            null_BHT = (1 + null_BHT / 1e-3).log()
            null_BHT = null_BHT * core.null_signal.weights[len(branches) // 2, :, None]
        return null_BHT.mean(1)

    for layer in core.layers:
        branch, null_BHT = layer.self_attn(
            hidden_states=layer.input_layernorm(read()),
            position_embeddings=rotation,
            attention_mask=None,
            normalizer=settings.normalizer,
            null_logit=settings.null_logit,
        )
        branches.append(scaled(branch))
        psis.append(torch.zeros(ids_NT.shape).double() if null_BHT is None else psi(null_BHT))
        branches.append(scaled(layer.mlp(layer.post_attention_layernorm(read())), mlp=True))
        without = core.null_signal is not None
        psis.append(torch.zeros_like(psis[-1]) if without else psis[-1])
    logits = model.lm_head(core.norm(read()))
    losses = F.cross_entropy(logits[:, :-1].mT, ids_NT[:, 1:], reduction="none").mean(1)
    return losses, routed


@pytest.mark.parametrize(("variant", "settings"), MODELS.items())
def test_every_measure_equals_the_forward_pass_written_out(variant, settings):
    model, ids = tiny_model(variant, dtype=torch.float64, **settings), tokens()
    losses, routed = written_out(model, ids)
    record = diagnose(model, ids, batch_size=2)
    assert record["loss.windowed"] == pytest.approx(losses.mean().item(), abs=1e-10)

    entropies, shares, embedding, nulls, signals = [], [], [], [], []
    for router, (alpha, null, signal) in enumerate(routed):
        share = alpha / alpha.sum(-1, keepdim=True)
        entropy = -(share * share.log()).sum(-1).mean(1)
        row = record.tables["depth.weights"][router]
        assert row == pytest.approx(alpha.mean((0, 1)).tolist(), abs=1e-10)
        assert record.tables["depth.entropy"][router] == pytest.approx(
            float(entropy.mean()), abs=1e-10
        )
        if alpha.shape[-1] > 1:
            entropies.append(entropy)
            shares.append(entropy / math.log(alpha.shape[-1]))
            embedding.append(alpha[..., 0].mean(1))
            nulls.append(null.mean(1))
            signals.append(signal.mean(1))
    assert len(entropies) == 8
    assert record["depth.entropy"] == pytest.approx(float(torch.stack(entropies).mean()), abs=1e-10)
    assert record["depth.entropy_normalized"] == pytest.approx(
        float(torch.stack(shares).mean()), abs=1e-10
    )
    for eps in (0.3, 0.2):
        rate = (torch.stack(embedding) > eps).double().mean()
        assert record[f"depth.sink_rate@{eps}"] == pytest.approx(float(rate))
    spread = torch.stack(entropies).mean(0).std() / math.sqrt(3)
    assert record.metric("depth.entropy").standard_error == pytest.approx(float(spread), abs=1e-10)
    if model.config.depth_normalizer == "softmax1":
        assert record["depth.null"] == pytest.approx(float(torch.stack(nulls).mean()), abs=1e-10)
        assert len(record.tables["depth.null"]) == 9
    else:
        assert "depth.null" not in record.tables
    if model.config.null_signal != "off":
        assert record["depth.signal"] == pytest.approx(
            float(torch.stack(signals).mean()), abs=1e-10
        )
        assert len(record.tables["depth.signal"]) == 9
    else:
        assert "depth.signal" not in record.tables
    assert not list(record.each("depth.causal"))


@pytest.mark.parametrize(("variant", "settings"), MODELS.items())
def test_causal_importance_is_the_loss_without_the_source(variant, settings):
    model, ids = tiny_model(variant, dtype=torch.float64, **settings), tokens()
    whole, _ = written_out(model, ids)
    record = diagnose(model, ids, causal=True)
    found = list(record.each("depth.causal"))
    last = math.ceil(8 / model.config.depth_block_size)
    assert [metric.where for metric in found] == [f"source.{i}" for i in range(last + 1)]
    for source, metric in enumerate(found):
        change = written_out(model, ids, source)[0] - whole
        assert metric.value == pytest.approx(float(change.mean()), abs=1e-10)
        assert metric.standard_error == pytest.approx(float(change.std() / math.sqrt(3)), abs=1e-10)
        assert metric.n == 3
        assert abs(metric.value) > 1e-4
    some = diagnose(model, ids, causal=[1, 0])
    assert [m.value for m in some.each("depth.causal")] == [found[1].value, found[0].value]
    # And nothing stays dropped.
    assert diagnose(model, ids)["loss.windowed"] == record["loss.windowed"]


def test_the_shuffled_signal_is_drawn_alike_with_and_without_a_source():
    """No router reads source 8 but the output's: where that gives it nothing, nothing changes."""
    model = tiny_model("oasis_signal_shuffled")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.zero_()
        model.model.depth.beta_raw[:8] = 3.0
        model.model.depth.beta_raw[8] = -40
    record = diagnose(model, tokens(), causal=[8, 3])
    last, third = (metric.value for metric in record.each("depth.causal"))
    assert abs(last) < 1e-6  # an empty source: the others keep their proportions
    assert abs(third) > 1e-4


def test_the_measures_by_hand():
    depth = Depth()
    for weights, null in (([[1.0, 0.0]], [0.0]), ([[0.25, 0.25], [0.0, 0.0]], [0.5, 1.0])):
        depth.update(
            RouterCall(0, torch.ones(1, len(weights), 1), torch.zeros(1, len(weights)), None)
        )
        depth.update(RouterCall(1, torch.tensor([weights]), torch.tensor([null]), None))
    values = {f"{metric.name} {metric.where}".strip(): metric.value for metric in depth.metrics()}
    # Means over tokens first: 1 and 0.125; entropies 0, and log 2 and 0; null 0 and 0.75.
    assert values == {
        "depth.sink_rate@0.3": 0.5,
        "depth.sink_rate@0.2": 0.5,
        "depth.entropy": pytest.approx(math.log(2) / 4),
        "depth.entropy_normalized": pytest.approx(0.25),
        "depth.null": pytest.approx(0.375),
        "depth.weight source.0": 0.5625,
        "depth.weight source.1": 0.0625,
    }
    assert depth.tables()["depth.null"] == [0, pytest.approx(0.375)]


def test_a_null_too_small_for_one_minus_the_sum_is_kept():
    model = tiny_model("oasis_signal_off")
    with torch.no_grad():
        model.model.depth.queries.fill_(0)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        # The embedding scores about 20 under every router: exp(-20) is below float32's 1 - 1.
        model.model.embed_tokens.weight.fill_(1)
        model.model.depth.key_norm.fill_(1)
        model.model.depth.queries.fill_(20 / 32)
    record = diagnose(model, tokens())
    # The other sources are zero, score 0 and change the sum by S exp(-20).
    assert record.tables["depth.null"][0] == pytest.approx(math.exp(-20), rel=1e-3)


def test_nan_weights_make_nan_measures():
    depth = Depth()
    depth.update(RouterCall(0, torch.tensor([[[0.5, math.nan]]]), torch.zeros(1, 1), None))
    depth.update(RouterCall(1, torch.tensor([[[math.nan, 0.5]]]), torch.zeros(1, 1), None))
    values = {metric.name: metric.value for metric in depth.metrics()}
    assert math.isnan(values["depth.sink_rate@0.3"])
    assert math.isnan(values["depth.entropy"])


def test_the_authors_form_has_its_states_for_sources():
    record = diagnose(ours("official"), torch.randint(0, 50, (2, 9)))
    assert [len(row) for row in record.tables["depth.weights"]] == [2, 3, 3, 4, 4, 5]
    assert len(record.tables["depth.null"]) == 6
    assert 0 < record["depth.null"] < 1


def test_without_depth_routing_there_is_no_depth():
    names = {metric.name for metric in diagnose(native("llama"), [[1, 2, 3]]).metrics}
    assert not [name for name in names if name.startswith("depth.")]


@pytest.mark.parametrize(
    ("make", "causal", "message"),
    [
        (lambda: native("llama"), True, "causal: the model has residual 'sum'"),
        (lambda: native("llama"), [], "only residual 'depth' has sources"),
        (lambda: ours("official"), [0], "the model has residual 'official'"),
        (lambda: ours("oasis"), [0, 7], "7 is not a source; .* from 0 to 6"),
        (lambda: ours("oasis_block"), [3], "from 0 to 2"),
        (lambda: ours("oasis"), [-1], "causal: -1 is not a source"),
        (lambda: ours("oasis"), [0.0], r"causal: 0\.0 is not a source"),
    ],
)
def test_sources_that_cannot_be_dropped_are_refused(make, causal, message):
    with pytest.raises(UserError, match=message):
        diagnose(make(), [[1, 2, 3]], causal=causal)
