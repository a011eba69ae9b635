"""A metric name has one protocol: every command gives the same number for the same text."""

from __future__ import annotations

import math

import pytest
from transformers import LlamaConfig

from oasis_attn import diagnose
from oasis_attn.data import held_out_windows, load_corpus
from oasis_attn.evaluation import evaluate
from oasis_attn.hub.loading import load_model
from oasis_attn.quantization import prefix_checkpoint as prefix_checkpoint_module
from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint
from oasis_attn.records import TextInfo
from oasis_attn.training import TrainingConfig, train

WINDOW, WINDOWS = 32, 5


def test_perplexity_is_one_number_whichever_command_measures_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"A sentence with number {i * i}.\n" * 40 + "\n" for i in range(120)))
    LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=300, max_position_embeddings=64,
    ).save_pretrained(tmp_path / "size")  # fmt: skip
    model = tmp_path / "model"
    config = TrainingConfig(
        out=model, variant="oasis", corpus=str(text), size=str(tmp_path / "size"), steps=3,
        batch_size=2, block_length=WINDOW, eval_windows=WINDOWS, learning_rate=1e-2,
    )  # fmt: skip
    trained = train(config, progress=False)
    loaded, tokenizer = load_model(model)
    corpus = load_corpus(text, "validation")
    read = {"window": WINDOW, "windows": WINDOWS}

    records = [
        diagnose(loaded, corpus, tokenizer=tokenizer, **read),
        diagnose(loaded, corpus.texts(), tokenizer=tokenizer, **read),
        diagnose(loaded, held_out_windows(corpus, tokenizer, **read).measured),
        evaluate(model, corpus=str(text), split="validation", window=WINDOW, limit=WINDOWS),
    ]
    found = {record["perplexity.windowed"] for record in records} | {trained["perplexity.windowed"]}
    infos = [trained.data.eval, *(record.data for record in records[:-1])]
    infos.append(TextInfo(**records[-1].data["perplexity"]))
    # No prefix helps a model as small as this, so it is given one.
    monkeypatch.setattr(prefix_checkpoint_module, "find_prefix", lambda *_, **__: (5,))
    common = {"calibration": str(text), "evaluation_split": "validation", **read}
    for record in (
        quantize_checkpoint(model, tmp_path / "q", scheme="w4a4", simulate=True, **common),
        prefix_checkpoint(model, tmp_path / "p", length=1, **common),
    ):
        found.add(record.metric("perplexity.windowed", "before").value)
        infos.append(record.data)
    assert len({info.tokens_sha256 for info in infos}) == 1
    assert {(info.choice, info.stride, info.windows) for info in infos} == {
        ("spread", WINDOW, WINDOWS)
    }
    for value in found:
        assert math.isclose(value, trained["perplexity.windowed"], rel_tol=1e-6), found
    strided = evaluate(model, corpus=str(text), split="validation", window=WINDOW, stride=8)
    with pytest.raises(ValueError, match=r"perplexity\.windowed"):
        strided["perplexity.windowed"]
