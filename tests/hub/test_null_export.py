"""Nulls with keys and values leave the library as a stored prefix for the family's own model."""

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from float64_mode import IDS, Float64Mode, native_model
from oasis_attn import UserError
from oasis_attn.hub import null_export
from oasis_attn.hub.convert import convert
from oasis_attn.hub.null_export import check_nulls, nulls_as_prefix
from oasis_attn.hub.prefix import attach_prefix, compute_prefix
from tiny_models import tiny_config, tiny_model

YARN = {
    "rope_type": "yarn", "factor": 2.0, "rope_theta": 5000.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 1.5, 2.0, 3.0], "factor": 2.0,
}  # fmt: skip
LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
SCALED_QUERIES = {
    "rope_type": "yarn", "factor": 2.0, "rope_theta": 5000.0, "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "max_position_embeddings": 64,
}  # fmt: skip
CASES = (
    ("llama", {"num_key_value_heads": 4}, 1),
    ("llama", {"rope_parameters": YARN}, 3),
    ("gemma2", {"sliding_window": 64}, 3),  # a soft cap
    ("glm", {}, 3),  # channels that are neighbors rotate together, and only half of them
    ("olmo2", {}, 1),
    ("qwen2", {}, 3),
    ("qwen3", {}, 1),
    ("smollm3", {}, 3),  # its fourth layer has no rotation
    ("stablelm", {}, 3),  # a quarter of the channels rotate
)
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0


@torch.no_grad()
def with_random_nulls(native, nulls=3):
    """`native` with nulls that are the same in query heads of one key head."""
    normalizer = {"name": "key_value_null", "nulls": nulls} if nulls > 1 else "key_value_null"
    model = convert(native, "kv_null", token_normalizer=normalizer)
    model.config.null_logit = 0.0
    for layer in model.model.layers:
        groups = layer.self_attn.num_key_value_groups
        layer.null_logit.zero_()
        for null in (layer.null_key, layer.null_value):
            null.copy_(torch.randn_like(null[::groups]).repeat_interleave(groups, 0))
    return model


def filled(adapter, batch):
    cache = DynamicCache()
    for layer, pair in enumerate(zip(adapter.keys_LGPd, adapter.values_LGPd, strict=True)):
        cache.update(*(x_GPd.expand(batch, -1, -1, -1) for x_GPd in pair), layer)
    return cache


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes", "nulls"), CASES)
def test_the_family_computes_the_same_with_a_stored_prefix(family, changes, nulls):
    native = native_model(family, **changes)
    model = with_random_nulls(native, nulls)
    with Float64Mode():
        base, adapter = nulls_as_prefix(model)
        assert type(base) is type(native)
        assert (base(IDS).logits - model(IDS).logits).abs().max() > 0.1
        for mask in (torch.ones_like(IDS), PADDED, PADDED.flip(1)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0) + nulls
            whole = torch.cat([mask.new_ones(2, nulls), mask], 1)
            cache, found = filled(adapter, 2), []
            for part in (slice(0, 7), slice(7, 12)):  # the second reads the cache of the first
                output = base(
                    IDS[:, part], past_key_values=cache, position_ids=positions[:, part],
                    attention_mask=whole[:, : nulls + part.stop],
                )  # fmt: skip
                found.append(output.logits)
            expected = model(IDS, attention_mask=mask).logits
            seen = mask.bool()
            found = torch.cat(found, 1)[seen]
            torch.testing.assert_close(found, expected[seen], rtol=0, atol=1e-9)


@torch.no_grad()
def test_peft_generates_the_same(tmp_path):
    model = with_random_nulls(native_model("qwen3").float())
    base, adapter = nulls_as_prefix(model)
    adapter.save(tmp_path)
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    how = {"attention_mask": PADDED, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(adapted.generate(input_ids=IDS, **how), model.generate(IDS, **how))
    positions = (PADDED.cumsum(-1) - 1).clamp(min=0)
    found = adapted(input_ids=IDS, attention_mask=PADDED, position_ids=positions).logits
    expected = model(IDS, attention_mask=PADDED).logits
    torch.testing.assert_close(found[PADDED > 0], expected[PADDED > 0], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_and_a_small_vocabulary(dtype):
    native = native_model("llama", vocab_size=5)  # fewer than the tokens of the check
    model = with_random_nulls(native).to(dtype)
    base, adapter = nulls_as_prefix(model)
    assert adapter.keys_LGPd.dtype == base.dtype == dtype
    head = model.model.layers[0].null_value
    head[1] += 0.5
    with pytest.raises(UserError, match=r"null_value: layer 0 has different .* up to 0\.5"):
        nulls_as_prefix(model)


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("llama", {}, {"residual": "depth"}, "residual: 'depth'"),
        ("llama", {}, {"output_gate": "head"}, "output_gate: 'head'"),
        ("llama", {}, {"branch_norm": "rms"}, "branch_norm: 'rms'"),
        ("llama", {"attention_output_bias": True}, {}, "attention_output_bias: True adds a bias"),
        ("gpt_oss", {}, {}, "family 'gpt_oss' has sinks"),
        ("mistral", {}, {}, r"attention_chunk_size: 6 is less than max_position_embeddings \(64\)"),
        ("llama", {"rope_parameters": DYNAMIC}, {}, "rope_type 'dynamic' rotates by other"),
        (
            "llama",
            {"max_position_embeddings": 3},
            {"token_normalizer": {"name": "key_value_null", "nulls": 3}},
            "nulls: 3 are not fewer than the 3 positions",
        ),
    ],
)
def test_what_no_prefix_computes_is_refused_by_name(family, changes, settings, message):
    model = tiny_model("kv_null", text=tiny_config(family, **changes), **settings)
    for check, given in ((check_nulls, model.config), (nulls_as_prefix, model)):
        with pytest.raises(UserError, match=f"{message}.*--with-code"):
            check(given)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {}, "keys of family 'deepseek_v3' have 16 channels and its values 12"),
        # a norm with a gain for each channel, after the rotation
        ("hunyuan_v1_dense", {}, "in layer 0, keys and queries at position 3 are not those"),
        ("phi3", LONG, "in texts of all lengths"),
        (
            "ministral3",
            {"rope_parameters": SCALED_QUERIES},
            r"in texts of all lengths in bfloat16 \(--weights float32",
        ),
    ],
)
def test_families_without_a_rotation_by_positions_are_refused(family, changes, message):
    if family == "deepseek_v3":
        model = tiny_model("kv_null", family)
        for layer in model.model.layers:
            layer.null_logit.zero_()
    else:
        # In 16 bits too, these changes of some percent are more than rounding.
        dtype = torch.float32 if family == "phi3" else torch.bfloat16
        native = native_model(family, sliding_window=None, **changes)
        model = with_random_nulls(native.to(dtype))
    with pytest.raises(UserError, match=message):
        nulls_as_prefix(model)


@torch.no_grad()
def test_nulls_that_are_no_prefix_are_refused(monkeypatch):
    native = native_model("llama").float()
    model = with_random_nulls(native)
    off = convert(native, "kv_null")
    with pytest.raises(UserError, match=r"layer 0 has -1.64e\+04, .*`oasis convert --to-vanilla`"):
        nulls_as_prefix(off)
    prefixed = attach_prefix(with_random_nulls(native), compute_prefix(native, [5]))
    with pytest.raises(UserError, match="it has nulls, and is quantized or has a prefix"):
        nulls_as_prefix(prefixed)
    original = null_export._pairwise_map  # a wrong map that passes all checks of rotations
    monkeypatch.setattr(null_export, "_ERROR", 1e9)
    monkeypatch.setattr(null_export, "_pairwise_map", lambda x, y: original(x, y).mT)
    with pytest.raises(UserError, match="'llama' does not compute the same with the nulls"):
        nulls_as_prefix(model)
    stored = null_export.Adapter
    monkeypatch.setattr(null_export, "Adapter", lambda keys, *rest: stored(keys[..., 1:], *rest))
    with pytest.raises(UserError, match="'llama' cannot read the nulls from its cache: "):
        nulls_as_prefix(model)
