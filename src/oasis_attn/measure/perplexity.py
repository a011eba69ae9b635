"""Token loss per window.  Axes: B windows, T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK = 256  # positions scored at once: bounds the copy that log-softmax makes of the logits


def window_losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean next-token loss of each window, in nats: [B] float64; each window's first token is not
    predicted."""
    batch, tokens = ids_BT.shape
    total_B = torch.zeros(batch, dtype=torch.float64, device=logits_BTV.device)
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    for start in range(0, tokens - 1, CHUNK):
        stop = min(start + CHUNK, tokens - 1)
        losses = cross_entropy(
            logits_BTV[:, start:stop].flatten(0, 1).to(dtype),
            ids_BT[:, start + 1 : stop + 1].flatten(),
            reduction="none",
        )
        total_B += losses.view(batch, -1).sum(-1, dtype=torch.float64)
    return total_B / (tokens - 1)
