"""The model card: describes a checkpoint from its config, and its measurements from its record."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from oasis_attn.files import write_text
from oasis_attn.hub.model_code import tested_versions
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.pretrained import SAVE_HOOKS
from oasis_attn.modeling.settings import SETTINGS
from oasis_attn.modeling.variants import variants
from oasis_attn.modeling.weight_names import is_ours
from oasis_attn.ops.normalizers import NEED_ENTMAX, with_length
from oasis_attn.records import ConversionRecord, Record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_GENERATED = "automatically generated"  # the template of transformers has these words too
_ALWAYS_LISTED = ("token_normalizer", "residual", "null_signal")
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
{requirement}
from transformers import {auto_class}

model = {auto_class}.from_pretrained({arguments})
```
{measured}
*This card was {generated}. Remove this line to keep the card when the model is saved again.*
"""
_REQUIREMENTS = {
    "oasis": "import oasis_attn  # without it, transformers cannot load this checkpoint",
    "compressed-tensors": "# needs: pip install compressed-tensors",
    "torchao": "# needs: pip install 'torchao>=0.18' 'transformers>=5.23'; on a CPU, also VNNI",
}
_WITH_CODE = "# runs the Python code in this folder, which needs {versions}"
_SETTINGS = """\
A `{family}` decoder with {parameters:,} parameters, of which the variant `{variant}` of
[OASIS](https://arxiv.org/abs/2605.17887) (library oasis-attn) adds {added:,}. Settings that are not
listed have their default values.

{settings}"""
_NATIVE = "A `{family}` decoder with {parameters:,} parameters."
_WITHOUT_BOS = """\
A null has the place of BOS (`{bos}`): texts of this model have no BOS in front. Its tokenizer adds
none."""
_PRUNED = """\
The MLP neurons that wrote massive activations are switched off: {neurons}."""
_QUANTIZED = """\
Quantized with the scheme `{scheme}` of oasis-attn, computed in {arithmetic} arithmetic: {targets}
layers and tensors."""
_KV_CACHE = """\
Its key-value cache is in {kv_cache}, with one scale for the keys and one for the values of each
layer."""
_UNTIED = """\
Its rotation needs an output head of its own, which is {entries:,} of the parameters, even if the
original model shares the matrix with the embedding."""
_PREFIX = """\
A stored prefix (tokens: {tokens}) precedes every input; its keys and values are part of the
weights. The folder `prefix` holds a copy as a PEFT adapter for the model without the prefix."""
PREFIX_IN_TOKENIZER = """\
The tokenizer puts the tokens {tokens} of the prefix before every text, and the chat template, if
there is one, puts their text before every chat. A program that tokenizes a text with
`add_special_tokens=False`, or reads token ids, must put them there itself."""
_MEASURED = """
## Measured{origin}

{metrics}

{facts}
"""


def write_card(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    format: str = "oasis",
    kv_cache: str = "",
) -> None:
    """Write `folder`/README.md, unless there is one without the line that says it was generated.

    `format` is that of the quantized weights: `oasis`, or `compressed-tensors` or `torchao`, which
    are loaded without `oasis_attn`.  `kv_cache` is that of the key-value cache, if it has one.

    The measurements come from `folder`/record.json; if it does not exist, from the record in the
    checkpoint that the model was loaded from, and the card names that checkpoint.
    """
    path = Path(folder) / "README.md"
    if path.exists() and _GENERATED not in path.read_text(encoding="utf-8"):
        return
    # An OASIS base model has its settings in `oasis_config`, not in `config`.
    config: PreTrainedConfig = getattr(model, "oasis_config", model.config)
    stored = getattr(model.config.get_text_config(decoder=True), "quantization_config", None)
    record, origin = None, ""
    for place in (Path(folder), Path(config.name_or_path or folder)):
        if (place / "record.json").is_file():
            record = Record.load(place / "record.json")
            origin = "" if place == Path(folder) else f", on `{place.name}` as it was loaded"
            break
    # A model in integer arithmetic has int8 buffers in place of float parameters.
    tensors = chain(model.named_parameters(), model.named_buffers())
    counts = {
        name: tensor.numel()
        for name, tensor in tensors
        if isinstance(tensor, nn.Parameter) or tensor.dtype == torch.int8
    }
    added = sum(n for name, n in counts.items() if is_ours(name))
    card = model_card(config, sum(counts.values()), added, stored, record, origin, format, kv_cache)
    write_text(path, card)


def model_card(
    config: PreTrainedConfig,
    parameters: int,
    added: int,
    stored: Any,
    record: Record | None,
    origin: str = "",
    format: str = "oasis",
    kv_cache: str = "",
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        config: the model's configuration.
        parameters: how many parameters the model has.
        added: how many of them the family's own model does not have.
        stored: the `quantization_config` of the model, or None.
        record: the measurements, if there are any.
        origin: text that names the measured checkpoint if it is not this one.
        format, kv_cache: see `write_card`.
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
            if name in _ALWAYS_LISTED or value != getattr(OasisConfig, name)
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
    if isinstance(record, ConversionRecord) and not origin:
        if record.bos is not None:
            facts.append(_WITHOUT_BOS.format(bos=record.bos))
        if record.neurons:
            neurons = ", ".join(f"{unit} of layer {layer}" for layer, unit in record.neurons)
            facts.append(_PRUNED.format(neurons=neurons))
    if scheme := getattr(stored, "scheme", None):
        title = f"{title}, {scheme['name']}"
        facts.append(
            _QUANTIZED.format(
                scheme=stored.described_scheme,
                arithmetic="int8" if format == "torchao" else stored.arithmetic,
                targets=len(stored.targets),
            )
        )
        if kv_cache:
            facts.append(_KV_CACHE.format(kv_cache=kv_cache.upper()))
        if scheme["rotation"] in ("folded", "hadamard"):
            facts.append(_UNTIED.format(entries=text.vocab_size * text.hidden_size))
    if prefix := getattr(stored, "prefix", None):
        title = f"{title}, with a prefix"
        if format == "oasis":
            facts.append(_PREFIX.format(tokens=len(prefix["tokens"])))
        else:
            facts.append(PREFIX_IN_TOKENIZER.format(tokens=prefix["tokens"]))
    task, auto_class = _task(config)
    arguments, requirement = "path_or_name", _REQUIREMENTS[format]
    if isinstance(config, OasisConfig) and auto_class in (getattr(config, "auto_map", None) or ()):
        arguments = "path_or_name, trust_remote_code=True"
        requirement = _WITH_CODE.format(versions=tested_versions())
        if config.normalizer.name in NEED_ENTMAX:
            requirement += " and entmax"
    return _CARD.format(
        task=task,
        auto_class=auto_class,
        arguments=arguments,
        tags=", ".join(tags),
        title=title,
        facts="\n\n".join(facts),
        requirement=requirement,
        measured="" if record is None else _measured(record, origin),
        generated=_GENERATED,
    )


def _task(config: PreTrainedConfig) -> tuple[str, str]:
    """The Hub's task name and the Auto class for the architecture in `config`."""
    name = (config.architectures or ["OasisForCausalLM"])[0]
    for head, task in _TASKS.items():
        if name.endswith(head):
            return task, f"AutoModel{head}"
    if name.startswith("Routed"):  # an OASIS base model
        return "feature-extraction", "AutoModel"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        return "image-text-to-text", "AutoModelForImageTextToText"
    return "text-generation", "AutoModelForCausalLM"


def variant_of(config: OasisConfig) -> str:
    """The name of the variant with these settings; `custom` if there is none."""
    defaults = {name: getattr(OasisConfig, name) for name in SETTINGS}
    given = config.settings["token_normalizer"]
    length = given.get("length", 0) if isinstance(given, dict) else 0
    for name, settings in variants().items():
        expected = defaults | settings
        expected["token_normalizer"] = with_length(expected["token_normalizer"], length)
        if expected == config.settings:
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
    facts |= environment.extensions
    known = {name: fact for name, fact in facts.items() if isinstance(fact, str | int | float)}
    return _MEASURED.format(
        origin=origin,
        metrics=_table(("metric", "value", "n", "standard error"), metrics),
        facts=_table(("record", ""), [(name, f"`{fact}`") for name, fact in known.items()]),
    )


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f"{standard_error:.2g}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


SAVE_HOOKS.append(write_card)
