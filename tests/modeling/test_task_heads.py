"""Auto classes for other tasks than the next token give our models, as they give the family's."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from oasis_attn import OasisConfig, UserError, convert
from oasis_attn.data import train_tokenizer
from oasis_attn.hub.prefix import attach_prefix, compute_prefix, prefix_of
from oasis_attn.modeling.modeling_oasis import OasisModel
from tiny_models import tiny_config, tiny_model

HEADS = {
    AutoModelForSequenceClassification: {"labels": torch.tensor([0, 2])},
    AutoModelForTokenClassification: {"labels": torch.arange(24).view(2, 12) % 3},
    AutoModelForQuestionAnswering: {
        "start_positions": torch.tensor([1, 4]),
        "end_positions": torch.tensor([3, 9]),
    },
}


@pytest.fixture(params=["llama", "mixtral"])
def causal(request, tmp_path):
    model = tiny_model(family=request.param, output_gate="head")
    model.save_pretrained(tmp_path)
    return model


@torch.no_grad()
def test_the_base_model_of_a_causal_checkpoint(causal, tmp_path, ids):
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(base, OasisModel)
    assert not base.training
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not info["missing_keys"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert torch.equal(base(**inputs)[0], causal.model(**inputs)[0])
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(ids)[0], base(ids)[0])
    assert " AutoModel.from_pretrained" in (tmp_path / "base" / "README.md").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "base").settings == causal.config.settings
    headed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(headed.model(ids)[0], base(ids)[0])


def test_the_base_model_keeps_a_prefix(tmp_path, ids):
    model = tiny_model()
    attach_prefix(model, compute_prefix(model, [5, 6])).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert prefix_of(base).tokens == (5, 6)
    assert torch.equal(base(ids)[0], model.model(ids)[0])
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(classifier.model(ids)[0], base(ids)[0])


def test_the_base_model_from_a_config(ids):
    """What we add is drawn as the family draws its own; the routers are in float32."""
    config = OasisConfig(text_config=tiny_config("mixtral"), output_gate="elementwise")
    base = AutoModel.from_config(config, dtype=torch.bfloat16)
    gate = base.layers[0].output_gate.weight.detach()
    assert gate.float().std().item() == pytest.approx(0.02, rel=0.2)
    assert gate.dtype == torch.bfloat16
    assert base(ids).last_hidden_state.shape == (2, 12, 32)
    assert base.config._experts_implementation == "grouped_mm"
    assert isinstance(OasisModel(config), OasisModel)


def test_the_base_model_refuses_what_the_causal_model_does(ids):
    config = tiny_model().config
    with pytest.raises(UserError, match="attn_implementation: 'sdpa' has no null option"):
        AutoModel.from_config(AutoConfig.for_model(**config.to_dict()), attn_implementation="sdpa")
    base = AutoModel.from_config(config)
    with pytest.raises(UserError, match="attn_implementation: 'eager' has no null option"):
        base.set_attn_implementation("eager")
    with pytest.raises(UserError, match="use_reentrant: True"):
        base.gradient_checkpointing_enable({"use_reentrant": True})
    cache = base(ids[:1], use_cache=True).past_key_values
    with pytest.raises(UserError, match="past_key_values: has 1 sequences, but the input has 2"):
        base(ids, past_key_values=cache)
    with pytest.raises(UserError, match="input_ids: pass either"):
        base()
    with pytest.raises(UserError, match="config: LlamaConfig is not OasisConfig"):
        OasisModel(tiny_config())
    with pytest.raises(ValueError, match=r"OasisConfig.* for this kind of AutoModel"):
        AutoModelForMaskedLM.from_config(config)


def test_outputs_that_the_config_asks_for(tmp_path, ids):
    tiny_model().save_pretrained(tmp_path)
    asked = {"output_attentions": True, "output_hidden_states": True}
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        outputs = auto.from_pretrained(tmp_path, **asked)(ids)
        assert [len(outputs.attentions), len(outputs.hidden_states)] == [4, 5]
        row_sums = outputs.attentions[0].sum(-1)
        assert row_sums.max() <= 1
        assert row_sums.min() < 0.9
    values = AutoModel.from_pretrained(tmp_path)(ids, output_attentions=True, return_dict=False)
    assert isinstance(values, tuple)


@pytest.mark.usefixtures("causal")
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_head_trains_and_comes_back(head, tmp_path, ids):
    labels = {"num_labels": 3} if "labels" in HEADS[head] else {}
    model, info = head.from_pretrained(tmp_path, output_loading_info=True, **labels)
    assert all("score" in key or "qa_outputs" in key for key in info["missing_keys"])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, **HEADS[head]).loss.backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    assert not untouched
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "trained")
    again, info = head.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not any(info.values()), info
    losses = [each(ids, **HEADS[head]).loss for each in (model, again)]
    assert torch.equal(*losses)
    card = (tmp_path / "trained" / "README.md").read_text()
    assert f"{head.__name__}.from_pretrained" in card


@torch.no_grad()
def test_a_classifier_with_the_method_off_is_the_familys(ids):
    text = tiny_config(initializer_range=0.2, num_labels=3)
    native = AutoModelForSequenceClassification.from_config(text).eval()
    causal = AutoModelForCausalLM.from_config(text)
    causal.model = native.model
    ours = AutoModelForSequenceClassification.from_config(convert(causal, "vanilla").config).eval()
    ours.load_state_dict(native.state_dict())
    padded = ids.clone()
    padded[0, :4] = 0
    mask = padded.ne(0).long()
    logits = [model(padded, attention_mask=mask).logits for model in (native, ours)]
    assert torch.equal(*logits)


def test_trainer_and_pipeline(tmp_path):
    texts = ["good good", "bad bad", "good bad"]
    tokenizer = train_tokenizer(iter(texts * 9), 280)
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("pad", "bos", "eos")}
    config = OasisConfig(text_config=tiny_config(vocab_size=len(tokenizer), **special))
    model = AutoModelForSequenceClassification.from_config(config)
    rows = [
        {**tokenizer(text), "labels": label} for text, label in zip(texts, (1, 0, 1), strict=True)
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert {answer["label"] for answer in classify(texts)} <= {"LABEL_0", "LABEL_1"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "OasisForSequenceClassification"
    ]
