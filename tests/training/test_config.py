from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest

from oasis_attn.errors import UserError
from oasis_attn.training import TrainingConfig


def test_defaults_are_valid_and_json():
    config = TrainingConfig(out="x")
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert not {"out", "resume"} & config.to_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "oasys"}, "variant: 'oasys' .* did you mean 'oasis'"),
        ({"settings": {"output_attentions": True}}, "settings: 'output_attentions' is not one of"),
        ({"settings": {"hidden_size": 64}}, "settings: 'hidden_size' is not one of"),
        ({"settings": {"null_signal": "of"}}, "null_signal: 'of' is not one of off, on"),
        ({"settings": {"depth_blok_size": 2}}, "did you mean 'depth_block_size'"),
        ({"size": "nono"}, "did you mean 'nano'"),
        ({"steps": 0}, "steps: 0 is not a whole number of at least 1"),
        ({"steps": 1.5}, "steps: 1.5 is not a whole number"),
        ({"seed": -1}, "seed: -1"),
        ({"block_length": 1}, "block_length: 1"),
        ({"batch_size": True}, "batch_size: True"),
        ({"gradient_accumulation": 0}, "gradient_accumulation: 0"),
        ({"learning_rate": -1e-3}, "learning_rate: -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"warmup": 1.5}, "warmup: 1.5 is not a number from 0 to 1"),
        ({"weight_decay": -1}, "weight_decay: -1"),
        ({"clip": 0}, "clip: 0 is not above 0"),
        ({"save_every": 25, "log_every": 10}, "save_every: 25 is not a multiple of log_every=10"),
        ({"eval_windows": 0}, "eval_windows: 0"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"lora_rank": 4}, "lora_rank: 4 needs from_model, because adapters leave the backbone"),
        ({"steps": 2**31}, "steps: 2147483648 is not a whole number from 1 to 2147483647"),
        ({"report_to": "wanb"}, "report_to: 'wanb' is not one of wandb, .* did you mean 'wandb'"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(out="x", **change)


def test_a_service_that_is_not_installed(monkeypatch):
    found = []

    def distribution(name):
        found.append(name)
        raise PackageNotFoundError(name)

    monkeypatch.setattr("oasis_attn.training.config.distribution", distribution)
    with pytest.raises(UserError) as error:
        TrainingConfig(out="x", report_to="tensorboard")
    assert str(error.value) == (
        "report_to: 'tensorboard' is not installed; run: pip install tensorboard"
    )
    assert found == ["tensorboard", "tensorboardX"]
