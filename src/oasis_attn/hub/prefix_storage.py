"""Saving and loading of models with a prefix through transformers' `HfQuantizer` interface.

transformers calls an `HfQuantizer` when it saves or loads a model whose config has a
`quantization_config`.  If the method in it is unknown, because `oasis_attn` was not imported,
transformers only warns and loads the weights that it recognizes; the model would then compute
something else.  Therefore the input embedding is stored with the shape `[V, D, 1]`, which makes
plain transformers stop with an error.  Quantized models are stored in the same way, see
`quantization.hf_quantizer`.

This module is imported while transformers itself is being imported, so it imports modules that need
transformers only when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oasis_attn.errors import UserError
from oasis_attn.modeling.hf_compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    before_upload,
    has_adapter,
    not_before_upload,
    register_quantization_config,
    register_quantizer,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METHOD = "oasis_prefix"


@register_quantization_config(METHOD)
class PrefixConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model with a prefix.

    Args:
        prefix: `tokens`, a list of ids; `shape`, the shape `[L, G, P, d]` of the keys and of the
            values; and `tuned`, see `Prefix`; None if there is no prefix.

    Raises:
        UserError: by `from_dict`, if a field has the wrong form.
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
        """Raise an error if a field has the wrong form."""
        if self.prefix is None:
            return
        tokens, shape = self.prefix["tokens"], self.prefix["shape"]
        whole = all(type(number) is int and number >= 0 for number in [*tokens, *shape])
        flag = type(self.prefix["tuned"]) is bool
        if not (whole and flag) or len(shape) != 4 or shape[2] != len(tokens):
            raise UserError(
                f"quantization_config: {self.prefix} is not a list of tokens, a shape and a flag"
            )


@register_quantizer(METHOD)
class PrefixHfQuantizer(HfQuantizer):
    """Stores the prefix with the weights, and the embedding with a shape of its own."""

    requires_calibration = True  # it only loads saved models; it does not quantize while loading
    is_trainable = True
    quantization_config: PrefixConfig
    state_dict: Mapping[str, Tensor] | None = None
    """The argument `state_dict` of `save_pretrained` while that runs."""

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save."""
        from oasis_attn.hub.prefix import prefix_of
        from oasis_attn.modeling.decoder_map import find_decoder

        if has_adapter(model):
            return None, {}  # transformers saves only the adapter
        state = dict(model.state_dict() if self.state_dict is None else self.state_dict)
        if any(tensor.is_meta for tensor in state.values()):
            raise UserError("model: it is offloaded; load it without offloading to save it")
        prefix = prefix_of(model)
        if prefix is not None:
            decoder = find_decoder(model)
            path = f"{decoder.name}." if decoder.name else ""
            state[f"{path}kv_prefix.keys"] = prefix.keys_LGPd
            state[f"{path}kv_prefix.values"] = prefix.values_LGPd
        embedding = model.get_input_embeddings().weight
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is embedding and name in state:
                state[name] = state[name].unsqueeze(-1)
        return state, {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **_kwargs: Any
    ) -> PreTrainedModel:
        from oasis_attn.modeling.decoder_map import find_decoder

        embedding: Any = model.get_input_embeddings()
        name = next(each for each, p in model.named_parameters() if p is embedding.weight)
        # That of ProphetNet is tied to another one, under whose name it is stored.
        stored: Any = model.get_parameter(model.all_tied_weights_keys.get(name, name))
        stored.data = stored.data.unsqueeze(-1)
        if self.quantization_config.prefix is not None:
            prefix, shape = nn.Module(), self.quantization_config.prefix["shape"]
            for part in ("keys", "values"):
                prefix.register_buffer(part, torch.empty(shape, device="meta", dtype=model.dtype))
            find_decoder(model).module.add_module("kv_prefix", prefix)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_kwargs: Any
    ) -> PreTrainedModel:
        from oasis_attn.hub.prefix import Prefix, attach_prefix
        from oasis_attn.modeling.decoder_map import find_decoder

        devices = set(getattr(model, "hf_device_map", {}).values())
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise UserError(
                "device_map: a model that is quantized or has a prefix cannot be offloaded"
            )
        embedding: Any = model.get_input_embeddings()
        embedding.weight.data = embedding.weight.data.squeeze(-1)
        set_hf_quantizer(model, self)
        fields = self.quantization_config.prefix
        if fields is not None:
            decoder: Any = find_decoder(model).module
            stored = decoder.kv_prefix
            del decoder.kv_prefix
            tokens = tuple(fields["tokens"])
            prefix = Prefix(
                tokens=tokens,
                keys_LGPd=stored.keys,
                values_LGPd=stored.values,
                tuned=fields["tuned"],
            )
            attach_prefix(model, prefix)
        if type(self) is PrefixHfQuantizer:
            vars(model)["is_quantized"] = False  # transformers sets it for every `HfQuantizer`
        return model


def set_hf_quantizer(model: PreTrainedModel, quantizer: PrefixHfQuantizer) -> None:
    """Make `save_pretrained` save `model` through `quantizer`, with a model card and its config."""
    # `OasisConfig` accepts only its own settings, so the family's config holds this one.
    text = model.config.get_text_config(decoder=True)
    if text is not model.config:
        vars(model.config).pop("quantization_config", None)
    if model.config.model_type == "oasis":  # `hub.model_code` cannot load what this one stores
        vars(model.config).pop("auto_map", None)
    text.quantization_config = quantizer.quantization_config
    vars(model)["hf_quantizer"] = quantizer
    vars(model)["save_pretrained"] = partial(_save_pretrained, model)
    before_upload(model, _write_further_files)


def prefix_hf_quantizer(model: PreTrainedModel) -> PrefixHfQuantizer:
    """Return the quantizer of `model`; create one if there is none.

    Raises:
        UserError: another library quantized the model; its checkpoints cannot store a prefix.
    """
    found: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    if found is None:
        found = PrefixHfQuantizer(PrefixConfig())
        set_hf_quantizer(model, found)
    elif not isinstance(found, PrefixHfQuantizer):
        method = found.quantization_config.quant_method
        raise UserError(f"model: it is quantized by {method!s} and cannot be saved with a prefix")
    return found


def forget_prefix(model: PreTrainedModel) -> None:
    """Make `save_pretrained` save `model` without a prefix; undoes what `attach_prefix` set."""
    quantizer = prefix_hf_quantizer(model)
    quantizer.quantization_config.prefix = None
    if type(quantizer) is PrefixHfQuantizer:  # otherwise the model is quantized, too
        del model.config.get_text_config(decoder=True).quantization_config
        for name in ("hf_quantizer", "save_pretrained"):
            del vars(model)[name]
        not_before_upload(model)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    quantizer = prefix_hf_quantizer(model)
    quantizer.state_dict = state_dict
    try:
        type(model).save_pretrained(model, save_directory, is_main_process, None, *args, **kwargs)
    finally:
        quantizer.state_dict = None
    if is_main_process and not has_adapter(model):
        _write_further_files(model, save_directory)


def _write_further_files(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the copy of the prefix, and a model card in place of the one of transformers."""
    from oasis_attn.hub.model_card import write_card
    from oasis_attn.hub.prefix import copy_prefix

    write_card(model, folder)
    if not has_adapter(model):
        copy_prefix(model, folder)
