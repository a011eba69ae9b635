"""Decoders on the trigger task: building and training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oasis_attn.data.tasks import task_by_name
from oasis_attn.errors import UserError
from oasis_attn.lab import DecoderTraining, decoder_backbone, predict, train_decoder
from oasis_attn.lab.decoder import new_decoder
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.training.parameters import group_of

TASK = task_by_name("trigger-every-8")
SHORT = DecoderTraining(steps=6, batch_size=4, warmup_steps=2)


def test_the_same_seed_gives_the_same_decoder_and_settings_do_not_change_the_sequences():
    first, again = (
        train_decoder("lab-1", settings_of("oasis_signal_shuffled"), TASK, SHORT, seed=3)
        for _ in range(2)
    )
    assert first.losses == again.losses
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = train_decoder("lab-2", settings_of("vanilla"), TASK, SHORT, seed=3)
    assert other.data_sha256 == first.data_sha256
    seed = train_decoder("lab-1", settings_of("vanilla"), TASK, SHORT, seed=4)
    assert seed.data_sha256 != first.data_sha256


def test_equal_depth_weights_of_unit_scale_are_the_residual_sum():
    settings = settings_of("attn_residual") | {"mix_scale": "rms"}
    fixed = replace(SHORT, trainable=["backbone"])
    ours, vanilla = (
        train_decoder("lab-2", each, TASK, training, seed=3)
        for each, training in ((settings, fixed), (settings_of("vanilla"), SHORT))
    )
    assert not ours.model.model.depth.queries.any()
    losses, expected = ([row["loss"] for row in run.losses] for run in (ours, vanilla))
    assert losses == pytest.approx(expected, rel=1e-3)  # the eps of the norms is not 0


def test_a_decoder_learns_the_task():
    trained = train_decoder(
        "lab-1", settings_of("vanilla"), TASK, replace(SHORT, steps=150, batch_size=16), seed=0
    )
    batch = TASK.batch(64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (predict(trained.model, batch.x_BTN) - batch.y_BTN).square().mean()
    assert error < 0.05 * batch.y_BTN.square().mean()
    assert trained.losses[-1]["loss"] < 0.1 * trained.losses[0]["loss"]
    assert not trained.model.training


def test_without_rotary_embeddings_the_order_of_earlier_tokens_does_not_matter():
    x_BTN = TASK.batch(2, torch.Generator().manual_seed(0)).x_BTN
    swapped_BTN = x_BTN[:, [0, 2, 1, *range(3, 8)]]
    for rotary in (False, True):
        training = replace(SHORT, rotary=rotary, learning_rate=1e-2)
        model = train_decoder("lab-1", settings_of("vanilla"), TASK, training, seed=0).model
        with torch.no_grad():
            last, other = (predict(model, each)[:, -1] for each in (x_BTN, swapped_BTN))
        assert torch.allclose(last, other, atol=1e-6) != rotary
    assert decoder_backbone("lab-2", TASK, rotary=True).no_rope_layers == [1, 1]


def test_a_saved_decoder_computes_the_same(tmp_path):
    trained = train_decoder("lab-1", settings_of("oasis"), TASK, SHORT, seed=0)
    trained.model.save_pretrained(tmp_path)
    loaded = OasisForCausalLM.from_pretrained(tmp_path).eval()
    x_BTN = TASK.batch(2, torch.Generator().manual_seed(0)).x_BTN
    assert torch.equal(predict(loaded, x_BTN), predict(trained.model, x_BTN))


def test_a_group_has_its_own_rate():
    settings = settings_of("kv_null") | {"null_logit": 2.0}

    def state(**rates):
        training = replace(SHORT, learning_rates=rates)
        return train_decoder("lab-1", settings, TASK, training, seed=0).model.state_dict()

    default, same, still = state(), state(null=SHORT.learning_rate), state(null=0.0)
    assert all(torch.equal(value, same[name]) for name, value in default.items())
    untrained = new_decoder("lab-1", settings, TASK, seed=0).state_dict()
    unchanged = {name for name, value in still.items() if torch.equal(value, untrained[name])}
    assert unchanged == {name for name in still if group_of(name) == "null"}


def test_a_group_without_parameters_is_refused():
    training = replace(SHORT, learning_rates={"null": 0.1})
    with pytest.raises(UserError, match=r"no parameter of the group 'null' is trained"):
        train_decoder("lab-1", settings_of("vanilla"), TASK, training, seed=0)


def test_the_rate_warms_up_and_decays_to_a_tenth():
    training = DecoderTraining(steps=100, warmup_steps=10)
    rates = [training.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0"),
        ({"learning_rates": {"nulls": 0.1}}, "learning_rates: 'nulls'"),
        ({"learning_rates": {None: 0.1}}, "None is not a group; in YAML, quote the group"),
        ({"learning_rates": {"null": -0.1}}, "learning_rates"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
        ({"rotary": 1}, "rotary: 1"),
    ],
)
def test_a_wrong_field_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        DecoderTraining(**values)


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match=r"size: 'lab-3' is not one of lab-1, .*; did you mean"):
        decoder_backbone("lab-3", TASK)


def test_heads():
    model = new_decoder("lab-1", {}, TASK, seed=0, heads=8)
    assert model.config.get_text_config().num_attention_heads == 8
    for heads in (0, 3, 128, 2.0):
        with pytest.raises(UserError, match=r"^heads: "):
            new_decoder("lab-1", {}, TASK, seed=0, heads=heads)
