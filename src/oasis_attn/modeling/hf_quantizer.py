"""How models that plain transformers cannot compute are saved and loaded: a guard, and the prefix.

transformers lets a `HfQuantizer` take part in saving and loading any model whose config has a
`quantization_config`.  Where the method in it is unknown, because `oasis_attn` was not imported, it
only warns, and would load what it recognises.  So the input embedding is stored as `[V, D, 1]`:
everywhere but here, its shape stops the loading with an error.

This module is imported while transformers itself is; it imports what needs transformers on use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from oasis_attn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METHOD = "oasis_prefix"


@register_quantization_config(METHOD)
class PrefixConfig(QuantizationConfigMixin):
    """What `config.json` says of a model with a prefix.

    Args:
        prefix: `tokens`, a list of ids, and `shape`, that of the keys and of the values
            `[L, G, P, d]`; None if there is no prefix.

    Raises:
        UserError: by `from_dict`, on any other form.
    """

    def __init__(self, prefix: Mapping[str, Any] | None = None, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.prefix = None if prefix is None else dict(prefix)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            config: Any = super().from_dict(config_dict, *args, **kwargs)  # type: ignore[no-untyped-call]
            config.check()
        except UserError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"quantization_config: {reason}") from error
        return config

    def check(self) -> None:
        """Raise an error if a field has not the form that it should have."""
        if self.prefix is None:
            return
        tokens, shape = self.prefix["tokens"], self.prefix["shape"]
        whole = all(type(number) is int and number >= 0 for number in [*tokens, *shape])
        if not whole or len(shape) != 4 or shape[2] != len(tokens):
            raise UserError(f"quantization_config: {self.prefix} is not tokens and keys' shape")


@register_quantizer(METHOD)
class PrefixQuantizer(HfQuantizer):
    """Stores the prefix beside the weights and the embedding in a shape of its own."""

    requires_calibration = True  # it loads what was saved; it quantises nothing
    is_trainable = True
    quantization_config: PrefixConfig
    given: Mapping[str, Tensor] | None = None
    """The state that `save_pretrained` was called with, while it runs."""

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors as they are on disk."""
        from oasis_attn.modeling.prefix import prefix_of

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # an adapter alone is saved
        state = dict(model.state_dict() if self.given is None else self.given)
        if any(tensor.is_meta for tensor in state.values()):
            raise UserError("model: it is offloaded; load it without offloading to save it")
        prefix = prefix_of(model)
        if prefix is not None:
            decoder = model.get_decoder()
            place = next(name for name, module in model.named_modules() if module is decoder)
            place = f"{place}." if place else ""
            state[f"{place}kv_prefix.keys"] = prefix.keys_LGPd
            state[f"{place}kv_prefix.values"] = prefix.values_LGPd
        embedding = model.get_input_embeddings().weight
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is embedding and name in state:
                state[name] = state[name].unsqueeze(-1)
        return state, {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **_kwargs: Any
    ) -> PreTrainedModel:
        embedding: Any = model.get_input_embeddings()
        embedding.weight.data = embedding.weight.data.unsqueeze(-1)
        if self.quantization_config.prefix is not None:
            stored, shape = nn.Module(), self.quantization_config.prefix["shape"]
            for name in ("keys", "values"):
                stored.register_buffer(name, torch.empty(shape, device="meta", dtype=model.dtype))
            model.get_decoder().add_module("kv_prefix", stored)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_kwargs: Any
    ) -> PreTrainedModel:
        from oasis_attn.modeling.prefix import Prefix, attach_prefix

        devices = set(getattr(model, "hf_device_map", {}).values())
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise UserError(
                "device_map: a model that is quantised or has a prefix cannot be offloaded"
            )
        embedding: Any = model.get_input_embeddings()
        embedding.weight.data = embedding.weight.data.squeeze(-1)
        set_hf_quantizer(model, self)
        fields = self.quantization_config.prefix
        if fields is not None:
            decoder: Any = model.get_decoder()
            stored = decoder.kv_prefix
            del decoder.kv_prefix
            tokens = tuple(fields["tokens"])
            attach_prefix(
                model, Prefix(tokens=tokens, keys_LGPd=stored.keys, values_LGPd=stored.values)
            )
        if type(self) is PrefixQuantizer:
            vars(model)["is_quantized"] = False  # transformers marks all that comes through here
        return model


def set_hf_quantizer(model: PreTrainedModel, quantizer: PrefixQuantizer) -> None:
    """Let `save_pretrained` write `model` as `quantizer` does, with a card, and config say so."""
    # `OasisConfig` knows its own settings and no others: the family's config holds it there.
    text = model.config.get_text_config(decoder=True)
    if text is not model.config:
        vars(model.config).pop("quantization_config", None)
    text.quantization_config = quantizer.quantization_config
    vars(model)["hf_quantizer"] = quantizer
    vars(model)["save_pretrained"] = partial(_save_pretrained, model)
    vars(model)["_upload_modified_files"] = partial(_upload_modified_files, model)


def prefix_quantizer(model: PreTrainedModel) -> PrefixQuantizer:
    """The one that `model` has, or a new one.

    Raises:
        UserError: the model is quantised by another library, whose checkpoints hold no prefix.
    """
    found: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    if found is None:
        found = PrefixQuantizer(PrefixConfig())
        set_hf_quantizer(model, found)
    elif not isinstance(found, PrefixQuantizer):
        method = found.quantization_config.quant_method
        raise UserError(f"model: it is quantised by {method!s} and cannot be saved with a prefix")
    return found


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    from oasis_attn.modeling.card import write_card
    from oasis_attn.modeling.prefix import copy_prefix

    quantizer = prefix_quantizer(model)
    quantizer.given = state_dict
    try:
        type(model).save_pretrained(model, save_directory, is_main_process, None, *args, **kwargs)
    finally:
        quantizer.given = None
    if is_main_process and not getattr(model, "_hf_peft_config_loaded", False):
        write_card(model, save_directory)
        copy_prefix(model, save_directory)


def _upload_modified_files(
    model: PreTrainedModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    from oasis_attn.modeling.card import write_card

    write_card(model, working_dir)  # transformers has just put its own template there
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)
