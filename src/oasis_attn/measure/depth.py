"""Depth routing: what each router reads, and what the loss owes to each source.

Axes: N windows, B of them at once, T tokens, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.measure.sinks import RATE_THRESHOLDS
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.depth_cache import RouterCall, drop_source
from oasis_attn.records import Metric

_TINY = torch.finfo(torch.float64).tiny


class Depth:
    """The depth.* measures of one pass over windows; each router's weights are reduced as seen."""

    def __init__(self) -> None:
        self._series: dict[str, dict[int, list[Tensor]]] = {}

    def see(self, call: RouterCall) -> None:
        """Take in what one router computed."""
        router, weights_BTS, null_BT, signal_BTS = call
        weights_BTS = weights_BTS.double()
        self._note("weights", router, weights_BTS.mean(1))
        self._note("null", router, null_BT.mean(1, dtype=torch.float64))
        # Of the weight that is spent: Softmax1 and sigmoid rows do not sum to one.
        share_BTS = weights_BTS / weights_BTS.sum(-1, keepdim=True).clamp_min(_TINY)
        self._note("entropy", router, torch.special.entr(share_BTS).sum(-1).mean(1))
        if signal_BTS is not None:
            signal_BT = signal_BTS.double().std(-1, correction=0)
            self._note("signal", router, signal_BT.mean(1))

    def _note(self, name: str, router: int, values: Tensor) -> None:
        self._series.setdefault(name, {}).setdefault(router, []).append(values.cpu())

    def _routers(self, name: str) -> dict[int, Tensor]:
        """One series over all windows: router -> [N], or [N, S]."""
        return {router: torch.cat(x) for router, x in sorted(self._series[name].items())}

    @property
    def _optional(self) -> list[str]:
        """Of the depth null and the null signal, those the model has."""
        null = any(bool((x_N != 0).any()) for x_N in self._routers("null").values())
        return ["null"] * null + ["signal"] * ("signal" in self._series)

    def metrics(self) -> list[Metric]:
        """Means over routers that have a choice, with their spread over windows.

        `depth.sink_rate@eps`: share of (window, router) whose mean weight on the embedding exceeds
        eps; S equal weights are 1/S each.  `depth.entropy`, in nats, of the weights brought to sum
        1, and `depth.entropy_normalised`, over log S.  `depth.null`, the depth normaliser's null
        mass, where it has one.  `depth.signal`, in nats: by how much the null signal moves the
        logits of a token's sources apart (their standard deviation), where there is one.
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
            "depth.entropy_normalised": entropy_NR / most_R,
        }
        for name in self._optional:
            values = self._routers(name)
            means[f"depth.{name}"] = torch.stack([values[router] for router in several], dim=1)
        return [mean_metric(name, values_NR.mean(1)) for name, values_NR in means.items()]

    def tables(self) -> dict[str, Any]:
        """Where the model routes over depth: `depth.weights` [router][source], and [router] each
        `depth.entropy` and, where there is one, `depth.null` and `depth.signal`."""
        if not self._series:
            return {}
        names = ("weights", "entropy", *self._optional)
        return {
            f"depth.{name}": [values.mean(0).tolist() for values in self._routers(name).values()]
            for name in names
        }


def causal_sources(model: PreTrainedModel, causal: bool | Sequence[int]) -> list[int]:
    """The sources to drop, one at a time: all for True, none for False, or those named.

    Source 0 is the embedding; source i the i-th block of `depth_block_size` sublayers.

    Raises:
        UserError: a model that does not route over `depth`, or a source it has not.
    """
    if causal is False:
        return []
    config = model.config
    if not isinstance(config, OasisConfig) or config.residual != "depth":
        residual = config.residual if isinstance(config, OasisConfig) else "sum"
        raise UserError(f"causal: only residual 'depth' has sources to drop; it is {residual!r}")
    last = -(-2 * config.num_hidden_layers // config.depth_block_size)
    sources = list(range(last + 1)) if causal is True else list(causal)
    for source in sources:
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source <= last:
            raise UserError(f"causal: {source!r} is not a source, a number from 0 to {last}")
    return sources


def causal_importance(
    model: PreTrainedModel, sources: Sequence[int], losses: Callable[[], Tensor]
) -> list[Metric]:
    """`depth.causal` at each of `sources`: the loss in nats without it, less the loss with it.

    `losses` runs the model over all windows and returns their losses [N]: once for each source and
    once more.  Each pass draws from the same random state, for the shuffled null signal.
    """

    def without(source: int | None) -> Tensor:
        with torch.random.fork_rng(), drop_source(model, source):
            torch.manual_seed(0)
            return losses()

    if not sources:
        return []
    whole_N = without(None)
    return [
        mean_metric("depth.causal", without(source) - whole_N, f"source.{source}")
        for source in sources
    ]
