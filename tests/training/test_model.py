from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from oasis_attn.modeling.variants import variants
from oasis_attn.training.model import build_model

BACKBONE = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=300,
    tie_word_embeddings=True,
)


def native_weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(BACKBONE).state_dict()


@pytest.mark.parametrize("variant", list(variants()))
def test_backbone_weights_depend_on_the_seed_only(variant):
    expected = native_weights(3)
    found = build_model(BACKBONE, variants()[variant], 3).state_dict()
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert all(torch.isfinite(weight).all() for weight in found.values())


def test_other_seed_other_weights_and_callers_state_is_kept():
    before = torch.random.get_rng_state()
    one, two = (build_model(BACKBONE, variants()["oasis"], seed) for seed in (0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.embed_tokens.weight"
    assert not torch.equal(one.state_dict()[name], two.state_dict()[name])
