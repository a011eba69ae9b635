"""Secondary sinks by the rule of arXiv 2512.22213.

The L states of a token are the outputs of the decoder layers; the last one is taken after the final
norm, as in the `hidden_states` of transformers.  For each window:

    b           the sink token: the one of the first two tokens with the larger mean norm
    start, end  the states in which b is large: from the steepest increase of |h_b| to the steepest
                decrease after it (`end` is exclusive)
    sink        a later token is a sink in the states from start to end in which
                |cos(h_t, h_b)| > 0.9

A token that is a sink in n states is a copy of b if n >= L - 15, a secondary sink if
4 < n < L - 15, and noise otherwise.  For L <= 19 there is no such n; then the limit is L / 2 and
the metrics have another name.

Axes: L states, B windows, 2 candidates for b, T tokens, D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.hub.prefix import prefix_of
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.records import Metric

COSINE = 0.9
NOISE = 4  # a token that is a sink in at most this many states is noise
COPY_MARGIN = 15  # a copy of the sink token is a sink in at least L - 15 states


class Sink(NamedTuple):
    """One secondary sink: its window and position, and the states in which it is one."""

    window: int
    position: int
    token: int
    states: tuple[int, ...]


class SecondarySinks:
    """Finds secondary sinks and measures how much attention they receive.

    Args:
        states: L, the number of states of a token.

    Attributes:
        windows: for each window, the position of the sink token and the states in which it is
            large.
        found: the secondary sinks, ordered by window and position.
    """

    def __init__(self, states: int) -> None:
        self._states = states
        shallow = states - COPY_MARGIN <= NOISE
        self._limit = states / 2 if shallow else states - COPY_MARGIN
        self._rule = "L/2" if shallow else f"L-{COPY_MARGIN}"
        self._norms: list[Tensor] = []
        self._alike: list[Tensor] = []
        self.windows: list[dict[str, int]] = []
        self._broken: list[bool] = []  # for each window, whether a norm is NaN or infinite
        self._copies: list[int] = []
        self.found: list[Sink] = []
        self._scores: list[float] = []

    def update(self, x_BTD: Tensor, ids_BT: Tensor) -> None:
        """Add one state of a batch, [B, T, D]; call it L times per batch, in order of depth."""
        x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        norms_BT = torch.linalg.vector_norm(x_BTD, dim=-1)
        dots_B2T = x_BTD[:, :2] @ x_BTD.transpose(1, 2)
        self._alike.append(dots_B2T.abs() > COSINE * norms_BT[:, :2, None] * norms_BT[:, None])
        self._norms.append(norms_BT[:, :2])
        if len(self._norms) == self._states:
            norms_B2L = torch.stack(self._norms, dim=-1).cpu()
            alike_B2LT = torch.stack(self._alike, dim=2).cpu()
            for norms_2L, alike_2LT, ids_T in zip(norms_B2L, alike_B2LT, ids_BT, strict=True):
                self._classify(norms_2L, alike_2LT, ids_T)
            self._norms, self._alike = [], []

    def _classify(self, norms_2L: Tensor, alike_2LT: Tensor, ids_T: Tensor) -> None:
        self._broken.append(not norms_2L.isfinite().all())
        first = int(norms_2L.mean(-1).argmax())
        start, end = large_states(norms_2L[first])
        window = len(self.windows)
        self.windows.append({"position": first, "start": start, "end": end})
        sink_LT = alike_2LT[first].clone()
        sink_LT[:start] = sink_LT[end:] = False
        sink_LT[:, : first + 1] = False
        counts_T = sink_LT.sum(0)
        self._copies.append(int((counts_T >= self._limit).sum()))
        for position in (
            ((counts_T > NOISE) & (counts_T < self._limit)).nonzero().flatten().tolist()
        ):
            states = tuple(sink_LT[:, position].nonzero().flatten().tolist())
            self.found.append(Sink(window, position, int(ids_T[position]), states))

    def score(self, model: PreTrainedModel, ids_NT: Tensor) -> None:
        """Run the windows with secondary sinks once more, to measure the attention they receive.

        The score of a sink is its mean attention probability over the queries that can attend to it
        and over the heads of the layers in whose output it is a sink; NaN if none of these layers
        has an attention map.
        """
        prefix = prefix_of(model)
        begin = 0 if prefix is None else len(prefix)  # keys before those of the window
        for window in sorted({sink.window for sink in self.found}):
            sinks = [sink for sink in self.found if sink.window == window]
            received: dict[int, list[Tensor]] = {sink.position: [] for sink in sinks}

            def on_attention(call: AttentionCall, sinks=sinks, received=received) -> None:
                for sink in sinks:
                    if call.layer in sink.states:
                        p_HT = call.column(begin + sink.position)[0]
                        received[sink.position].append(p_HT[:, sink.position :].double().mean())

            with torch.random.fork_rng(), observe_attention(model, on_attention):
                model(input_ids=ids_NT[window : window + 1], use_cache=False)
            self._scores += [
                float(torch.stack(received[s.position]).mean())
                if received[s.position]
                else math.nan
                for s in sinks
            ]

    def metrics(self) -> list[Metric]:
        """`sink.secondary_tokens@RULE` and `sink.first_copies@RULE` per window, and, if there are
        secondary sinks, their mean `sink.secondary_score@RULE`; RULE is `L-15` or `L/2`."""
        counts_N = torch.zeros(len(self.windows))
        for sink in self.found:
            counts_N[sink.window] += 1
        counts = {"secondary_tokens": counts_N, "first_copies": torch.tensor(self._copies)}
        broken_N = torch.tensor(self._broken)
        metrics = [
            mean_metric(f"sink.{name}@{self._rule}", x_N.double().masked_fill(broken_N, math.nan))
            for name, x_N in counts.items()
        ]
        if self._scores:
            name = f"sink.secondary_score@{self._rule}"
            metrics.append(mean_metric(name, torch.tensor(self._scores)))
        return metrics

    def tables(self) -> dict[str, Any]:
        """`sink.window`: per window, the `position` of the sink token and its `start` and `end`.
        `sink.secondary_tokens`: a row per secondary sink, with its level (`first_layer`,
        `layers`)."""
        return {
            "sink.window": self.windows,
            "sink.secondary_tokens": [
                {
                    "window": sink.window,
                    "position": sink.position,
                    "token": sink.token,
                    "first_layer": sink.states[0],
                    "layers": len(sink.states),
                    "score": score,
                }
                for sink, score in zip(self.found, self._scores, strict=True)
            ],
        }


def large_states(norms_L: Tensor) -> tuple[int, int]:
    """The states from `start` to `end` (exclusive) in which a token with these norms is large.

    `start` follows the steepest increase, `end` follows the steepest decrease after it.  If the
    increase is the last step, `end` is L.  For a single state the result is (0, 0).
    """
    steps = norms_L.diff()
    if not len(steps):
        return 0, 0
    start = int(steps.argmax()) + 1
    later = steps[start:]
    return start, start + int(later.argmin()) + 1 if len(later) else len(norms_L)
