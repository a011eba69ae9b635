"""The loss of a model on disjoint windows of text.  Axes: N windows, B in a batch, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import Windows
from oasis_attn.errors import check_whole
from oasis_attn.hub.model_info import check_lengths, eval_mode
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.records import Metric


def measure_loss(
    model: PreTrainedModel, windows: Windows, *, batch_size: int = 1
) -> tuple[Metric, Metric]:
    """`perplexity.windowed` and `loss.windowed` (nats per token), the same numbers as `diagnose`.

    Args:
        model: a decoder.
        windows: all of them are read.
        batch_size: windows in one forward pass; it changes the speed and not the numbers.

    Raises:
        UserError: a window is longer than the model has positions.
    """
    check_whole("batch_size", batch_size, 1)
    check_lengths(model, windows.ids_NT.shape[1:], "window")
    batches = windows.ids_NT.to(model.device).split(batch_size)
    with eval_mode(model), torch.no_grad():
        return loss_metrics(torch.cat([window_losses(model, ids_BT) for ids_BT in batches]))


def window_losses(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """The mean loss of each window [B], in nats per token."""
    return token_losses(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).mean(-1)


def loss_metrics(losses_N: Tensor) -> tuple[Metric, Metric]:
    """The metrics from the losses of all windows; perplexity is the exponential of their mean."""
    loss = mean_metric("loss.windowed", losses_N)
    perplexity = float(losses_N.mean().exp())
    return Metric(name="perplexity.windowed", value=perplexity, n=loss.n), loss
