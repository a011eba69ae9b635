"""Training on: a model that exists, its null logit raised, parts of it frozen or adapted."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, DiffLlamaConfig

from oasis_attn import SinkCallback, convert
from oasis_attn.data import load_corpus, read_windows, train_tokenizer
from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import attach_prefix, compute_prefix, prefix_of, with_prefix
from oasis_attn.measure.loss import measure_loss
from oasis_attn.modeling.null_logit import LEAST_WITH_DEPTH
from oasis_attn.quantization import quantize
from oasis_attn.records import TrainingRecord
from oasis_attn.training import TrainingConfig, train
from oasis_attn.training.anneal import LOWEST_START
from oasis_attn.training.parameters import group_of
from oasis_attn.training.trainer import OasisTrainer
from tiny_models import tiny_config, tiny_model


def quiet(config: TrainingConfig) -> TrainingRecord:
    return train(config, progress=False)


def column(record: TrainingRecord, name: str) -> list[float]:
    return [row[name] for row in record.tables["loss"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    """A tiny native checkpoint with its own tokenizer, and what it converts to."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(load_corpus(corpus).texts(), 270)
    torch.manual_seed(0)
    native = AutoModelForCausalLM.from_config(
        tiny_config(vocab_size=270, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    )
    native.save_pretrained(folder / "native")
    tokenizer.save_pretrained(folder / "native")
    convert(folder / "native", "oasis").save_pretrained(folder / "converted")
    tokenizer.save_pretrained(folder / "converted")
    return folder


@pytest.fixture
def onward(models, corpus, tmp_path):
    def config(out="run", source="converted", **changes) -> TrainingConfig:
        small = {
            "out": tmp_path / out, "from_model": models / source, "corpus": corpus, "steps": 10,
            "block_length": 32, "batch_size": 4, "learning_rate": 1e-3, "save_every": 2,
            "log_every": 1, "eval_windows": 4,
        }  # fmt: skip
        return TrainingConfig(**small | changes)

    return config


def test_converted_starts_where_the_native_model_does(onward):
    frozen = {"learning_rate": 0.0, "steps": 1, "save_every": 1}
    converted, native = (quiet(onward(name, name, **frozen)) for name in ("converted", "native"))
    assert column(converted, "loss") == pytest.approx(column(native, "loss"), abs=1e-5)
    assert converted.model.config["null_logit"] < -1000
    assert native.model.config is None
    assert native.training["from_model"].endswith("native")
    assert native.training["variant"] is native.training["size"] is None
    assert native.weights_sha256 != converted.weights_sha256


def test_anneal(onward):
    record = quiet(onward(anneal_null=5))
    found = column(record, "null_logit")
    assert found == pytest.approx([-9.6, -7.2, -4.8, -2.4, 0, 0, 0, 0, 0, 0])
    assert found[0] > LOWEST_START
    assert record.model.config["null_logit"] == 0
    out = onward().out
    assert AutoModelForCausalLM.from_pretrained(out).config.null_logit == 0


def test_anneal_is_in_every_checkpoint_and_resumes_exactly(onward, monkeypatch):
    whole = quiet(onward("whole", anneal_null=8))
    original = OasisTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet(onward("stopped", anneal_null=8))
    out = onward("stopped").out
    for step in (2, 4):
        saved = json.loads((out / "checkpoints" / f"checkpoint-{step}" / "config.json").read_text())
        assert saved["null_logit"] == column(whole, "null_logit")[step - 1]
    resumed = quiet(onward("stopped", anneal_null=8, resume=True))
    assert resumed.tables == whole.tables
    assert resumed["loss.windowed"] == whole["loss.windowed"]


def test_anneal_starts_at_the_models_own_null_if_that_is_higher(onward, models):
    model, tokenizer = load_model(models / "converted")
    model.config.null_logit = -3.0
    model.save_pretrained(models / "higher")
    tokenizer.save_pretrained(models / "higher")
    found = column(quiet(onward(source="higher", anneal_null=3, steps=4)), "null_logit")
    assert found == pytest.approx([-2, -1, 0, 0])


@pytest.mark.parametrize(("setting", "target"), [(3, 3), ("log_context", LEAST_WITH_DEPTH)])
def test_anneal_to_another_null(setting, target, onward):
    record = quiet(onward(anneal_null=5, steps=6, settings={"null_logit": setting}))
    step = (target - LOWEST_START) / 5
    expected = [LOWEST_START + step * (1 + i) for i in range(5)]
    assert column(record, "null_logit") == pytest.approx([*expected, target])
    assert record.model.config["null_logit"] == target
    assert record.training["settings"] == {"null_logit": setting}


def test_anneal_from_scratch_rises_to_the_variants_own_null(onward):
    scratch = {"from_model": None, "variant": "oasis_quiet", "anneal_null": 2, "steps": 3}
    record = quiet(onward(**scratch, size="nano", vocab_size=300))
    assert column(record, "null_logit") == pytest.approx([-3.75, 4.5, 4.5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("native", r"anneal_null: 5 steps require .* token_normalizer 'softmax1'.*'softmax'"),
        (
            "raised",
            r"anneal_null: 5 steps to the null logit 0\.0 require a start below it",
        ),
    ],
)
def test_nothing_to_anneal(onward, models, source, message):
    if source == "raised" and not (models / source).exists():
        model, tokenizer = load_model(models / "converted")
        model.config.null_logit = 0.0
        model.save_pretrained(models / source)
        tokenizer.save_pretrained(models / source)
    with pytest.raises(UserError, match=message):
        quiet(onward(source=source, anneal_null=5))
    assert not onward().out.exists()


def test_rates_by_group(onward, models):
    # While the null is off there is no signal to couple to.
    quiet(onward(learning_rate=0.0, learning_rates={"beta": 0.1}, steps=3, anneal_null=1))
    before, after = (
        load_model(path)[0].state_dict() for path in (models / "converted", onward().out)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model.depth.beta_raw"}


def test_frozen_parts_keep_their_bits(onward, models):
    record = quiet(onward(trainable=["router", "model.layers.1.mlp.*"], steps=3))
    before, after = (
        load_model(path)[0].state_dict() for path in (models / "converted", onward().out)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        "model.depth.queries", "model.depth.key_norm",
        *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }  # fmt: skip
    assert record.trained_parameters < record.model.parameters


def test_lora_is_merged_and_resumes_exactly(onward, models, monkeypatch):
    pytest.importorskip("peft")
    whole = quiet(onward("whole", lora_rank=4, anneal_null=5))
    assert column(whole, "loss")[-1] < column(whole, "loss")[0]
    before, after = (
        load_model(path)[0].state_dict() for path in (models / "converted", onward("whole").out)
    )
    assert before.keys() == after.keys()
    assert whole.model.parameters == sum(x.numel() for x in after.values())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 4
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])

    config = onward("stopped", lora_rank=4, anneal_null=5)
    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "gathered_weights", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quiet(config)
    resumed = quiet(onward("stopped", lora_rank=4, anneal_null=5, resume=True))
    assert resumed.tables == whole.tables
    assert resumed["loss.windowed"] == whole["loss.windowed"]


@pytest.mark.parametrize(
    ("family", "variant", "trainable"),
    [("llama", "oasis", ["*embed_tokens*"]), ("mixtral", None, [])],
)
def test_lora_resumes_exactly_with_a_tied_head_experts_and_a_prefix(
    family, variant, trainable, onward, models, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    names = {"vocab_size": 270, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    text = tiny_config(family, tie_word_embeddings=True, **names)
    model = AutoModelForCausalLM.from_config(text)
    model = convert(model, variant) if variant else model
    attach_prefix(model, compute_prefix(model, (5, 6)))
    model.save_pretrained(tmp_path / "tied")
    load_model(models / "native")[1].save_pretrained(tmp_path / "tied")
    common = {"lora_rank": 2, "steps": 6, "from_model": tmp_path / "tied", "trainable": trainable}
    whole = quiet(onward("whole", **common))
    original = OasisTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet(onward("stopped", **common))
    resumed = quiet(onward("stopped", **common, resume=True))
    assert resumed.tables == whole.tables
    assert resumed["loss.windowed"] == whole["loss.windowed"]
    trained, original = (load_model(tmp_path / name)[0] for name in ("stopped", "tied"))
    assert trained.lm_head.weight is trained.get_input_embeddings().weight
    assert torch.equal(prefix_of(trained).keys_LGPd, prefix_of(original).keys_LGPd)


def test_a_null_with_a_key_and_a_value_trains_beside_lora_and_resumes(
    onward, models, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    text = tiny_config(vocab_size=270, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    tiny_model("kv_null", text=text).save_pretrained(tmp_path / "source")
    load_model(models / "native")[1].save_pretrained(tmp_path / "source")
    common = {"lora_rank": 2, "steps": 6, "from_model": tmp_path / "source"}
    whole = quiet(onward("whole", **common))
    training_step = OasisTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OasisTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet(onward("stopped", **common))
    resumed = quiet(onward("stopped", **common, resume=True))
    assert resumed.tables == whole.tables
    assert "null_logit" not in whole.tables["loss"][0]  # it is learned, so not that of the config
    before, after, again = (
        load_model(tmp_path / name)[0].state_dict() for name in ("source", "whole", "stopped")
    )
    assert all(torch.equal(after[name], again[name]) for name in after)
    for name, weight in before.items():
        if group_of(name) == "null":
            assert not torch.equal(weight, after[name]), name
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_another_prefix_is_another_run(onward, models, tmp_path):
    model, tokenizer = load_model(models / "native")
    source = tmp_path / "source"
    tokenizer.save_pretrained(source)
    with_prefix(model, compute_prefix(model, (5, 6))).save_pretrained(source)
    quiet(onward(from_model=source, steps=1))
    with_prefix(model, compute_prefix(model, (6, 5))).save_pretrained(source)
    with pytest.raises(UserError, match=r"resume: .* has weights_sha256"):
        quiet(onward(from_model=source, steps=1, resume=True))


def test_penalty_is_logged_apart_and_lowers_what_it_measures(onward):
    plain = quiet(onward("plain", outlier_penalty=1e-9))
    pressed = quiet(onward("pressed", outlier_penalty=10.0))
    assert column(pressed, "outlier_penalty")[0] == column(plain, "outlier_penalty")[0]
    assert column(pressed, "outlier_penalty")[-1] < column(plain, "outlier_penalty")[-1] - 0.01
    assert column(pressed, "loss")[0] == pytest.approx(column(plain, "loss")[0], abs=1e-5)
    halves = quiet(onward("halves", outlier_penalty=10.0, batch_size=2, gradient_accumulation=2))
    for name in ("loss", "outlier_penalty"):
        assert column(halves, name) == pytest.approx(column(pressed, name), abs=2e-4)


def test_a_quantized_model_is_refused(onward, models):
    native, tokenizer = load_model(models / "native")
    quantize(native, "w4a4").save_pretrained(models / "quantized")
    tokenizer.save_pretrained(models / "quantized")
    with pytest.raises(UserError, match=r"from_model: .*quantized' is quantized"):
        quiet(onward(source="quantized"))
    assert not onward().out.exists()


def test_a_family_without_positions(onward, models):
    """It trains, and can be watched."""
    text = BloomConfig(vocab_size=270, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0)
    AutoModelForCausalLM.from_config(text).save_pretrained(models / "bloom")
    load_model(models / "native")[1].save_pretrained(models / "bloom")
    assert quiet(onward("trained", "bloom", steps=2))["loss.windowed"] > 0
    assert train(onward(source="bloom", steps=2), progress=False, callbacks=[SinkCallback])


def test_the_final_loss_is_that_of_tokens_only(onward, models):
    """transformers adds the load-balancing loss of the experts to the loss of the model."""
    text = tiny_config("mixtral", vocab_size=270, output_router_logits=True)
    AutoModelForCausalLM.from_config(text).save_pretrained(models / "balanced")
    load_model(models / "native")[1].save_pretrained(models / "balanced")
    config = onward(source="balanced", steps=1)
    record, (model, tokenizer) = quiet(config), load_model(config.out)
    windows = read_windows(
        load_corpus(config.corpus, config.eval_split),
        tokenizer,
        window=config.block_length,
        windows=config.eval_windows,
    )
    assert record["loss.windowed"] == pytest.approx(measure_loss(model, windows)[1].value)


def test_a_callback_that_refuses_the_model_leaves_no_folder(onward, models):
    text = DiffLlamaConfig(
        vocab_size=270, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(text).save_pretrained(models / "diffllama")
    load_model(models / "native")[1].save_pretrained(models / "diffllama")
    with pytest.raises(UserError, match="model: family 'diffllama' is not supported by diagnose"):
        train(onward(source="diffllama", steps=2), progress=False, callbacks=[SinkCallback])
    assert not onward().out.exists()


def test_bad_input(onward):
    for change, message in [
        ({"variant": "oasis"}, "variant: 'oasis' has no effect with from_model"),
        ({"settings": {"null_logit": -1.0}}, "settings: .* has no effect with from_model"),
        (
            {"settings": {"null_logit": 1, "residual": "sum"}, "anneal_null": 5},
            "settings: .* has no effect with from_model",
        ),
        (
            {"settings": {"null_logit": "log"}, "anneal_null": 5},
            "null_logit: 'log' is neither a number nor 'log_context'",
        ),
        (
            {"settings": {"null_logit": -20}, "anneal_null": 5},
            r"anneal_null: 5 steps to the null logit -20 require a start below it, .* -12\.0",
        ),
        ({"anneal_null": 11}, "anneal_null: 11 is more than the run's 10 steps"),
        ({"learning_rates": {"routr": 1e-3}}, "did you mean 'router'"),
        ({"learning_rates": {"router": -1}}, r"learning_rates\['router'\]: -1"),
        ({"trainable": "router"}, "trainable: 'router' is not a list"),
        ({"lora_rank": -1}, "lora_rank: -1"),
        ({"outlier_penalty": -1.0}, "outlier_penalty: -1"),
        ({"block_length": 65}, "block_length: 65 tokens are more than the model's 64 positions"),
        ({"from_model": "no/such/model/here"}, "does not exist"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            quiet(onward(**change))
        assert "\n" not in str(caught.value)
        assert not onward().out.exists()
