"""Arguments of the wrong type: each function of the library names the argument in one line."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn import OasisConfig, UserError, diagnose, evaluate, quantize
from oasis_attn.evaluation import EvaluationConfig
from oasis_attn.hub.loading import load_model
from oasis_attn.quantization import Scheme, schemes
from oasis_attn.training import TrainingConfig
from tiny_models import tiny_config, word_tokenizer

VALUES = (3, None, object(), [[1]], np.arange(4), "misspelled", "\0", {1: 2}, lambda _: 3)
WORDS = {  # of messages that name something else than the argument
    "texts_or_tokens": "text|token",
    "name_or_path": "model",
    "text_config": "text_config|hidden_size|vocab_size",
}
SCHEME = {name: getattr(schemes()["w4a4"], name) for name in ("name", "weight", "activation")}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1)).eval()


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (diagnose, [*signature(diagnose).parameters]),
        (evaluate, ["tokenizer", *(field.name for field in fields(EvaluationConfig))]),
        (quantize, [*signature(quantize).parameters]),
        (load_model, [name for name in signature(load_model).parameters if name != "check"]),
        (Scheme, [field.name for field in fields(Scheme)]),
        (OasisConfig, ["token_normalizer", "null_logit", "beta_init", "depth_block_size"]),
        (TrainingConfig, [field.name for field in fields(TrainingConfig)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_types_are_named(function, names, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 90}" for i in range(5000)))
    right = {
        diagnose: {"model": model, "texts_or_tokens": torch.ones(2, 8, dtype=torch.int64)},
        evaluate: {
            "model": model, "tokenizer": word_tokenizer(), "corpus": "text.txt", "window": 8,
            "limit": 1,
        },
        quantize: {"model": model, "scheme": "w8a8-dynamic"},
        load_model: {"name_or_path": "absent"},
        Scheme: SCHEME,
        OasisConfig: {"text_config": tiny_config()},
        TrainingConfig: {"out": "new"},
    }[function]  # fmt: skip
    for name in names:
        for number, value in enumerate(VALUES):
            try:
                function(**right | {name: value})
            except UserError as error:
                message = str(error)
                assert "\n" not in message, (name, number)
                if function is not load_model or "absent" not in message:
                    assert any(word in message for word in WORDS.get(name, name).split("|")), (
                        name,
                        message,
                    )
