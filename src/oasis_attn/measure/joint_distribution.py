"""The joint distribution over depth sources and positions (OASIS, assumption D.4).

Sublayer l reads route i with weight alpha_i, and route i has attended to position j with p_i(j):

    q(i, j) = alpha_i p_i(j)        mass Z = sum q;  leakage L = q on position 0, the sink;
                                    concentration C = max q;  negative entropy E = sum q log q

q is not stored.  From m_i = sum_j p_i(j), L_i, C_i and E_i of each route,

    Z = sum alpha_i m_i     L = sum alpha_i L_i     C = max alpha_i C_i
    E = sum alpha_i E_i + sum m_i alpha_i log alpha_i

This is the closed form of D.4 for rows that sum to one, and it is also exact with a null option,
where m_i < 1.  The `*_renormalized` values are those of q / Z: otherwise a model with a null
probability has lower values of all three.

A route is a part of a source, with these rows p_i:
- the embedding: its row is 1 at the token's own position.  So C is at least the weight of the
  embedding; in a residual sum C is mostly this weight, 1 / R;
- a sublayer: its row is the mean over heads of its layer's attention (for the MLP too, as for psi,
  which is the mean over heads of the null probability);
- a block of sublayers is split into one route per sublayer, each with an equal share of its weight;
- a residual sum counts as one block of the embedding and all previous sublayers, so that all
  weights are equal;
- in the authors' form, a state counts as the sublayer whose output it is.

Queries: all sublayers but the first, which reads only the embedding, and all tokens but the first,
which attends only to itself.

Axes: N windows, B windows in a batch, T tokens (queries), S keys, R routes, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError, check_whole
from oasis_attn.measure.residual_updates import observe_updates
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.modeling.depth_cache import RouterCall, observe_depth
from oasis_attn.modeling.families import family_of
from oasis_attn.records import DiagnosisRecord, Metric

NO_OP = 0.1  # this share of a window's tokens, those with the smallest update, is near-no-op
_SMALLEST_MASS = 1e-6  # lower bound of the mass that renormalized values are divided by
_ELEMENTS = 1 << 20  # attention weights to compute at once
_EMBEDDING = -1


class Rows(NamedTuple):
    """Statistics of one distribution over positions for each query: [B, T] float64 each."""

    mass: Tensor
    leakage: Tensor
    concentration: Tensor
    neg_entropy: Tensor


def row_statistics(call: AttentionCall) -> Rows:
    """m, L, C and E of an attention's rows, averaged over heads, a block of queries at a time."""
    B, H, T, _ = call.query_BHTd.shape
    step = max(1, _ELEMENTS // (B * H * call.key_BGSd.shape[2]))
    blocks = []
    for start in range(0, T, step):
        p_BTS = call.rows(start, min(start + step, T)).mean(1).double()
        entropy_BT = torch.special.entr(p_BTS).sum(-1)
        blocks.append(Rows(p_BTS.sum(-1), p_BTS[..., 0], p_BTS.amax(-1), -entropy_BT))
    return Rows(*(torch.cat(values, dim=1) for values in zip(*blocks, strict=True)))


def routes(residual: str, block: int, sublayer: int) -> tuple[list[int], list[int]]:
    """The routes that sublayer `sublayer` reads.

    Returns:
        For each route, the index of the source that it is a part of, and the index of the layer
        whose attention gives its row (-1 for the embedding).
    """
    if residual == "official":
        layer, after_mlp = divmod(sublayer - 1, 2)
        layers = [_EMBEDDING, *range(layer + 1), *[layer] * after_mlp]
        return list(range(len(layers))), layers
    layers = [_EMBEDDING, *(done // 2 for done in range(sublayer))]
    if residual == "sum":
        return [0] * len(layers), layers
    return [0, *(1 + done // block for done in range(sublayer))], layers


def joint_statistics(alpha_BTR: Tensor, routes_R: Sequence[Rows]) -> dict[str, Tensor]:
    """Z, L, C, E and their renormalized values, [B, T] each, from R routes in closed form."""
    m, leak, peak, neg = (torch.stack(values, dim=-1) for values in zip(*routes_R, strict=True))
    mass_BT = (alpha_BTR * m).sum(-1)
    raw = {
        "leakage": (alpha_BTR * leak).sum(-1),
        "concentration": (alpha_BTR * peak).amax(-1),
        "neg_entropy": (alpha_BTR * neg - m * torch.special.entr(alpha_BTR)).sum(-1),
    }
    divisor_BT = mass_BT.clamp_min(_SMALLEST_MASS)
    renormalized = {f"{name}_renormalized": values / divisor_BT for name, values in raw.items()}
    renormalized["neg_entropy_renormalized"] -= mass_BT / divisor_BT * divisor_BT.log()
    return {"mass": mass_BT} | raw | renormalized


class Joint:
    """Computes the joint.* metrics during one pass over windows.

    Raises:
        UserError: the family is not supported, so that its sublayers are not known.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        ours = isinstance(config, OasisConfig)
        self._model = model
        family_of(config.get_text_config(decoder=True))  # raises if it has no row
        self._layers = decoder_map(model).layers
        self._residual: str = config.residual if ours else "sum"
        self._block: int = config.depth_block_size if ours else 1
        self._rows: dict[int, Rows] = {}
        self._weights: dict[int, Tensor] = {}
        self._series: dict[str, dict[int, list[Tensor]]] = {}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Context in which forward passes of the model, on windows without padding, are added."""
        with ExitStack() as stack:
            stack.enter_context(observe_attention(self._model, self._on_attention))
            stack.enter_context(observe_depth(self._model, self._on_router))
            stack.enter_context(observe_updates(self._layers, self._on_update))
            yield

    def _on_attention(self, call: AttentionCall) -> None:
        rows = row_statistics(call)
        self._rows[call.layer] = rows
        ones, zeros = torch.ones_like(rows.mass), torch.zeros_like(rows.mass)
        self._rows[_EMBEDDING] = Rows(ones, zeros, ones, zeros)

    def _on_router(self, call: RouterCall) -> None:
        # In the authors' form, a router follows its sublayer; the next sublayer reads its result.
        self._weights[call.router + (self._residual == "official")] = call.weights_BTS.double()

    def _on_update(self, sublayer: int, ratio_BT: Tensor) -> None:
        if sublayer == 0:
            return
        sources, layers = routes(self._residual, self._block, sublayer)
        sizes_S = torch.tensor(sources, device=ratio_BT.device).bincount()
        if self._residual == "sum":
            weights_BTS = torch.ones_like(ratio_BT).unsqueeze(-1)
        else:
            weights_BTS = self._weights[sublayer]
        alpha_BTR = (weights_BTS / sizes_S)[..., sources]
        values = joint_statistics(alpha_BTR, [self._rows[layer] for layer in layers])
        count = math.ceil(NO_OP * (ratio_BT.shape[1] - 1))
        smallest_BT = ratio_BT[:, 1:].topk(count, largest=False).indices
        for name, values_BT in values.items():
            queries_BT = values_BT[:, 1:]
            self._record(name, sublayer, queries_BT)
            self._record(f"{name}_no_op@{NO_OP}", sublayer, queries_BT.gather(1, smallest_BT))

    def _record(self, name: str, sublayer: int, values_BT: Tensor) -> None:
        series = self._series.setdefault(name, {})
        series.setdefault(sublayer, []).append(values_BT.mean(1).cpu())

    def _stacks(self) -> dict[str, Tensor]:
        """Each series for all windows and sublayers, [N, 2L - 1]."""
        return {
            name: torch.stack([torch.cat(x) for x in series.values()], dim=1)
            for name, series in self._series.items()
        }

    def metrics(self) -> list[Metric]:
        """`joint.{mass, leakage, concentration, neg_entropy}` and the `_renormalized` form of the
        last three, as means over all queries; and each with the suffix `_no_op@0.1` as the mean
        over near-no-op queries: for each sublayer, the 10 % of a window's tokens with the smallest
        update ||v|| / ||h||.

        The 10 % are chosen for each sublayer, because the scale of h differs between residual forms
        and between sublayers, and a pre-norm ignores it.
        """
        return [mean_metric(f"joint.{name}", x.mean(1)) for name, x in self._stacks().items()]

    def tables(self) -> dict[str, Any]:
        """`joint.sequences`: for each metric its value in each window [N], for `compare_joint`.
        `joint.sublayers`: for each metric its value at sublayers 1 to 2L - 1."""
        stacks = {f"joint.{name}": values for name, values in self._stacks().items()}
        return {
            "joint.sequences": {name: values.mean(1).tolist() for name, values in stacks.items()},
            "joint.sublayers": {name: values.mean(0).tolist() for name, values in stacks.items()},
        }


def compare_joint(
    record: DiagnosisRecord, baseline: DiagnosisRecord, *, seed: int = 0, draws: int = 10_000
) -> list[dict[str, Any]]:
    """Compare the joint.* metrics of two models on the same windows, paired by window.

    Near-no-op queries are chosen for each model separately.  The interval is a 95 % percentile
    bootstrap of the mean difference; it draws whole windows, because the queries in one window are
    not independent.

    Args:
        record, baseline: records of `diagnose(..., joint=True)` on the same tokens.
        seed: random seed of the bootstrap.
        draws: number of bootstrap samples.

    Returns:
        A row for each metric: `metric`, `value`, `baseline`, `difference` (value - baseline), its
        interval `low` and `high`, and `n`, the number of windows.

    Raises:
        UserError: a record has no joint.*, the records have different tokens, or only one window.
    """
    check_whole("draws", draws, 1)
    tables = []
    for argument, each in (("record", record), ("baseline", baseline)):
        if "joint.sequences" not in each.tables:
            raise UserError(
                f"{argument}: it has no joint.* metrics; run diagnose with joint=True (--joint)"
            )
        tables.append(each.tables["joint.sequences"])
    if record.data.tokens_sha256 != baseline.data.tokens_sha256:
        raise UserError(
            "baseline: it was measured on different tokens than record; use the same windows"
        )
    windows = len(next(iter(tables[0].values())))
    if windows < 2:
        raise UserError(f"record: it has {windows} window; a comparison needs at least 2")
    # The same draws for all metrics.
    generator = torch.Generator().manual_seed(seed)
    drawn_KN = torch.randint(windows, (draws, windows), generator=generator)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    rows = []
    for name in tables[0]:
        # float(): a record that was saved and loaded holds non-finite values as strings.
        value_N, baseline_N = (
            torch.tensor([float(x) for x in table[name]], dtype=torch.float64) for table in tables
        )
        difference_N = value_N - baseline_N
        low, high = difference_N[drawn_KN].mean(1).quantile(levels).tolist()
        rows.append(
            {
                "metric": name,
                "value": float(value_N.mean()),
                "baseline": float(baseline_N.mean()),
                "difference": float(difference_N.mean()),
                "low": low,
                "high": high,
                "n": windows,
            }
        )
    return rows
