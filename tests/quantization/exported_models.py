"""Models and schemes for the tests of the formats compressed-tensors and torchao."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

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


def has_int8_kernels():
    """Whether torchao is installed, and this processor has VNNI instructions."""
    if find_spec("torchao") is None:
        return False
    from torchao.utils import should_reduce_range

    return not should_reduce_range(torch.device("cpu"))


def quantized(model, scheme, **keywords):
    batches = [
        torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)
    ]
    return quantize(
        model, scheme, calibration=batches if scheme.needs_calibration else None, **keywords
    )
