from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from oasis_attn.data.tokens import prompt_ids
from oasis_attn.errors import UserError
from oasis_attn.evaluation.generate import generate
from oasis_attn.evaluation.samples import SampleLog
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import quantize
from oasis_attn.quantization.kv_cache import QuantizedCache
from tiny_models import tiny_config

PROMPTS = ["Question: 1", "Question: 1 2 3 apples and many more\nAnswer:", "x", "Answer: 2"]


def run(model, tokenizer, prompts=PROMPTS, log=None, **options):
    given = {"stops": ["Question:"], "max_new_tokens": 12, "batch_size": 3} | options
    log = log or SampleLog(None, {}, resume=False)
    return generate(model, tokenizer, prompts, log=log, finish=lambda _index, _text: {}, **given)


def one_by_one(model, tokenizer, prompt, steps):
    """Greedy, without a cache or padding."""
    ids = prompt_ids(prompt, tokenizer)
    start = len(ids)
    for _ in range(steps):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
@pytest.mark.parametrize("scheme", [None, "w4a4"])
def test_greedy_is_the_argmax_of_the_full_forward(build, tokenizer, variant, scheme):
    model = build(variant, dtype=torch.float64)
    if scheme:
        model = quantize(model, scheme)
    responses = run(model, tokenizer, stops=[])
    assert responses == [[one_by_one(model, tokenizer, prompt, 12)] for prompt in PROMPTS]
    assert len({text for (text,) in responses}) > 1


def test_a_cache_that_counts_tokens_meets_no_padding(build, tokenizer):
    model = build("vanilla", width=32)
    seen = []

    def cache(config):
        made = QuantizedCache(config, bits=2, first=2, recent=0)
        seen.append(made)
        return made

    prompts = ["1 2 3 " * 20, "x" * 70]
    together = run(model, tokenizer, prompts, cache=cache)
    assert len(seen) == 2
    assert together == [run(model, tokenizer, [prompt], cache=cache)[0] for prompt in prompts]


def test_padding_does_not_move_a_prefix_out_of_a_window(tokenizer):
    torch.manual_seed(0)
    config = tiny_config("mistral", vocab_size=len(tokenizer), sliding_window=16, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    prefixed = with_prefix(model, compute_prefix(model, [3, 5]))
    assert run(prefixed, tokenizer, stops=[]) == [
        run(prefixed, tokenizer, [prompt], stops=[])[0] for prompt in PROMPTS
    ]


def test_native_models_and_tokenizers_without_pad_token(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    expected = [[one_by_one(model, tokenizer, prompt, 12)] for prompt in PROMPTS]
    pad, side = tokenizer.pad_token, tokenizer.padding_side
    try:
        tokenizer.pad_token, tokenizer.padding_side = None, "right"
        assert run(model, tokenizer, stops=[]) == expected
        assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    finally:
        tokenizer.pad_token, tokenizer.padding_side = pad, side


def test_samples_are_independent_of_batch_neighbors_and_of_the_global_generator(build, tokenizer):
    model = build(dtype=torch.float64)
    options = {"repeats": 3, "temperature": 1.0}
    whole = run(model, tokenizer, batch_size=12, **options)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert run(model, tokenizer, batch_size=1, **options) == whole
    assert torch.equal(torch.get_rng_state(), before)
    assert run(model, tokenizer, PROMPTS[:2], **options) == whole[:2]
    assert all(len(set(texts)) == 3 for texts in whole)
    assert run(model, tokenizer, seed=1, **options) != whole


def test_draws_follow_the_softmax_at_the_temperature(build, tokenizer):
    model = build()
    count, temperature = 600, 0.7
    prompt = "Question: 1"
    texts = run(model, tokenizer, [prompt], stops=[], max_new_tokens=1, repeats=count,
                temperature=temperature, batch_size=200)[0]  # fmt: skip
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt_ids(prompt, tokenizer)])).logits[0, -1]
    likely = (logits_V / temperature).softmax(-1)
    token = int(likely.argmax())
    share = sum(text == tokenizer.decode([token]) for text in texts) / count
    p = float(likely[token])
    assert abs(share - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_the_model_s_own_generation_settings_play_no_part_and_stay(build, tokenizer):
    model = build()
    plain = run(model, tokenizer)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 12
    model.train()
    assert run(model, tokenizer) == plain
    assert model.generation_config.repetition_penalty == 5.0
    assert model.training


def test_answers_end_before_stops(build, tokenizer):
    model = build()
    (whole,) = run(model, tokenizer, ["x"], stops=[])[0]
    stop = whole[3:5]
    (text,) = run(model, tokenizer, ["x"], stops=["never", stop])[0]
    assert text == whole[: whole.index(stop)]


def test_a_resumed_log_is_not_generated_again(build, tokenizer, tmp_path):
    model = build()
    path = tmp_path / "log.jsonl"
    whole = run(model, tokenizer, log=SampleLog(path, {}, resume=False))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))  # the settings, and two of the first batch of three
    assert run(model, tokenizer, log=SampleLog(path, {}, resume=True)) == whole
    assert path.read_bytes() == b"".join(lines)
    model.generate = None  # not called any more
    assert run(model, tokenizer, log=SampleLog(path, {}, resume=True)) == whole


def test_too_long_a_prompt_is_refused(build, tokenizer):
    with pytest.raises(
        UserError, match=r"max_new_tokens: \d+ tokens are more than the model's 256"
    ):
        run(build(), tokenizer, ["x", "y " * 150])
