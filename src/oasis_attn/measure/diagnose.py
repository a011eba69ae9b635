"""One pass over windows of text that measures what the model's forward pass computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.errors import check_at_least
from oasis_attn.measure.depth import Depth
from oasis_attn.measure.outliers import Outliers
from oasis_attn.measure.parts import Tap, find_taps
from oasis_attn.measure.perplexity import window_losses
from oasis_attn.measure.secondary import SecondarySinks
from oasis_attn.measure.sinks import Sinks
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.measure.windows import cut_windows, describe_windows
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.residual import observe_depth
from oasis_attn.records import Metric, Record


def diagnose(
    model: PreTrainedModel,
    texts_or_tokens: str | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = None,
    windows: int = 16,
    batch_size: int = 1,
    data: dict[str, Any] | None = None,
    seed: int | None = None,
) -> Record:
    """Perplexity, outliers, attention sinks, null mass and depth weights of a causal decoder.

    Args:
        model: any decoder family of transformers whose attention goes through its attention
            interface, or ours.  It is run as it stands, in eval mode, and left as it was.
        texts_or_tokens: a text, an iterable of texts, or rows of token ids ([N, T] or a sequence of
            [T]), each row a window.
        tokenizer: reads the texts; its BOS, where it has one, begins every window.
        window: tokens in a window; 512 for texts, the rows' own length for tokens.
        windows: how many are read at most, from the start.
        batch_size: windows in one forward pass; it changes the speed and not the numbers.
        data: where the text comes from, for the record.
        seed: what the text was drawn with, for the record.

    Returns:
        A record of kind `diagnosis`.  Metrics: `perplexity.windowed`, the exponential of
        `loss.windowed` (nats per token, disjoint windows), `outlier.*`, `sink.*`, and `null.mass`
        where attention has a null option.  Tables per layer and head: see `Outliers.tables`,
        `Sinks.tables`, `SecondarySinks.tables` and `Depth.tables`.

    Raises:
        UserError: text or tokens that make no window (see `cut_windows`), or a model whose layers,
            attention, MLPs or norms cannot be found.
    """
    check_at_least("batch_size", batch_size, 1)
    taps = find_taps(model)
    embedding: Any = model.get_input_embeddings()
    ids_NT = cut_windows(
        texts_or_tokens,
        tokenizer=tokenizer,
        window=window,
        windows=windows,
        vocabulary=embedding.weight.shape[0],
    )
    losses, outliers, depth = [], Outliers(taps), Depth()
    sinks, secondary = Sinks(taps), SecondarySinks(sum(tap.kind == "layer" for tap in taps))

    def see(tap: Tap, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        outliers.see(tap, x, ids_BT)
        if tap.kind == "layer" and tap.layer is not None:
            secondary.see(tap.layer, x, ids_BT)

    with _eval_mode(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(observe_attention(model, sinks.see))
        stack.enter_context(observe_depth(model, depth.see))
        for tap in taps:
            stack.enter_context(_hooked(tap, see))
        for ids_BT in ids_NT.to(model.device).split(batch_size):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            losses.append(window_losses(logits_BTV, ids_BT))

    return Record(
        kind="diagnosis",
        subject=_subject(model),
        data=(data or {}) | describe_windows(ids_NT),
        seed=seed,
        metrics=(
            *_perplexity(torch.cat(losses)),
            *outliers.metrics(),
            *sinks.metrics(),
            *secondary.metrics(),
        ),
        tables=outliers.tables() | sinks.tables() | secondary.tables() | depth.tables(),
    )


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _hooked(tap: Tap, see: Any) -> Iterator[None]:
    handle = tap.module.register_forward_hook(lambda _module, _inputs, output: see(tap, output))
    try:
        yield
    finally:
        handle.remove()


def _perplexity(losses_N: Tensor) -> list[Metric]:
    loss = mean_metric("loss.windowed", losses_N)
    perplexity = float(losses_N.mean().exp())
    return [Metric(name="perplexity.windowed", value=perplexity, n=loss.n), loss]


def _subject(model: PreTrainedModel) -> dict[str, Any]:
    settings = {"settings": model.config.settings} if isinstance(model.config, OasisConfig) else {}
    return settings | {
        "name": model.config.name_or_path,
        "family": model.config.get_text_config(decoder=True).model_type,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
