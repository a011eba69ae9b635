"""A checkpoint's files, checked before another library builds anything from them.

A folder may come from anywhere.  Its JSON may hold anything, so that no count in it is believed
before the weights confirm it, and no code that it names is run.
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
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from oasis_attn.errors import UserError, one_line, parse_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OBJECTS = (  # files that must hold a JSON object where they are present
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_COUNT = re.compile(r"(layers?|blocks|labels)$")  # settings that config classes make lists of
MOST_COUNTED = 10_000
_BUFFER_ROOM = 2**28  # elements of buffers, such as causal masks, that no file holds
_KERNEL_SETTINGS = (
    *("attn_implementation", "_attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Attributes:
        name: what the user calls it, for messages.
        source: a local folder or a hub id, as `from_pretrained` takes it.
        trust_remote_code: whether Python code that comes with it may run.
    """

    name: str
    source: str
    trust_remote_code: bool

    def error(self, reason: str) -> UserError:
        where = "" if Path(self.source).exists() else "is not found locally, and from the Hub "
        return UserError(f"model: {self.name!r} {where}cannot be loaded: {reason}")

    @contextmanager
    def foreign(self, part: str) -> Iterator[None]:
        """While open, another library interprets `part` of the checkpoint.

        Whatever it raises then is caused by the files: it becomes one `UserError`.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a foreign library on a foreign file: no list would be complete
            reason = one_line(error)
            if not self.trust_remote_code and "trust_remote_code" in reason:
                raise self.error(
                    f"{part} needs Python code that comes with the checkpoint, which is not run;"
                    " read that code, and allow it with --trust-remote-code"
                    " (trust_remote_code=True)"
                ) from error
            if not isinstance(error, OSError | ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise self.error(f"{part}: {reason}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in one of the files; None if the file is absent."""
        with self.foreign(name):
            needed = name == "config.json"
            path = cached_file(
                self.source,
                name,
                _raise_exceptions_for_missing_entries=needed,
                _raise_exceptions_for_connection_errors=needed,
            )
            return None if path is None else read_object(path)

    def check_json(self) -> bool:
        """Raise `UserError` on JSON that no model should be built from.

        Returns:
            Whether the config says that the weights are quantised.
        """
        config = self.read_json("config.json")
        assert config is not None  # needed, so that its absence has raised
        if self.read_json("adapter_config.json") is not None:
            raise self.error(
                "adapter_config.json: it is a PEFT adapter; merge it into its base model"
                " (merge_and_unload) and save that"
            )
        for name in _OBJECTS:
            self.read_json(name)
        with self.foreign("config.json"):
            return check_config(config, trust_remote_code=self.trust_remote_code)

    def weight_bytes(self) -> int:
        """The size of all files with weights; `UserError` unless they are whole, and all read."""
        return sum(os.path.getsize(path) for path in self._weight_files())

    def _weight_files(self) -> list[str]:
        single = self._file(_WEIGHTS)
        index = None if single else self.read_json(_INDEX)
        if single is not None:
            shards = {_WEIGHTS: single}
        elif index is not None:
            shards = self._shards(index)
        else:
            raise self.error(f"it holds neither {_WEIGHTS} nor {_INDEX}")
        for path in sorted(Path(self.source).glob("*.safetensors")):
            if path.name not in shards:
                raise self.error(f"{path.name} is read by nothing; move it to another folder")
        return list(shards.values())

    def _shards(self, index: dict[str, Any]) -> dict[str, str]:
        placed = index.get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise self.error(f"{_INDEX}: weight_map does not map tensors to files")
        shards = {}
        for name in dict.fromkeys(placed.values()):
            if not isinstance(name, str) or PurePosixPath(name).name != name:
                raise self.error(f"{_INDEX}: {name!r} is not the name of a file beside it")
            path = self._file(name)
            if path is None:
                raise self.error(f"{_INDEX}: {name} is absent")
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
            return cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` if it holds anything else."""
    found = parse_json(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it holds {json.dumps(found)[:40]}, not an object")
    return found


def check_config(config: dict[str, Any], *, trust_remote_code: bool) -> bool:
    """Raise `ValueError` on settings that would do harm before transformers judges them.

    Returns:
        Whether the config says that the weights are quantised.
    """
    quantized = False
    for key, value in config.items():
        if callable(getattr(PreTrainedConfig, key, None)):
            raise ValueError(f"{key} is no setting; it would replace a method")
        if _COUNT.search(key) and isinstance(value, int) and abs(value) > MOST_COUNTED:
            raise ValueError(f"{key}: {value!r} is more than {MOST_COUNTED}")
        if key in _KERNEL_SETTINGS and "/" in str(value) and not trust_remote_code:
            raise ValueError(
                f"{key}: {value!r} is code from the Hub; allow it with --trust-remote-code"
            )
        if key == "transformers_weights" and value is not None:
            raise ValueError(f"{key}: only {_WEIGHTS} and the files of its index are read")
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
        raise ValueError(f"quantization_config: quant_method {method!r} is not a known method")


@contextmanager
def parameter_limit(most: int, reason: str) -> Iterator[None]:
    """While open, building a model of more parameters on the meta device raises `UserError`.

    It raises with the first parameter that is too much, before a model that could not be held in
    memory, or that would take minutes to lay out, is whole.
    """
    thread = threading.get_ident()

    def counter(limit: int) -> Any:
        counted = 0

        def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
            nonlocal counted
            if tensor is not None and tensor.is_meta and threading.get_ident() == thread:
                counted += tensor.numel()
                if counted > limit:
                    raise UserError(reason)

        return count

    handles = (
        register_module_parameter_registration_hook(counter(most)),
        register_module_buffer_registration_hook(counter(most + _BUFFER_ROOM)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
