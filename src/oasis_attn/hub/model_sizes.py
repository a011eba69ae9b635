"""Named model sizes: decoder backbones for training from scratch.

All are Llama models (RMSNorm before each sublayer, rotary positions, SwiGLU of width 8/3 D rounded
up to a multiple of 32).  Embeddings are tied, because in such small models a separate output matrix
would hold most of the parameters.  The parameter counts are of the vanilla variant with the default
vocabulary of the size.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_attn.errors import UserError, check_choice, check_whole, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LARGEST_VOCABULARY = 2**24


def _llama(*, width: int, layers: int, heads: int, vocab_size: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": -(-8 * width // (3 * 32)) * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
    }


# Parameters:   pico 0.3 M,  nano 2.1 M,  micro 8.5 M,  mini 29.5 M,  small 110 M,  medium 337 M
SIZES: dict[str, dict[str, Any]] = {
    "pico": _llama(width=64, layers=4, heads=4, vocab_size=1024, length=512),
    "nano": _llama(width=128, layers=8, heads=4, vocab_size=4096, length=2048),
    "micro": _llama(width=256, layers=8, heads=4, vocab_size=8192, length=2048),
    "mini": _llama(width=512, layers=8, heads=8, vocab_size=8192, length=2048),
    "small": _llama(width=768, layers=12, heads=12, vocab_size=32768, length=4096),
    "medium": _llama(width=1024, layers=24, heads=16, vocab_size=32768, length=4096),
}


def check_size(size_or_path: str | Path, vocab_size: int | None = None) -> None:
    """Raise `UserError` for an unknown size or a vocabulary that is not possible, without torch."""
    name = str(size_or_path)
    if not os.path.exists(name):
        check_choice("size (or a configuration file)", name, SIZES)
    if vocab_size is not None:
        check_whole("vocab_size", vocab_size, 1, _LARGEST_VOCABULARY)


def text_config(size_or_path: str | Path, vocab_size: int | None = None) -> PreTrainedConfig:
    """The configuration of the backbone.

    Args:
        size_or_path: a name in `SIZES`, a Hugging Face config.json, or the folder that contains it.
        vocab_size: number of tokens; default: that of the size or file.

    Raises:
        UserError: the size is unknown (the message names the nearest one), or the file is not a
            configuration.
    """
    check_size(size_or_path, vocab_size)

    from transformers import LlamaConfig

    name = str(size_or_path)
    config = LlamaConfig(**SIZES[name]) if name in SIZES else _read(name)
    if vocab_size is not None:
        config.vocab_size = vocab_size
    return config


def _read(path: str) -> PreTrainedConfig:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from oasis_attn.hub.checkpoint import check_config, parameter_limit, read_object

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    too_large = f"size: {path!r} describes a model that does not fit in the memory of this machine"
    try:
        check_config(read_object(file), trust_remote_code=False)
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"), parameter_limit(memory // 4, too_large):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the library may raise any type on a broken file
        raise UserError(
            f"size: {path!r} is not a Hugging Face configuration ({one_line(error)})"
        ) from error
    return config
