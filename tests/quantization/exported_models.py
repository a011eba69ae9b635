"""Models and schemes for the tests of the format compressed-tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from oasis_attn.quantization import QuantSpec, quantize, schemes
from tiny_models import VOCABULARY, tiny_config

TABLE = schemes()
STATIC, DYNAMIC = TABLE["w8a8-static-linear"], TABLE["w8a8-dynamic"]
GROUPS = QuantSpec(bits=4, symmetric=True, granularity="group", group_size=16)
W4A16 = replace(TABLE["w4a16"], weight=GROUPS)


def make(kind="llama", dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = tiny_config(kind, tie_word_embeddings=True, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantized(model, scheme, **keywords):
    batches = [
        torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)
    ]
    return quantize(
        model, scheme, calibration=batches if scheme.needs_calibration else None, **keywords
    )
