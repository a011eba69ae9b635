"""`OasisConfig`: a family's own config, and the method's settings around it."""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from oasis_attn.errors import UserError, check_at_least, check_choice, check_whole
from oasis_attn.ops.normalizers import NORMALIZERS, WITH_NULL

ATTENTION = "oasis"
"""The name of our function in transformers' attention and mask registries."""

_LARGEST = 1e6  # of numbers that are set
_CHOICES = {
    "token_normalizer": tuple(name for name in NORMALIZERS if name != "sigmoid"),
    "output_gate": ("none", "head", "elementwise"),
    "residual": ("sum", "depth", "authors"),
    "depth_normalizer": ("softmax", "softmax1", "sigmoid"),
    "depth_scale": ("none", "sources", "unit"),
    "branch_scale": ("none", "unit", "bounded", "mlp"),
    "null_signal": ("off", "on", "shuffled"),
    "evidence": ("mass", "log"),
    "mlp_evidence": ("attention", "none"),
    "coupling": ("router", "head"),
}
_FORWARDED = {  # what transformers reads off a model's top config
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "sliding_window"),
    *("classifier_dropout", "hidden_dropout"),
}
BROKEN = (
    *(StrictDataclassError, OSError, ValueError, TypeError, AttributeError, LookupError),
    ArithmeticError,
)
"""What transformers raises for a configuration whose fields are absent or of another kind."""
_BASE_EXTRAS = {  # what transformers itself may hand to any config
    *("torch_dtype", "attn_implementation", "experts_implementation", "output_attentions"),
    *("name_or_path", "num_labels", "trust_remote_code", "model_type"),
    *("quantization_config", "tokenizer_class"),
}


class OasisConfig(PreTrainedConfig):
    """A decoder family's config with a null option in attention and routing over depth.

    Everything is saved with a checkpoint, the attention function included: `from_pretrained` needs
    no flag.  Settings that cannot act together are refused at construction.

    Args:
        text_config: the family's own config, or its dictionary with `model_type`; default Llama.
        token_normalizer: of token attention, see `oasis_attn.ops.normalizers`.
        null_logit: c of `softmax1`; 0 is Softmax1, very negative values switch the null off.
        clip_gamma: gamma < 0 of `clipped_softmax` (Bondarenko 2023 take -alpha / T, alpha 2 to 4).
        output_gate: sigmoid gate on the attention output before its projection: one per `head`
            and token (Bondarenko 2023), or `elementwise` (arXiv 2505.06708).
        residual: `sum`, attention over `depth` (arXiv 2603.15031), or the form of the OASIS
            `authors`: sources are states, routers in each layer project queries and keys.
        depth_block_size: sublayers per depth source; 1 is the full form.
        depth_normalizer: over the sources.  In this form a common factor on the weights cancels in
            the next RMSNorm, so that in a family with pre-norms `softmax1` does what `softmax`
            does, with the null signal and without, up to the norms' eps: it changes the scale of
            the mixes alone.  That eps is not small beside the mixes of a new model: see
            docs/study.md.
        depth_scale: `sources` multiplies the mix by the number of sources (plus one for `softmax1`,
            2 for `sigmoid`), so that zero queries give the exact residual sum.  `unit` brings each
            token's mix to a root mean square of 1.  The next RMSNorm removes that, up to its eps,
            but a quantiser needs it: without it, tokens whose mixes are small share a range with
            large ones.
        branch_scale: `unit` brings the embedding and each branch's output to a root mean square of
            1 at each token before they join the residual, as Peri-LN (arXiv 2502.02732) without its
            gain: none counts for more by being large.  `bounded` divides by sqrt(mean square +
            0.1): none becomes larger than 1, but what is small stays small, so that a null can
            still silence a branch.  `mlp` is `unit` for MLPs alone: how large attention's output is
            stays the null's affair.
        null_signal: psi lowers the depth logits (OASIS); `shuffled` over all tokens of the batch,
            one permutation a layer, keeps its distribution and destroys its information (a control;
            not causal).
        evidence: what psi is the mean over heads of: the null `mass` (OASIS), or its `log`,
            log(1 + null / 0.001), to which a null of a hundredth says nearly as much as one of a
            half.
        mlp_evidence: psi of an MLP is that of its layer's `attention` (OASIS), or `none`, so that
            it is not routed around for what attention lacked.
        coupling: beta is one number a `router` (OASIS), or times one learned for each `head` of the
            source.
        coupling_init: initial value of beta before the softplus.
        recency_init: of the authors' bias towards late states (their code has 0.0 and 8.0).

    Raises:
        UserError: on an unknown setting or value, or settings that exclude each other.
    """

    model_type = "oasis"
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: Any = None
    token_normalizer: str = "softmax1"
    null_logit: float = 0.0
    clip_gamma: float = 0.0
    output_gate: str = "none"
    residual: str = "depth"
    depth_block_size: int = 1
    depth_normalizer: str = "softmax1"
    depth_scale: str = "none"
    branch_scale: str = "none"
    null_signal: str = "on"
    evidence: str = "mass"
    mlp_evidence: str = "attention"
    coupling: str = "router"
    coupling_init: float = -5.0
    recency_init: float = 0.0
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        known = _BASE_EXTRAS | _FORWARDED
        refuse_unknown(name for name in kwargs if name not in known and name[0] != "_")
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, ATTENTION):
            raise UserError(
                f"attn_implementation: {asked!r} has no null option;"
                f" leave it out, it is {ATTENTION!r}"
            )
        if not isinstance(self.text_config, dict | PreTrainedConfig | None):
            raise UserError(f"text_config: {self.text_config!r} is no configuration or its mapping")
        if isinstance(self.text_config, PreTrainedConfig):
            # Ours from here on: the caller's object keeps its own attention implementation.
            self.text_config = copy.deepcopy(self.text_config)
            # The top config hands its own down, and would forget the family's.
            kwargs.setdefault("experts_implementation", self.text_config._experts_implementation)
        labelled = self.id2label is not None or "num_labels" in kwargs
        try:
            super().__post_init__(**kwargs)
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"text_config: {' '.join(str(error).split())}") from error
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        text: Any = self.text_config
        if not labelled:  # a classifier's are in the family's config
            self.id2label, self.label2id = text.id2label, text.label2id
        if self.problem_type is None:
            self.problem_type = text.problem_type
        if text.output_attentions:  # which it could not be saved with beside our function
            self.output_attentions, text.output_attentions = True, False
        self.check()
        self._attn_implementation = ATTENTION

    def __getattr__(self, name: str) -> Any:
        # An open fall-through would leak the family's fields into this config's own.
        if name in _FORWARDED and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        text = self.__dict__.get("text_config")
        if name in _FORWARDED and isinstance(text, PreTrainedConfig):
            setattr(text, name, value)  # where the family's own model reads it
        else:
            super().__setattr__(name, value)

    @property
    def output_attentions(self) -> bool:
        """Whether forward returns attention maps unless told; our function can, `eager` or not."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: see `output_attentions`."""

    def validate(self) -> None:
        """Raise `UserError` on what could not be loaded again; `save_pretrained` asks first."""
        self.check()
        try:
            self.text_config.validate()
            for validator in self.__class_validators__:  # by name: one of them is overridden here
                getattr(self, validator.__name__)()
        except BROKEN as error:
            raise UserError(f"config: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """As transformers', less attributes of other libraries, which loading would refuse."""
        known = {field.name for field in fields(self)} | _BASE_EXTRAS
        return {
            name: value
            for name, value in super().to_dict().items()
            if name in known or name[0] == "_"
        }

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As transformers', except that a family's own checkpoint is taken as `text_config`."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found and found.get("model_type") != cls.model_type and "text_config" not in found:
            found = {"text_config": found, "model_type": cls.model_type}
        return found, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As transformers', but a checkpoint must say of which family it is: none is the default.

        Raises:
            UserError: no `text_config`.
        """
        if config_dict.get("text_config") is None:
            raise UserError("text_config: None is not a family's configuration or its mapping")
        return super().from_dict(config_dict, **kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, as the constructor takes them."""
        return {name: getattr(self, name) for name in SETTINGS}

    def check(self) -> None:
        """Raise `UserError` on a setting's unknown value, and on settings that exclude each other.

        The constructor does; whoever changes a setting afterwards should.
        """
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        check_whole("depth_block_size", self.depth_block_size, 1)
        for name in ("null_logit", "clip_gamma", "coupling_init", "recency_init"):
            value = getattr(self, name)
            if name != "null_logit" or value != -math.inf:  # minus infinity: no null
                check_at_least(name, value, -_LARGEST, _LARGEST)
        self._belongs("null_logit", "token_normalizer", ("softmax1",))
        self._belongs("clip_gamma", "token_normalizer", ("clipped_softmax",))
        if self.token_normalizer == "clipped_softmax" and not self.clip_gamma < 0:
            raise UserError(
                f"clip_gamma: {self.clip_gamma!r} is not below 0, so nothing is clipped"
            )
        self._belongs("depth_normalizer", "residual", ("depth", "authors"))
        for name in ("depth_block_size", "depth_scale"):
            self._belongs(name, "residual", ("depth",))
        self._belongs("recency_init", "residual", ("authors",))
        if self.null_signal != "off":
            if self.residual == "sum":
                raise UserError(
                    f"null_signal: {self.null_signal!r} needs residual 'depth', for a sum has"
                    " no router; set null_signal='off'"
                )
            if self.token_normalizer not in WITH_NULL:
                raise UserError(
                    f"null_signal: {self.null_signal!r} needs a token_normalizer with a null,"
                    f" one of {', '.join(WITH_NULL)}; {self.token_normalizer!r} has none"
                )
        for name in ("evidence", "mlp_evidence", "coupling", "coupling_init"):
            self._belongs(name, "null_signal", ("on", "shuffled"))
        for name in ("mlp_evidence", "coupling"):
            self._belongs(name, "residual", ("depth",))

    def _belongs(self, name: str, other: str, values: tuple[str, ...]) -> None:
        """A setting that the others leave without effect must be at its default."""
        if getattr(self, other) not in values and getattr(self, name) != getattr(type(self), name):
            raise UserError(
                f"{name}: {getattr(self, name)!r} has no effect with"
                f" {other}={getattr(self, other)!r}; it needs {' or '.join(map(repr, values))}"
            )


SETTINGS = (
    "token_normalizer",
    "null_logit",
    "clip_gamma",
    "output_gate",
    "residual",
    "depth_block_size",
    "depth_normalizer",
    "depth_scale",
    "branch_scale",
    "null_signal",
    "evidence",
    "mlp_evidence",
    "coupling",
    "coupling_init",
    "recency_init",
)


def check_settings(names: Iterable[str]) -> None:
    """Raise `UserError` on the first of `names` that is none of `SETTINGS`."""
    refuse_unknown(name for name in names if name not in SETTINGS)


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise `UserError` on the first of `names`, with the setting it may have meant."""
    for name in names:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"settings: {name!r} is none of {', '.join(SETTINGS)}{hint}")


AutoConfig.register(OasisConfig.model_type, OasisConfig)
