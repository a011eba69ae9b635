"""Keys and values as a PEFT adapter for prefix tuning (2101.00190), which peft applies.

Axes: L layers, G key heads, P entries of the prefix, d head width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.devices import is_out_of_memory
from oasis_attn.errors import UserError, one_line
from oasis_attn.files import staged_folder, write_bytes, write_text

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_CHECKED = 9  # tokens with which an adapter is checked
_BASE_MODEL = "base_model"  # the subfolder with the model to which an exported adapter belongs
_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags: [oasis-attn, {family}]
---

# {title}

{text}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(f"{{path}}/base_model")
model = PeftModel.from_pretrained(model, path)
tokenizer = AutoTokenizer.from_pretrained(path)
```

With padding on the left, pass `position_ids` to a forward pass; `generate` needs nothing.
"""
_BASE_CARD = """\
---
library_name: transformers
tags: [oasis-attn, {family}]
---

# The base model of a PEFT adapter

{title}: this is its base model. The adapter is in the folder that contains this one. Without it,
this model computes something else.
"""


class Adapter(NamedTuple):
    """Keys and values in front of every sequence.

    Attributes:
        keys_LGPd, values_LGPd: as in a cache, that is, keys after the rotary embedding.
        metadata: what the file with the tensor says about them; peft does not read it.
    """

    keys_LGPd: Tensor
    values_LGPd: Tensor
    metadata: Mapping[str, str]

    def save(self, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
        """Write the two files to `folder`: a config and a tensor `[P, L * 2 * G * d]`.

        Args:
            base_model: the folder or name of the model to which the adapter belongs.
        """
        L, G, P, d = self.keys_LGPd.shape
        packed_LKGPd = torch.stack([self.keys_LGPd, self.values_LGPd], 1)
        flat = packed_LKGPd.permute(3, 0, 1, 2, 4).reshape(P, -1).detach().cpu().contiguous()
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": P,
            "prefix_projection": False,
            "num_layers": L,
            "num_attention_heads": G,
            "token_dim": G * d,
            "num_transformer_submodules": 1,
        }
        if base_model is not None:
            config["base_model_name_or_path"] = base_model
        data = save({TENSOR: flat}, {"format": "pt", **self.metadata})
        write_bytes(Path(folder) / WEIGHTS, data)
        write_text(Path(folder) / CONFIG, json.dumps(config, indent=1) + "\n")


def export_adapter(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    out: Path,
    *,
    title: str,
    text: str,
) -> None:
    """Write `adapter`, its base model, the tokenizer and a card to the new folder `out`.

    Args:
        model: what `base` computes with the adapter.
        title, text: of the card; the code that loads the folder follows the text.

    Raises:
        UserError: see `check_adapter`; nothing is written in this case.
    """
    family = base.config.get_text_config(decoder=True).model_type
    with staged_folder(out) as stage:
        base.save_pretrained(stage / _BASE_MODEL)
        tokenizer.save_pretrained(stage / _BASE_MODEL)
        tokenizer.save_pretrained(stage)
        adapter.save(stage, str(out.absolute() / _BASE_MODEL))
        check_adapter(model, base, stage)
        write_text(stage / "README.md", _CARD.format(family=family, title=title, text=text))
        write_text(stage / _BASE_MODEL / "README.md", _BASE_CARD.format(family=family, title=title))


@torch.no_grad()
def check_adapter(model: PreTrainedModel, base: PreTrainedModel, folder: Path) -> None:
    """Raise `UserError` unless `base` with the adapter in `folder` computes what `model` computes.

    Nothing is checked if peft is not installed.
    """
    if find_spec("peft") is None:
        return
    from peft import PeftModel

    family = base.config.get_text_config(decoder=True).model_type
    ids_1T = checked_ids(base)
    try:
        adapted: Any = PeftModel.from_pretrained(base, folder).eval()
        found = adapted(input_ids=ids_1T).logits
    except Exception as error:  # peft may raise any type for a family that it does not know
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"prefix: peft cannot apply it to family {family!r}: {one_line(error)}"
        ) from error
    if not is_close(found, model(input_ids=ids_1T).logits):
        raise UserError(f"prefix: peft does not compute the same with it in family {family!r}")


def checked_ids(model: PreTrainedModel) -> Tensor:
    """Tokens with which an adapter of `model` is checked, `[1, T]`."""
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(_CHECKED, device=model.device) % size)[None]


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ only by the rounding in all layers.

    That of `found` may have been in 16 bits, even if it was cast to float32 afterwards.  Parts of a
    float64 model, such as the angles of its rotary embedding, are in float32.
    """
    held = [d for d in (torch.bfloat16, torch.float16) if torch.equal(found.to(d).to(found), found)]
    dtypes = torch.float32, expected.dtype, *held
    allowed = math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))
    return bool((found - expected).norm() <= allowed * expected.norm())
