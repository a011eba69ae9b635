"""Sequences packed in a row are what they are alone, with default settings, or are refused."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from oasis_attn import UserError
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.modeling.packing import is_one_sequence
from tiny_models import tiny_model

LENGTHS = (5, 12, 7)
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")


def family_model(family="llama"):
    sinks = FAMILIES[family].sinks
    return tiny_model(
        family=family,
        dtype=torch.float64,
        mix_scale="sum",
        token_normalizer="learned_sink" if sinks else "softmax1",
    )


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (length,), generator=generator) for length in LENGTHS]


def packed(**changes):
    batch = {
        "input_ids": torch.cat(sequences())[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }
    return batch | changes


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_sequences_alone(family):
    """Sliding windows and chunks, of 6 tokens here, are counted within a sequence."""
    model, atol = family_model(family), 1e-5  # some experts are chosen in float32
    alone = torch.cat([model(ids[None]).logits for ids in sequences()], 1)
    ones = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    for settings in ({}, {"attention_mask": ones}, {"use_cache": False}):
        output = model(**packed(**settings))
        torch.testing.assert_close(output.logits, alone, rtol=0, atol=atol)
        assert output.past_key_values is None


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_flattening_collator_gives_the_gradients_of_the_sequences_alone(family, checkpointing):
    model = family_model(family).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": ids.tolist()} for ids in sequences()], return_tensors="pt")
    model(**batch).loss.backward()
    together = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    predicted = [length - 1 for length in LENGTHS]
    for ids, count in zip(sequences(), predicted, strict=True):
        loss = model(ids[None], labels=ids[None]).loss
        (loss * count / sum(predicted)).backward()
    assert len(together) > 20
    for name, parameter in model.named_parameters():
        if name in together:  # the loss is float32, transformers' own
            torch.testing.assert_close(parameter.grad, together[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_row_is_packed_in_its_own_way():
    model = family_model()
    ids = torch.cat(sequences()).view(2, 12)
    positions = torch.tensor([[*range(4), *range(8)], [*range(12)]])
    logits = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    alone = torch.cat([model(ids[:1, :4]).logits, model(ids[:1, 4:]).logits], 1)
    torch.testing.assert_close(
        logits, torch.cat([alone, model(ids[1:]).logits]), rtol=0, atol=1e-10
    )


@torch.no_grad()
def test_compiled():
    model = family_model()
    alone = torch.cat([model(ids[None]).logits for ids in sequences()], 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = compiled(**packed(use_cache=False)).logits
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-10)
    whole = torch.arange(sum(LENGTHS))[None]
    compiled(**packed(position_ids=whole))
    with pytest.raises(RuntimeError, match=r"position_ids: they restart.*pass use_cache=False"):
        compiled(**packed())


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_cache": True}, "position_ids: they restart within a row, but a cache holds one"),
        ({"past_key_values": DynamicCache()}, "position_ids: they restart"),
        ({"attention_mask": torch.ones(1, 24).index_fill(1, torch.tensor(23), 0)}, "has zeros"),
        ({"position_ids": torch.tensor([[*range(10), *range(12, 26)]])}, "they skip positions"),
        ({"position_ids": None, "seq_idx": torch.zeros(1, 24)}, "seq_idx: .* need position_ids"),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 5, 24])}, "cu_seq_lens_q: "),
    ],
)
def test_what_cannot_be_right_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        family_model()(**packed(**changes))


@torch.no_grad()
def test_a_new_sequence_behind_a_filled_cache_is_refused():
    model, (first, second, _) = family_model(), sequences()
    cache = model(first[None], use_cache=True).past_key_values
    with pytest.raises(UserError, match="position_ids: they restart"):
        model(second[None], position_ids=torch.arange(12)[None], past_key_values=cache)
    with pytest.raises(UserError, match="position_ids: they restart"):
        model.generate(**packed(), max_new_tokens=2)


@torch.no_grad()
def test_a_mask_of_four_axes_is_the_callers():
    model, batch = family_model(), packed()
    causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    jumping = batch["position_ids"] + torch.arange(24)
    model(**packed(position_ids=jumping, attention_mask=causal))
    whole = {"position_ids": torch.arange(24)[None]}
    logits = model(**packed(**whole, attention_mask=causal)).logits
    torch.testing.assert_close(logits, model(**packed(**whole)).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("positions", "mask", "past", "single"),
    [
        ([0, 1, 2, 3], None, 0, True),
        ([3, 4, 5, 6], None, 0, True),
        ([3, 4, 5, 6], None, 3, True),
        ([3, 4, 5, 6], None, 4, False),
        ([0, 1, 0, 1], None, 0, False),
        ([0, 0, 1, 2], [0, 1, 1, 1], 0, True),  # padding on the left, by generate
        ([0, 1, 2, 3], [0, 1, 1, 1], 0, True),
        ([0, 1, 0, 0], [1, 1, 0, 0], 0, True),  # on the right
        ([0, 1, 1, 2], [1, 1, 0, 1], 0, True),  # within
        ([0, 1, 2, 3], [1, 1, 0, 1], 0, True),
        ([0, 1, 0, 0], [1, 1, 0, 1], 0, False),
        ([0, 1, 2, 1], [1, 1, 0, 1], 0, False),
        ([0, 1, 3, 4], [1, 1, 1, 1], 0, False),
        ([2, 3, 4, 5], [0, 1, 1, 1, 1, 1, 1], 3, True),  # behind a padded cache of 3
        ([0, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1], 3, False),
        ([0, 0, 1, 2], [0, 0, 0, 0, 1, 1, 1], 3, True),
    ],
)
def test_one_sequence(positions, mask, past, single):
    mask = None if mask is None else torch.tensor([mask])
    assert bool(is_one_sequence(torch.tensor([positions]), mask, past)) is single
