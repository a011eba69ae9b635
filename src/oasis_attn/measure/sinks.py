"""Attention sinks (first-position probability, sink rate, value-weighted norm) and the null.

Axes: N windows, B windows in a batch, T tokens, L layers, H heads, I heads and the bias, d head
width, D width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.measure.hooks import HookPoint, attention_layers
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.attention import AttentionCall
from oasis_attn.records import Metric

RATE_LENGTH = 64  # T of the sink rate in Gu et al. 2024 (arXiv 2410.10781)
RATE_THRESHOLDS = (0.3, 0.2)
IDLE = 0.5  # an idle head gives more than this to the first position and the null


def value_images(value_BHd: Tensor, out_projection: nn.Module) -> Tensor:
    """f_h(x): the value of each head times the output projection without bias, [B, H, D] float64.

    Kobayashi et al. 2020 (arXiv 2004.10102).  An output gate is not included.
    """
    batch, heads, width = value_BHd.shape
    # One row per head, zero for the other heads, so that any type of projection module works; and
    # a row of zeros, whose image is the bias.
    rows_BIHd = value_BHd.new_zeros(batch, heads + 1, heads, width)
    rows_BIHd[:, :heads].diagonal(dim1=1, dim2=2).copy_(value_BHd.transpose(1, 2))
    # .forward, so that hooks on the projection are not called.
    images_BID = out_projection.forward(rows_BIHd.flatten(2))
    return (images_BID[:, :heads] - images_BID[:, heads:]).double()


def first_position_norms(p_BHT: Tensor, value_BHd: Tensor, out_projection: nn.Module) -> Tensor:
    """|| sum_h A_h[t, 0] f_h(x_0) || for each query t, [B, T] float64: see `value_images`."""
    images_BHD = value_images(value_BHd, out_projection)
    # || sum_h p_h f_h ||^2 = p^T (F F^T) p needs H values per query instead of D.
    gram_BHH = images_BHD @ images_BHD.transpose(1, 2)
    p_BTH = p_BHT.transpose(1, 2).double()
    return ((p_BTH @ gram_BHH) * p_BTH).sum(-1).clamp_min(0).sqrt()


def check_calls(model: PreTrainedModel, calls: Counter[int], layers: Collection[int]) -> None:
    """Raise `UserError` unless each of `layers` made one attention call; `calls` counts them."""
    for layer in sorted({*layers, *calls}):
        if layer not in layers or calls[layer] != 1:
            raise UserError(
                f"model: family {model.config.model_type!r} is not supported by diagnose: layer"
                f" {layer} calls the attention interface of transformers {calls[layer]} times"
                " per forward pass, not once, so its attention sinks cannot be measured"
            )


class Sinks:
    """Computes the sink.* metrics of attention, and null.mass, during one pass over windows.

    Only layers with softmax attention are measured; the others have no attention map.

    Args:
        points: the modules whose outputs are observed.
        prefixed: whether the model has a stored prefix.  The first position is then that of the
            prefix, so that all queries of a window are later ones.
    """

    def __init__(self, points: list[HookPoint], *, prefixed: bool = False) -> None:
        self._later = slice(0 if prefixed else 1, None)
        self._attention = attention_layers(points)
        self._layers = [point for point in points if point.kind == "layer"]
        # What a layer without softmax attention has instead; it may be only an MLP.
        self._others = {p.layer: p for kind in ("mlp", "mixer") for p in points if p.kind == kind}
        self._series: dict[str, dict[int, list[Tensor]]] = {}
        self._window = 0
        self._calls: Counter[int] = Counter()

    def update(self, call: AttentionCall) -> None:
        """Add one attention call."""
        self._calls[call.layer] += 1
        point = self._attention.get(call.layer)
        if point is None:
            return  # `check` raises an error
        p_BHT = call.column(0)
        null_BHT = call.null_BHT
        heads = p_BHT.shape[1]
        self._window = p_BHT.shape[2]

        self._record("mass", call.layer, _mean(p_BHT[..., self._later]))
        real_BHT = 1 - null_BHT[..., self._later]
        # A row whose sum is 0 cannot be renormalized; it is excluded from the mean.
        idle_BHT = real_BHT <= 1e-6
        share_BHT = (p_BHT[..., self._later] / real_BHT).masked_fill(idle_BHT, 0).double()
        rows_BH = (~idle_BHT).sum(-1).clamp_min(1)
        self._record("mass_renormalized", call.layer, share_BHT.sum(-1) / rows_BH)
        self._record("rate", call.layer, _mean(p_BHT[..., :RATE_LENGTH]))
        self._record("rate_window", call.layer, _mean(p_BHT))
        self._record("null", call.layer, _mean(null_BHT))

        if point.projects_heads:
            value_BGd = call.value_BGSd[:, :, 0]
            value_BHd = value_BGd.repeat_interleave(heads // value_BGd.shape[1], dim=1)
            norms_BT = first_position_norms(p_BHT, value_BHd, point.module)
            self._record("value_weighted", call.layer, _mean(norms_BT[:, self._later]))

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UserError` unless each layer with softmax attention has made one attention call
        since the last check, and no other layer has."""
        calls, self._calls = self._calls, Counter()
        check_calls(model, calls, self._attention)

    def _record(self, name: str, layer: int, values: Tensor) -> None:
        self._series.setdefault(name, {}).setdefault(layer, []).append(values.cpu())

    def _of_layers(self, name: str) -> dict[int, Tensor]:
        """One series for all windows, [N, H] or [N], by layer."""
        series = self._series.get(name, {})
        return {layer: torch.cat(values) for layer, values in sorted(series.items())}

    def _joined(self, name: str) -> Tensor:
        """One series for all windows, of all layers and heads: [N, L * H] or [N, L]."""
        return torch.cat([_columns(x) for x in self._of_layers(name).values()], dim=1)

    @property
    def _has_null(self) -> bool:
        return any(bool((x_NH != 0).any()) for x_NH in self._of_layers("null").values())

    def metrics(self) -> list[Metric]:
        """Means over layers and heads, with the standard error over windows.

        `sink.rate@eps` is the rate of Gu et al., over the first 64 queries of each window; because
        of causality this equals windows of 64 tokens.  `sink.rate_window@eps` is over the whole
        window.  If windows are shorter than 64, only the latter is given.
        """
        if not self._attention:
            return []
        rates = {"sink.rate_window": self._joined("rate_window")}
        if self._window >= RATE_LENGTH:
            rates = {"sink.rate": self._joined("rate")} | rates
        means = {
            "sink.mass": self._joined("mass"),
            "sink.mass_renormalized": self._joined("mass_renormalized"),
        }
        if "value_weighted" in self._series:
            means["sink.value_weighted"] = self._joined("value_weighted")
        means |= {
            f"{name}@{eps}": (values > eps).double().where(~values.isnan(), torch.nan)
            for name, values in rates.items()
            for eps in RATE_THRESHOLDS
        }
        if self._has_null:
            means["null.mass"] = self._joined("null")
        metrics = [mean_metric(name, values.mean(1)) for name, values in means.items()]
        mass_N = self._joined("mass")
        largest = float(mass_N.mean(0).max())
        idle = math.nan if math.isnan(largest) else float(len(self._idle()))
        return [
            *metrics,
            Metric(name="sink.max_mass", value=largest, n=len(mass_N)),
            Metric(name="sink.idle_heads", value=idle, n=len(mass_N)),
        ]

    def tables(self) -> dict[str, Any]:
        """`sink.mass` [L][H], `sink.value_weighted` [L], and, if attention has a null option,
        `null.mass` [L][H]; NaN in layers without an attention map, and for heads that a layer with
        fewer heads does not have.  `sink.idle_heads` has the layer and the index of each.  The
        layers without a map are the rows of `sink.no_map`: `layer`, and the class of the `module`
        that it has instead."""
        if not self._attention:
            return {"sink.no_map": self._without_map()}
        tables: dict[str, Any] = {
            "sink.mass": self._by_head("mass"),
            "sink.idle_heads": self._idle(),
        }
        weighted = self._of_layers("value_weighted")
        if weighted:
            tables["sink.value_weighted"] = [
                float(weighted[layer].mean(0)) if layer in weighted else math.nan
                for layer in range(len(self._layers))
            ]
        if self._has_null:
            tables["null.mass"] = self._by_head("null")
        if len(self._attention) < len(self._layers):
            tables["sink.no_map"] = self._without_map()
        return tables

    def _idle(self) -> list[list[int]]:
        null = self._of_layers("null")
        return [
            [layer, head]
            for layer, mass_NH in self._of_layers("mass").items()
            for head in ((mass_NH + null[layer]).mean(0) > IDLE).nonzero().flatten().tolist()
        ]

    def _by_head(self, name: str) -> list[list[float]]:
        means = {layer: x_NH.mean(0).tolist() for layer, x_NH in self._of_layers(name).items()}
        heads = max(map(len, means.values()))
        rows = [means.get(layer, []) for layer in range(len(self._layers))]
        return [row + [math.nan] * (heads - len(row)) for row in rows]

    def _without_map(self) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "module": type(self._others.get(layer, point).module).__name__}
            for layer, point in enumerate(self._layers)
            if layer not in self._attention
        ]


def _columns(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.unsqueeze(1)


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, dtype=torch.float64)
