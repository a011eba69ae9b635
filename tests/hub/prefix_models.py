"""What the tests of prefixes share."""

import torch
from transformers import AutoModelForCausalLM

from tiny_models import VOCABULARY, cast, tiny_config

TOKENS = (5, 6, 7)


def native(family="llama", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = tiny_config(family, initializer_range=0.2, **changes)
    return cast(AutoModelForCausalLM.from_config(config), dtype).eval()


def text(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
