"""A prefix leaves the library: in the tokenizer, or as an adapter."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from hub.prefix_models import TOKENS, native, text
from oasis_attn.errors import UserError
from oasis_attn.hub.peft_adapter import check_adapter
from oasis_attn.hub.prefix import (
    compute_prefix,
    load_prefix,
    prefix_of,
    prefix_replaced,
    with_prefix,
    without_prefix,
)
from oasis_attn.hub.prefix_export import is_computed, save_tokenizer_with_prefix
from tiny_models import word_tokenizer
from tokenizer_factories import TEXT, byte_level, spaced

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "Ann has 12 pens."}]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_without_prefix_is_the_original_model(tmp_path, family):
    model = native(family, dtype=torch.float32)
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    assert is_computed(prefixed)
    plain, ids_BT = without_prefix(prefixed), text(2, 7)
    assert torch.equal(plain(ids_BT).logits, model(ids_BT).logits)
    assert not torch.equal(prefixed(ids_BT).logits, model(ids_BT).logits)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)
    keys = prefix_of(prefixed).keys_LGPd
    with prefix_replaced(prefixed, keys * 1.01, prefix_of(prefixed).values_LGPd):
        assert not is_computed(prefixed)


@torch.no_grad()
def test_rounding_to_16_bits_is_not_tuning(tmp_path):
    model = native("llama", dtype=torch.bfloat16)
    prefix = compute_prefix(model, TOKENS)
    with_prefix(model, prefix).save_pretrained(tmp_path / "computed")
    with_prefix(model, replace(prefix, tuned=True)).save_pretrained(tmp_path / "tuned")
    for dtype in (torch.bfloat16, torch.float32):
        computed, tuned = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
            for name in ("computed", "tuned")
        )
        assert is_computed(computed)
        assert not is_computed(tuned)
    assert load_prefix(tmp_path / "tuned").tuned
    stored = prefix_of(computed)
    with prefix_replaced(computed, stored.keys_LGPd * 1.01, stored.values_LGPd):
        assert not is_computed(computed)  # these need float32


def byte_level_only():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def in_a_sequence():
    tokenizer = byte_level()
    inner = tokenizer.backend_tokenizer
    steps = [processors.ByteLevel(trim_offsets=False), inner.post_processor]
    inner.post_processor = processors.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize(
    "make", [byte_level, byte_level_only, in_a_sequence, word_tokenizer, lambda: spaced("first")]
)
def test_every_text_has_the_prefix_once(tmp_path, make):
    tokenizer = make()
    tokenizer.pad_token = tokenizer.eos_token
    assert not save_tokenizer_with_prefix(tokenizer, TOKENS, tmp_path)  # it has no chat template
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for each in TEXT:
        want = tokenizer(each).input_ids
        assert saved(each).input_ids == [*TOKENS, *want]
        assert saved.encode(each) == [*TOKENS, *want]
        assert (
            saved(each, add_special_tokens=False).input_ids
            == want[-len(want) :][
                len(want) - len(tokenizer(each, add_special_tokens=False).input_ids) :
            ]
        )
        short = saved(each, truncation=True, max_length=6).input_ids
        assert short == [*TOKENS, *tokenizer(each, truncation=True, max_length=3).input_ids]
    pair = tokenizer(TEXT[0], TEXT[1]).input_ids
    assert saved(TEXT[0], TEXT[1]).input_ids == [*TOKENS, *pair]
    padded = saved(["", TEXT[0]], padding=True, padding_side="left")
    assert padded.input_ids[1] == saved(TEXT[0]).input_ids
    assert sum(padded.attention_mask[0]) == len(saved("").input_ids)
    saved.save_pretrained(tmp_path / "2")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "2")(TEXT[0]).input_ids == saved(TEXT[0]).input_ids
    )


def test_what_the_class_of_the_tokenizer_sets_is_kept(tmp_path):
    fields = json.loads(spaced("prepend").backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in fields["merges"]]
    tokenizer = LlamaTokenizer(vocab=fields["vocab"], merges=merges)
    assert tokenizer.padding_side == "left"
    tokenizer.truncation_side = "left"
    save_tokenizer_with_prefix(tokenizer, TOKENS, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.padding_side, saved.truncation_side) == ("left", "left")
    assert saved.model_input_names == tokenizer.model_input_names


def test_an_adapter_that_peft_cannot_apply_is_refused(tmp_path):
    model = native("gpt2", dtype=torch.float32, num_key_value_heads=4)
    prefixed = with_prefix(model, compute_prefix(model, TOKENS))
    prefix_of(prefixed).adapter.save(tmp_path, "somewhere")
    check_adapter(prefixed, without_prefix(prefixed), tmp_path)
    other = with_prefix(model, compute_prefix(model, TOKENS[::-1]))
    with pytest.raises(UserError, match="peft does not compute the same"):
        check_adapter(other, without_prefix(other), tmp_path)
    prefixed.config.num_key_value_heads = 2  # peft derives sizes from it
    with pytest.raises(UserError, match="peft cannot apply it to family 'gpt2'"):
        check_adapter(prefixed, without_prefix(prefixed), tmp_path)


def test_chats_have_the_prefix_once(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    prefix = tuple(tokenizer("pens", add_special_tokens=False).input_ids)
    assert save_tokenizer_with_prefix(tokenizer, prefix, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    want = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert saved.apply_chat_template(CHAT, return_dict=False) == [*prefix, *want]
    assert want[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "Ann h"),  # "h" joins the text
        ("{{ raise_exception('a system message comes first') }}", "pens"),
    ],
)
def test_a_template_that_cannot_have_the_prefix_is_left_out(tmp_path, template, prefix):
    tokenizer = byte_level()
    tokenizer.chat_template = template.replace("{{ m.content }}", "as {{ m.content }}")
    tokens = tuple(tokenizer(prefix, add_special_tokens=False).input_ids)
    assert not save_tokenizer_with_prefix(tokenizer, tokens, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template is None
    assert saved("").input_ids[: len(tokens)] == list(tokens)
    assert tokenizer.chat_template is not None


def test_tokenizers_that_cannot_have_a_prefix_are_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("a", 1), ("b", 2))
    with pytest.raises(UserError, match=r"its post-processor is \['BertProcessing'\]"):
        save_tokenizer_with_prefix(tokenizer, TOKENS, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2"])
def test_peft_applies_a_tuned_prefix(tmp_path, family):
    model = native(family, dtype=torch.float32)
    prefix = compute_prefix(model, TOKENS)
    prefix.keys_LGPd.add_(torch.randn_like(prefix.keys_LGPd))
    prefixed, ids_BT = with_prefix(model, prefix), text(2, 9)
    prefix_of(prefixed).adapter.save(tmp_path, "somewhere")
    adapted = PeftModel.from_pretrained(without_prefix(prefixed), tmp_path).eval()
    want = prefixed(ids_BT).logits
    torch.testing.assert_close(adapted(input_ids=ids_BT).logits, want, atol=1e-5, rtol=1e-5)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    got = adapted.generate(input_ids=ids_BT, **greedy)
    assert torch.equal(got, prefixed.generate(ids_BT, **greedy))
