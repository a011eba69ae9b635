"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft, merged at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from oasis_attn.errors import UserError

if TYPE_CHECKING:
    from peft import LoraModel


def adapt(model: PreTrainedModel, rank: int, seed: int) -> LoraModel:
    """Add adapters of this rank, with scale 2, in place to all linear layers except the head.

    `adapter.merge_and_unload()` merges the adapters into the weights and returns the model.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise UserError("lora_rank: LoRA needs peft: pip install 'oasis-attn[lora]'") from error
    config: Any = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoraModel(model, config, "default")
