"""Take a prefix out of a model, as a part of the tokenizer that other programs read.

An untuned prefix is what the model computes from the prefix tokens, so it is enough that every text
begins with them: they become part of the tokenizer, and every program that uses the tokenizer has
the prefix.  A tuned prefix is no longer that of any tokens, and becomes a PEFT adapter, see
`peft_adapter`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.errors import Refusal, shown
from oasis_attn.files import write_text
from oasis_attn.hub.model_card import PREFIX_IN_TOKENIZER
from oasis_attn.hub.peft_adapter import is_close
from oasis_attn.hub.prefix import Prefix, compute_prefix, prefix_of, without_prefix
from oasis_attn.hub.tokenizer_prefix import PIECE, post_processor_steps

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [oasis-attn, {family}]
---

# {family} with a prefix of {count} tokens

{text}
"""
_CHAT = [{"role": "user", "content": "Hello."}]
_PROBES = ("", "a", "One text, and then another: 12 + 3 = 15.\n\n  End.")


@torch.no_grad()
def is_computed(model: PreTrainedModel) -> bool:
    """Whether `model` computes the keys and values of its prefix from the tokens of the prefix.

    They differ after the prefix was tuned, or the model was trained.  Tuning may change them less
    than 16-bit numbers do, so that the prefix itself says whether it was tuned.
    """
    prefix: Any = prefix_of(model)
    if prefix.tuned:
        return False
    computed = compute_prefix(without_prefix(model), prefix.tokens)
    pairs = (
        (prefix.keys_LGPd, computed.keys_LGPd),
        (prefix.values_LGPd, computed.values_LGPd),
    )
    return all(is_close(stored, again) for stored, again in pairs)


def check_prefix_in_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `Refusal` unless the prefix of `model` can become part of `tokenizer`."""
    prefix: Any = prefix_of(model)
    if not is_computed(model):
        raise _error(
            "it was tuned, or the model was trained after it got the prefix, so that its keys and"
            " values are not those of its tokens",
            "; use --format oasis",
        )
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_tokenizer_with_prefix(tokenizer, prefix.tokens, Path(folder))


def save_tokenizer_with_prefix(
    tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...], folder: Path
) -> bool:
    """Save a tokenizer that puts `tokens` before every text, once, and before BOS.

    `add_special_tokens=False` leaves them out as it does BOS.  Programs tokenize the result of a
    chat template in this way, so that the text of the tokens precedes the template.

    Args:
        folder: it holds the config of the model.

    Returns:
        Whether chats have the prefix.  If the text of the tokens cannot precede the chat template,
        because it would be cut into other tokens, the tokenizer is saved without a template.

    Raises:
        Refusal: the tokenizer has no `tokenizer.json`, or one that cannot have a prefix.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _error("the tokenizer has no tokenizer.json")
    saved: Any = copy.deepcopy(tokenizer)
    chats = bool(saved.chat_template) and _put_before_chats(saved, tokens)
    if not chats:
        saved.chat_template = None
    saved.save_pretrained(folder)
    for path in folder.glob("*"):  # other forms of the vocabulary, which say nothing of the prefix
        if path.suffix in (".model", ".txt") or path.name in ("vocab.json", "added_tokens.json"):
            path.unlink()
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["post_processor"] = _with_prefix(fields["post_processor"], tokens, saved)
    write_text(file, json.dumps(fields, ensure_ascii=False))
    file = folder / "tokenizer_config.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    for name in ("add_bos_token", "add_eos_token"):  # with them, the post-processor is made anew
        about.pop(name, None)
    # The class of a family may have other defaults than this one.
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("padding_side", "truncation_side", "model_input_names"):
        about[name] = getattr(tokenizer, name)
    write_text(file, json.dumps(about, ensure_ascii=False, indent=2))
    _check_saved(tokenizer, tokens, folder)
    return chats


def write_prefix_card(prefix: Prefix, folder: Path, family: str) -> None:
    """Write the README.md of a model of `family` with the prefix in its tokenizer."""
    text = PREFIX_IN_TOKENIZER.format(tokens=list(prefix.tokens))
    write_text(folder / "README.md", _CARD.format(family=family, count=len(prefix), text=text))


def _error(reason: str, remedy: str = "") -> Refusal:
    why = f"cannot become part of the tokenizer: {reason}"
    return Refusal(f"prefix: it {why}{remedy}", reason=f"its prefix {why}")


def _put_before_chats(tokenizer: Any, tokens: tuple[int, ...]) -> bool:
    """Put the prefix before the chat templates; whether a chat then begins with its tokens."""
    text = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    given = tokenizer.chat_template
    # A Jinja string literal has the escapes of JSON.
    start = "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    templates = given if isinstance(given, dict) else {"default": given}
    changed = {name: start + template for name, template in templates.items()}
    for name, template in templates.items():
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            try:
                before, after = (
                    tokenizer.apply_chat_template(_CHAT, chat_template=each, **options)
                    for each in (template, changed[name])
                )
            except (TemplateError, ValueError, TypeError, KeyError):
                return False  # the template needs more than a message of the user
            plain, prefixed = (
                tokenizer(each, add_special_tokens=False).input_ids for each in (before, after)
            )
            if after != text + before or prefixed != [*tokens, *plain]:
                return False
    tokenizer.chat_template = changed if isinstance(given, dict) else changed["default"]
    return True


def _with_prefix(
    processor: dict[str, Any] | None, tokens: tuple[int, ...], tokenizer: Any
) -> dict[str, Any]:
    """The post-processor in `tokenizer.json`, which also puts `tokens` before a text."""
    steps = post_processor_steps(processor)
    kinds = [step["type"] for step in steps]
    others = sorted({*kinds} - {"ByteLevel", "TemplateProcessing"})
    if others or kinds.count("TemplateProcessing") > 1:
        raise _error(f"its post-processor is {others or kinds}")
    if "TemplateProcessing" not in kinds:
        sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
        template = {
            "type": "TemplateProcessing",
            "single": sequences[:1],
            "pair": sequences,
            "special_tokens": {},
        }
        steps.append(template)
    piece = {"SpecialToken": {"id": PIECE, "type_id": 0}}
    names = tokenizer.convert_ids_to_tokens(list(tokens))
    for step in steps:
        if step["type"] == "TemplateProcessing":
            step["single"], step["pair"] = [piece, *step["single"]], [piece, *step["pair"]]
            step["special_tokens"][PIECE] = {"id": PIECE, "ids": list(tokens), "tokens": names}
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}


def _check_saved(tokenizer: Any, tokens: tuple[int, ...], folder: Path) -> None:
    """Raise `Refusal` unless transformers reads the prefix from `folder`."""
    saved: Any = AutoTokenizer.from_pretrained(folder)
    for text in _PROBES:
        if saved(text).input_ids != [*tokens, *tokenizer(text).input_ids]:
            raise _error(f"transformers then reads {shown(text)} as {saved(text).input_ids}")
