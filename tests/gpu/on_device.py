"""Models for the tests on a GPU, and comparisons with the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn.data import load_corpus, read_windows
from oasis_attn.records import processor
from tiny_models import VOCABULARY, tiny_config, tiny_model, word_tokenizer

DEVICE = "cuda"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = {"num_hidden_layers": 2, "intermediate_size": 64, "initializer_range": 0.2}
FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "qwen3_moe")
VARIANTS = ("oasis", "kv_null", "official", "vanilla")
IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
WINDOWS = {"window": 16, "windows": 3}


def native(family="llama", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **SIZES | changes)).eval()


def routed(variant="oasis", family="llama", **changes):
    return tiny_model(variant, text=tiny_config(family, **SIZES | changes))


def both(model):
    """The model, and a copy of it on the device."""
    return model, copy.deepcopy(model).to(DEVICE)


def build(name):
    """A model of a family, or a variant of this library."""
    if name in FAMILIES:
        return native(name)
    return routed(*reversed(name.split("/"))) if "/" in name else routed(name)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def close(found, expected, atol=1e-3):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


def ran_on():
    """The device as records name it."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else processor()


def load_windows(text):
    return read_windows(load_corpus(text, "test"), word_tokenizer(), **WINDOWS).ids_NT
