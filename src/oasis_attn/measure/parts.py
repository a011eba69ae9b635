"""Where to listen in a decoder: the tensors that method papers hook, found by shape of the tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError

MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2")
OUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A module whose output is measured.

    Attributes:
        name: its path below the decoder (`layers.3.self_attn.o_proj`).
        kind: `layer`, `mlp`, `attention` (the out-projection), `norm` or `final_norm`.
        layer: the decoder layer's number; None for the final norm.
        module: the module itself.
    """

    name: str
    kind: str
    layer: int | None
    module: nn.Module


def find_taps(model: PreTrainedModel) -> list[Tap]:
    """Every hooked tensor of outlier.*: each layer's output, MLP output, attention out-projection
    and norms (two in most families, four where branches are also normed after), and the final norm.

    Raises:
        UserError: naming the family, where one of these cannot be told apart.
    """
    return list(_taps(model))


def check_output(model: PreTrainedModel, tap: Tap, x: Any, ids_BT: Tensor) -> None:
    """Raise `UserError` unless `x` is one vector for each token: [B, T, D] or [B * T, D]."""
    tokens = tuple(ids_BT.shape)
    if not isinstance(x, Tensor) or tuple(x.shape[:-1]) not in (tokens, (ids_BT.numel(),)):
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"model: family {model.config.model_type!r} cannot be diagnosed: the output of "
            f"{tap.name} is {shape}, not one vector for each of {list(tokens)} tokens"
        )


def _taps(model: PreTrainedModel) -> Iterator[Tap]:
    decoder = model.get_decoder()
    if decoder is model:  # transformers finds none, as in llama4
        decoder = getattr(model, "model", model)
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if depth is None:
        raise UserError(
            f"model: family {model.config.model_type!r} cannot be diagnosed: its configuration "
            "has no num_hidden_layers"
        )
    path, layers = _one(
        model,
        f"list of {depth} layers",
        [
            (name, child)
            for name, child in decoder.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ],
    )
    for number, layer in enumerate(layers.children()):
        here = f"{path}.{number}"
        yield Tap(name=here, kind="layer", layer=number, module=layer)
        children = dict(layer.named_children())
        attention, module = _one(
            model,
            f"attention in {here}",
            [(name, child) for name, child in children.items() if _is(child, "Attention")],
        )
        projection, module = _one(
            model,
            f"out-projection in {here}.{attention}",
            [
                (name, child)
                for name, child in module.named_modules()
                if name.rpartition(".")[2] in OUT_PROJECTIONS
            ],
        )
        yield Tap(
            name=f"{here}.{attention}.{projection}", kind="attention", layer=number, module=module
        )
        mlp, module = _one(
            model, f"MLP in {here}", [(name, children[name]) for name in MLPS if name in children]
        )
        yield Tap(name=f"{here}.{mlp}", kind="mlp", layer=number, module=module)
        for name, child in children.items():
            if _is(child, "Norm"):
                yield Tap(name=f"{here}.{name}", kind="norm", layer=number, module=child)
    norms = {name: child for name, child in decoder.named_children() if _is(child, "Norm")}
    # Some families norm the embedding too, first, or what goes into every layer, last.
    final = "norm" if "norm" in norms else next(reversed(norms), "")
    name, module = _one(model, "final norm", [(final, norms[final])] if norms else [])
    yield Tap(name=name, kind="final_norm", layer=None, module=module)


def _is(module: nn.Module, kind: str) -> bool:
    return kind in type(module).__name__


def _one(
    model: PreTrainedModel, what: str, found: list[tuple[str, nn.Module]]
) -> tuple[str, nn.Module]:
    if len(found) != 1:
        raise UserError(
            f"model: family {model.config.model_type!r} cannot be diagnosed: "
            f"{len(found)} modules look like its {what}"
        )
    return found[0]
