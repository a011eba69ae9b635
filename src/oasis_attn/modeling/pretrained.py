"""What every model of ours is to transformers, and what it refuses."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.card import write_card
from oasis_attn.modeling.configuration import ATTENTION, OasisConfig
from oasis_attn.modeling.depth_cache import DepthRouter
from oasis_attn.modeling.prefix import copy_prefix


class OasisPreTrainedModel(PreTrainedModel):
    """Declarations, memory switches, and saving with a model card."""

    config_class = OasisConfig
    config: OasisConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "depth_cache", "layer_args"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def oasis_config(self) -> OasisConfig:
        """The settings, which `config` holds in a model with a head."""
        return self.config

    @classmethod
    def from_pretrained(cls, *args: Any, tp_plan: Any = None, **kwargs: Any) -> Self:
        """As transformers', less tensor parallelism: psi is a mean over all heads of a layer."""
        if tp_plan is not None:
            raise UserError(f"tp_plan: {tp_plan!r} would split the heads the null signal averages")
        return super().from_pretrained(*args, **kwargs)

    def set_attn_implementation(
        self,
        attn_implementation: str | dict[Any, Any],
        allow_all_kernels: bool = False,  # noqa: ARG002
    ) -> None:
        """Refused unless it is ours: no other function has a null option."""
        _refuse_attention(attn_implementation)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """As transformers', at construction: `from_config` writes its argument into the config."""
        _refuse_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True: experts are the family's own.  transformers would look for them in our source."""
        return True

    def _grouped_mm_can_dispatch(self) -> bool:
        """As the family's own model; experts are "eager" in a family that cannot, by default."""
        from transformers import MODEL_MAPPING  # which is there once our models are registered

        family: Any = MODEL_MAPPING[type(self.config.get_text_config())]
        if not family._can_set_experts_implementation():
            raise UserError(f"experts_implementation: 'grouped_mm' is not for {family.__name__}")
        return True

    def recompute_mixes(self, enabled: bool = True) -> None:
        """Recompute each depth mix and the norm after it in backward instead of keeping them.

        What a sublayer keeps is then no more than with a residual sum, at the price of one more
        pass over the sources each way.
        """
        for module in self.modules():
            if isinstance(module, DepthRouter):
                module.recompute = enabled

    def _activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers', less the reentrant form, which loses the depth sources' gradients."""
        reentrant = (activation_checkpointing_kwargs or {}).get("use_reentrant")
        if reentrant and self.oasis_config.residual != "sum":
            raise UserError("use_reentrant: True drops the depth sources' gradients; set it False")
        if self.oasis_config.residual != "sum":
            # A layer hands its sources on through the cache.  torch.compile refuses such an effect
            # in a checkpointed layer, which is not repeated in backward; the cache needs no repeat.
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers', and a model card beside the weights (see `card.write_card`)."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(self, save_directory)
            copy_prefix(self, save_directory)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        write_card(self, working_dir)  # transformers has just put its own template there
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _refuse_attention(asked: str | dict[Any, Any] | None) -> None:
    if asked != ATTENTION:
        raise UserError(
            f"attn_implementation: {asked!r} has no null option; only {ATTENTION!r} has"
        )


def check_cache(cache: Cache, layers: nn.ModuleList, batch: int) -> None:
    """Refuse a cache that another model, or another batch, has filled.

    Raises:
        UserError: not a transformers `Cache`, or one of other layers, keys or sequences.
    """
    if not isinstance(cache, Cache):
        raise UserError(f"past_key_values: {type(cache).__name__!r} is no transformers Cache")
    found = len(getattr(cache, "layers", ()))
    if found not in (0, len(layers)):  # a dynamic cache may grow its layers as they come
        raise UserError(
            f"past_key_values: has {found} layers, this model {len(layers)}; it is another model's"
        )
    keys = getattr(cache.layers[0], "keys", None) if found else None
    if keys is None or keys.dim() != 4:
        return
    sequences, heads, _, width = keys.shape
    if sequences != batch:
        raise UserError(f"past_key_values: holds {sequences} sequences, the input {batch}")
    projection = getattr(layers[0].self_attn, "k_proj", None)
    expected = getattr(projection, "out_features", heads * width)
    if heads * width != expected:
        raise UserError(
            f"past_key_values: has keys of {heads} heads x {width}, this model {expected} numbers;"
            " it is another model's"
        )
