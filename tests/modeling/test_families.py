"""Attached, not copied: with the method switched off, a family's logits to the last bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config

from oasis_attn import OasisConfig, OasisForCausalLM, UserError
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.modeling.variants import settings_of
from tiny import tiny_config

EAGER_ONLY = ("gemma2", "gpt_oss")  # their native softcap or sinks are not in SDPA


def native_and_ours(family, variant, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    text = tiny_config(family, initializer_range=0.2)
    kind = "eager" if family in EAGER_ONLY else "sdpa"
    native = AutoModelForCausalLM.from_config(text, attn_implementation=kind).to(dtype).eval()
    ours = OasisForCausalLM(OasisConfig(text_config=text, **settings_of(variant) | settings))
    loaded = ours.to(dtype).eval().load_state_dict(native.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    assert all(name.startswith("model.depth.") for name in loaded.missing_keys)
    return native, ours


@pytest.mark.filterwarnings("ignore:null_attention falls back")
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_sum_is_the_native_model(family, ids):
    native, ours = native_and_ours(family, "vanilla")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        difference = ours(ids, attention_mask=mask).logits - native(ids, attention_mask=mask).logits
    bound = 1e-5 if family in EAGER_ONLY else 0.0
    assert difference[mask.bool()].abs().max() <= bound


@pytest.mark.filterwarnings("ignore:null_attention falls back")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [1, 3])
def test_zero_queries_and_a_low_null_are_the_native_model(family, block, ids):
    changes = {"depth_scale": "sources", "depth_block_size": block}
    variant = "attn_residual" if family == "gpt_oss" else "oasis"  # its sinks are null logits
    if variant == "oasis":
        changes["null_logit"] = -1e4
    native, ours = native_and_ours(family, variant, torch.float64, **changes)
    bound = 1e-5 if family in EAGER_ONLY else 1e-10  # native eager takes its softmax in float32
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=0, atol=bound)


def test_a_post_norm_family_needs_the_scaled_mix():
    with pytest.raises(UserError, match=r"depth_scale: 'none' would shrink .*'olmo2'"):
        OasisForCausalLM(OasisConfig(text_config=tiny_config("olmo2")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GPT2Config(n_layer=1), "model_type: 'gpt2' is not one of"),
        (BertConfig(num_hidden_layers=1), "model_type: 'bert' is not one of"),
        ({"model_type": "lama"}, "text_config: .*lama"),
    ],
)
def test_other_architectures_are_refused_by_name(text, message):
    with pytest.raises(UserError, match=message):
        OasisForCausalLM(OasisConfig(text_config=text))
