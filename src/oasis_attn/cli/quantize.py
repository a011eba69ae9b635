"""`oasis quantize`: quantize a model, and measure the effect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from oasis_attn.cli import calibration as options
from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_saved,
    print_servable,
    print_table,
    working,
)

if TYPE_CHECKING:
    from oasis_attn.records import QuantizationRecord
    from oasis_attn.report import Table


def quantize(
    model: Model,
    out: Annotated[Path, Option(help="A new folder for the quantized model.")],
    scheme: Annotated[
        str,
        Option(
            help="w8a8-static-full, w8a8-static-linear, w8a8-dynamic, w4a8, w4a4, w4a16,"
            " fp8-static, fp8-dynamic, mxfp8, mxfp4 or nvfp4."
        ),
    ] = "w8a8-dynamic",
    scheme_option: options.SchemeOption = None,
    format: Annotated[
        str,
        Option(
            help="compressed-tensors can be loaded without this package, by transformers, vLLM and"
            r" SGLang; writing it needs pip install 'oasis-attn\[export]'. torchao is w8a8-dynamic"
            r" with int8 kernels in transformers; it needs pip install 'oasis-attn\[int8]'. oasis"
            " supports every scheme and model, and has int8 kernels. auto is compressed-tensors"
            " where it can hold the scheme and the model, and otherwise oasis; the output says"
            " which, and why."
        ),
    ] = "auto",
    simulate: Annotated[
        bool,
        Option(
            "--simulate",
            help="For the format oasis: simulate the quantization in floating point; without it,"
            " use int8 kernels. It has no effect on compressed-tensors, and torchao refuses it.",
        ),
    ] = False,
    ignore: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help="Do not quantize targets that match PATTERN, such as '*.down_proj'; repeatable.",
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        Option(
            help="fp8 writes the scales of a key-value cache in FP8, which engines read; it needs"
            " the format compressed-tensors.",
            metavar="FORMAT",
            show_default=False,
        ),
    ] = None,
    calibration: options.Calibration = "stdlib",
    calibration_split: options.CalibrationSplit = "train",
    evaluation: options.Evaluation = None,
    evaluation_split: options.EvaluationSplit = "test",
    window: options.Window = 512,
    windows: options.Windows = 16,
    sensitivity: Annotated[
        str | None,
        Option(
            help="Measure the perplexity with everything quantized except one group of tensors,"
            " and with only that group. BY is kind, layer or target.",
            metavar="BY",
        ),
    ] = None,
    seed: options.RotationSeed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model, measure perplexity, size and speed, and save it for from_pretrained.

    Example: [bold]oasis quantize smollm2 --scheme w4a16 --out small[/bold]

    To serve the result: [bold]vllm serve small --dtype bfloat16[/bold]

    For int8 kernels: [bold]oasis quantize smollm2 --format oasis --out small[/bold]
    """
    from oasis_attn.devices import check_device
    from oasis_attn.files import check_free
    from oasis_attn.quantization.options import (
        COMPRESSED_TENSORS,
        OASIS,
        check_quantization,
        vllm_computes,
    )
    from oasis_attn.quantization.schemes import Scheme

    varied = options.varied_scheme(scheme, scheme_option)
    check_quantization(
        varied,
        format=format,
        simulate=simulate,
        window=window,
        windows=windows,
        sensitivity=sensitivity,
        seed=seed,
        kv_cache=kv_cache,
    )
    check_device(device)
    check_free(out)
    options.check_inputs(model, calibration, calibration_split, evaluation, evaluation_split)

    from oasis_attn.quantization.quantize_checkpoint import quantize_checkpoint

    with working(model, as_json=as_json) as report:
        record = quantize_checkpoint(
            model,
            out,
            scheme=varied,
            format=format,
            simulate=simulate,
            ignore=ignore or (),
            kv_cache=kv_cache,
            calibration=calibration,
            calibration_split=calibration_split,
            evaluation=evaluation,
            evaluation_split=evaluation_split,
            window=window,
            windows=windows,
            sensitivity=sensitivity,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        print(record.to_json())
    else:
        _show(record)
        written = OASIS if record.arithmetic in ("int8", "simulated") else record.arithmetic
        because = f", because {record.fallback}" if record.fallback else ""
        served = written == COMPRESSED_TENSORS and vllm_computes(Scheme.from_dict(record.scheme))
        if written == COMPRESSED_TENSORS and not served:
            because = ", for transformers; vLLM does not compute this scheme"
        print(f"\nFormat: {written}{because}")
        if served:
            print_servable(out)
        else:
            print_saved(out, purpose="evaluate it", command=("oasis", "evaluate", out))


def _float_weights(sizes: dict[str, int]) -> Table:
    """The weights in floating point; the same weight of all layers is one row."""
    from oasis_attn.report import Table

    rows: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        count, total = rows.get(kind, (0, 0))
        rows[kind] = count + 1, total + size
    return Table(
        title="Weights in floating point (without embeddings and head)",
        columns=("weight", "count", "entries"),
        rows=tuple((kind, str(count), f"{total:,}") for kind, (count, total) in rows.items()),
    )


def _show(record: QuantizationRecord) -> None:
    from oasis_attn.quantization.remedies import described
    from oasis_attn.quantization.schemes import Scheme
    from oasis_attn.report import Table
    from oasis_attn.report.tables import number

    rows = [
        ("perplexity.windowed", *map(number, record.before_after("perplexity.windowed"))),
        ("size.bytes", *(f"{value:,.0f}" for value in record.before_after("size.bytes"))),
    ]
    rows.append(("speed.over_unquantized", "1", f"{record['speed.over_unquantized']:.3f}"))
    rows.append(("size.quantized_share", "0", f"{record['size.quantized_share']:.4f}"))
    missed = record.rounded_to_nearest
    if missed:
        rows.append(("layers without tokens for GPTQ", "", str(len(missed))))
    title = f"{record.model.name}: {described(Scheme.from_dict(record.scheme))}"
    if record.kv_cache:
        title += f", key-value cache in {record.kv_cache}"
    print_table(Table(title=title, columns=("metric", "before", "after"), rows=tuple(rows)))

    if record.float_weights:
        print_table(_float_weights(record.float_weights))
    worst = sorted(
        record.each("quantization.activation_error"), key=lambda m: m.value, reverse=True
    )
    rows = [(m.where, f"{m.value:.3g}") for m in worst[:10]]
    title = "Layers with the largest activation quantization error (relative MSE)"
    print_table(Table(title=title, columns=("tensor", "error"), rows=tuple(rows)))
    if "sensitivity" in record.tables:
        rows = [
            (group, f"{without:.5g}", f"{only:.5g}")
            for group, without, only in zip(*record.tables["sensitivity"].values(), strict=True)
        ]
        title = "Perplexity with all groups quantized but one, and with only that group"
        columns = ("group", "all but this group", "only this group")
        print_table(Table(title=title, columns=columns, rows=tuple(rows)))
