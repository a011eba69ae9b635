"""Pipelines, Trainer, PEFT, TRL and lm-eval take our models as any other."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from oasis_attn import OasisForCausalLM
from oasis_attn.data import train_tokenizer
from tiny_models import tiny_config, tiny_model

TEXTS = ["the sink is where attention goes", "a null option is nothing to read", "one two three"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS * 20), 300)


@pytest.fixture
def reader(tokenizer):
    """A model that the tokenizer fits."""
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("pad", "bos", "eos")}
    text = tiny_config(initializer_range=0.2, vocab_size=len(tokenizer), **special)
    return tiny_model(text=text)


def test_pipeline(reader, tokenizer):
    writer = pipeline("text-generation", model=reader, tokenizer=tokenizer)
    outputs = writer(TEXTS[:2], max_new_tokens=4, do_sample=False, batch_size=2)
    for text, output in zip(TEXTS, outputs, strict=False):
        assert output[0]["generated_text"].startswith(text)


# --------------------------------------------------------------------------------------- outputs


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
