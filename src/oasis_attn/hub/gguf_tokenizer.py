"""The tokenizer of a GGUF file, in the conventions of llama.cpp.

A GGUF file has no `tokenizer.json`.  It names a kind of tokenizer (`gpt2`: byte-level BPE; `llama`:
SentencePiece) and a way to split text into words, and llama.cpp has the code.  A tokenizer that the
file cannot describe is refused, because llama.cpp would cut the text into other tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from oasis_attn.errors import UserError
from oasis_attn.modeling.hf_compat import GGUF_PRE_TOKENIZER_SPLITS

_SPLITS = {  # llama.cpp's name of a splitting pattern -> whether whole words skip the merges
    "llama-bpe": True,
    "dbrx": False,  # the pattern of llama-bpe
    "tekken": True,
    "qwen2": False,
    "qwen35": False,
    "gpt-4o": False,
}
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer:
    """What a GGUF file says about a tokenizer.

    Attributes:
        model: `gpt2` or `llama`.
        pre: llama.cpp's name of the way to split text into words.
        tokens, types: the text and the kind of each token; the model has an embedding for each.
        special: the ids of the special tokens, by name.
        adds: whether BOS and EOS are added to every text.
        merges: of `gpt2`: pairs of tokens, separated by a space.
        scores: of `llama`: the priority of each token.
        space_prefix: of `llama`: whether a space precedes every text.
        chat_template: a Jinja template, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    special: dict[str, int]
    adds: dict[str, bool]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = True
    chat_template: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> GGUFTokenizer:
        """Describe a tokenizer.

        Args:
            size: number of rows of the model's embedding; those without a token become unused ones.

        Raises:
            UserError: a GGUF file cannot describe the tokenizer; the message says why.
        """
        fields = json.loads(_backend(tokenizer).to_str())
        if fields["model"]["type"] != "BPE":
            raise _error(f"its model is {fields['model']['type']}, not BPE")
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
        special = {name: number for name, number in special.items() if number is not None}
        tokens, types = _tokens(fields, special, size)
        common: dict[str, Any] = {
            "tokens": tokens,
            "types": types,
            "special": special,
            "adds": _added(tokenizer, special),
            "chat_template": _chat_template(tokenizer),
        }
        if fields["model"]["byte_fallback"]:
            space_prefix, scores = _space_prefix(fields), _scores(fields, tokens)
            return cls(
                model="llama", pre="default", space_prefix=space_prefix, scores=scores, **common
            )
        return cls(model="gpt2", pre=_pre_tokenizer(fields), merges=_merges(fields), **common)

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys of the tokenizer."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        else:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _error(reason: str) -> UserError:
    return UserError(f"tokenizer: a GGUF file cannot describe it: {reason}")


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _error("it has no tokenizer.json")
    return backend


def _added(tokenizer: Any, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether the tokenizer adds BOS and EOS; `UserError` if it adds another token."""
    text, whole = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    places = range(len(whole) - len(text) + 1)
    start = next(at for at in places if whole[at : at + len(text)] == text)
    before, after = whole[:start], whole[start + len(text) :]
    for added, name in ((before, "bos"), (after, "eos")):
        if added not in ([], [special.get(name)]):
            raise _error(f"it adds the tokens {added} to a text, not only {name.upper()}")
    return {"bos": bool(before), "eos": bool(after)}


def _chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _tokens(
    fields: Mapping[str, Any], special: Mapping[str, int], size: int
) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in fields["model"]["vocab"].items():
        tokens[index] = token
        is_byte = fields["model"]["byte_fallback"] and _BYTE.fullmatch(token)
        types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in fields["added_tokens"]:
        if added["id"] >= size:
            raise _error(
                f"its token {added['content']!r} is number {added['id']}, but the model has only"
                f" {size} embeddings"
            )
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    if "unk" in special and fields["model"]["byte_fallback"]:
        types[special["unk"]] = TokenType.UNKNOWN
    return tokens, types


def _pairs(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = fields["model"]["merges"]
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


def _merges(fields: Mapping[str, Any]) -> list[str]:
    # A space inside a token is written as the byte-level BPE writes it, because it separates two.
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(fields)]


def _scores(fields: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """The order in which merges make tokens, downwards from 0."""
    pairs = ["".join(pair) for pair in _pairs(fields)]
    rank = {token: -float(index) for index, token in enumerate(dict.fromkeys(pairs))}
    in_order = [rank[token] for token in pairs]
    if in_order != sorted(in_order, reverse=True):
        raise _error("two merges make the same token, and merges of other tokens are between them")
    return [rank.get(token, -float(len(rank))) for token in tokens]


def _steps(step: Mapping[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[parts]) if step["type"] == "Sequence" else [dict(step)]


def _space_prefix(fields: Mapping[str, Any]) -> bool:
    normalizers = _steps(fields["normalizer"], "normalizers")
    words = _steps(fields["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not words and normalizers == [{"type": "Prepend", "prepend": _SPACE}, replace]:
        return True
    if not normalizers and len(words) == 1 and words[0]["type"] == "Metaspace":
        step = words[0]
        if step["replacement"] == _SPACE and not step["split"]:
            return bool(step["prepend_scheme"] != "never")
    raise _error(f"normalizer {_names(normalizers)} and pre-tokenizer {_names(words)} are unknown")


def _pre_tokenizer(fields: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level BPE."""
    normalizers = _steps(fields["normalizer"], "normalizers")
    if _names(normalizers) not in ("none", "NFC"):  # llama.cpp expects text in NFC
        raise _error(f"normalizer {_names(normalizers)} is unknown")
    steps = _steps(fields["pre_tokenizer"], "pretokenizers")
    ignores, kinds = bool(fields["model"].get("ignore_merges")), [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] == ["ByteLevel"] and not last["add_prefix_space"]:
        if last["use_regex"] and not ignores:
            if kinds == ["ByteLevel"]:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
                return "smollm"
        if not last["use_regex"] and kinds == ["Split", "ByteLevel"]:
            pattern = steps[0]["pattern"].get("Regex")
            isolated = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
            for name, skips in _SPLITS.items():
                if isolated and skips == ignores and GGUF_PRE_TOKENIZER_SPLITS[name] == pattern:
                    return name
    raise _error(f"pre-tokenizer {_names(steps)} has no name in llama.cpp that is known here")


def _names(steps: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(step["type"] for step in steps) or "none"
