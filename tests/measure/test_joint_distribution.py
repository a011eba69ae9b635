"""joint.* against q(i, j) written out, [N, T, R, T] at once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from example_records import TEXT, diagnosis
from oasis_attn import convert
from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose, joint_distribution
from oasis_attn.measure.joint_distribution import Rows, compare_joint, joint_statistics, routes
from oasis_attn.measure.residual_updates import observe_updates
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.modeling.depth_cache import observe_depth
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.records import DiagnosisRecord
from tiny_models import VOCABULARY, tiny_config, tiny_model

from .models import native, ours

VARIANTS = {
    "vanilla": {},
    "softmax1": {},
    "learned_sink": {},
    "softpick": {},
    "attn_residual": {},
    "attn_residual_block": {},
    "oasis": {},
    "oasis_block": {"depth_block_size": 3},
    "oasis_depth_sigmoid": {},
    "oasis_depth_softmax": {"mix_scale": "sum"},
    "official": {},
}
STATISTICS = ("leakage", "concentration", "neg_entropy")


def tokens(windows=3, length=25):
    return torch.randint(VOCABULARY, (windows, length), generator=torch.manual_seed(5))


def eager_map(call, null_logit):
    """Head-mean p, [N, T, T], from queries and keys: a null logit in one more column."""
    if call.weights_BHTS is not None:
        return call.weights_BHTS.mean(1)
    heads, length, width = call.query_BHTd.shape[1:]
    key = call.key_BGSd.repeat_interleave(heads // call.key_BGSd.shape[1], 1)
    scores = call.query_BHTd @ key.mT / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    column = (
        torch.as_tensor(null_logit, dtype=torch.float64)
        .reshape(-1, 1, 1)
        .expand(*scores.shape[:3], 1)
    )
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].mean(1)


def brute_force(model, ids):
    """name -> [N, routers], and the same over near-no-op queries."""
    weights, maps, states, updates = {}, [], [], []

    def see_attention(call):
        layer = model.model.layers[call.layer]
        kind = model.config.token_normalizer
        logit = {"softmax": -torch.inf, "softmax1": 0.0}.get(kind, layer.null_logit)
        maps.append(eager_map(call, logit))

    hooks = []
    for layer in model.model.layers:
        for norm, branch in (
            (layer.input_layernorm, layer.self_attn),
            (layer.post_attention_layernorm, layer.mlp),
        ):
            hooks.append(norm.register_forward_pre_hook(lambda _m, x: states.append(x[0])))
            hooks.append(
                branch.register_forward_hook(
                    lambda _m, _x, y: updates.append(y[0] if isinstance(y, tuple) else y)
                )
            )
    with (
        torch.no_grad(),
        observe_attention(model, see_attention),
        observe_depth(model, lambda call: weights.update({call.router: call.weights_BTS})),
    ):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    config, (N, T) = model.config, ids.shape
    itself = torch.eye(T, dtype=torch.float64).expand(N, T, T)
    found = {}
    for router in range(1, 2 * len(maps)):
        rows = [itself, *(maps[done // 2] for done in range(router))]
        if config.residual == "sum":
            alpha = [torch.ones(N, T).double() / len(rows)] * len(rows)
        elif config.residual == "depth":
            alpha = [weights[router][..., 0]]
            for start in range(0, router, config.depth_block_size):
                block = range(start, min(start + config.depth_block_size, router))
                share = weights[router][..., 1 + start // config.depth_block_size] / len(block)
                alpha += [share] * len(block)
        else:  # x_0, x_1, ..., then what is within the layer whose router this is
            layer, after_mlp = (router - 1) // 2, (router - 1) % 2
            rows = [itself, *maps[:layer], maps[layer], *([maps[layer]] if after_mlp else [])]
            alpha = weights[router].unbind(-1)
        q = torch.stack([a.unsqueeze(-1) * p for a, p in zip(alpha, rows, strict=True)], 2).double()
        mass = q.sum((2, 3))
        values = {"mass": mass}
        for form, x in (("", q), ("_renormalized", q / mass[..., None, None])):
            values["leakage" + form] = x[..., 0].sum(2)
            values["concentration" + form] = x.flatten(2).amax(-1)
            logs = x.log().masked_fill(x == 0, 0)
            values["neg_entropy" + form] = (x * logs).sum((2, 3))
        ratio = updates[router].norm(dim=-1) / states[router].norm(dim=-1)
        for window in range(N):
            order = ratio[window, 1:].argsort()[: math.ceil(0.1 * (T - 1))] + 1
            for name, value in values.items():
                found.setdefault(f"joint.{name}", {})[window, router] = value[window, 1:].mean()
                some = found.setdefault(f"joint.{name}_no_op@0.1", {})
                some[window, router] = value[window, order].mean()
    return {
        name: torch.stack(list(values.values())).view(-1, N).T for name, values in found.items()
    }


@pytest.mark.parametrize(("variant", "changes"), VARIANTS.items())
def test_every_number_equals_q_written_out(variant, changes):
    model, ids = tiny_model(variant, dtype=torch.float64, **changes), tokens()
    expected = brute_force(model, ids)
    record = diagnose(model, ids, joint=True, batch_size=2)
    found = {m.name: m for m in record.metrics if m.name.startswith("joint.")}
    assert set(found) == set(expected)
    assert len(found) == 14
    for name, values_NR in expected.items():
        found_N, found_R = (
            record.tables[f"joint.{kind}"][name] for kind in ("sequences", "sublayers")
        )
        assert found_N == pytest.approx(values_NR.mean(1).tolist(), abs=1e-10)
        assert found_R == pytest.approx(values_NR.mean(0).tolist(), abs=1e-10)
        assert found[name].value == pytest.approx(float(values_NR.mean()), abs=1e-10)
        assert found[name].n == 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "olmo2"])
def test_a_native_model_is_the_residual_sum_of_its_family(family):
    text = tiny_config(family, initializer_range=0.2)
    routed = tiny_model("vanilla", text=text).double()
    plain = AutoModelForCausalLM.from_config(text).double().eval()
    plain.load_state_dict(routed.state_dict())
    records = [diagnose(model, tokens(), joint=True) for model in (plain, routed)]
    assert records[0].metrics == records[1].metrics
    assert len(records[0].tables["joint.sublayers"]["joint.leakage"]) == 7


def test_equal_weights_over_depth_are_the_residual_sum():
    """Zero queries: the same function, and the same joint distribution but for the depth null."""
    plain, ids = native("llama"), tokens() % 50
    routed = convert(plain, "depth_softmax1_only", mix_scale="sum")
    sums, mixes = (diagnose(model, ids, joint=True) for model in (plain, routed))
    assert mixes["joint.mass"] < sums["joint.mass"] == pytest.approx(1)
    for name in sums.tables["joint.sequences"]:
        if "_renormalized" in name:
            assert mixes[name] == pytest.approx(sums[name], abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "olmo2"])
def test_an_update_is_what_the_stream_gains(family):
    """In a plain sum, what the next part reads less what this one read."""
    model, ids, ratios = tiny_model("vanilla", family), tokens(), {}
    layers = decoder_map(model).layers
    row = FAMILIES[family]
    between = []
    for layer in layers:
        reader = getattr(layer.module, row.pre_mlp or row.mlp)
        reader.register_forward_pre_hook(lambda _m, x: between.append(x[0]))
    last = []
    model.model.norm.register_forward_pre_hook(lambda _m, x: last.append(x[0]))
    with torch.no_grad(), observe_updates(layers, ratios.__setitem__):
        states = [*model(ids, output_hidden_states=True).hidden_states[:-1], *last]
    for layer in range(4):
        for part, (h, after) in enumerate(
            ((states[layer], between[layer]), (between[layer], states[layer + 1]))
        ):
            wanted = ((after - h).norm(dim=-1) / h.norm(dim=-1)).double()
            torch.testing.assert_close(ratios[2 * layer + part], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "opt"])
def test_rows_are_the_columns_side_by_side(family):
    """Grouped heads, a sliding window, a soft cap."""
    calls, ids = [], torch.randint(0, 50, (2, 30))
    model = native(family)
    with torch.no_grad(), observe_attention(model, calls.append):
        model(input_ids=ids)
    for call in calls:
        whole = torch.stack([call.column(position) for position in range(30)], -1)
        rows = call.rows(7, 19)
        assert rows.shape[2] == 12
        torch.testing.assert_close(rows, whole[:, :, 7:19, : rows.shape[3]], rtol=0, atol=1e-12)
        assert not whole[:, :, 7:19, rows.shape[3] :].any()


@pytest.mark.parametrize("variant", ["oasis", "softpick", "vanilla"])
def test_pieces_and_batches_change_no_number(variant, monkeypatch):
    model, ids = tiny_model(variant, dtype=torch.float64), tokens()
    whole = diagnose(model, ids, joint=True)
    monkeypatch.setattr(joint_distribution, "_ELEMENTS", 4 * 25 * 7)
    pieces = diagnose(model, ids, joint=True, batch_size=3)
    for name, values in whole.tables["joint.sequences"].items():
        assert pieces.tables["joint.sequences"][name] == pytest.approx(values, rel=1e-9)


def test_joint_is_asked_for_and_changes_no_other_number():
    model, ids = tiny_model("oasis"), tokens()
    without, both = diagnose(model, ids), diagnose(model, ids, joint=True)
    assert without.metrics == tuple(m for m in both.metrics if not m.name.startswith("joint."))
    assert set(both.tables) - set(without.tables) == {"joint.sequences", "joint.sublayers"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    keys=st.integers(1, 9),
    spent=st.floats(1e-3, 1),
    peaked=st.floats(0, 200),
)
def test_the_closed_form_is_that_of_q(seed, count, keys, spent, peaked):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 1, count, keys, generator=generator, dtype=torch.float64) * peaked
    p = scores.softmax(-1) * torch.rand(1, 1, count, 1, generator=generator).double()
    alpha = torch.randn(1, 1, count, generator=generator).double().softmax(-1) * spent
    alpha[..., 1:2] = 0  # a source that is not read at all
    rows = [
        Rows(p_j.sum(-1), p_j[..., 0], p_j.amax(-1), -torch.special.entr(p_j).sum(-1))
        for p_j in p.unbind(2)
    ]
    found = joint_statistics(alpha, rows)
    q = (alpha.unsqueeze(-1) * p).flatten(2)
    torch.testing.assert_close(found["mass"], q.sum(-1))
    for form, x in (("", q), ("_renormalized", q / q.sum(-1).clamp_min(1e-6).unsqueeze(-1))):
        wanted = {
            "leakage": x.unflatten(2, (count, keys))[..., 0].sum(-1),
            "concentration": x.amax(-1),
            "neg_entropy": torch.special.xlogy(x, x).sum(-1),
        }
        for name in STATISTICS:
            torch.testing.assert_close(found[name + form], wanted[name], rtol=1e-9, atol=1e-12)
    if q.sum() > 1e-6:
        assert found["neg_entropy_renormalized"] <= 1e-9
        assert found["neg_entropy_renormalized"] >= -math.log(count * keys) - 1e-9


@pytest.mark.parametrize(
    ("form", "router", "sources", "layers"),
    [
        (("sum", 1), 1, [0, 0], [-1, 0]),
        (("sum", 1), 4, [0, 0, 0, 0, 0], [-1, 0, 0, 1, 1]),
        (("depth", 1), 3, [0, 1, 2, 3], [-1, 0, 0, 1]),
        (("depth", 3), 5, [0, 1, 1, 1, 2, 2], [-1, 0, 0, 1, 1, 2]),
        (("depth", 4), 2, [0, 1, 1], [-1, 0, 0]),
        (("official", 1), 1, [0, 1], [-1, 0]),
        (("official", 1), 2, [0, 1, 2], [-1, 0, 0]),
        (("official", 1), 4, [0, 1, 2, 3], [-1, 0, 1, 1]),
        (("official", 1), 5, [0, 1, 2, 3], [-1, 0, 1, 2]),
    ],
)
def test_routes(form, router, sources, layers):
    assert routes(*form, router) == (sources, layers)


def record_of(values: list[float | str], sha: str = "same") -> DiagnosisRecord:
    return diagnosis(
        data=replace(TEXT, tokens_sha256=sha),
        tables={"joint.sequences": {"joint.leakage": values, "joint.mass": [1.0] * len(values)}},
    )


def test_two_windows_have_three_means():
    """Drawn with probabilities 1/4, 1/2 and 1/4, so the interval ends at the extremes."""
    leakage, mass = compare_joint(record_of([0.1, 0.4]), record_of([0.2, 0.9]))
    assert leakage == {
        "metric": "joint.leakage",
        "value": pytest.approx(0.25),
        "baseline": pytest.approx(0.55),
        "difference": pytest.approx(-0.3),
        "low": pytest.approx(-0.5),
        "high": pytest.approx(-0.1),
        "n": 2,
    }
    assert (mass["difference"], mass["low"], mass["high"]) == (0, 0, 0)


def test_the_interval_is_that_of_paired_windows():
    """What both models share from window to window is no spread of their difference."""
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.randn(2, 400, generator=generator).double()
    record, baseline = (shared + 0.1 * own + 0.05).tolist(), shared.tolist()
    row, _ = compare_joint(record_of(record), record_of(baseline), seed=3)
    error = 0.1 * float(own.std()) / 20
    assert row["low"] == pytest.approx(row["difference"] - 1.96 * error, abs=0.15 * error)
    assert row["high"] == pytest.approx(row["difference"] + 1.96 * error, abs=0.15 * error)
    assert row == compare_joint(record_of(record), record_of(baseline), seed=3)[0]
    assert row != compare_joint(record_of(record), record_of(baseline), seed=4)[0]


def test_records_of_two_models_are_compared(tmp_path):
    ids = tokens()
    records = [diagnose(ours(name), ids % 50, joint=True) for name in ("oasis", "vanilla")]
    again = [DiagnosisRecord.load(r.save(tmp_path / f"{n}.json")) for n, r in enumerate(records)]
    rows = compare_joint(*again)
    assert rows == compare_joint(*records)
    for row in rows:
        value, baseline = (record[row["metric"]] for record in records)
        assert row["difference"] == pytest.approx(value - baseline)
        assert row["low"] <= row["difference"] <= row["high"]


def test_a_window_that_is_not_finite_is_not_hidden():
    row = compare_joint(record_of(["nan", 0.4]), record_of([0.2, 0.9]))[0]
    assert all(math.isnan(row[name]) for name in ("value", "difference", "low", "high"))


@pytest.mark.parametrize(
    ("record", "baseline", "message"),
    [
        (replace(record_of([1, 2]), tables={}), record_of([1, 2]), "record: it has no joint"),
        (record_of([1, 2]), replace(record_of([1, 2]), tables={}), "baseline: it has no joint"),
        (record_of([1, 2]), record_of([1, 2], "other"), "baseline: .* on different tokens"),
        (record_of([1]), record_of([1]), "record: it has 1 window; "),
    ],
)
def test_records_that_do_not_pair_are_refused(record, baseline, message):
    with pytest.raises(UserError, match=message):
        compare_joint(record, baseline)


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="draws: 0 is not a whole number of at least 1"):
        compare_joint(record_of([1, 2]), record_of([1, 2]), draws=0)
    with pytest.raises(UserError, match="model_type: 'gpt2' is not supported"):
        diagnose(native("gpt2"), [[1, 2, 3]], joint=True)
