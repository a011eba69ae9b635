"""The model card: what a checkpoint is and what was measured on it, from its config and record."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oasis_attn.files import write_text
from oasis_attn.modeling.configuration import SETTINGS, OasisConfig
from oasis_attn.modeling.variants import variants
from oasis_attn.modeling.weight_names import is_ours
from oasis_attn.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_GENERATED = "automatically generated"  # transformers' own template says so too
_ALWAYS = ("token_normalizer", "residual", "null_signal")
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [{tags}]
---

# {title}

{facts}

```python
import oasis_attn  # without it, transformers cannot load this checkpoint
from transformers import {auto_class}

model = {auto_class}.from_pretrained(path_or_name)
```
{measured}
*This card was {generated}; without this line it is kept as it is.*
"""
_SETTINGS = """\
A `{family}` decoder of {parameters:,} parameters, {added:,} of them added by these settings, the
variant `{variant}` of [OASIS](https://arxiv.org/abs/2605.17887) in oasis-attn. Settings that are
not listed are at their defaults.

{settings}"""
_NATIVE = "A `{family}` decoder of {parameters:,} parameters."
_QUANTIZED = """\
Quantised with the scheme `{scheme}` of oasis-attn, computed in {arithmetic} arithmetic: {targets}
layers and tensors."""
_PREFIX = """\
Every input is read behind a stored prefix (tokens: {tokens}), whose keys and values are among the
weights. The folder `prefix` holds a copy as a PEFT adapter for the model without it."""
_MEASURED = """
## Measured{origin}

{metrics}

{facts}
"""


def write_card(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write `folder`/README.md, unless a card stands there that a person has made theirs.

    The measurements are those of `folder`/record.json; without one, of the record beside the
    checkpoint that the model was loaded from, which the card then names.
    """
    path = Path(folder) / "README.md"
    if path.exists() and _GENERATED not in path.read_text(encoding="utf-8"):
        return
    # Of ours, the settings, which the base model's own `config` does not hold.
    config: PreTrainedConfig = getattr(model, "oasis_config", model.config)
    stored = getattr(model.config.get_text_config(decoder=True), "quantization_config", None)
    record, origin = None, ""
    for place in (Path(folder), Path(config.name_or_path or folder)):
        if (place / "record.json").is_file():
            record = Record.load(place / "record.json")
            origin = "" if place == Path(folder) else f", on `{place.name}` as it was loaded"
            break
    # Integer arithmetic has no parameters of floats, but codes.
    tensors = chain(model.named_parameters(), model.named_buffers())
    counts = {
        name: tensor.numel()
        for name, tensor in tensors
        if isinstance(tensor, nn.Parameter) or tensor.dtype == torch.int8
    }
    added = sum(n for name, n in counts.items() if is_ours(name))
    card = model_card(config, sum(counts.values()), added, stored, record, origin)
    write_text(path, card)


def model_card(
    config: PreTrainedConfig,
    parameters: int,
    added: int,
    stored: Any,
    record: Record | None,
    origin: str = "",
) -> str:
    """The card as Markdown with its YAML head.

    Args:
        parameters, added: how many there are, and how many of them the settings added.
        stored: the `quantization_config` of the model, or None.
        record: what was measured; `origin` says on which checkpoint, if not on this one.
    """
    text = config.get_text_config(decoder=True)
    tags, family = ["oasis-attn", text.model_type], text.model_type
    title, facts = family, [_NATIVE.format(family=family, parameters=parameters)]
    if isinstance(config, OasisConfig):
        variant = variant_of(config)
        tags, title = [*tags, variant], f"{variant} on {family}"
        rows = [
            (f"`{name}`", f"`{value}`")
            for name, value in config.settings.items()
            if name in _ALWAYS or value != getattr(OasisConfig, name)
        ]
        facts = [
            _SETTINGS.format(
                family=family,
                variant=variant,
                parameters=parameters,
                added=added,
                settings=_table(("setting", "value"), rows),
            )
        ]
    if scheme := getattr(stored, "scheme", None):
        title = f"{title}, {scheme['name']}"
        facts.append(
            _QUANTIZED.format(
                scheme=scheme["name"], arithmetic=stored.arithmetic, targets=len(stored.targets)
            )
        )
    if prefix := getattr(stored, "prefix", None):
        title = f"{title}, with a prefix"
        facts.append(_PREFIX.format(tokens=len(prefix["tokens"])))
    task, auto_class = _task(config)
    return _CARD.format(
        task=task,
        auto_class=auto_class,
        tags=", ".join(tags),
        title=title,
        facts="\n\n".join(facts),
        measured="" if record is None else _measured(record, origin),
        generated=_GENERATED,
    )


def _task(config: PreTrainedConfig) -> tuple[str, str]:
    """The hub's name of the task, and the Auto class, of the class that `config` was saved with."""
    name = (config.architectures or ["OasisForCausalLM"])[0]
    for head, task in _TASKS.items():
        if name.endswith(head):
            return task, f"AutoModel{head}"
    if name.startswith("Routed"):  # a base model of ours
        return "feature-extraction", "AutoModel"
    return "text-generation", "AutoModelForCausalLM"


def variant_of(config: OasisConfig) -> str:
    """The variant whose settings these are; `custom` if there is none."""
    defaults = {name: getattr(OasisConfig, name) for name in SETTINGS}
    for name, settings in variants().items():
        if defaults | settings == config.settings:
            return name
    return "custom"


def _measured(record: Record, origin: str) -> str:
    metrics = [
        (f"`{m.name}` {m.where}".strip(), f"{m.value:.6g}", str(m.n), _error(m.standard_error))
        for m in record.metrics
        if m.where in ("", "before", "after")
    ]
    environment = record.environment
    facts = record.to_dict()["data"] | {"seed": record.seed, "date": record.created}
    facts |= {"device": environment.device, "commit": environment.commit} | environment.versions
    known = {name: fact for name, fact in facts.items() if isinstance(fact, str | int | float)}
    return _MEASURED.format(
        origin=origin,
        metrics=_table(("metric", "value", "n", "standard error"), metrics),
        facts=_table(("of the record", ""), [(name, f"`{fact}`") for name, fact in known.items()]),
    )


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f"{standard_error:.2g}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
