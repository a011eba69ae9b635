"""SinkCallback in a plain Trainer of transformers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oasis_attn import SinkCallback, diagnose
from oasis_attn.errors import UserError
from tiny_models import VOCABULARY, tiny_config, tiny_model

LENGTH = 12


def rows(count=24, length=LENGTH):
    generator = torch.Generator().manual_seed(1)
    ids_NT = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_NT]


def native(family="llama", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, initializer_range=0.2, **changes))


class Reporter(TrainerCallback):
    """Keeps what a service in `report_to` would get."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        self.logged.append({"step": state.global_step} | logs)

    def with_(self, name):
        return {row["step"]: row for row in self.logged if name in row}


def trainer_of(model, folder, dataset=None, callbacks=(), **arguments):
    small = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3,
        "logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **small | arguments),
        train_dataset=rows() if dataset is None else dataset,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("make", [native, tiny_model], ids=["native", "ours"])
def test_the_numbers_are_those_of_diagnose(tmp_path, make):
    model, reporter = make(), Reporter()
    ids_NT = torch.stack([row["input_ids"] for row in rows(3)])
    before = diagnose(model, ids_NT, batch_size=2)
    trainer = trainer_of(model, tmp_path, callbacks=[reporter])
    trainer.add_callback(SinkCallback(trainer, every=2, tokens=ids_NT))
    trainer.train()
    logged = reporter.with_("sink.mass")
    assert list(logged) == [0, 2, 4]
    for step, record in ((0, before), (4, diagnose(model, ids_NT, batch_size=2))):
        names = logged[step].keys() - {"step", "epoch"}
        assert {"sink.mass", "sink.max_mass", "outlier.max_inf_norm", "outlier.massive"} < names
        assert {"outlier.avg_kurtosis", "loss.windowed"} < names
        for name in names:
            metric, _, where = name.partition("/")
            assert logged[step][name] == pytest.approx(
                record.metric(metric, where).value, rel=1e-12, nan_ok=True
            )
    assert logged[0]["sink.mass"] != logged[4]["sink.mass"]
    sources = [name for name in logged[4] if name.startswith("depth.weight/source.")]
    assert ("null.mass" in logged[4]) == (make is tiny_model)
    assert len(sources) == (2 * 4 + 1 if make is tiny_model else 0)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_training_is_bit_identical(tmp_path, bf16):
    """Also with dropout, which draws random numbers; and every log of the loss is still made."""
    results = []
    for watched in (False, True):
        model = native("gpt2", attn_pdrop=0.2, resid_pdrop=0.2)
        trainer = trainer_of(model, tmp_path, bf16=bf16)
        if watched:
            trainer.add_callback(SinkCallback(trainer, every=1))
        trainer.train()
        losses = {r["step"]: r["loss"] for r in trainer.state.log_history if "loss" in r}
        results.append((losses, trainer.model.state_dict(), trainer.model.config.to_dict()))
    (plain, weights, config), (watched, same, after) = results
    assert list(plain) == [2, 4]
    assert watched == plain
    assert after == config
    for name, weight in weights.items():
        assert torch.equal(weight, same[name]), name


@pytest.mark.parametrize(("every", "batch", "windows"), [(100, 1, 4), (20, 2, 2), (3, 2, 1)])
def test_by_default_a_twentieth_of_the_rows_is_measured(tmp_path, every, batch, windows):
    trainer = trainer_of(native(), tmp_path, per_device_train_batch_size=batch)
    assert len(SinkCallback(trainer, every=every).windows) == windows


def test_the_tokens_of_the_passes(tmp_path):
    """Measured and trained tokens, counted in the forward passes."""
    model, tokens = native(num_hidden_layers=1), {True: 0, False: 0}

    def count(module, _args, keywords):
        tokens[module.training] += keywords["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    trainer = trainer_of(
        model, tmp_path, max_steps=40, gradient_accumulation_steps=2, logging_steps=40
    )
    trainer.add_callback(SinkCallback(trainer, every=20))
    trainer.train()
    passes = 3  # at steps 0, 20 and 40
    assert tokens == {True: 40 * 2 * 2 * LENGTH, False: passes * 4 * LENGTH}
    assert 0.05 * tokens[True] >= 2 * 4 * LENGTH


def test_padding_is_not_measured(tmp_path):
    dataset = rows(2)
    for row, padding in zip(dataset, (3, 5), strict=True):
        row["attention_mask"] = torch.arange(LENGTH) >= padding
    trainer = trainer_of(native(), tmp_path, dataset, per_device_train_batch_size=40)
    ids_NT = SinkCallback(trainer).windows.ids_NT
    expected = [dataset[0]["input_ids"][3:10], dataset[1]["input_ids"][5:]]
    assert torch.equal(ids_NT, torch.stack(expected))


class Endless(IterableDataset):
    def __iter__(self):
        yield from rows()


def test_refusals(tmp_path):
    trainer = trainer_of(native(), tmp_path)
    with pytest.raises(UserError, match="every: 0 is not a whole number of at least 1"):
        SinkCallback(trainer, every=0)
    with pytest.raises(UserError, match=f"tokens: {VOCABULARY} is outside the model's vocabulary"):
        SinkCallback(trainer, tokens=[[1, VOCABULARY]])
    with pytest.raises(UserError, match="tokens: 65 tokens are more than the model's 64 positions"):
        SinkCallback(trainer, tokens=[[1] * 65])
    endless = trainer_of(native(), tmp_path, Endless())
    with pytest.raises(UserError, match=r"tokens: None needs .* indexed, not Endless; give rows"):
        SinkCallback(endless)
    text = trainer_of(native(), tmp_path, [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"tokens: None needs .* its rows have text, label; give"):
        SinkCallback(text)
    for row in (None, "text", {"input_ids": ["a"]}):
        with pytest.raises(UserError, match="tokens: None needs training data of token ids, not"):
            SinkCallback(trainer_of(native(), tmp_path, [row]))
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=True,
    )  # fmt: skip
    refused = trainer_of(AutoModelForCausalLM.from_config(config), tmp_path)
    with pytest.raises(UserError, match="model: family 'bert' is not supported: "):
        SinkCallback(refused)
