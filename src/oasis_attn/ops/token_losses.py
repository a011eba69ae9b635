"""Next-token loss per token.  Axes: B sequences, T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK = 64  # positions per call: the copy that log-softmax makes should fit in the cache


def token_losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Next-token losses in nats, [B, T-1] float64; the first token has no prediction."""
    batch, tokens = ids_BT.shape
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    losses = [torch.zeros(batch, 0, dtype=torch.float64, device=logits_BTV.device)]
    for start in range(0, tokens - 1, CHUNK):
        stop = min(start + CHUNK, tokens - 1)
        chunk = cross_entropy(
            logits_BTV[:, start:stop].flatten(0, 1).to(dtype),
            ids_BT[:, start + 1 : stop + 1].flatten(),
            reduction="none",
        )
        losses.append(chunk.view(batch, -1).double())
    return torch.cat(losses, dim=1)
