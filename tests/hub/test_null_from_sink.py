"""A pretrained model's sink becomes a null without training."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from oasis_attn import UserError, convert
from oasis_attn.hub.null_from_sink import null_from_sink
from tiny_models import cast, tiny_config


def native_model(family="llama", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    text = tiny_config(family, initializer_range=0.2, **changes)
    return cast(AutoModelForCausalLM.from_config(text), dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "smollm3"])
def test_a_null_of_one_token_is_its_prefix_that_shifts_no_position(family, ids):
    native = native_model(family)
    converted, tokens = null_from_sink(native, torch.tensor([[7]]))
    assert tokens == ()
    cache = DynamicCache()
    native(torch.full((2, 1), 7), past_key_values=cache)
    expected = native(
        ids, past_key_values=cache, position_ids=torch.arange(12)[None],
        attention_mask=torch.ones(2, 13, dtype=torch.long),
    )  # fmt: skip
    torch.testing.assert_close(converted(ids).logits, expected.logits, rtol=0, atol=1e-6)
