"""The joint distribution over sources and positions that a sublayer reads (OASIS, assumption D.4).

Sublayer l reads source i with weight alpha_i, and source i has read position j with p_i(j):

    q(i, j) = alpha_i p_i(j)        mass Z = sum q;  leakage L = q on position 0, the sink;
                                    concentration C = max q;  negative entropy E = sum q log q

No q is stored.  With each route's own m_i = sum_j p_i(j), L_i, C_i and E_i,

    Z = sum alpha_i m_i     L = sum alpha_i L_i     C = max alpha_i C_i
    E = sum alpha_i E_i + sum m_i alpha_i log alpha_i

which is D.4's closed form for rows that sum to one, and stays exact for those of a null option,
where m_i < 1.  `*_renormalised` is the same of q / Z: without it, whatever leaves mass on a null
has less of everything.

What a route is, and what it has read:
- the embedding has read the token itself alone, so that C is at least its weight: in a residual
  sum C is mostly that, 1 / R;
- a sublayer has read what its layer's attention read (an MLP the same, as with psi): the mean over
  heads of the rows, as psi is the mean over heads of the null;
- a block of sublayers is as many routes, its weight shared out equally among them: they are summed;
- a residual sum is one such block of the embedding and all sublayers so far: equal weights;
- in the authors' form a state counts as the sublayer that made it.

The queries are the sublayers' after the first, which reads the embedding alone, at every token
after the first, which sees itself alone.

Axes: N windows, B of them at once, T tokens (queries), S keys, R routes, H heads.
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
from oasis_attn.measure.parts import Tap
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.measure.updates import observe_updates
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.depth_cache import RouterCall, observe_depth
from oasis_attn.modeling.families import family_of
from oasis_attn.records import DiagnosisRecord, Metric

NO_OP = 0.1  # the share of a window's tokens, those of smallest update, that are near-no-op
_IDLE = 1e-6  # a mass below this has no renormalised form: it counts as spread over nothing
_ELEMENTS = 1 << 20  # of a map, computed at once
_EMBEDDING = -1


class Rows(NamedTuple):
    """What one distribution over positions amounts to, for each query: [B, T] float64 each."""

    mass: Tensor
    leakage: Tensor
    concentration: Tensor
    neg_entropy: Tensor


def row_statistics(call: AttentionCall) -> Rows:
    """m, L, C and E of the head-mean rows of one attention, some queries at a time."""
    B, H, T, _ = call.query_BHTd.shape
    step = max(1, _ELEMENTS // (B * H * call.key_BGSd.shape[2]))
    parts = []
    for start in range(0, T, step):
        p_BTS = call.rows(start, min(start + step, T)).mean(1).double()
        entropy_BT = torch.special.entr(p_BTS).sum(-1)
        parts.append(Rows(p_BTS.sum(-1), p_BTS[..., 0], p_BTS.amax(-1), -entropy_BT))
    return Rows(*(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)))


def routes(residual: str, block: int, sublayer: int) -> tuple[list[int], list[int]]:
    """What sublayer `sublayer` reads, a route each: of which source it is a part, and the layer
    whose attention it has read by (-1: none, the embedding)."""
    if residual == "official":
        layer, after_mlp = divmod(sublayer - 1, 2)
        layers = [_EMBEDDING, *range(layer + 1), *[layer] * after_mlp]
        return list(range(len(layers))), layers
    layers = [_EMBEDDING, *(done // 2 for done in range(sublayer))]
    if residual == "sum":
        return [0] * len(layers), layers
    return [0, *(1 + done // block for done in range(sublayer))], layers


def joint_statistics(alpha_BTR: Tensor, routes_R: Sequence[Rows]) -> dict[str, Tensor]:
    """Z, L, C, E and their renormalised forms, [B, T] each, from R routes in closed form."""
    m, leak, peak, neg = (torch.stack(values, dim=-1) for values in zip(*routes_R, strict=True))
    mass_BT = (alpha_BTR * m).sum(-1)
    raw = {
        "leakage": (alpha_BTR * leak).sum(-1),
        "concentration": (alpha_BTR * peak).amax(-1),
        "neg_entropy": (alpha_BTR * neg - m * torch.special.entr(alpha_BTR)).sum(-1),
    }
    spent_BT = mass_BT.clamp_min(_IDLE)
    renormalised = {f"{name}_renormalised": values / spent_BT for name, values in raw.items()}
    renormalised["neg_entropy_renormalised"] -= mass_BT / spent_BT * spent_BT.log()
    return {"mass": mass_BT} | raw | renormalised


class Joint:
    """The joint.* measures of one pass over windows.

    Raises:
        UserError: a family without adapter, whose sublayers cannot be told apart.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        ours = isinstance(config, OasisConfig)
        self._model = model
        self._family = family_of(config.get_text_config(decoder=True))
        self._residual: str = config.residual if ours else "sum"
        self._block: int = config.depth_block_size if ours else 1
        self._rows: dict[int, Rows] = {}
        self._weights: dict[int, Tensor] = {}
        self._series: dict[str, dict[int, list[Tensor]]] = {}

    @contextmanager
    def listening(self, taps: Sequence[Tap]) -> Iterator[None]:
        """While open, take in what the model computes; whole windows of unpadded tokens."""
        layers = [tap.module for tap in taps if tap.kind == "layer"]
        with ExitStack() as stack:
            stack.enter_context(observe_attention(self._model, self._see_attention))
            stack.enter_context(observe_depth(self._model, self._see_router))
            stack.enter_context(observe_updates(layers, self._family, self._see_update))
            yield

    def _see_attention(self, call: AttentionCall) -> None:
        rows = row_statistics(call)
        self._rows[call.layer] = rows
        ones, zeros = torch.ones_like(rows.mass), torch.zeros_like(rows.mass)
        self._rows[_EMBEDDING] = Rows(ones, zeros, ones, zeros)

    def _see_router(self, call: RouterCall) -> None:
        # The authors' routers stand after their sublayer, and feed the next.
        self._weights[call.router + (self._residual == "official")] = call.weights_BTS.double()

    def _see_update(self, sublayer: int, ratio_BT: Tensor) -> None:
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
            self._note(name, sublayer, queries_BT)
            self._note(f"{name}_no_op@{NO_OP}", sublayer, queries_BT.gather(1, smallest_BT))

    def _note(self, name: str, sublayer: int, values_BT: Tensor) -> None:
        series = self._series.setdefault(name, {})
        series.setdefault(sublayer, []).append(values_BT.mean(1).cpu())

    def _stacks(self) -> dict[str, Tensor]:
        """Each series over all windows and sublayers, [N, 2L - 1]."""
        return {
            name: torch.stack([torch.cat(x) for x in series.values()], dim=1)
            for name, series in self._series.items()
        }

    def metrics(self) -> list[Metric]:
        """`joint.{mass, leakage, concentration, neg_entropy}` and, but for the mass, their
        `_renormalised` form; over all queries, and `_no_op@0.1` over the tenth of each window's
        tokens whose update ||v|| / ||h|| is smallest, chosen for each sublayer.

        That share is of each sublayer's own tokens because the scale of h differs between residual
        forms and sublayers, and means nothing to a pre-norm.
        """
        return [mean_metric(f"joint.{name}", x.mean(1)) for name, x in self._stacks().items()]

    def tables(self) -> dict[str, Any]:
        """By the metrics' names: `joint.sequences`, the value in each window [N], for
        `compare_joint`; and `joint.sublayers`, the value at sublayers 1 to 2L - 1."""
        stacks = {f"joint.{name}": values for name, values in self._stacks().items()}
        return {
            "joint.sequences": {name: values.mean(1).tolist() for name, values in stacks.items()},
            "joint.sublayers": {name: values.mean(0).tolist() for name, values in stacks.items()},
        }


def compare_joint(
    record: DiagnosisRecord, baseline: DiagnosisRecord, *, seed: int = 0, draws: int = 10_000
) -> list[dict[str, Any]]:
    """Both models' joint.* on the same windows, paired window by window.

    Each model's near-no-op queries are its own.  The interval is a percentile bootstrap of the mean
    difference, 95 %, whose draws are of whole windows, for the queries in one are not independent.

    Returns:
        A row for each metric: `metric`, `value`, `baseline`, `difference` (value - baseline), its
        interval `low` and `high`, and `n`, the windows.

    Raises:
        UserError: a record without joint.*, records of other tokens, or of a single window.
    """
    check_whole("draws", draws, 1)
    tables = []
    for argument, each in (("record", record), ("baseline", baseline)):
        if "joint.sequences" not in each.tables:
            raise UserError(f"{argument}: it has no joint.*; diagnose the model with joint=True")
        tables.append(each.tables["joint.sequences"])
    if record.data.tokens_sha256 != baseline.data.tokens_sha256:
        raise UserError("baseline: it was measured on other tokens than record, so no window pairs")
    windows = len(next(iter(tables[0].values())))
    if windows < 2:
        raise UserError(f"record: {windows} window has no spread; a comparison takes at least 2")
    # One draw of windows for all metrics.
    generator = torch.Generator().manual_seed(seed)
    drawn_KN = torch.randint(windows, (draws, windows), generator=generator)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    rows = []
    for name in tables[0]:
        # float: what is not finite is a string in a record read back.
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
