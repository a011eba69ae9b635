"""A stored prefix has the same effect as its tokens before every input."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache
from transformers.generation.continuous_batching import PagedAttentionCache

from hub.prefix_models import TOKENS, native, text
from oasis_attn.errors import UserError
from oasis_attn.hub.model_info import fingerprint
from oasis_attn.hub.prefix import (
    attach_prefix,
    compute_prefix,
    prefix_of,
    with_prefix,
)
from oasis_attn.measure import diagnose
from tiny_models import VOCABULARY, tiny_model

FAMILIES = (
    *("llama", "gpt2", "opt", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "olmo2", "granite"),
    "llama4_text",
)
VARIANTS = ("oasis", "attn_residual", "softpick", "clipped_softmax", "kv_null")


def with_tokens_before(ids_BT):
    """The input with the prefix tokens before it."""
    return torch.cat([torch.tensor([TOKENS]).expand(len(ids_BT), -1), ids_BT], 1)


@pytest.fixture(scope="module")
def llama():
    model = native()
    return model, with_prefix(model, compute_prefix(model, TOKENS))


@torch.no_grad()
def check_same(model):
    ids_BT = text(2, 9)
    before = model(ids_BT).logits
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    want = model(with_tokens_before(ids_BT)).logits[:, len(TOKENS) :]
    # The native eager softmax is float32; its order of summation depends on the number of keys.
    atol = 1e-6 if model.config._attn_implementation == "eager" else 1e-10
    for keywords in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids_BT)}):
        torch.testing.assert_close(prefixed(ids_BT, **keywords).logits, want, atol=atol, rtol=0)
    assert torch.equal(model(ids_BT).logits, before)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(with_tokens_before(ids_BT), **greedy)[:, len(TOKENS) :]
    assert torch.equal(prefixed.generate(ids_BT, **greedy), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    check_same(native(family))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    check_same(tiny_model(variant, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "use_cache": False},
    ],
)
def test_generate(llama, how):
    model, prefixed = llama
    ids_BT = text(2, 7)
    torch.manual_seed(3)
    want = model.generate(with_tokens_before(ids_BT), max_new_tokens=6, **how)[:, len(TOKENS) :]
    torch.manual_seed(3)
    assert torch.equal(prefixed.generate(ids_BT, max_new_tokens=6, **how), want)


@torch.no_grad()
def test_generate_with_prompt_lookup(llama):
    model, prefixed = llama
    ids_1T = text(1, 4).repeat(1, 3)
    want = model.generate(with_tokens_before(ids_1T), max_new_tokens=8, do_sample=False)[
        :, len(TOKENS) :
    ]
    got = prefixed.generate(ids_1T, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [native, lambda: native("gemma2", sliding_window=32), lambda: tiny_model().double()],
)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 2}, {"num_beams": 2}])
def test_generation_continues_from_a_returned_cache(make, padding, how):
    """The input is the whole text, or only its new tokens with a mask of the whole text."""
    model = make()
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    first = torch.cat([torch.zeros(2, padding, dtype=torch.int64), text(2, 6)], 1)
    second, greedy = text(2, 4), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    turn = prefixed.generate(
        first, attention_mask=(first > 0).long(), return_dict_in_generate=True, **greedy
    )
    whole = torch.cat([turn.sequences, second], 1)
    mask = torch.ones_like(whole).index_fill(1, torch.arange(padding), 0)
    cache = turn.past_key_values
    assert cache.get_seq_length() == turn.sequences.shape[1] - 1
    want = prefixed.generate(whole, attention_mask=mask, **greedy | how)
    if "num_beams" in how:
        cache.batch_repeat_interleave(2)
    copied = copy.deepcopy(cache)
    got = prefixed.generate(whole, attention_mask=mask, past_key_values=cache, **greedy | how)
    assert torch.equal(got, want)
    if not how:
        new = whole[:, copied.get_seq_length() :]
        got = prefixed.generate(new, attention_mask=mask, past_key_values=copied, **greedy)
        assert torch.equal(got[:, new.shape[1] :], want[:, whole.shape[1] :])


@torch.no_grad()
def test_a_cropped_cache_and_a_reset_cache(llama):
    _, prefixed = llama
    ids_BT = text(2, 9)
    want = prefixed(ids_BT).logits
    cache = prefixed(ids_BT, use_cache=True).past_key_values
    cache.crop(-4)
    got = prefixed(ids_BT[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 5:], atol=1e-10, rtol=0)
    cache.crop(-9)
    torch.testing.assert_close(
        prefixed(ids_BT, past_key_values=cache).logits, want, atol=1e-10, rtol=0
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        prefixed(ids_BT, past_key_values=cache).logits, want, atol=1e-10, rtol=0
    )


@torch.no_grad()
def test_an_assistant_model_with_a_prefix(llama):
    model, prefixed = llama
    ids_1T, greedy = text(1, 6), {"max_new_tokens": 8, "do_sample": False}
    for main in (model, prefixed):
        want = main.generate(ids_1T, **greedy)
        assert torch.equal(main.generate(ids_1T, assistant_model=prefixed, **greedy), want)


@torch.no_grad()
@pytest.mark.parametrize("make", [native, lambda: native("opt"), lambda: tiny_model().double()])
def test_left_padding_changes_nothing(make):
    model = make()
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    ids_BT = text(2, 7)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids_BT], 1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    want = prefixed.generate(ids_BT, **greedy)
    assert torch.equal(prefixed.generate(padded, attention_mask=mask, **greedy)[:, 3:], want)
    outputs = prefixed(ids_BT, use_cache=True)
    again = prefixed(padded, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(again.logits[:, 3:], outputs.logits, rtol=0, atol=1e-5)
    wider = torch.cat([mask, mask[:, -1:]], 1)
    pair = [
        prefixed(ids_BT[:, :1], past_key_values=each.past_key_values, attention_mask=mask_BS).logits
        for each, mask_BS in ((outputs, None), (again, wider))
    ]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


@torch.no_grad()
def test_left_padding_that_moves_the_prefix_out_of_a_window_is_refused():
    model = native("mistral", sliding_window=9)
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    ids_BT, room = text(2, 10), 9 - len(TOKENS)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :2] = 0
    want = prefixed(ids_BT[1:, 2:room]).logits
    got = prefixed(ids_BT[:, :room], attention_mask=mask_BT[:, :room]).logits[1:, 2:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    prefixed(ids_BT, attention_mask=torch.ones_like(ids_BT))
    with pytest.raises(UserError, match="padding on the left moves the prefix out of the sliding"):
        prefixed(ids_BT, attention_mask=mask_BT)


@torch.no_grad()
def test_embeddings_instead_of_tokens_and_the_loss(llama):
    model, prefixed = llama
    ids_BT = text(2, 7)
    output = prefixed(inputs_embeds=model.get_input_embeddings()(ids_BT), labels=ids_BT)
    want = model(with_tokens_before(ids_BT)).logits[:, len(TOKENS) :]
    torch.testing.assert_close(output.logits, want)
    loss = cross_entropy(want[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 8)), masked=st.booleans(), placed=st.booleans())
@torch.no_grad()
def test_the_result_does_not_depend_on_how_the_input_is_split(llama, cuts, masked, placed):
    _, prefixed = llama
    ids_BT = text(2, 9)
    want, cache, got = prefixed(ids_BT).logits, DynamicCache(), []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 9], strict=True):
        keywords = {"attention_mask": torch.ones(2, stop)} if masked else {}
        if placed:
            keywords["position_ids"] = torch.arange(start, stop)[None]
        output = prefixed(ids_BT[:, start:stop], past_key_values=cache, use_cache=True, **keywords)
        got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_cache_is_returned_only_on_request(llama):
    _, prefixed = llama
    assert prefixed(text(1, 4), use_cache=False).past_key_values is None
    cache = prefixed(text(1, 4), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4  # of the caller's tokens
    assert cache.layers[0].get_seq_length() == 4 + len(TOKENS)


@torch.no_grad()
def test_a_copy_has_its_own_prefix_and_shares_the_weights(llama):
    model, prefixed = llama
    ids_BT = text(2, 7)
    again = copy.deepcopy(prefixed)
    assert torch.equal(again(ids_BT).logits, prefixed(ids_BT).logits)
    assert again.save_pretrained.args == (again,)
    assert fingerprint(again) == fingerprint(prefixed)
    again.get_decoder().kv_prefix.values.zero_()
    assert fingerprint(again) != fingerprint(prefixed)
    assert not torch.equal(again(ids_BT).logits, prefixed(ids_BT).logits)
    assert prefix_of(again).tokens == prefix_of(prefixed).tokens == TOKENS
    assert prefix_of(model) is None
    weights = zip(model.parameters(), prefixed.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in weights)
    assert prefixed.state_dict().keys() == model.state_dict().keys()


def test_gradients_reach_the_model(llama):
    model, prefixed = llama
    prefixed(text(1, 5), labels=text(1, 5)).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_diagnose_measures_with_the_prefix(llama):
    _, prefixed = llama
    ids_BT = text(3, 9)
    record = diagnose(prefixed, ids_BT)
    losses = [prefixed(row[None], labels=row[None]).loss.item() for row in ids_BT]
    assert record["loss.windowed"] == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_a_model_quantized_by_another_library_is_refused(llama):
    model = native()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    with pytest.raises(UserError, match="quantized by gptq and cannot be saved with a prefix"):
        attach_prefix(model, prefix_of(llama[1]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 6, 6)},
            r"attention_mask: \(2, 1, 6, 6\) is not \[2, 6",
        ),
        ({"attention_mask": torch.ones(2, 9)}, r"is not \[2, 6\]"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask: dict"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed sequences cannot"),
        (
            {
                "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
                "attention_mask": torch.ones(2, 6),
            },
            "packed sequences cannot",
        ),
    ],
)
def test_unsupported_inputs_are_refused(llama, keywords, message):
    with pytest.raises(UserError, match=message):
        llama[1](text(2, 6), **keywords)


@torch.no_grad()
def test_unsupported_caches_are_refused(llama):
    model, prefixed = llama
    ids_BT = text(2, 6)
    with pytest.raises(UserError, match="StaticCache has a fixed size"):
        prefixed(ids_BT, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(UserError, match="belongs to generate_batch and cannot hold a prefix"):
        prefixed(ids_BT, past_key_values=object.__new__(PagedAttentionCache))
    filled = model(ids_BT, use_cache=True).past_key_values
    with pytest.raises(UserError, match="filled without this model's prefix"):
        prefixed(ids_BT, past_key_values=filled)
    own = prefixed(ids_BT, use_cache=True).past_key_values
    with pytest.raises(UserError, match="a prefix, but this model has none"):
        model(ids_BT, past_key_values=own)
    with pytest.raises(UserError, match="has 2 sequences, but the input has 1"):
        prefixed(ids_BT[:1], past_key_values=own)
    with pytest.raises(UserError, match="has 2 sequences, but the input has 6"):
        prefixed.generate(text(2, 9), past_key_values=own, num_beams=3, max_new_tokens=2)
    with pytest.raises(UserError, match="StaticCache has a fixed size"):
        prefixed.generate(ids_BT, cache_implementation="static", max_new_tokens=2)
    one = prefixed(text(1, 6), use_cache=True).past_key_values
    with pytest.raises(
        UserError, match=r"must be 6 \.\. 14"
    ):  # `generate` does not slice the position ids
        prefixed.generate(
            text(1, 9), past_key_values=one, prompt_lookup_num_tokens=2, max_new_tokens=2
        )
    own.crop(-7)
    with pytest.raises(UserError, match="1 tokens of the prefix were removed"):
        prefixed(ids_BT, past_key_values=own)


def test_mismatched_models_and_prefixes_are_refused(llama):
    model, prefixed = llama
    with pytest.raises(UserError, match="already has a prefix"):
        attach_prefix(prefixed, prefix_of(prefixed))
    with pytest.raises(UserError, match="already has a prefix"):
        compute_prefix(prefixed, TOKENS)
    with pytest.raises(UserError, match="another model"):
        with_prefix(native(num_hidden_layers=2), prefix_of(prefixed))
    with pytest.raises(UserError, match="has only 3 positions"):
        with_prefix(native(max_position_embeddings=3), prefix_of(prefixed))
    with pytest.raises(UserError, match="cannot have a prefix"):
        compute_prefix(native("deepseek_v3"), TOKENS)
    for tokens in ((), (VOCABULARY,), (-1,)):
        with pytest.raises(UserError, match="tokens: "):
            compute_prefix(model, tokens)
    with pytest.raises(UserError, match="must be given by name"):
        prefixed.model(text(1, 3), torch.ones(1, 3))
    checkpointed = with_prefix(native(), prefix_of(prefixed)).train()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="activation_checkpointing"):
        checkpointed(text(1, 3))
