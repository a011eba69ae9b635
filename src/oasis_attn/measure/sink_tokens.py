"""Sink tokens: which tokens receive much attention, in which layers.

The received attention of a token in one head is its probability, mean over the queries of the
window (0 for the queries before the token).  A token is a sink in a head if this exceeds 0.3, the
threshold of Gu et al. 2024 (arXiv 2410.10781), who apply it to the first token.  Of windows longer
than 64 tokens, at most 64 evenly spaced queries are read, so that no attention map is computed.

Axes: N windows, B windows in a batch, L layers, H heads, Q queries, P prefix tokens, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.hub.prefix import prefix_of
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.attention import AttentionCall
from oasis_attn.records import Metric

THRESHOLD = 0.3
QUERIES = 64  # at most so many are read of each window
ROWS = 10  # of the table


class SinkTokens:
    """Finds the sink tokens during one pass over windows.

    Args:
        model: the model; the tokens of its prefix, if it has one, have negative positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        prefix = prefix_of(model)
        self._prefix = torch.tensor(prefix.tokens if prefix else (), dtype=torch.int64)
        self._batch: dict[int, Tensor] = {}
        self._layers: list[int] = []
        self._counts: list[Tensor] = []
        self._found: dict[tuple[int, int], list[Tensor]] = {}

    def update(self, call: AttentionCall) -> None:
        """Add one attention call."""
        T = call.query_BHTd.shape[2]
        step = -(-T // QUERIES)
        self._batch[call.layer] = call.rows(step - 1, T, step).mean(2).float().cpu()

    def classify(self, ids_BT: Tensor) -> None:
        """Find the sink tokens of a batch, after the calls of all layers."""
        if not self._batch:
            return
        keys_BS = torch.cat([self._prefix.expand(len(ids_BT), -1), ids_BT.cpu()], dim=1)
        self._layers = sorted(self._batch)
        heads = max(received_BHS.shape[1] for received_BHS in self._batch.values())
        received_BLHS = ids_BT.new_zeros(
            (len(ids_BT), len(self._layers), heads, keys_BS.shape[1]),
            dtype=torch.float,
            device="cpu",
        )
        for index, layer in enumerate(self._layers):
            # Some layers have fewer heads, or further keys that are no tokens.
            received_BHS = self._batch[layer][..., : keys_BS.shape[1]]
            received_BLHS[:, index, : received_BHS.shape[1]] = received_BHS
        self._batch.clear()
        sinks_BS = (received_BLHS > THRESHOLD).any(2).any(1)
        broken_B = received_BLHS.isnan().flatten(1).any(1)
        self._counts.append(sinks_BS.sum(1).double().masked_fill(broken_B, torch.nan))
        for window, key in sinks_BS.nonzero().tolist():
            name = key - len(self._prefix), int(keys_BS[window, key])
            self._found.setdefault(name, []).append(received_BLHS[window, :, :, key])

    def metrics(self) -> list[Metric]:
        """`sink.tokens@0.3`: the number of sink tokens of a window."""
        if not self._counts:
            return []
        return [mean_metric(f"sink.tokens@{THRESHOLD}", torch.cat(self._counts))]

    def tables(self) -> dict[str, Any]:
        """`sink.tokens`: the ten largest sinks, one row per position and token.

        Each row has the number of `windows` in which the token is a sink, and over these windows
        the number of `heads` in which it is one (mean), its `received` attention in these heads
        (mean), and all `layers` of these heads.
        """
        rows = [
            _row(position, token, torch.stack(received), self._layers)
            for (position, token), received in self._found.items()
        ]
        rows.sort(key=lambda row: row["windows"] * row["heads"] * row["received"], reverse=True)
        return {"sink.tokens": rows[:ROWS]}


def _row(position: int, token: int, received_NLH: Tensor, layers: list[int]) -> dict[str, Any]:
    sink_NLH = received_NLH > THRESHOLD
    return {
        "position": position,
        "token": token,
        "windows": len(received_NLH),
        "heads": float(sink_NLH.flatten(1).sum(1).double().mean()),
        "received": float(received_NLH[sink_NLH].mean()),
        "layers": [layers[index] for index in sink_NLH.any(2).any(0).nonzero().flatten().tolist()],
    }
