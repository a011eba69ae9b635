"""Nulls with keys and values become plain nulls; distillation from another model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from oasis_attn import convert
from oasis_attn.data import load_corpus, train_tokenizer
from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.ops.null_attention import null_attention
from oasis_attn.records import TrainingRecord
from oasis_attn.training import TrainingConfig, train
from oasis_attn.training.null_to_logit import NullToLogit, finish, routed_layers
from oasis_attn.training.prepare import prepare
from oasis_attn.training.trainer import OasisTrainer
from tiny_models import VOCABULARY, tiny_config, tiny_model

FORMS = {
    "key and value": "key_value_null",
    "three nulls": {"name": "key_value_null", "nulls": 3},
    "value": "value_null",
}
NAMES = {"vocab_size": 270, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def with_null(form="key and value", variant="kv_null", **settings):
    """A tiny model whose null has random keys and values that matter."""
    model = tiny_model(variant, token_normalizer=FORMS[form], **settings).eval()
    torch.manual_seed(1)
    for layer in routed_layers(model):
        for parameter in (layer.null_key, layer.null_value, layer.null_logit):
            if parameter is not None:
                parameter.data.normal_()
    return model


def move_to(schedule, step):
    for each in range(step + 1):
        schedule.on_step_begin(None, SimpleNamespace(global_step=each), None)


def ids(seed=0):
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_ends(form, tmp_path):
    model, tokens = with_null(form, dtype=torch.float64), ids()
    with torch.no_grad():
        before = model(tokens).logits
        schedule = NullToLogit(model, 4, [tokens])
        assert torch.equal(model(tokens).logits, before)
        move_to(schedule, 5)
        last = model(tokens).logits
        finish(model)
        plain = model(tokens).logits
        assert (last - before).abs().max() > 1e-3
        assert (plain - last).abs().max() < 1e-12
        assert model.config.settings["token_normalizer"] == "learned_sink"
        assert not any("null_key" in name or "null_value" in name for name in model.state_dict())
        model.save_pretrained(tmp_path)
        loaded = OasisForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(loaded(tokens).logits, plain)
        assert loaded.config.text_config.attention_output_bias


def test_the_logit_and_the_bias_are_means_over_the_tokens():
    """In the first layer, whose input does not depend on the null, against `null_attention`."""
    model, tokens = with_null(dtype=torch.float64), ids()
    layer, captured = routed_layers(model)[0], {}

    def capture(call):
        if call.layer == 0:
            captured.update(q=call.query_BHTd, k=call.key_BGSd, v=call.value_BGSd)

    with torch.no_grad(), observe_attention(model, capture):
        model(tokens)
    q = captured["q"]
    key, value, logit = (
        x.detach().clone() for x in (layer.null_key, layer.null_value, layer.null_logit)
    )
    _, null_BHT = null_attention(
        q, captured["k"], captured["v"], is_causal=True, null_key=key, null_value=value,
        null_logit=logit,
    )  # fmt: skip
    logits_BHT = (q @ key.mT).squeeze(-1) * q.shape[-1] ** -0.5 + logit[:, None]
    added = (null_BHT.mean((0, 2))[:, None] * value[:, 0]).flatten()
    move_to(NullToLogit(model, 3, [tokens[:1], tokens[1:]]), 2)
    assert torch.allclose(layer.null_logit, logits_BHT.mean((0, 2)), atol=1e-12)
    linear = layer.self_attn.o_proj
    assert torch.allclose(linear.bias, F.linear(added, linear.weight), atol=1e-12)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"output_gate": "head"}),
        ("llama", {"output_gate": "elementwise"}),
        ("afmoe", {}),  # with a gate of its own
        ("bitnet", {}),  # with a norm before the output projection
        ("stablelm", {}),
    ],
)
def test_the_bias_is_what_the_values_add_after_gates_and_norms(family, settings):
    """In the first layer, whose input does not depend on the null."""
    model, tokens = with_null(family=family, dtype=torch.float64, **settings), ids()
    layer, seen = routed_layers(model)[0], []
    hook = layer.self_attn.register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    with torch.no_grad():
        model(tokens)
        value = layer.null_value.clone()
        layer.null_value.zero_()
        model(tokens)
        layer.null_value.copy_(value)
    hook.remove()
    move_to(NullToLogit(model, 1, [tokens]), 0)
    bias_D = layer.output_projection.bias
    torch.testing.assert_close(bias_D, (seen[0] - seen[1]).mean((0, 1)), rtol=0, atol=1e-12)


def test_a_prefix_takes_part_in_the_means():
    """As the same tokens before the text do, whose own outputs do not count."""
    model, tokens = with_null(dtype=torch.float64), ids()
    prefixed = with_prefix(model, compute_prefix(model, (5, 6)))
    whole = torch.cat([torch.tensor([[5, 6]]).expand(2, -1), tokens], 1)
    layer, seen = routed_layers(model)[0], []
    hook = layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.append(out[0][:, 2:]))
    with torch.no_grad():
        model(whole)
        value = layer.null_value.clone()
        layer.null_value.zero_()
        model(whole)
        layer.null_value.copy_(value)
    hook.remove()
    move_to(NullToLogit(prefixed, 1, [tokens]), 0)
    bias_D = routed_layers(prefixed)[0].output_projection.bias
    torch.testing.assert_close(bias_D, (seen[0] - seen[1]).mean((0, 1)), rtol=0, atol=1e-12)


def test_a_bias_that_the_family_has_is_used():
    model = with_null(family="starcoder2")
    start = [layer.self_attn.o_proj.bias.detach().clone() for layer in routed_layers(model)]
    move_to(NullToLogit(model, 1, [ids()]), 0)
    assert not hasattr(model.config.text_config, "attention_output_bias")
    for before, layer in zip(start, routed_layers(model), strict=True):
        assert not torch.equal(before, layer.self_attn.o_proj.bias)


def test_output_bias():
    with pytest.raises(UserError, match=r"output_bias: True has no effect with 'starcoder2'"):
        tiny_model("softmax1", text=tiny_config("starcoder2", attention_output_bias=True))
    with pytest.raises(UserError, match="output_bias: 'yes'"):
        tiny_model("softmax1", text=tiny_config(attention_output_bias="yes"))
    text = tiny_config(attention_output_bias=True)
    biases = [layer.self_attn.o_proj.bias for layer in routed_layers(tiny_model(text=text))]
    assert all(bias is not None and not bias.any() for bias in biases)
    with pytest.raises(UserError, match=r"output_bias: True adds a bias .* change the function"):
        convert(AutoModelForCausalLM.from_config(text))


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    """A tiny native checkpoint, and models with nulls."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(load_corpus(corpus).texts(), 270)
    text = tiny_config(**NAMES)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text).save_pretrained(folder / "native")
    with_null(text=text).save_pretrained(folder / "null")
    routed = with_null(variant="oasis", text=text, mix_scale="sum")
    routed.save_pretrained(folder / "routed")
    for path in folder.iterdir():
        tokenizer.save_pretrained(path)
    return folder


@pytest.fixture
def onward(models, corpus, tmp_path):
    def config(out="run", source="null", **changes) -> TrainingConfig:
        small = {
            "out": tmp_path / out, "from_model": models / source, "corpus": corpus, "steps": 6,
            "block_length": 32, "batch_size": 4, "learning_rate": 1e-3, "save_every": 2,
            "log_every": 1, "eval_windows": 4,
        }  # fmt: skip
        return TrainingConfig(**small | changes)

    return config


def quiet(config: TrainingConfig) -> TrainingRecord:
    return train(config, progress=False)


def column(record: TrainingRecord, name: str) -> list[float]:
    return [row[name] for row in record.tables["loss"]]


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("source", ["null", "routed"])
def test_the_whole_road_resumes_exactly(onward, models, monkeypatch, source, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    common = {
        "source": source, "null_to_logit": 4, "distill_from": models / "native",
        "outlier_penalty": 0.1, "outlier_tensors": "layer_outputs", "lora_rank": lora_rank,
    }  # fmt: skip
    whole = quiet(onward("whole", **common))
    assert column(whole, "null_factor") == pytest.approx([0.75, 0.5, 0.25, 0, 0, 0])
    training_step = OasisTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet(onward("stopped", **common))
    saved = onward("stopped").out / "checkpoints" / "checkpoint-2"
    if not lora_rank:  # otherwise checkpoints contain no configuration
        settings = json.loads((saved / "config.json").read_text())
        assert settings["token_normalizer"] == "key_value_null"
        halfway, start = load_model(saved)[0], load_model(models / source)[0]
        for now, then in zip(routed_layers(halfway), routed_layers(start), strict=True):
            assert torch.equal(now.null_key, 0.5 * then.null_key)
            assert torch.equal(now.null_value, 0.5 * then.null_value)
    resumed = quiet(onward("stopped", **common, resume=True))
    assert resumed.tables == whole.tables
    assert resumed["loss.windowed"] == whole["loss.windowed"]
    model = load_model(onward("stopped").out)[0]
    assert model.config.token_normalizer == "learned_sink"
    assert model.config.null_signal == ("on" if source == "routed" else "off")


def test_distillation(onward, models, monkeypatch):
    native, still = models / "native", {"learning_rate": 0.0, "steps": 1, "save_every": 1}
    own = quiet(onward("own", source="native", distill_from=native, **still))
    assert abs(column(own, "loss")[0]) < 1e-6
    plain = quiet(onward("plain", **still))
    pure = quiet(onward("pure", distill_from=native, **still))
    mixed = quiet(onward("mixed", distill_from=native, distill_weight=0.25, **still))
    tokens, teacher, both = (column(record, "loss")[0] for record in (plain, pure, mixed))
    assert both == pytest.approx(0.75 * tokens + 0.25 * teacher, abs=1e-5)
    assert teacher > 1e-4
    halves = {"batch_size": 2, "gradient_accumulation": 2, "outlier_penalty": 0.3}
    half = {"distill_from": native, "distill_weight": 0.5}
    whole = quiet(onward("whole", **half, outlier_penalty=0.3))
    # As in Gemma 3n, whose loss is a mean over the forward pass.
    monkeypatch.setattr(OasisForCausalLM, "accepts_loss_kwargs", False, raising=False)
    parts = quiet(onward("parts", **half, **halves))
    for name in ("loss", "outlier_penalty"):
        assert column(parts, name) == pytest.approx(column(whole, name), abs=2e-4)
    assert column(whole, "loss")[-1] < column(whole, "loss")[0]
    assert whole.training["distill_from"] == str(native)


def test_bad_input(onward, tmp_path, corpus, monkeypatch):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(tiny_config(**NAMES)).save_pretrained(other)
    train_tokenizer(load_corpus(corpus).texts(), 260).save_pretrained(other)
    for change, message in [
        ({"null_to_logit": 7}, "null_to_logit: 7 is more than the run's 6 steps"),
        ({"null_to_logit": 2, "from_model": None}, "null_to_logit: 2 needs from_model"),
        ({"null_to_logit": 2, "source": "native"}, "null_to_logit: 2 .* 'key_value_null', but"),
        ({"null_to_logit": 2, "trainable": ["*.null_key"]}, "trainable: .* are keys and values"),
        ({"distill_weight": 0.5}, "distill_weight: 0.5 has no effect without distill_from"),
        ({"distill_weight": 2}, "distill_weight: 2"),
        ({"distill_from": other}, "distill_from: .* has another tokenizer"),
        ({"distill_from": "no/such/model"}, "does not exist"),
        ({"outlier_tensors": "layer_outputs"}, "outlier_tensors: 'layer_outputs' has no effect"),
        ({"outlier_tensors": "all", "outlier_penalty": 1.0}, "outlier_tensors: 'all' is not"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            quiet(onward(**change))
        assert "\n" not in str(caught.value)
        assert not onward().out.exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="null_to_logit: FSDP is not supported"):
        prepare(onward(null_to_logit=2))
