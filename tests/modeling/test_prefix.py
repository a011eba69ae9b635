"""A stored prefix is the same as its tokens standing before everything the model reads."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.trainer_utils import validate_quantization_for_training

from oasis_attn import OasisForCausalLM
from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose
from oasis_attn.modeling.loading import load_model
from oasis_attn.modeling.prefix import (
    attach_prefix,
    compute_prefix,
    load_prefix,
    prefix_of,
    with_prefix,
)
from oasis_attn.modeling.pretrained import OasisPreTrainedModel
from oasis_attn.modeling.subject import fingerprint
from tiny import VOCABULARY, cast, tiny_config, tiny_model

TOKENS = (5, 6, 7)
FAMILIES = ("llama", "gpt2", "opt", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "olmo2", "granite")
VARIANTS = ("oasis", "attn_residual", "softpick", "clipped_softmax", "learned_sink")


def native(family="llama", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = tiny_config(family, initializer_range=0.2, **changes)
    return cast(AutoModelForCausalLM.from_config(config), dtype).eval()


def text(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def behind(ids_BT):
    """The tokens themselves in front."""
    return torch.cat([torch.tensor([TOKENS]).expand(len(ids_BT), -1), ids_BT], 1)


@pytest.fixture(scope="module")
def llama():
    model = native()
    return model, with_prefix(model, compute_prefix(model, TOKENS))


@torch.no_grad()
def check_same(model):
    ids_BT = text(2, 9)
    before = model(ids_BT).logits
    twin = with_prefix(model, compute_prefix(model, TOKENS))
    want = model(behind(ids_BT)).logits[:, len(TOKENS) :]
    # A native eager softmax is float32, and its sum's order depends on how many keys are masked.
    atol = 1e-6 if model.config._attn_implementation == "eager" else 1e-10
    for keywords in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids_BT)}):
        torch.testing.assert_close(twin(ids_BT, **keywords).logits, want, atol=atol, rtol=0)
    assert torch.equal(model(ids_BT).logits, before)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(behind(ids_BT), **greedy)[:, len(TOKENS) :]
    assert torch.equal(twin.generate(ids_BT, **greedy), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_read_it_as_its_tokens(family):
    check_same(native(family))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_read_it_as_its_tokens(variant):
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
    model, twin = llama
    ids_BT = text(2, 7)
    torch.manual_seed(3)
    want = model.generate(behind(ids_BT), max_new_tokens=6, **how)[:, len(TOKENS) :]
    torch.manual_seed(3)
    assert torch.equal(twin.generate(ids_BT, max_new_tokens=6, **how), want)


@torch.no_grad()
def test_generate_with_guesses_that_are_taken_back(llama):
    model, twin = llama
    ids_1T = text(1, 4).repeat(1, 3)
    want = model.generate(behind(ids_1T), max_new_tokens=8, do_sample=False)[:, len(TOKENS) :]
    got = twin.generate(ids_1T, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("make", [native, lambda: native("gemma2"), lambda: tiny_model().double()])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 2}, {"num_beams": 2}])
def test_the_next_turn_goes_on_from_the_cache_of_the_last(make, padding, how):
    """Given the whole text, or its new tokens only beside a mask of the whole."""
    model = make()
    twin = with_prefix(model, compute_prefix(model, TOKENS))
    first = torch.cat([torch.zeros(2, padding, dtype=torch.int64), text(2, 6)], 1)
    second, greedy = text(2, 4), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    turn = twin.generate(
        first, attention_mask=(first > 0).long(), return_dict_in_generate=True, **greedy
    )
    whole = torch.cat([turn.sequences, second], 1)
    mask = torch.ones_like(whole).index_fill(1, torch.arange(padding), 0)
    cache = turn.past_key_values
    assert cache.get_seq_length() == turn.sequences.shape[1] - 1
    want = twin.generate(whole, attention_mask=mask, **greedy | how)
    if "num_beams" in how:
        cache.batch_repeat_interleave(2)
    copied = copy.deepcopy(cache)
    got = twin.generate(whole, attention_mask=mask, past_key_values=cache, **greedy | how)
    assert torch.equal(got, want)
    if not how:
        new = whole[:, copied.get_seq_length() :]
        got = twin.generate(new, attention_mask=mask, past_key_values=copied, **greedy)
        assert torch.equal(got[:, new.shape[1] :], want[:, whole.shape[1] :])


@torch.no_grad()
def test_a_cropped_cache_goes_on_and_a_reset_one_starts_anew(llama):
    _, twin = llama
    ids_BT = text(2, 9)
    want = twin(ids_BT).logits
    cache = twin(ids_BT, use_cache=True).past_key_values
    cache.crop(-4)
    got = twin(ids_BT[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 5:], atol=1e-10, rtol=0)
    cache.crop(-9)
    torch.testing.assert_close(twin(ids_BT, past_key_values=cache).logits, want, atol=1e-10, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(twin(ids_BT, past_key_values=cache).logits, want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_an_assistant_with_a_prefix_helps(llama):
    model, twin = llama
    ids_1T, greedy = text(1, 6), {"max_new_tokens": 8, "do_sample": False}
    for main in (model, twin):
        want = main.generate(ids_1T, **greedy)
        assert torch.equal(main.generate(ids_1T, assistant_model=twin, **greedy), want)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_left_padding_changes_nothing(family):
    model = native(family)
    twin = with_prefix(model, compute_prefix(model, TOKENS))
    ids_BT = text(2, 7)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids_BT], 1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    want = twin.generate(ids_BT, **greedy)
    assert torch.equal(twin.generate(padded, attention_mask=mask, **greedy)[:, 3:], want)


@torch.no_grad()
def test_embeddings_instead_of_tokens_and_the_loss(llama):
    model, twin = llama
    ids_BT = text(2, 7)
    output = twin(inputs_embeds=model.get_input_embeddings()(ids_BT), labels=ids_BT)
    want = model(behind(ids_BT)).logits[:, len(TOKENS) :]
    torch.testing.assert_close(output.logits, want)
    loss = cross_entropy(want[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 8)), masked=st.booleans(), placed=st.booleans())
@torch.no_grad()
def test_any_pieces_with_a_cache_are_the_whole(llama, cuts, masked, placed):
    _, twin = llama
    ids_BT = text(2, 9)
    want, cache, got = twin(ids_BT).logits, DynamicCache(), []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 9], strict=True):
        keywords = {"attention_mask": torch.ones(2, stop)} if masked else {}
        if placed:
            keywords["position_ids"] = torch.arange(start, stop)[None]
        output = twin(ids_BT[:, start:stop], past_key_values=cache, use_cache=True, **keywords)
        got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-10, rtol=0)


@torch.no_grad()
def test_no_cache_is_handed_back_that_was_not_asked_for(llama):
    _, twin = llama
    assert twin(text(1, 4), use_cache=False).past_key_values is None
    cache = twin(text(1, 4), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4  # of the caller's tokens
    assert cache.layers[0].get_seq_length() == 4 + len(TOKENS)


@torch.no_grad()
def test_a_copy_has_its_own_and_shares_the_weights(llama):
    model, twin = llama
    ids_BT = text(2, 7)
    again = copy.deepcopy(twin)
    assert torch.equal(again(ids_BT).logits, twin(ids_BT).logits)
    assert again.save_pretrained.args == (again,)
    assert fingerprint(again) == fingerprint(twin)
    again.get_decoder().kv_prefix.values.zero_()
    assert fingerprint(again) != fingerprint(twin)
    assert not torch.equal(again(ids_BT).logits, twin(ids_BT).logits)
    assert prefix_of(again).tokens == prefix_of(twin).tokens == TOKENS
    assert prefix_of(model) is None
    weights = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in weights)
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_gradients_reach_the_model_through_it(llama):
    model, twin = llama
    twin(text(1, 5), labels=text(1, 5)).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_diagnose_measures_behind_it(llama):
    _, twin = llama
    ids_BT = text(3, 9)
    record = diagnose(twin, ids_BT)
    losses = [twin(row[None], labels=row[None]).loss.item() for row in ids_BT]
    assert record["loss.windowed"] == pytest.approx(sum(losses) / 3, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: native(dtype=torch.float32), tiny_model])
def test_saved_with_the_model_and_loaded_by_us_and_by_peft(make, tmp_path):
    model = make()
    twin = with_prefix(model, compute_prefix(model, TOKENS))
    twin.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    ids_BT = text(2, 7)
    want = twin(ids_BT).logits
    loaded, _ = load_model(tmp_path)
    assert prefix_of(loaded).tokens == TOKENS
    assert torch.equal(loaded(ids_BT).logits, want)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids_BT, **greedy), twin.generate(ids_BT, **greedy))
    half, _ = load_model(tmp_path, dtype="bfloat16")
    assert half(ids_BT).logits.dtype == torch.bfloat16

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(model)
    assert prefix_of(plain).tokens == TOKENS
    assert torch.equal(plain(ids_BT).logits, want)
    if not isinstance(model, OasisPreTrainedModel):
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(ids_BT)[0], twin.base_model(ids_BT)[0])
        assert torch.equal(type(model).from_pretrained(tmp_path)(ids_BT).logits, want)
        adapted = PeftModel.from_pretrained(model, tmp_path / "prefix").eval()
        torch.testing.assert_close(adapted(input_ids=ids_BT).logits, want, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_the_weights_do_not_know_is_refused(tmp_path):
    model = native(dtype=torch.float32)
    with_prefix(model, compute_prefix(model, TOKENS)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # by transformers alone, which leaves the adapter there
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="subfolder 'prefix' that its weights were saved without"):
        load_model(tmp_path)


def test_a_model_that_another_library_quantised_gets_none(llama):
    model = native()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    with pytest.raises(UserError, match="quantised by gptq and cannot be saved with a prefix"):
        attach_prefix(model, prefix_of(llama[1]))


@torch.no_grad()
def test_it_can_be_trained_and_saved_again(tmp_path):
    model = native(dtype=torch.float32)
    with_prefix(model, compute_prefix(model, TOKENS)).save_pretrained(tmp_path / "1")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    validate_quantization_for_training(loaded)
    loaded.lm_head.weight.mul_(2)
    loaded.half().float()
    given = {name: tensor + 1 for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "2", state_dict=given, max_shard_size="20KB")
    again, ids_BT = AutoModelForCausalLM.from_pretrained(tmp_path / "2"), text(2, 7)
    assert len(list((tmp_path / "2").glob("model-*.safetensors"))) > 1
    for name, theirs in again.named_parameters():
        assert torch.equal(given[name], theirs)
    assert torch.equal(prefix_of(again).keys_LGPd, prefix_of(loaded).keys_LGPd)
    assert torch.equal(prefix_of(again).values_LGPd, prefix_of(loaded).values_LGPd)
    assert again(ids_BT).logits.isfinite().all()


def test_it_is_found_in_a_subfolder_and_goes_with_the_model_that_had_it(tmp_path):
    model = tiny_model()
    twin, ids_BT = with_prefix(model, compute_prefix(model, TOKENS)), text(2, 7)
    twin.save_pretrained(tmp_path / "sub")
    loaded = OasisForCausalLM.from_pretrained(tmp_path, subfolder="sub")
    assert torch.equal(loaded(ids_BT).logits, twin(ids_BT).logits)
    model.save_pretrained(tmp_path / "sub")
    assert prefix_of(OasisForCausalLM.from_pretrained(tmp_path / "sub")) is None


def test_broken_files_are_told(tmp_path, llama):
    _, twin = llama
    config, weights = (
        tmp_path / "prefix" / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    (tmp_path / "config.json").write_text("{}")
    assert load_prefix(tmp_path) is None
    prefix_of(twin).save(tmp_path / "prefix")
    stored = load_prefix(tmp_path)
    assert torch.equal(stored.keys_LGPd, prefix_of(twin).keys_LGPd)
    assert torch.equal(stored.values_LGPd, prefix_of(twin).values_LGPd)
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {"num_layers": 3}))
    with pytest.raises(UserError, match="not a prefix of ours"):
        load_prefix(tmp_path)
    config.write_text(json.dumps(about))
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="not a prefix of ours"):
        load_prefix(tmp_path)
    prefix_of(twin).save(tmp_path / "prefix")
    stored.keys_LGPd[0, 0, 0, 0] = torch.nan
    stored.save(tmp_path / "prefix")
    with pytest.raises(UserError, match="not finite"):
        load_prefix(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match="holds only one of"):
        load_prefix(tmp_path)


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
def test_inputs_that_cannot_stand_behind_it_are_refused(llama, keywords, message):
    with pytest.raises(UserError, match=message):
        llama[1](text(2, 6), **keywords)


@torch.no_grad()
def test_caches_without_it_are_refused(llama):
    model, twin = llama
    ids_BT = text(2, 6)
    with pytest.raises(UserError, match="StaticCache has no room"):
        twin(ids_BT, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    filled = model(ids_BT, use_cache=True).past_key_values
    with pytest.raises(UserError, match="filled without this model's prefix"):
        twin(ids_BT, past_key_values=filled)
    own = twin(ids_BT, use_cache=True).past_key_values
    with pytest.raises(UserError, match="holds a prefix, and this model has none"):
        model(ids_BT, past_key_values=own)
    with pytest.raises(UserError, match="holds 2 sequences, the input 1"):
        twin(ids_BT[:1], past_key_values=own)
    with pytest.raises(UserError, match="holds 2 sequences, the input 6"):
        twin.generate(text(2, 9), past_key_values=own, num_beams=3, max_new_tokens=2)
    with pytest.raises(UserError, match="StaticCache has no room"):
        twin.generate(ids_BT, cache_implementation="static", max_new_tokens=2)
    one = twin(text(1, 6), use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"must be 6 \.\. 14"):  # generate does not slice these
        twin.generate(text(1, 9), past_key_values=one, prompt_lookup_num_tokens=2, max_new_tokens=2)
    own.crop(-7)
    with pytest.raises(UserError, match="1 tokens of the prefix were cropped"):
        twin(ids_BT, past_key_values=own)


def test_models_and_prefixes_that_do_not_fit_are_refused(llama):
    model, twin = llama
    with pytest.raises(UserError, match="has a prefix already"):
        attach_prefix(twin, prefix_of(twin))
    with pytest.raises(UserError, match="has a prefix already"):
        compute_prefix(twin, TOKENS)
    with pytest.raises(UserError, match="another model's"):
        with_prefix(native(num_hidden_layers=2), prefix_of(twin))
    with pytest.raises(UserError, match="leave no room"):
        with_prefix(native(max_position_embeddings=3), prefix_of(twin))
    with pytest.raises(UserError, match="does not keep keys and values of one shape"):
        compute_prefix(native("deepseek_v3"), TOKENS)
    for tokens in ((), (VOCABULARY,), (-1,)):
        with pytest.raises(UserError, match="tokens: "):
            compute_prefix(model, tokens)
    with pytest.raises(UserError, match="must be given by name"):
        twin.model(text(1, 3), torch.ones(1, 3))
    checkpointed = with_prefix(native(), prefix_of(twin)).train()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="activation_checkpointing"):
        checkpointed(text(1, 3))
