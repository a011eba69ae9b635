"""Generation, caches, hidden states and attention maps as with any Hugging Face model."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
)

from oasis_attn import UserError
from tiny_models import greedy, tiny_config, tiny_model

MODELS = [
    ("oasis", "llama"), ("oasis_block", "qwen3"), ("softpick", "llama"), ("vanilla", "llama"),
    ("oasis", "gemma2"), ("official", "llama"),
]  # fmt: skip


@pytest.fixture(params=MODELS, ids=lambda pair: "-".join(pair))
def model(request):
    return tiny_model(*request.param, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:null_attention falls back")
class TestGenerate:
    def test_a_static_cache_changes_nothing(self, model, ids):
        static = greedy(model, ids, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, greedy(model, ids))

    def test_beams_are_the_same_with_and_without_a_cache(self, model, ids):
        texts = [greedy(model, ids, num_beams=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*texts)

    def test_left_padded_batches_are_the_singles(self, model, ids):
        batch = ids.clone()
        batch[0, :5] = 0
        mask = torch.ones_like(batch)
        mask[0, :5] = 0
        together = greedy(model, batch, attention_mask=mask)[:, 12:]
        alone = [greedy(model, ids[:1, 5:])[:, 7:], greedy(model, ids[1:])[:, 12:]]
        assert torch.equal(together, torch.cat(alone))

    @torch.no_grad()
    def test_a_prompt_is_read_once_and_gone_on_from_twice(self, model, ids):
        prompt, cache = ids[:, :8], DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, use_cache=True)
        for last in (ids[:, 8:], ids[:, 8:] - 1):
            whole = torch.cat([prompt, last], 1)
            went_on = greedy(model, whole, past_key_values=copy.deepcopy(cache))
            assert torch.equal(went_on, greedy(model, whole))

    def test_assistants_and_prompt_lookup_change_nothing(self, model, ids):
        plain = greedy(model, ids[:1])
        assert torch.equal(plain, greedy(model, ids[:1], prompt_lookup_num_tokens=3))
        assistant = tiny_model("vanilla", seed=1, dtype=torch.float64)
        assert torch.equal(plain, greedy(model, ids[:1], assistant_model=assistant))

    def test_sampling_is_the_seeds(self, ids):
        model = tiny_model()
        texts = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=True, top_k=0))
        assert torch.equal(texts[0], texts[1])
        assert not torch.equal(texts[0], texts[2])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:null_attention falls back")
def test_a_hidden_state_is_what_its_layer_reads(model, ids):
    read = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    outputs = model(ids, output_hidden_states=True)
    states = outputs.hidden_states
    assert len(states) == 5
    # As in every model the first is the embeddings' output; routing may scale it for layer 0.
    torch.testing.assert_close(states[0], model.get_input_embeddings()(ids))
    cosine = torch.cosine_similarity(read[0], states[0], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert all(torch.equal(state, x) for state, x in zip(states[1:4], read[1:], strict=True))
    assert torch.equal(model.model(ids).last_hidden_state, states[4])
    selected = model(ids, output_hidden_states=[0, -1]).hidden_states
    assert [state is not None for state in selected] == [True, False, False, False, True]


@pytest.mark.filterwarnings("ignore:null_attention falls back")
def test_attention_maps_leave_the_null_unspent(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    outputs = model(ids, attention_mask=mask, output_attentions=True, output_null_probability=True)
    plain = model(ids, attention_mask=mask, output_null_probability=True)
    torch.testing.assert_close(outputs.logits, plain.logits, rtol=0, atol=1e-10)
    assert plain.attentions is None
    for index, weights in enumerate(outputs.attentions):
        assert weights.shape == (2, 4, 12, 12)
        assert weights.triu(1).eq(0).all()
        null = outputs.null_probability[index]
        torch.testing.assert_close(weights.sum(-1), 1 - null, rtol=0, atol=1e-12)
        if plain.null_probability is not None:
            torch.testing.assert_close(plain.null_probability[index], null, rtol=0, atol=1e-10)
    assert (plain.null_probability is None) == (model.config.token_normalizer == "softmax")
    outputs.attentions[0].retain_grad()
    outputs.logits.sum().backward()
    assert outputs.attentions[0].grad is not None


def test_maps_can_be_asked_for_in_the_config_and_in_generate(ids, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)
    assert len(model(ids).attentions) == 4
    written = tiny_model().generate(
        ids, max_new_tokens=3, return_dict_in_generate=True, output_attentions=True
    )
    assert [step[0].shape[2:] for step in written.attentions] == [(12, 12), (1, 13), (1, 14)]


def filled(ids, **changes):
    model = tiny_model(text=tiny_config(**changes))
    return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda ids: filled(ids, num_hidden_layers=2), "has 2 layers, but this model has 4"),
        (
            lambda ids: filled(ids, num_key_value_heads=4),
            "has keys of 4 heads x 8, but this model has keys of 16",
        ),
        (lambda ids: filled(ids[:1]), "has 1 sequences, but the input has 2"),
        (lambda ids: ((ids, ids),) * 4, "'tuple' is not a transformers Cache"),
    ],
)
def test_a_cache_of_another_model_is_refused(cache, message, ids):
    with pytest.raises(UserError, match=f"past_key_values: {message}"):
        tiny_model()(ids, past_key_values=cache(ids))


def test_an_empty_cache_of_any_make_is_taken(ids):
    model = tiny_model()
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert int(cache.get_seq_length()) == 13
