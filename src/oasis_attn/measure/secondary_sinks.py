"""Secondary sinks by the rule of arXiv 2512.22213, in the states that leave the layers.

The L states of a token are the outputs of the decoder layers; the last one is taken after the final
norm, as transformers' `hidden_states` has it.  For each window:

    b           the sink token: of the first two, the one whose norm is larger, mean over states
    start, end  the states in which it is large: from the steepest rise of |h_b| to its steepest
                fall after that (`end` is exclusive)
    sink        a later token, in each state from start to end with |cos(h_t, h_b)| > 0.9

A token that is one in n states is a copy of the sink token for n >= L - 15, a secondary sink for
4 < n < L - 15, and noise otherwise.  With L <= 19 no n is in between: there the limit is L / 2,
under another name.

Axes: L states, B windows, 2 candidates for b, T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.records import Metric

COSINE = 0.9
NOISE = 4  # in so many states or fewer, a token is no sink
FALL_SHORT = 15  # a copy of the sink token is a sink in all but so many states


class Sink(NamedTuple):
    """One secondary sink: its window and position, and the states in which it is one."""

    window: int
    position: int
    token: int
    states: tuple[int, ...]


class SecondarySinks:
    """Which tokens are secondary sinks, and how much attention they receive.

    Args:
        states: L, of one token.

    Attributes:
        windows: of each window seen, the sink token's position and the states in which it is large.
        found: the secondary sinks in them, in order.
    """

    def __init__(self, states: int) -> None:
        self._states = states
        shallow = states - FALL_SHORT <= NOISE
        self._limit = states / 2 if shallow else states - FALL_SHORT
        self._rule = "L/2" if shallow else f"L-{FALL_SHORT}"
        self._norms: list[Tensor] = []
        self._alike: list[Tensor] = []
        self.windows: list[dict[str, int]] = []
        self._copies: list[int] = []
        self.found: list[Sink] = []
        self._scores: list[float] = []

    def see(self, x_BTD: Tensor, ids_BT: Tensor) -> None:
        """Take in the states of one batch, 0 to L - 1 in turn."""
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
        """Run the windows that have secondary sinks once more, and note what each receives.

        A sink's score is its mean attention probability, over the queries that see it and the heads
        of those layers whose output has it as a sink.
        """
        for window in sorted({sink.window for sink in self.found}):
            sinks = [sink for sink in self.found if sink.window == window]
            received: dict[int, list[Tensor]] = {sink.position: [] for sink in sinks}

            def see(call: AttentionCall, sinks=sinks, received=received) -> None:
                for sink in sinks:
                    if call.layer in sink.states:
                        p_HT = call.column(sink.position)[0]
                        received[sink.position].append(p_HT[:, sink.position :].double().mean())

            with torch.random.fork_rng(), observe_attention(model, see):
                model(input_ids=ids_NT[window : window + 1], use_cache=False)
            self._scores += [float(torch.stack(received[s.position]).mean()) for s in sinks]

    def metrics(self) -> list[Metric]:
        """`sink.secondary_tokens@RULE` and `sink.first_copies@RULE` per window, and the mean
        `sink.secondary_score@RULE` where there are any; RULE is `L-15` or `L/2`."""
        counts_N = torch.zeros(len(self.windows))
        for sink in self.found:
            counts_N[sink.window] += 1
        metrics = [
            mean_metric(f"sink.secondary_tokens@{self._rule}", counts_N),
            mean_metric(f"sink.first_copies@{self._rule}", torch.tensor(self._copies)),
        ]
        if self._scores:
            name = f"sink.secondary_score@{self._rule}"
            metrics.append(mean_metric(name, torch.tensor(self._scores)))
        return metrics

    def tables(self) -> dict[str, Any]:
        """`sink.window`, by window: the sink token's `position` and its `start` and `end`; and
        `sink.secondary_tokens`, a row for each: its level is (`first_layer`, `layers`)."""
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
    """The states, from `start` to `end` (exclusive), in which a token of these norms is large.

    The steepest rise leads to `start`; the steepest fall after it leads to `end`.  Where the rise
    is the last step, `end` is L; a single state has none.
    """
    steps = norms_L.diff()
    if not len(steps):
        return 0, 0
    start = int(steps.argmax()) + 1
    falls = steps[start:]
    return start, start + int(falls.argmin()) + 1 if len(falls) else len(norms_L)
