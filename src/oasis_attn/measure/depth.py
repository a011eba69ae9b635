"""Depth routing: the weights of each router, and the effect of each source on the loss.

Axes: N windows, B windows in a batch, T tokens, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError, check_iterable
from oasis_attn.measure.sinks import RATE_THRESHOLDS
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.depth_cache import RouterCall, drop_source
from oasis_attn.records import Metric

_TINY = torch.finfo(torch.float64).tiny


class Depth:
    """Computes the depth.* metrics during one pass over windows; no weights are stored."""

    def __init__(self) -> None:
        self._series: dict[str, dict[int, list[Tensor]]] = {}

    def update(self, call: RouterCall) -> None:
        """Add one router call."""
        router, weights_BTS, null_BT, signal_BTS = call
        weights_BTS = weights_BTS.double()
        self._record("weights", router, weights_BTS.mean(1))
        self._record("null", router, null_BT.mean(1, dtype=torch.float64))
        # Renormalize, because the weights of Softmax1 and sigmoid do not sum to one.
        share_BTS = weights_BTS / weights_BTS.sum(-1, keepdim=True).clamp_min(_TINY)
        self._record("entropy", router, torch.special.entr(share_BTS).sum(-1).mean(1))
        if signal_BTS is not None:
            signal_BT = signal_BTS.double().std(-1, correction=0)
            self._record("signal", router, signal_BT.mean(1))

    def _record(self, name: str, router: int, values: Tensor) -> None:
        self._series.setdefault(name, {}).setdefault(router, []).append(values.cpu())

    def _routers(self, name: str) -> dict[int, Tensor]:
        """One series for all windows: router -> [N] or [N, S]."""
        return {router: torch.cat(x) for router, x in sorted(self._series[name].items())}

    @property
    def _optional(self) -> list[str]:
        """Which of "null" (depth null) and "signal" (null signal) the model has."""
        null = any(bool((x_N != 0).any()) for x_N in self._routers("null").values())
        return ["null"] * null + ["signal"] * ("signal" in self._series)

    def metrics(self) -> list[Metric]:
        """Means over routers with at least two sources, with the standard error over windows.

        `depth.sink_rate@eps`: share of (window, router) pairs whose mean weight on the embedding
        exceeds eps (uniform weights are 1/S).  `depth.entropy`: entropy in nats of the renormalized
        weights; `depth.entropy_normalized`: the same divided by log S.  `depth.null`: null
        probability of the depth normalizer, if it has one.  `depth.weight`: mean weight of each
        source in the routers that read it.  `depth.signal`: standard deviation over
        a token's sources of what the null signal adds to their logits, in nats, if there is one.
        """
        if not self._series:
            return []
        weights, entropies = self._routers("weights"), self._routers("entropy")
        several = [router for router, weights_NS in weights.items() if weights_NS.shape[1] > 1]
        embedding_NR = torch.stack([weights[router][:, 0] for router in several], dim=1)
        entropy_NR = torch.stack([entropies[router] for router in several], dim=1)
        most_R = entropy_NR.new_tensor([math.log(weights[router].shape[1]) for router in several])
        means = {
            f"depth.sink_rate@{eps}": (embedding_NR > eps)
            .double()
            .where(~embedding_NR.isnan(), torch.nan)
            for eps in RATE_THRESHOLDS
        } | {
            "depth.entropy": entropy_NR,
            "depth.entropy_normalized": entropy_NR / most_R,
        }
        for name in self._optional:
            values = self._routers(name)
            means[f"depth.{name}"] = torch.stack([values[router] for router in several], dim=1)
        return [
            *(mean_metric(name, values_NR.mean(1)) for name, values_NR in means.items()),
            *(
                mean_metric(
                    "depth.weight", _of_source(source, weights, several), f"source.{source}"
                )
                for source in range(max(weights[router].shape[1] for router in several))
            ),
        ]

    def tables(self) -> dict[str, Any]:
        """For a model with depth routing: `depth.weights` [router][source], and `depth.entropy`,
        `depth.null` and `depth.signal` (the last two if the model has them), each [router].
        Rows begin with router 0; with `residual="official"`, with router 1."""
        if not self._series:
            return {}
        names = ("weights", "entropy", *self._optional)
        return {
            f"depth.{name}": [values.mean(0).tolist() for values in self._routers(name).values()]
            for name in names
        }


def _of_source(source: int, weights: dict[int, Tensor], routers: list[int]) -> Tensor:
    """The weight of a source [N], mean over those of `routers` that read it."""
    readers = [weights[router] for router in routers if weights[router].shape[1] > source]
    return torch.stack([weights_NS[:, source] for weights_NS in readers]).mean(0)


def causal_sources(model: PreTrainedModel, causal: bool | Sequence[int]) -> list[int]:
    """The sources to remove, one at a time: all for True, none for False, or the given ones.

    Source 0 is the embedding; source i is the i-th block of `depth_block_size` sublayers.

    Raises:
        UserError: the model has no depth routing (`residual="depth"`), or no such source.
    """
    if causal is False:
        return []
    config = model.config
    if not isinstance(config, OasisConfig) or config.residual != "depth":
        residual = config.residual if isinstance(config, OasisConfig) else "sum"
        raise UserError(
            f"causal: the model has residual {residual!r}; only residual 'depth' has sources"
        )
    if not isinstance(causal, bool):
        check_iterable("causal", causal, "a list of sources, true or false")
    last = -(-2 * config.num_hidden_layers // config.depth_block_size)
    sources = list(range(last + 1)) if causal is True else list(causal)
    for source in sources:
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source <= last:
            raise UserError(
                f"causal: {source!r} is not a source; sources are whole numbers from 0 to {last}"
            )
    return sources


def causal_importance(
    model: PreTrainedModel, sources: Sequence[int], losses: Callable[[], Tensor]
) -> list[Metric]:
    """`depth.causal` for each of `sources`: the loss without the source minus the loss with it.

    Losses are in nats per token.  `losses` runs the model on all windows and returns their losses
    [N]; it is called once per source and once with all sources.  Each call starts from the same
    random state, which matters for the shuffled null signal.
    """

    def without(source: int | None) -> Tensor:
        with torch.random.fork_rng(), drop_source(model, source):
            torch.manual_seed(0)
            return losses()

    if not sources:
        return []
    full_N = without(None)
    return [
        mean_metric("depth.causal", without(source) - full_N, f"source.{source}")
        for source in sources
    ]
