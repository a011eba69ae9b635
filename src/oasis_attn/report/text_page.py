"""An interactive page about one text: attention of each head, activations, depth routing.

    view(model, tokenizer, "Some text").save("view.html")

The page is one file without links.  `text_page.html` is its frame, `text_page.css` its style, and
`heat_map.js` and `text_page.js` its program, which reads the JSON of `_data`.  Its maps are packed
by `packing`, and the program decodes a map when it is shown.

Axes: L layers, H heads, T tokens, P prefix tokens, S = P + T keys.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from operator import index
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from oasis_attn.data.tokens import prompt_ids, token_texts
from oasis_attn.errors import UserError, check_loaded, check_unicode, check_whole, one_line
from oasis_attn.files import write_text
from oasis_attn.measure.inspect_text import Inspection, inspect_text
from oasis_attn.measure.sink_tokens import THRESHOLD
from oasis_attn.records.environment import current_environment
from oasis_attn.report.html import THEME, table_block
from oasis_attn.report.packing import LEVELS, pack_map, packed_bytes
from oasis_attn.report.text_findings import findings, massive_table, percent, sinks, token_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 256
"""Default number of tokens that a page shows."""
_WANTED, _LIMIT = 4_400_000, 64_000_000  # bytes of packed maps
_HEIGHT = 900  # of the page in a notebook, in pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class TextPage:
    """The page of one text.  A notebook shows it inline.

    Attributes:
        html: the page.
        findings: what the numbers say, in sentences; the first is the heading of the page.
        inspection: the measurements.
    """

    html: str
    findings: tuple[str, ...]
    inspection: Inspection

    def save(self, path: str | Path) -> Path:
        """Write the page atomically."""
        return write_text(path, self.html)

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="{escape(self.findings[0])}" srcdoc="{escape(self.html)}"'
            f' style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'
        )


def view(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Sequence[int] | Sequence[Mapping[str, str]],
    *,
    tokens: int = TOKENS,
) -> TextPage:
    """Run a model on one text and make an interactive page about it.

    Args:
        model: as for `diagnose`.
        tokenizer: None if `text` is token ids, which the page then shows as numbers.
        text: a text, token ids, or the messages of a chat, each with `role` and `content`, which
            the chat template of the tokenizer makes into a text.
        tokens: how many tokens are shown at most, from the first; later tokens would not change
            what a decoder computes for them.

    Raises:
        UserError: as `inspect_text`; text without a tokenizer, or a chat without a template; maps
            that could take more than 64 MB.
    """
    check_loaded(model)
    check_whole("tokens", tokens, 2)
    ids = _token_ids(tokenizer, text)
    config = model.config.get_text_config(decoder=True)
    shape = config.num_hidden_layers, config.num_attention_heads
    _levels(*shape, tokens=min(tokens, len(ids)))  # refuses a page that is too large
    inspection = inspect_text(model, ids[:tokens])
    every = (*inspection.prefix, *inspection.ids)
    texts = [f"{token} " for token in every] if tokenizer is None else token_texts(every, tokenizer)
    return text_page(inspection, texts, total=len(ids))


def text_page(inspection: Inspection, texts: Sequence[str], *, total: int) -> TextPage:
    """The page about the measurements of one text.

    Args:
        texts: the text of each of the S keys.
        total: number of tokens of the whole text; the page shows T of them.

    Raises:
        UserError: the maps could take more than 64 MB.
    """
    names = token_names(texts, len(inspection.prefix))
    heading, *further = found = findings(inspection, names)
    table = massive_table(inspection, names)
    html = Template(_read("text_page.html")).substitute(
        title=escape(f"{_model_name(inspection)}: attention and activations on a text"),
        style=THEME + _read("text_page.css"),
        about=escape(_about(inspection, total)),
        heading=_text(heading),
        lead="\n".join(f"<li>{_text(sentence)}</li>" for sentence in further),
        threshold=percent(THRESHOLD),
        massive="" if table is None else table_block(table),
        footer=escape(_footer()),
        data=_json(_data(inspection, texts, names)),
        script=_read("heat_map.js") + _read("text_page.js"),
    )
    return TextPage(html=html, findings=found, inspection=inspection)


def maps_bytes(
    layers: int, heads: int, levels: int, *, tokens: int, prefix: int = 0, passes: int = 0
) -> int:
    """The largest size of the packed maps of a page, in bytes.

    Args:
        levels: see `packing`.
        tokens: T.
        prefix: P.
        passes: forward passes whose depth weights the page shows: 0 to 2.
    """
    attention = packed_bytes((2 + prefix + t for t in range(tokens)), levels)
    routing = packed_bytes(range(1, 2 * layers + 2), levels)
    return layers * heads * attention + passes * tokens * routing


def _levels(layers: int, heads: int, **sizes: int) -> int:
    """The most levels with which the maps take no more than `_WANTED` bytes, or the fewest."""
    sized = {levels: maps_bytes(layers, heads, levels, **sizes) for levels in LEVELS}
    if sized[LEVELS[0]] > _LIMIT:
        raise UserError(
            f"tokens: {sizes['tokens']} tokens of {layers} layers x {heads} heads could make a page"
            f" of {sized[LEVELS[0]] / 1e6:.0f} MB; it must be at most {_LIMIT / 1e6:.0f} MB"
        )
    return max(levels for levels in LEVELS if levels == LEVELS[0] or sized[levels] <= _WANTED)


def _token_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Sequence[int] | Sequence[Mapping[str, str]],
) -> list[int]:
    if isinstance(text, str):
        check_unicode("text", text)
        return prompt_ids(text, _needed(tokenizer))
    try:
        parts: list[Any] = list(text)
        if not (parts and all(isinstance(each, Mapping) for each in parts)):
            return [index(each) for each in parts]
    except TypeError as error:
        raise UserError(
            f"text: this {type(text).__name__} is no text, and has neither token ids nor messages"
        ) from error
    messages, tokenizer = [dict(each) for each in parts], _needed(tokenizer)
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program that comes with the model
        raise UserError(f"chat: the chat template failed: {one_line(error)}") from error
    check_unicode("chat", str(prompt))
    return prompt_ids(str(prompt), tokenizer)


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError("tokenizer: None cannot read text; give the model's tokenizer, or ids")
    return tokenizer


def _data(inspection: Inspection, texts: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What the program reads; arrays over heads are flat, in the order of layers."""
    L, H, T, S = inspection.attention_LHTS.shape
    depths = [each for each in (inspection.depth, inspection.depth_off) if each]
    levels = _levels(L, H, tokens=T, prefix=S - T, passes=len(depths))
    received_LHS = inspection.received_LHS()
    null_norms = inspection.null_norms_LHT
    return {
        "layers": L,
        "heads": H,
        "prefix": S - T,
        "tokens": texts,
        "names": names,
        "levels": levels,
        "hasNull": inspection.has_null,
        "maps": _maps(inspection, levels),
        "norms": [_numbers(x_S) for x_S in inspection.image_norms_LHS.reshape(L * H, S)],
        "nullNorms": [_numbers(x_T) for x_T in null_norms.reshape(L * H, T)]
        if null_norms.any()
        else None,
        "sinks": sinks(received_LHS),
        "sink": _most(received_LHS),
        "weightedSink": _most(inspection.received_LHS(weighted=True)),
        "received": _rounded(received_LHS.mean((0, 1))),
        "nullOfToken": _rounded(inspection.null_LHT.mean((0, 1))),
        "nullOfHead": _rounded(inspection.null_LHT.mean(2).ravel()),
        "largest": [_rounded(x_T) for x_T in inspection.largest_LT],
        "channels": inspection.channels_LT.tolist(),
        "medians": _rounded(inspection.medians_L),
        "massive": sorted({(each.layer, each.position) for each in inspection.massive}),
        "depth": _depth(inspection, levels),
    }


def _maps(inspection: Inspection, levels: int) -> list[str]:
    """The packed map of each head.  Row t has the null, if there is one, and the keys up to t."""
    L, H, T, _ = inspection.attention_LHTS.shape
    null_LHT1 = inspection.null_LHT[..., None][..., : int(inspection.has_null)]
    maps = np.concatenate([null_LHT1, inspection.attention_LHTS], axis=-1).reshape(L * H, T, -1)
    ends = maps.shape[2] - T + np.arange(1, T + 1)
    return [
        pack_map([row[:end] for row, end in zip(each, ends, strict=True)], levels) for each in maps
    ]


def _depth(inspection: Inspection, levels: int) -> dict[str, Any] | None:
    """The packed weights of each token, [router][source], with and without the null signal."""
    on, off = inspection.depth, inspection.depth_off
    if on is None:
        return None

    def packed(weights: Sequence[np.ndarray]) -> list[str]:
        return [
            pack_map([x_TN[token] for x_TN in weights], levels)
            for token in range(len(inspection.ids))
        ]

    lengths = [x_TN.shape[1] for x_TN in on.weights]
    settings = inspection.model.config or {}
    return {
        "on": packed(on.weights),
        "off": None if off is None else packed(off.weights),
        "lengths": lengths,
        "routers": [_sublayer(router, len(inspection.largest_LT)) for router in on.routers],
        "sources": [_source(settings, index) for index in range(max(lengths))],
    }


def _sublayer(number: int, layers: int) -> str:
    """The name of sublayer `number` + 1, which reads router `number`."""
    layer, mlp = divmod(number, 2)
    return "final norm" if layer == layers else f"{'MLP' if mlp else 'attention'} {layer}"


def _source(settings: Mapping[str, Any], source: int) -> str:
    """The name of a source: the embedding, or the sublayers of a block."""
    if source == 0:
        return "embedding"
    if settings["residual"] == "official":
        return f"state {source}"
    block = settings["depth_block_size"]
    first, last = (_sublayer(number, -1) for number in ((source - 1) * block, source * block - 1))
    return first if block == 1 else f"{first} to {last}"


def _most(received_LHS: np.ndarray) -> list[dict[str, Any]]:
    """For each head, the key that receives most, and its share."""
    received = received_LHS.reshape(-1, received_LHS.shape[2])
    return [{"at": int(row.argmax()), "value": round(float(row.max()), 4)} for row in received]


def _numbers(x: np.ndarray) -> dict[str, Any]:
    """Numbers of at least 0 as 16-bit shares of the largest of them."""
    top = float(x.max()) or 1.0
    shares = np.rint(x / top * 65535).astype("<u2")
    return {"top": float(f"{top:.6g}"), "text": base64.b64encode(shares.tobytes()).decode()}


def _rounded(x: np.ndarray) -> list[float]:
    """Numbers with five significant digits."""
    return [float(f"{value:.5g}") for value in x.tolist()]


def _text(sentence: str) -> str:
    """A sentence as HTML, in which no line ends before a percent sign."""
    return escape(sentence, quote=False).replace(" %", "&nbsp;%")


def _json(data: dict[str, Any]) -> str:
    """JSON for a <script> element, in which `<` could end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _about(inspection: Inspection, total: int) -> str:
    L, H, T, S = inspection.attention_LHTS.shape
    model = inspection.model
    tokens = f"{T} tokens" if total == T else f"the first {T} of {total:,} tokens"
    prefix = f" after a prefix of {S - T}" if S > T else ""
    return (
        f"{_model_name(inspection)} · {model.architecture}, {model.parameters:,} parameters ·"
        f" {L} layers x {H} heads · {tokens}{prefix}"
    )


def _model_name(inspection: Inspection) -> str:
    return Path(inspection.model.name).name or inspection.model.architecture


def _footer() -> str:
    versions = current_environment().versions
    named = ", ".join(f"{x} {versions[x]}" for x in ("oasis-attn", "torch", "transformers"))
    return f"Measured in one forward pass · {named}"


def _read(name: str) -> str:
    return (files("oasis_attn.report") / name).read_text(encoding="utf-8")
