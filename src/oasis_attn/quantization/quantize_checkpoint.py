"""Load a model, quantize it, measure the effect, and save the quantized model with a record."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import Windows, calibration_corpora, read_windows
from oasis_attn.devices import find_device, wait_for
from oasis_attn.errors import Refusal, UserError
from oasis_attn.files import check_free, staged_folder
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_card import write_card
from oasis_attn.hub.model_info import check_lengths
from oasis_attn.hub.prefix import Prefix, prefix_of, without_prefix
from oasis_attn.hub.prefix_export import check_prefix_in_tokenizer, save_tokenizer_with_prefix
from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.progress import Progress, no_progress
from oasis_attn.quantization.compressed_tensors_format import write_compressed_tensors
from oasis_attn.quantization.coverage import quantized_share
from oasis_attn.quantization.int8 import check_kernels, to_int8
from oasis_attn.quantization.kv_scales import check_kv_cache, kv_scales
from oasis_attn.quantization.options import (
    AUTO,
    COMPRESSED_TENSORS,
    OASIS,
    TORCHAO,
    Choice,
    cannot_hold,
    check_quantization,
    choose_format,
)
from oasis_attn.quantization.plain_model import check_model, check_transforms, refusal
from oasis_attn.quantization.record import quantization_record
from oasis_attn.quantization.schemes import Scheme, get_scheme
from oasis_attn.quantization.sensitivity import (
    sensitivity_table,
    target_metrics,
)
from oasis_attn.quantization.served_prefix import check_served_prefix
from oasis_attn.quantization.simulate import check_unquantized_config, quantize, scheme_targets
from oasis_attn.quantization.torchao_format import write_torchao
from oasis_attn.records import Metric, QuantizationRecord


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | Scheme = "w8a8-dynamic",
    format: str = AUTO,
    simulate: bool = False,
    ignore: Sequence[str] = (),
    kv_cache: str | None = None,
    calibration: str = "stdlib",
    calibration_split: str = "train",
    evaluation: str | None = None,
    evaluation_split: str = "test",
    window: int = 512,
    windows: int = 16,
    sensitivity: str | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> QuantizationRecord:
    """Quantize a model, measure the effect, and write model, tokenizer and record to `out`.

    Args:
        model: see `load_model`.
        out: a new folder; `from_pretrained` restores the quantized model from it.
        scheme: see `quantize`.
        format: `compressed-tensors`, for engines such as vLLM, see `save_compressed_tensors`;
            `torchao`, for int8 kernels in transformers, see `save_torchao`; `oasis`, which holds
            every scheme and model, and is loaded with `oasis_attn`; or `auto`: the first if it can
            hold the scheme and the model and its library is installed, and otherwise `oasis`, for
            the reason that is the `fallback` of the record.

            In `compressed-tensors` and `torchao`, the perplexity and speed `after` are those of the
            folder as transformers loads it, without `oasis_attn`, and a prefix becomes part of the
            tokenizer.  In `compressed-tensors`, the scheme gets `fused_scales` if its weights have
            `e4m3` scales.
        simulate: for the format `oasis`: if true, the quantized model computes in floating point,
            which works for every scheme; if false, it uses int8 kernels, which exist for some
            schemes only.  Folders in the format `compressed-tensors` compute in floating point;
            with `torchao`, true is refused.
        ignore: patterns of target names (`*.down_proj`) that are not quantized.
        kv_cache: `fp8` to write the scales of a key-value cache in FP8, see `kv_scales`, which
            needs the format `compressed-tensors`; None to leave the cache in floating point.
        calibration, calibration_split: corpus and split for calibration.  The errors of activations
            are measured on the same windows, for every scheme.
        evaluation, evaluation_split: corpus and split for perplexity; the default corpus is that of
            `calibration`.
        window: tokens per window.
        windows: maximum number of windows for calibration, and for perplexity; they are spread over
            the split.
        sensitivity: measure the perplexity with all but one group of tensors quantized, and with
            only that group, for each `kind`, `layer` or `target`.  Each measurement is one pass
            over the windows.
        seed: random seed of the rotation.
        device: see `load_model`.
        trust_remote_code: see `load_model`.
        progress: see `Progress`.

    Returns:
        The record.  Its metrics are `size.quantized_share` (see `coverage`); `perplexity.windowed`
        and `size.bytes`, `before` and `after`; `speed.over_unquantized`, the median over windows of
        the ratio of tokens per second; and the `target_metrics` of the simulated model.  With
        `sensitivity`, it has the table `sensitivity`.

    Raises:
        UserError: unusable arguments, a scheme without int8 kernels in the format `oasis`, an error
            of `quantize`, or, unless the format is `auto`, one of `save_compressed_tensors`
            or `save_torchao`.  Nothing is written then.
    """
    scheme = get_scheme(scheme)
    check_quantization(
        scheme,
        format=format,
        simulate=simulate,
        window=window,
        windows=windows,
        sensitivity=sensitivity,
        seed=seed,
        kv_cache=kv_cache,
    )
    if kv_cache is not None:  # which other formats would drop
        format = COMPRESSED_TENSORS
    check_free(out)
    choice = choose_format(format, scheme)
    if choice.format == TORCHAO or (choice.format == OASIS and not simulate):
        check_kernels(scheme, find_device(device), choice.fallback)
    corpora = calibration_corpora(calibration, calibration_split, evaluation, evaluation_split)

    progress("loading the model")
    loaded, tokenizer = load_model(
        model,
        device=device,
        trust_remote_code=trust_remote_code,
        check=check_unquantized_config,
    )
    check_no_prefix_in_tokenizer(tokenizer, model)
    check_lengths(loaded, [window], "window")
    seen, held_out = (
        read_windows(corpus, tokenizer, window=window, windows=windows) for corpus in corpora
    )
    work = _Work(
        loaded=loaded,
        tokenizer=tokenizer,
        out=Path(out),
        simulate=simulate,
        targets=_not_ignored(scheme_targets(loaded, scheme), ignore),
        kv_cache=kv_cache or "",
        seen=seen,
        held_out=held_out,
        sensitivity=sensitivity,
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    try:
        return work.write(scheme, choice)
    except Refusal as error:
        if format != AUTO:
            raise
        choice = Choice(OASIS, cannot_hold("model", error.reason))
    if not simulate:
        check_kernels(scheme, loaded.device, choice.fallback)
    return work.write(scheme, choice)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A model to quantize, and what `quantize_checkpoint` needs in order to write it in a format.

    Attributes:
        seen, held_out: the windows to calibrate and to measure on.
        quantized: the quantized models so far, of which a second format may need the same.
    """

    loaded: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    out: Path
    simulate: bool
    targets: list[str]
    kv_cache: str
    seen: Windows
    held_out: Windows
    sensitivity: str | None
    seed: int
    trust_remote_code: bool
    progress: Progress
    quantized: dict[Scheme, PreTrainedModel] = field(default_factory=dict)

    def write(self, scheme: Scheme, choice: Choice) -> QuantizationRecord:
        """Quantize, measure and write the model; `Refusal` if the format cannot hold it."""
        format, progress = choice.format, self.progress
        loaded, tokenizer, held_out = self.loaded, self.tokenizer, self.held_out
        if format == COMPRESSED_TENSORS and scheme.weight.scale_type == "e4m3":
            scheme = replace(scheme, fused_scales=True)
        batches = list(self.seen.ids_NT.split(1))
        given = batches if scheme.needs_calibration else None
        prefix = prefix_of(loaded) if format != OASIS else None
        quantized = self._quantized(scheme, format, prefix, given)
        with staged_folder(self.out) as stage:
            measured, fields = quantized, {}
            if format != OASIS:  # before it is measured, because the folder may be refused
                scales = None
                if self.kv_cache:
                    progress("measuring the key-value cache")
                    scales = kv_scales(quantized, batches)
                progress("writing")
                _save_without_ours(quantized, tokenizer, stage, format, scales)
                measured = _load_again(stage, str(loaded.device), self.trust_remote_code, format)
                fields = {"arithmetic": format}
            progress("measuring the errors of each tensor")
            metrics = target_metrics(quantized, batches)
            tables: dict[str, Any] = {}
            if self.sensitivity is not None:
                tables["sensitivity"] = sensitivity_table(
                    *(loaded, scheme, held_out.ids_NT, given),
                    targets=self.targets,
                    by=self.sensitivity,
                    seed=self.seed,
                    progress=progress,
                )
            if format == OASIS:
                progress("writing")
                if not self.simulate:
                    to_int8(quantized)
                quantized.save_pretrained(stage)
                tokenizer.save_pretrained(stage)
            progress("measuring perplexity and speed")
            sizes = {
                "before": sum(p.numel() * p.element_size() for p in loaded.parameters()),
                "after": sum(path.stat().st_size for path in stage.glob("*.safetensors")),
            }
            tokens = () if prefix is None else prefix.tokens
            metrics = (
                *(Metric(name="size.bytes", value=v, where=k) for k, v in sizes.items()),
                Metric(name="size.quantized_share", value=quantized_share(quantized)),
                *_compare(loaded, measured, held_out.ids_NT, tokens),
                *metrics,
            )
            record = quantization_record(
                loaded,
                quantized,
                data=held_out.info,
                calibration=self.seen.info,
                seed=self.seed,
                metrics=metrics,
                tables=tables,
                fallback=choice.fallback,
                kv_cache=self.kv_cache,
                **fields,
            )
            record.save(stage / "record.json")
            # Again, because the card shows metrics of the record.
            write_card(quantized, stage, format=format, kv_cache=self.kv_cache)
        return record

    def _quantized(
        self, scheme: Scheme, format: str, prefix: Prefix | None, calibration: list[Tensor] | None
    ) -> PreTrainedModel:
        """The quantized model; `Refusal` if `format` cannot hold it, as early as this is known."""
        loaded = self.loaded
        if prefix is not None:
            check_prefix_in_tokenizer(loaded, self.tokenizer)
        if format != OASIS:
            plain = loaded if prefix is None else without_prefix(loaded)
            check_model(plain, self.targets, format)
            if self.kv_cache:
                check_kv_cache(plain, self.seen.ids_NT[0])
        if scheme not in self.quantized:
            self.progress("quantizing")
            self.quantized[scheme] = quantize(
                loaded, scheme, calibration=calibration, targets=self.targets, seed=self.seed
            )
        quantized = self.quantized[scheme]
        if format != OASIS:
            check_transforms(quantized, format)
        if prefix is not None:
            self.progress("computing the prefix in the quantized model")
            check_served_prefix(quantized, loaded, self.seen.ids_NT, format)
        return quantized


def _save_without_ours(
    quantized: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    format: str,
    scales: Mapping[str, Tensor] | None,
) -> None:
    """Write a folder that needs no `oasis_attn`, with the prefix of the model in the tokenizer."""
    prefix = prefix_of(quantized)

    def write(model: PreTrainedModel) -> None:
        if format == TORCHAO:
            write_torchao(model, folder)
        else:
            write_compressed_tensors(model, folder, scales)

    if prefix is None:
        write(quantized)
        tokenizer.save_pretrained(folder)
        return
    write(without_prefix(quantized))
    chats = save_tokenizer_with_prefix(tokenizer, prefix.tokens, folder)
    if getattr(tokenizer, "chat_template", None) and not chats:
        warnings.warn(
            "tokenizer: its chat template is left out, because the text of the prefix would be cut"
            " into other tokens in front of it",
            stacklevel=3,
        )


def _load_again(folder: Path, device: str, trust_remote_code: bool, format: str) -> PreTrainedModel:
    """The model as transformers loads it from the written folder, in the dtype of the folder."""
    try:
        model, _ = load_model(
            folder, dtype="auto", device=device, trust_remote_code=trust_remote_code
        )
    except UserError as error:
        reason = f"transformers does not load it again ({error.__cause__ or error})"
        raise refusal(format, reason) from error
    return model


def _not_ignored(targets: Sequence[str], ignore: Sequence[str]) -> list[str]:
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in targets):
            example = f", such as {targets[0]!r}" if targets else "; it has none in this model"
            raise UserError(f"ignore: {pattern!r} matches none of the scheme's targets{example}")
    return [name for name in targets if not any(fnmatchcase(name, p) for p in ignore)]


@torch.no_grad()
def _compare(
    before: PreTrainedModel, after: PreTrainedModel, ids_NT: Tensor, tokens: Sequence[int]
) -> list[Metric]:
    """The perplexity of both models, and the median ratio of their speeds.

    The `tokens` of a prefix precede each window of the model `after`, which does not store it.
    """
    models = {"before": (before, ()), "after": (after, tokens)}
    losses: dict[str, list[Tensor]] = {where: [] for where in models}
    seconds: dict[str, list[float]] = {where: [] for where in models}
    for ids_BT in ids_NT.to(before.device).split(1):
        for where, (model, first) in models.items():
            read = torch.cat([ids_BT.new_tensor([first]).expand(len(ids_BT), -1), ids_BT], 1)
            wait_for(before.device)
            start = time.perf_counter()
            logits_BTV = model(input_ids=read, use_cache=False).logits[:, len(first) :]
            wait_for(before.device)
            seconds[where].append(time.perf_counter() - start)
            losses[where].append(token_losses(logits_BTV, ids_BT).mean())
    count = len(ids_NT)
    metrics = [
        Metric(
            name="perplexity.windowed",
            value=float(torch.stack(losses[where]).mean().exp()),
            where=where,
            n=count,
        )
        for where in models
    ]
    ratios = [b / a for b, a in zip(seconds["before"], seconds["after"], strict=True)]
    speed = Metric(name="speed.over_unquantized", value=statistics.median(ratios), n=count)
    return [*metrics, speed]
