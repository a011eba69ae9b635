"""Find the tokens of a prefix behind which static ranges are narrow, and tune what they became.

A sink token carries activations thousands of times those of its neighbours, and one static range
must hold both.  With a few tokens in front that take the part of the sink, no later token becomes
one, and ranges are those of ordinary tokens.

Axes: C candidate prefixes, B windows, P prefix tokens, T tokens, D width, N = B * T.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.errors import UserError, check_at_least, check_choice, check_whole
from oasis_attn.modeling.prefix import Prefix, prefix_of, prefix_replaced, with_prefix
from oasis_attn.quantization.branches import decoder_layers
from oasis_attn.quantization.sites import linear_sites

METHODS = ("greedy", "frequency")
OUTLIER = 64.0  # peak over the median token's peak (PrefixQuant, 4.1)
GAIN = 0.5  # CushionCache's threshold: a longer prefix must at least halve the noise
CANDIDATES = 32
_STEPS = 255  # of an 8-bit range
_ROWS = 16  # sequences run at once


def find_prefix(
    model: PreTrainedModel,
    ids_BT: Tensor,
    *,
    method: str = "greedy",
    length: int = 4,
    candidates: Collection[int] | None = None,
) -> tuple[int, ...]:
    """Token ids of a prefix, 1 to `length` of them.

    `greedy` (CushionCache 2406.12016, section 4.1): append the candidate that leaves the least
    range noise; return the shortest prefix on the way whose noise is at most twice the least.
    `frequency` (PrefixQuant 2410.05265, section 4): run the model once; take as many of the most
    frequent outlier tokens as a window has on average after its first token, then BOS.

    Args:
        model: a transformers decoder without a prefix.
        ids_BT: windows of text, int64; a few short ones are enough, since sinks arise at the start.
        candidates: for `greedy`; default, the outlier tokens, BOS, EOS and the most frequent tokens
            of `ids_BT`, 32 in all.

    Raises:
        UserError: unusable arguments, or no prefix halves the noise: the model has no use for one.
    """
    check_choice("method", method, METHODS)
    check_whole("length", length, 1)
    if prefix_of(model) is not None:
        raise UserError("model: it has a prefix already; give the model without it")
    if method == "frequency" and candidates is not None:
        raise UserError("candidates: given, but method 'frequency' finds its own")
    if candidates is not None and not candidates:
        raise UserError("candidates: there is none; give token ids, or None for a choice of ours")
    _check_ids("ids_BT", ids_BT, model)
    if candidates is not None:
        _check_in_vocabulary("candidates", torch.tensor(list(candidates)), model)

    outliers_BT = outlier_tokens(model, ids_BT)
    bos = _special(model, "bos_token_id")
    if method == "frequency":
        after = Counter(ids_BT[:, 1:][outliers_BT[:, 1:]].tolist())
        count = min(-(-after.total() // len(ids_BT)), length - len(bos))
        found = (*(token for token, _ in after.most_common(count)), *bos)
        path = [(), found] if found else [()]
        noises = torch.cat([range_noise(model, ids_BT, [prefix]) for prefix in path])
    else:
        if candidates is None:
            frequent = Counter(ids_BT.flatten().tolist()).most_common(CANDIDATES)
            known = Counter(ids_BT[outliers_BT].tolist()).most_common()
            pool = [*bos, *_special(model, "eos_token_id"), *(t for t, _ in known + frequent)]
            candidates = list(dict.fromkeys(pool))[:CANDIDATES]
        path, noises = _greedy(model, ids_BT, list(candidates), length)
    least, before = float(noises.min()), float(noises[0])
    if least > GAIN * before:
        raise UserError(
            f"model: no prefix of up to {length} tokens found by {method!r} halves its range noise"
            f" ({before:.3g}, at best {least:.3g})"
        )
    return path[int((noises <= least / GAIN).nonzero()[0])]


def _greedy(
    model: PreTrainedModel, ids_BT: Tensor, candidates: list[int], length: int
) -> tuple[list[tuple[int, ...]], Tensor]:
    """The prefixes on the way, and the noise behind each."""
    path: list[tuple[int, ...]] = [()]
    noises = [float(range_noise(model, ids_BT, path))]
    # One token may do nothing where two do much, so that only a gain once made is waited for.
    while len(path) <= length and (
        noises[-1] <= GAIN * min(noises[:-1], default=torch.inf) or min(noises) > GAIN * noises[0]
    ):
        longer = [(*path[-1], token) for token in candidates]
        noise_C = range_noise(model, ids_BT, longer)
        best = int(noise_C.argmin())
        path.append(longer[best])
        noises.append(float(noise_C[best]))
    return path, torch.tensor(noises)


@torch.no_grad()
def range_noise(
    model: PreTrainedModel, ids_BT: Tensor, prefixes: Sequence[Sequence[int]]
) -> Tensor:
    """Noise of 8-bit static ranges behind each prefix, over the signal: [C] float64.

    With r the range of a tensor over all windows, prefix left out, and s the median token's mean
    square, the mean of (r / 255)^2 / (12 s) over the inputs of linear layers and layers' outputs.
    All prefixes must be of one length.
    """
    noises: list[Tensor] = []
    prefix_CP = torch.tensor([list(prefix) for prefix in prefixes], dtype=torch.int64)
    P = prefix_CP.shape[1]
    B, T = ids_BT.shape
    for part_CP in prefix_CP.split(max(1, _ROWS // B)):
        rows = torch.cat([part_CP.repeat_interleave(B, 0), ids_BT.repeat(len(part_CP), 1)], 1)
        sites: list[Tensor] = []

        def see(_kind: str, x_RTD: Tensor, sites=sites) -> None:
            sites.append(_noise(x_RTD[:, P:].reshape(len(x_RTD) // B, B * T, -1)))

        with _watched(model, rows, see):
            _run(model, rows)
        noises.append(torch.stack(sites).mean(0))
    return torch.cat(noises)


def _noise(x_CND: Tensor) -> Tensor:
    step_C = (x_CND.amax((1, 2)).clamp(min=0) - x_CND.amin((1, 2)).clamp(max=0)).double() / _STEPS
    signal_C = x_CND.square().mean(-1).median(-1).values.double()
    return step_C.square() / (12 * signal_C.clamp(min=torch.finfo(x_CND.dtype).tiny))


@torch.no_grad()
def outlier_tokens(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Where the peak of a token is over 64 times the median token's, in any tensor: bool [B, T]."""
    outliers_BT = torch.zeros_like(ids_BT, dtype=torch.bool)

    def see(_kind: str, x_BTD: Tensor) -> None:
        peak_BT = x_BTD.abs().amax(-1)
        outliers_BT.logical_or_((peak_BT > OUTLIER * peak_BT.median()).to(outliers_BT.device))

    with _watched(model, ids_BT, see):
        _run(model, ids_BT)
    return outliers_BT


@torch.no_grad()
def peaks(model: PreTrainedModel, batches: Iterable[Tensor]) -> dict[str, float]:
    """max |x| over all inputs of linear layers (`linear`) and over layers' outputs (`hidden`)."""
    found = {"linear": 0.0, "hidden": 0.0}

    def see(kind: str, x_BTD: Tensor) -> None:
        found[kind] = max(found[kind], float(x_BTD.abs().max()))

    for ids_BT in batches:
        with _watched(model, ids_BT, see):
            _run(model, ids_BT)
    return found


def tune_prefix(
    model: PreTrainedModel,
    prefix: Prefix,
    batches: Sequence[Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-2,
    noise_weight: float = 0.1,
) -> Prefix:
    """`prefix` with keys and values trained for text behind it that quantises well.

    Adam on loss + noise_weight * log(range noise), see `range_noise`; the model is frozen
    (CushionCache 2406.12016, section 4.2, whose second term is the quantisation error itself).

    Args:
        model: without a prefix.
        batches: token ids, int64 [B, T], one a step, taken in turn.
        steps: of Adam.
        learning_rate: its peak; it falls to 0 linearly.
        noise_weight: nats per e-fold of noise.

    Raises:
        UserError: unusable arguments; a loss that is not finite.
    """
    check_whole("steps", steps, 1)
    check_at_least("noise_weight", noise_weight, 0)
    if not learning_rate > 0:
        raise UserError(f"learning_rate: {learning_rate!r} is not above 0")
    if not batches:
        raise UserError("batches: there is none")
    for ids_BT in batches:
        _check_ids("batches", ids_BT, model)
    twin = with_prefix(model, prefix).eval()
    stored = prefix_of(twin)
    assert stored is not None
    keys, values = (
        x.detach().clone().requires_grad_() for x in (stored.keys_LGPd, stored.values_LGPd)
    )
    optimizer = torch.optim.Adam([keys, values], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with prefix_replaced(twin, keys, values), torch.enable_grad():
        for ids_BT in islice(cycle(batches), steps):
            sites: list[Tensor] = []

            def see(_kind: str, x_BTD: Tensor, sites=sites) -> None:
                sites.append(_noise(x_BTD.flatten(0, 1)[None]))

            ids_BT = ids_BT.to(twin.device)
            with _watched(twin, ids_BT, see):
                loss = twin(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            total = loss + noise_weight * torch.cat(sites).mean().log()
            if not total.isfinite():
                raise UserError(f"learning_rate: {learning_rate} made the loss not finite")
            keys.grad, values.grad = torch.autograd.grad(total, (keys, values))
            optimizer.step()
            schedule.step()
    return Prefix(tokens=prefix.tokens, keys_LGPd=keys.detach(), values_LGPd=values.detach())


@contextmanager
def _watched(
    model: PreTrainedModel, ids_BT: Tensor, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, `see` gets each linear layer's input and each decoder layer's output, [B, T, D].

    What several layers read is seen once; what a layer reads of some tokens only, as experts do,
    not at all.
    """
    last: list[Tensor | None] = [None]

    def take(kind: str, x: Any) -> None:
        x = x if isinstance(x, Tensor) else x[0]
        if x is not last[0] and x.shape[:-1].numel() == ids_BT.numel():
            last[0] = x
            see(kind, x.reshape(*ids_BT.shape, -1))

    with ExitStack() as stack:
        sites = set(linear_sites(model))
        for name, module in model.named_modules():
            if name in sites:
                handle = module.register_forward_pre_hook(lambda _, args: take("linear", args[0]))
                stack.callback(handle.remove)
        for layer in decoder_layers(model)[1]:
            handle = layer.register_forward_hook(lambda _module, _args, out: take("hidden", out))
            stack.callback(handle.remove)
        yield


def _run(model: PreTrainedModel, ids_BT: Tensor) -> None:
    training = model.training
    model.eval()
    try:
        model.base_model(input_ids=ids_BT.to(model.device), use_cache=False)
    finally:
        model.train(training)


def _special(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """The id or ids of a special token; none where the model has none."""
    value = getattr(model.config.get_text_config(decoder=True), name, None)
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _check_ids(argument: str, ids_BT: Tensor, model: PreTrainedModel) -> None:
    shape = tuple(ids_BT.shape)
    if ids_BT.dtype != torch.int64 or ids_BT.ndim != 2 or ids_BT.shape[1] < 2 or not len(ids_BT):
        raise UserError(f"{argument}: {ids_BT.dtype} {shape} is not int64 [windows, 2 or more]")
    _check_in_vocabulary(argument, ids_BT, model)


def _check_in_vocabulary(argument: str, ids: Tensor, model: PreTrainedModel) -> None:
    size = model.config.get_text_config(decoder=True).vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise UserError(f"{argument}: token ids {low} .. {high} are not all in 0 .. {size - 1}")
