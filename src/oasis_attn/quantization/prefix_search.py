"""Search for prefix tokens that absorb the attention sinks, and tune their keys and values.

The activations of a sink token are thousands of times larger than those of other tokens, and one
static range must cover both.  If a few prefix tokens become the sinks, no later token does, and
static ranges only need to cover ordinary tokens.

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
from oasis_attn.hub.model_info import eval_mode
from oasis_attn.hub.prefix import Prefix, prefix_of, prefix_replaced, with_prefix
from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.ops.rounding_noise import OUTLIER, rounding_noise
from oasis_attn.quantization.options import PREFIX_METHODS
from oasis_attn.quantization.targets import linear_targets

GAIN = 0.5  # a longer prefix must at least halve the noise (threshold of CushionCache)
CANDIDATES = 32
_ROWS = 16  # sequences per forward pass


def find_prefix(
    model: PreTrainedModel,
    ids_BT: Tensor,
    *,
    method: str = "greedy",
    length: int = 4,
    candidates: Collection[int] | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> tuple[int, ...]:
    """Search for a prefix of 1 to `length` tokens and return their ids.

    The method `greedy` (CushionCache 2406.12016, section 4.1) repeatedly appends the candidate with
    the lowest range noise; of the prefixes found on the way, it returns the shortest one whose
    noise is at most twice the minimum.  The method `frequency` (PrefixQuant 2410.05265, section 4)
    runs the model once; it takes the most frequent outlier tokens, as many as an average window has
    after its first token, followed by BOS.

    Args:
        model: a decoder of transformers or of this library, without a prefix.
        ids_BT: windows of text, int64; a few short windows are enough, because sinks are near the
            start.
        method: `greedy` or `frequency`.
        length: maximum number of tokens.
        candidates: token ids for `greedy`; by default the outlier tokens, BOS, EOS and the most
            frequent tokens of `ids_BT`, 32 in all.
        on_round: is called before `greedy` tries the candidates for the next token.

    Raises:
        UserError: unusable arguments, or no prefix halves the noise; if no token has massive
            activations, the message says that none is needed.
    """
    check_choice("method", method, PREFIX_METHODS)
    check_whole("length", length, 1)
    if prefix_of(model) is not None:
        raise UserError("model: it already has a prefix; use the model without it")
    if method == "frequency" and candidates is not None:
        raise UserError("candidates: given, but method 'frequency' does not use them")
    if candidates is not None and not candidates:
        raise UserError("candidates: it is empty; give token ids, or None for the default")
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
        path, noises = _greedy(model, ids_BT, list(candidates), length, on_round)
    least, before = float(noises.min()), float(noises[0])
    if not least <= GAIN * before or before == 0:
        found_none = (
            f"no prefix of up to {length} tokens found by {method!r} halves its range noise"
            f" ({before:.3g} without prefix, {least:.3g} with the best one)"
        )
        if outliers_BT.any():
            raise UserError(f"model: {found_none}")
        raise UserError(
            "model: it needs no prefix, because no token of the searched text has massive"
            f" activations (above {OUTLIER:g} times those of the median token); {found_none}"
        )
    return path[int((noises <= least / GAIN).nonzero()[0])]


def _greedy(
    model: PreTrainedModel,
    ids_BT: Tensor,
    candidates: list[int],
    length: int,
    on_round: Callable[[], None],
) -> tuple[list[tuple[int, ...]], Tensor]:
    """The prefixes of growing length, and the noise with each of them."""
    path: list[tuple[int, ...]] = [()]
    noises = [float(range_noise(model, ids_BT, path))]
    # One token may not help although two do: until the noise was halved once, continue anyway.
    while len(path) <= length and (
        noises[-1] <= GAIN * min(noises[:-1], default=torch.inf) or min(noises) > GAIN * noises[0]
    ):
        on_round()
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
    """Relative noise of 8-bit static ranges with each prefix, [C] float64.

    The noise is the mean of (r / 255)^2 / (12 s) over the inputs of linear layers and the outputs
    of decoder layers.  Here r is the range of a tensor over all windows, without the prefix tokens,
    and s is the mean square of the median token.  All prefixes must have the same length.
    """
    noises: list[Tensor] = []
    prefix_CP = torch.tensor([list(prefix) for prefix in prefixes], dtype=torch.int64)
    P = prefix_CP.shape[1]
    B, T = ids_BT.shape
    for part_CP in prefix_CP.split(max(1, _ROWS // B)):
        rows = torch.cat([part_CP.repeat_interleave(B, 0), ids_BT.repeat(len(part_CP), 1)], 1)
        noise_C: list[Tensor] = []

        def observe(_kind: str, x_RTD: Tensor, noise_C=noise_C) -> None:
            noise_C.append(_noise(x_RTD[:, P:].reshape(len(x_RTD) // B, B * T, -1)))

        with _observed(model, rows, observe):
            _run(model, rows)
        noises.append(torch.stack(noise_C).mean(0))
    return torch.cat(noises)


def _noise(x_CND: Tensor) -> Tensor:
    precise = torch.promote_types(x_CND.dtype, torch.float32)  # squares of float16 numbers vanish
    signal_C = x_CND.to(precise).square().mean(-1).median(-1).values
    return rounding_noise(x_CND.amin((1, 2)), x_CND.amax((1, 2)), signal_C)


@torch.no_grad()
def outlier_tokens(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Tokens whose max|x| exceeds 64 times that of the median token in any tensor, bool [B, T]."""
    outliers_BT = torch.zeros_like(ids_BT, dtype=torch.bool)

    def observe(_kind: str, x_BTD: Tensor) -> None:
        peak_BT = x_BTD.abs().amax(-1)
        outliers_BT.logical_or_((peak_BT > OUTLIER * peak_BT.median()).to(outliers_BT.device))

    with _observed(model, ids_BT, observe):
        _run(model, ids_BT)
    return outliers_BT


@torch.no_grad()
def max_activations(model: PreTrainedModel, batches: Iterable[Tensor]) -> dict[str, float]:
    """max|x| over inputs of linear layers (`linear`) and outputs of decoder layers (`hidden`)."""
    found = {"linear": 0.0, "hidden": 0.0}

    def observe(kind: str, x_BTD: Tensor) -> None:
        found[kind] = max(found[kind], float(x_BTD.abs().max()))

    for ids_BT in batches:
        with _observed(model, ids_BT, observe):
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
    on_step: Callable[[], None] = lambda: None,
) -> Prefix:
    """Train the keys and values of `prefix` so that the model quantizes well with it.

    Adam minimizes loss + noise_weight * log(range noise), see `range_noise`; the model is frozen.
    (In CushionCache, 2406.12016, section 4.2, the second term is the quantization error itself.)

    Args:
        model: a decoder without a prefix.
        prefix: a prefix of `model`; it does not change.
        batches: token ids, int64 [B, T]; each step uses one, in turn.
        steps: number of optimizer steps.
        learning_rate: peak learning rate (linear decay to 0).
        noise_weight: weight of the second term.
        on_step: is called before each step.

    Returns:
        The tuned prefix.

    Raises:
        UserError: unusable arguments, or the loss is not finite.
    """
    check_whole("steps", steps, 1)
    check_at_least("noise_weight", noise_weight, 0)
    if not learning_rate > 0:
        raise UserError(f"learning_rate: {learning_rate!r} is not greater than 0")
    if not batches:
        raise UserError("batches: it is empty")
    for ids_BT in batches:
        _check_ids("batches", ids_BT, model)
    prefixed = with_prefix(model, prefix).eval()
    stored = prefix_of(prefixed)
    assert stored is not None
    keys, values = (
        x.detach().clone().requires_grad_() for x in (stored.keys_LGPd, stored.values_LGPd)
    )
    optimizer = torch.optim.Adam([keys, values], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with prefix_replaced(prefixed, keys, values), torch.enable_grad():
        for ids_BT in islice(cycle(batches), steps):
            on_step()
            noises: list[Tensor] = []

            def observe(_kind: str, x_BTD: Tensor, noises=noises) -> None:
                noises.append(_noise(x_BTD.flatten(0, 1)[None]))

            ids_BT = ids_BT.to(prefixed.device)
            with _observed(prefixed, ids_BT, observe):
                loss = prefixed(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            total = loss + noise_weight * torch.cat(noises).mean().log()
            if not total.isfinite():
                raise UserError(f"learning_rate: with {learning_rate}, the loss is not finite")
            keys.grad, values.grad = torch.autograd.grad(total, (keys, values))
            optimizer.step()
            schedule.step()
    keys, values = keys.detach(), values.detach()
    return Prefix(tokens=prefix.tokens, keys_LGPd=keys, values_LGPd=values, tuned=True)


@contextmanager
def _observed(
    model: PreTrainedModel, ids_BT: Tensor, observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside the context, call `observe(kind, x)` with the tensors [B, T, D] of a forward pass.

    These are the inputs of linear layers (`linear`) and the outputs of decoder layers (`hidden`).
    A tensor that several layers read is reported once.  Inputs that contain only some of the
    tokens, such as those of experts, are not reported.
    """
    previous: list[Tensor | None] = [None]

    def report(kind: str, x: Any) -> None:
        x = x if isinstance(x, Tensor) else x[0]
        if x is not previous[0] and x.shape[:-1].numel() == ids_BT.numel():
            previous[0] = x
            observe(kind, x.reshape(*ids_BT.shape, -1))

    with ExitStack() as stack:
        names = set(linear_targets(model))
        for name, module in model.named_modules():
            if name in names:
                handle = module.register_forward_pre_hook(lambda _, args: report("linear", args[0]))
                stack.callback(handle.remove)
        for layer in [layer.module for layer in decoder_map(model).layers]:
            handle = layer.register_forward_hook(lambda _module, _args, out: report("hidden", out))
            stack.callback(handle.remove)
        yield


def _run(model: PreTrainedModel, ids_BT: Tensor) -> None:
    with eval_mode(model):
        model.base_model(input_ids=ids_BT.to(model.device), use_cache=False)


def _special(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """The ids of a special token that have an embedding; empty if the model has none."""
    text = model.config.get_text_config(decoder=True)
    value = getattr(text, name, None)
    ids = () if value is None else value if isinstance(value, list) else (value,)
    return tuple(token for token in ids if 0 <= token < text.vocab_size)


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
