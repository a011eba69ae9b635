from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3Config

from oasis_attn.errors import UserError
from oasis_attn.hub.model_sizes import SIZES, text_config


@pytest.mark.parametrize(
    ("size", "millions"),
    [("nano", 2.1), ("micro", 8.5), ("mini", 29.5), ("small", 110), ("medium", 337)],
)
def test_parameter_counts(size, millions):
    with torch.device("meta"):
        model = LlamaForCausalLM(text_config(size))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)
    assert model.config.tie_word_embeddings
    assert model.config.intermediate_size == pytest.approx(
        8 / 3 * model.config.hidden_size, rel=0.04
    )
    assert model.config.head_dim in (32, 64)


def test_pico():
    """Its MLP is wider than 8/3 D, because 8/3 * 64 is rounded up to a multiple of 32."""
    with torch.device("meta"):
        model = LlamaForCausalLM(text_config("pico"))
    assert model.num_parameters() / 1e6 == pytest.approx(0.28, rel=0.02)
    assert (model.config.intermediate_size, model.config.head_dim) == (192, 16)


def test_vocabulary_of_ones_own():
    assert text_config("nano").vocab_size == SIZES["nano"]["vocab_size"]
    assert text_config("nano", 1000).vocab_size == 1000
    assert SIZES["nano"]["vocab_size"] == 4096


def test_any_configuration_file(tmp_path):
    Qwen3Config(hidden_size=64, vocab_size=500).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        config = text_config(path)
        assert (config.model_type, config.hidden_size, config.vocab_size) == ("qwen3", 64, 500)


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="did you mean 'nano'"):
        text_config("nanno")
    with pytest.raises(UserError, match="vocab_size: 0"):
        text_config("nano", 0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a Hugging Face configuration") as caught:
        text_config(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(UserError, match="is not a Hugging Face configuration"):
        text_config(tmp_path / "config.json")
