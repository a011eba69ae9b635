"""Checks of a checkpoint's files before another library builds a model from them.

The files are untrusted.  A size in the JSON files is not used before the weight files confirm it,
and code that they name is not run.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig

from oasis_attn.devices import is_out_of_memory
from oasis_attn.errors import UserError, one_line, parse_json
from oasis_attn.modeling.hf_compat import IMPLEMENTATION_KEYS, AutoHfQuantizer, find_file

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OBJECTS = (  # files that must hold a JSON object where they are present
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_COUNT = re.compile(r"(layers?|blocks|labels)$")  # config classes build a list of this length
MOST_COUNTED = 10_000
_BUFFER_ALLOWANCE = 2**28  # elements of buffers that are not stored in a file (causal masks)


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Attributes:
        name: the name that the user gave, for messages.
        source: a local folder or a Hub id, for `from_pretrained`.
        trust_remote_code: whether Python code in the checkpoint may run.
    """

    name: str
    source: str
    trust_remote_code: bool

    def error(self, reason: str) -> UserError:
        if Path(self.source).exists():
            return UserError(f"model: {self.name!r} cannot be loaded: {reason}")
        return UserError(
            f"model: {self.name!r} is not found locally and cannot be loaded from the Hub: {reason}"
        )

    @contextmanager
    def foreign(self, part: str) -> Iterator[None]:
        """Context in which another library reads `part` of the checkpoint.

        Any exception is caused by the files, and is raised as one `UserError`.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the library may raise any type on a broken file
            if is_out_of_memory(error):  # which depends on the machine
                raise
            reason = one_line(error)
            if not self.trust_remote_code and "trust_remote_code" in reason:
                raise self.error(
                    f"{part} needs Python code from the checkpoint, which is not run by default;"
                    " read the code, then allow it with --trust-remote-code"
                    " (trust_remote_code=True)"
                ) from error
            if not isinstance(error, OSError | ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise self.error(f"{part}: {reason}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in one of the files; None if the file does not exist."""
        with self.foreign(name):
            required = name == "config.json"
            path = find_file(self.source, name, absent_ok=not required, offline_ok=not required)
            return None if path is None else read_object(path)

    def check_json(self) -> bool:
        """Raise `UserError` if the JSON files are invalid or unsafe.

        Returns:
            Whether the config says that the weights are quantized.
        """
        config = self.read_json("config.json")
        assert config is not None  # required: read_json raises if it does not exist
        if self.read_json("adapter_config.json") is not None:
            raise self.error(
                "adapter_config.json: this is a PEFT adapter; merge it into its base model"
                " (merge_and_unload) and save the result"
            )
        for name in _OBJECTS:
            self.read_json(name)
        with self.foreign("config.json"):
            return check_config(config, trust_remote_code=self.trust_remote_code)

    def weight_bytes(self) -> int:
        """The size of all weight files.

        Raises:
            UserError: a weight file is missing or damaged, or a file would not be read.
        """
        return sum(os.path.getsize(path) for path in self._weight_files())

    def _weight_files(self) -> list[str]:
        single = self._file(_WEIGHTS)
        index = None if single else self.read_json(_INDEX)
        if single is not None:
            shards = {_WEIGHTS: single}
        elif index is not None:
            shards = self._shards(index)
        else:
            raise self.error(f"it contains neither {_WEIGHTS} nor {_INDEX}")
        for path in sorted(Path(self.source).glob("*.safetensors")):
            if path.name not in shards:
                raise self.error(f"{path.name} would not be read; move it to another folder")
        return list(shards.values())

    def _shards(self, index: dict[str, Any]) -> dict[str, str]:
        placed = index.get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise self.error(f"{_INDEX}: weight_map does not map tensors to files")
        shards = {}
        for name in dict.fromkeys(placed.values()):
            if not isinstance(name, str) or PurePosixPath(name).name != name:
                raise self.error(f"{_INDEX}: {name!r} is not a file name in the same folder")
            path = self._file(name)
            if path is None:
                raise self.error(f"{_INDEX}: {name} does not exist")
            shards[name] = path
        for name, path in shards.items():
            with self.foreign(name), safe_open(path, "pt") as file:
                held = set(file.keys())
            listed = {key for key, where in placed.items() if where == name}
            if held != listed:
                different = min(held ^ listed)
                only = "the file" if different in held else "the index"
                raise self.error(f"{_INDEX}: {different} of {name} is only in {only}")
        return shards

    def _file(self, name: str) -> str | None:
        with self.foreign(name):
            return find_file(self.source, name, absent_ok=True)


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` if it contains another type."""
    found = parse_json(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it contains {json.dumps(found)[:40]}, not a JSON object")
    return found


def check_config(config: dict[str, Any], *, trust_remote_code: bool) -> bool:
    """Raise `ValueError` on values that do harm before transformers validates them.

    Returns:
        Whether the config says that the weights are quantized.
    """
    quantized = False
    for key, value in config.items():
        if callable(getattr(PreTrainedConfig, key, None)):
            raise ValueError(f"{key} is not a config field; it would replace a method")
        if _COUNT.search(key) and isinstance(value, int) and abs(value) > MOST_COUNTED:
            raise ValueError(f"{key}: {value!r} is more than {MOST_COUNTED}")
        if key in IMPLEMENTATION_KEYS and "/" in str(value) and not trust_remote_code:
            raise ValueError(
                f"{key}: {value!r} names code on the Hub; allow it with --trust-remote-code"
            )
        if key == "transformers_weights" and value is not None:
            raise ValueError(f"{key}: only {_WEIGHTS} and the files that {_INDEX} lists are read")
        if key == "quantization_config" and value is not None:
            _check_quantization(value)
            quantized = True
        elif key.endswith("_config") and isinstance(value, dict):
            quantized |= check_config(value, trust_remote_code=trust_remote_code)
    if config.get("model_type") == "oasis" and not isinstance(config.get("text_config"), dict):
        raise ValueError(f"text_config: {config.get('text_config')!r} is not a family's config")
    return quantized


def _check_quantization(value: Any) -> None:
    method = value.get("quant_method") if isinstance(value, dict) else None
    if not isinstance(method, str) or not AutoHfQuantizer.supports_quant_method(value):
        raise ValueError(f"quantization_config: quant_method {method!r} is unknown")


@contextmanager
def parameter_limit(limit: int, message: str) -> Iterator[None]:
    """Context in which building a larger model on the meta device raises `UserError(message)`.

    The error comes at the first parameter beyond `limit`, before a model is complete that would not
    fit in memory or would take minutes to construct.
    """
    thread = threading.get_ident()

    def counter(allowed: int) -> Any:
        counted = 0

        def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
            nonlocal counted
            if tensor is not None and tensor.is_meta and threading.get_ident() == thread:
                counted += tensor.numel()
                if counted > allowed:
                    raise UserError(message)

        return count

    handles = (
        register_module_parameter_registration_hook(counter(limit)),
        register_module_buffer_registration_hook(counter(limit + _BUFFER_ALLOWANCE)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
