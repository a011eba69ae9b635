"""Run a model entirely in float64, although its norms and routers convert to float32."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from tiny_models import VOCABULARY, cast, tiny_config

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


class Float64Mode(TorchFunctionMode):
    """While active, every conversion to float32 converts to float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        if func is torch.Tensor.to:
            args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {
            name: wide.get(value, value) if name == "dtype" else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def native_model(family, **changes):
    """The family's own transformers model in float64, with norms and biases perturbed."""
    torch.manual_seed(0)
    text = tiny_config(family, initializer_range=0.2, **changes)
    return perturbed(cast(AutoModelForCausalLM.from_config(text), torch.float64).eval())


@torch.no_grad()
def perturbed(model):
    """`model` with noise added to its gains, biases and sinks."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("key_norm"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def float64_logits(model, ids=IDS):
    """Logits of `model`, computed in float64 throughout."""
    with Float64Mode():
        return model(ids).logits
