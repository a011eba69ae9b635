"""What people do with a Hugging Face model works with ours, and says so when it cannot."""

import copy
import io
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from oasis_attn import OasisForCausalLM, UserError
from oasis_attn.data import train_tokenizer
from tiny_models import VOCABULARY, tiny_config, tiny_model

MODELS = [
    ("oasis", "llama"), ("oasis_block", "qwen3"), ("softpick", "llama"), ("vanilla", "llama"),
    ("oasis", "gemma2"), ("official", "llama"),
]  # fmt: skip
TEXTS = ["the sink is where attention goes", "a null option is nothing to read", "one two three"]


@pytest.fixture(params=MODELS, ids=lambda pair: "-".join(pair))
def model(request):
    return tiny_model(*request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS * 20), 300)


@pytest.fixture
def reader(tokenizer):
    """A model that the tokenizer fits."""
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("pad", "bos", "eos")}
    text = tiny_config(initializer_range=0.2, vocab_size=len(tokenizer), **special)
    return tiny_model(text=text)


def greedy(model, ids, **how):
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **how)


# ------------------------------------------------------------------------------------- generating


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


def test_pipeline(reader, tokenizer):
    writer = pipeline("text-generation", model=reader, tokenizer=tokenizer)
    outputs = writer(TEXTS[:2], max_new_tokens=4, do_sample=False, batch_size=2)
    for text, output in zip(TEXTS, outputs, strict=False):
        assert output[0]["generated_text"].startswith(text)


# --------------------------------------------------------------------------------------- outputs


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


# ------------------------------------------------------------------------------ loading and saving


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cpu", "auto", "disk"])
def test_device_maps(kind, ids, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    names = ["lm_head", *(f"model.{name}" for name, _ in model.model.named_children())]
    places = dict.fromkeys(names, "cpu") | {"model.layers": "disk"} if kind == "disk" else kind
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(greedy(loaded, ids), greedy(model, ids))


@pytest.mark.parametrize("variant", ["oasis", "oasis_block", "oasis_unit", "official", "kv_null"])
def test_a_model_that_does_not_fit_is_offloaded(variant, ids, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in loaded.hf_device_map.values()
    for inference in (True, False):
        with torch.inference_mode(inference):
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(greedy(loaded, ids), greedy(model, ids))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:null_attention falls back")
@pytest.mark.parametrize(
    ("asked", "saved", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes(asked, saved, expected, ids, tmp_path):
    model = tiny_model().to(saved)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
    router = torch.promote_types(expected, torch.float32)  # routers are never narrower
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (router if "model.depth" in name else expected), name
    assert loaded(ids).logits.dtype == expected
    assert loaded(ids).logits.isfinite().all()


@torch.no_grad()
def test_shards(ids, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_tie_resize_and_survive(tied, ids, tmp_path):
    model = tiny_model(text=tiny_config(tie_word_embeddings=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == VOCABULARY + 9
    torch.testing.assert_close(model(ids).logits[..., :VOCABULARY], before)
    assert model(ids, labels=ids).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = OasisForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_is_set_on_the_config_reaches_the_model(ids, tmp_path):
    model = tiny_model()
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids).past_key_values is None
    cached = AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=True)
    assert cached(ids).past_key_values is not None
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["oasis", "official", "vanilla"])
def test_copies_compute_the_same(variant, ids):
    model = tiny_model(variant)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(ids).logits, model(ids).logits)
        other.lm_head.weight.zero_()
        assert other.model.layers[0].self_attn is not model.model.layers[0].self_attn
    assert model(ids).logits.abs().max() > 0


def test_a_pickled_model_opens_in_another_process(ids, tmp_path):
    model = tiny_model()
    torch.save({"model": model, "ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "all")
    script = """if True:
        import sys, torch
        saved = torch.load(sys.argv[1], weights_only=False)
        asked = {"output_hidden_states": True, "output_null_probability": True}
        outputs = saved["model"](saved["ids"], **asked)
        assert torch.equal(outputs.logits, saved["logits"])
        assert len(outputs.hidden_states) == 5 and len(outputs.null_probability) == 4
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "all")], check=True, timeout=600)


# -------------------------------------------------------------------------------- other libraries


def test_trainer(ids, tmp_path):
    model = tiny_model()
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        learning_rate=1e-2, gradient_checkpointing=True, use_cpu=True,
    )  # fmt: skip
    before = model(ids, labels=ids).loss.item()
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(ids, labels=ids).loss.item() < before - 0.1


def test_lora(ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    reference = model(ids).logits.detach()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    logits = adapted(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    assert not torch.allclose(logits, reference)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, OasisForCausalLM)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(packing, reader, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    exact = copy.deepcopy(reader).double()  # TRL binds a forward of its own to the model
    before = copy.deepcopy(reader.state_dict())
    trainer = trl.SFTTrainer(
        model=reader,
        args=trl.SFTConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_length=16, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-2, packing=packing,
        ),
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in TEXTS * 2]),
        processing_class=tokenizer,
    )  # fmt: skip
    if packing:  # as TRL hands it over, a row computes what its sequences do alone
        batch = next(iter(trainer.get_train_dataloader()))
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        assert len(starts) > 1
        ids = batch["input_ids"]
        spans = pairwise([*starts, ids.shape[1]])
        with torch.no_grad():
            alone = torch.cat([exact(ids[:, start:stop]).logits for start, stop in spans], 1)
            torch.testing.assert_close(exact(**batch).logits, alone, rtol=0, atol=1e-10)
    trainer.train()
    assert len([row for row in trainer.state.log_history if "train_loss" in row]) == 1
    for name in ("model.depth.queries", "model.depth.beta_raw", "lm_head.weight"):
        assert not torch.equal(before[name], reader.state_dict()[name].to(before[name].dtype)), name


@torch.no_grad()
def test_lm_eval(reader, tokenizer, tmp_path):
    """A local multiple-choice task: the log-likelihoods of its samples are the model's own."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    choices = [" is where", " two three"]
    documents = [{"question": "the sink", "answer": 0}, {"question": "one", "answer": 1}]
    (tmp_path / "test.json").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'test.json'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        f"doc_to_choice: {choices}\nmetric_list:\n  - metric: acc\n"
    )
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=reader, tokenizer=tokenizer, batch_size=2, device="cpu"),
        tasks=["tiny"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    samples = results["samples"]["tiny"]
    assert len(samples) == 2
    for sample in samples:
        for choice, (value, _greedy) in zip(choices, sample["filtered_resps"], strict=True):
            prompt = tokenizer(sample["doc"]["question"])["input_ids"]
            both = torch.tensor([tokenizer(sample["doc"]["question"] + choice)["input_ids"]])
            likely = reader(both).logits.log_softmax(-1)[0, :-1].gather(-1, both[0, 1:, None])
            assert float(value) == pytest.approx(likely[len(prompt) - 1 :].sum().item(), abs=1e-4)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_implementation": "eager"}, "attn_implementation: 'eager' has no null option"),
        ({"attn_implementation": "sdpa"}, "attn_implementation: 'sdpa' has no null option"),
        ({"residual": "sum"}, "null_signal: 'on' needs residual 'depth'"),
        ({"null_signal": "louder"}, "null_signal: 'louder' is not one of off, on, shuffled"),
        ({"residual": "official", "mix_scale": "sum"}, "mix_scale: 'sum' has no effect"),
        ({"mix_scale": "double"}, "mix_scale: 'double' is not one of none, sum, rms"),
        ({"mix_scael": "sum"}, "settings: 'mix_scael' .*did you mean 'mix_scale'"),
        ({"token_normalizer": "softmax"}, "null_signal: 'on' needs a token_normalizer with a null"),
    ],
)
def test_conflicting_settings_are_refused_at_loading(keywords, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, OasisForCausalLM):
        with pytest.raises(UserError, match=message):
            loader.from_pretrained(tmp_path, **keywords)


def test_another_attention_function_is_refused():
    with pytest.raises(UserError, match="attn_implementation: 'sdpa' has no null option"):
        tiny_model().set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="attn_implementation: 'eager' has no null option"):
        AutoModelForCausalLM.from_config(tiny_model().config, attn_implementation="eager")


def test_the_base_model_is_saved_with_its_settings(tmp_path, ids):
    model = tiny_model("softmax1")
    model.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.settings == model.config.settings
    assert torch.equal(again.model(ids)[0], model.model(ids)[0])


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
