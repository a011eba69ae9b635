"""`oasis quantize`: a model in fewer bits, and what that cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, pair, print_table, working

if TYPE_CHECKING:
    from oasis_attn.records import QuantizationRecord
    from oasis_attn.report import Table


def quantize(
    model: Annotated[
        str, Argument(help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold].")
    ],
    out: Annotated[Path, Option(help="A new folder for the quantised model.")],
    scheme: Annotated[
        str, Option(help="w8a8-static, w8a8-static-linear, w8a8-dynamic, w4a8, w4a4 or w4a16.")
    ] = "w8a8-dynamic",
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change the scheme: weight.bits=3, rotation=hadamard, ...; repeatable.",
        ),
    ] = None,
    simulate: Annotated[
        bool,
        Option(
            "--simulate",
            help="Compute in floating point on the scheme's grids; without it, in integers.",
        ),
    ] = False,
    skip: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help="Leave tensors out, as '*.down_proj'; repeatable."),
    ] = None,
    calibration: Annotated[
        str, Option(help="A corpus by name, or a local text file, to calibrate on.")
    ] = "stdlib",
    calibration_split: Annotated[str, Option(help="Which split of it to read.")] = "train",
    evaluation: Annotated[
        str | None,
        Option(help="The same to measure perplexity on; default, that corpus."),
    ] = None,
    evaluation_split: Annotated[str, Option(help="Which split of it to read.")] = "test",
    window: Annotated[int, Option(help="Tokens per window.")] = 512,
    windows: Annotated[
        int,
        Option(help="Windows to calibrate on, and to measure on, spread over each split."),
    ] = 16,
    costs: Annotated[
        str | None,
        Option(help="Perplexity without and with only each kind, layer or site.", metavar="BY"),
    ] = None,
    seed: Annotated[int, Option(help="Of a rotation.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantise a model, measure perplexity, size and speed, and save it for from_pretrained.

    Example: [bold]oasis quantize smollm2 --scheme w4a4 --simulate --out small[/bold]
    """
    from oasis_attn.errors import check_choice
    from oasis_attn.quantization import schemes
    from oasis_attn.quantization.checkpoint import quantize_checkpoint

    check_choice("scheme", scheme, schemes())
    changes = dict(pair("--set", text) for text in settings or ())
    with working(f"quantising {model}") as status:
        record = quantize_checkpoint(
            model,
            out,
            scheme=schemes()[scheme].vary(changes),
            simulate=simulate,
            skip=skip or (),
            calibration=calibration,
            calibration_split=calibration_split,
            evaluation=evaluation,
            evaluation_split=evaluation_split,
            window=window,
            windows=windows,
            costs=costs,
            seed=seed,
            trust_remote_code=trust_remote_code,
            tell=lambda what: status.update(escape(f"{model}: {what}")),
        )
    if as_json:
        print(record.to_json())
    else:
        _show(record)


def _left(sizes: dict[str, int]) -> Table:
    """Weights that stay in floating point: those of all layers in one row."""
    from oasis_attn.report import Table

    rows: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        count, total = rows.get(kind, (0, 0))
        rows[kind] = count + 1, total + size
    return Table(
        title="Weights left in floating point (embeddings and head aside)",
        columns=("weight", "how many", "entries"),
        rows=tuple((kind, str(count), f"{total:,}") for kind, (count, total) in rows.items()),
    )


def _show(record: QuantizationRecord) -> None:
    from oasis_attn.report import Table

    rows = [
        (name, *(f"{value:.6g}" for value in record.before_after(name)))
        for name in ("perplexity.windowed", "size.bytes")
    ]
    rows.append(("speed.over_unquantized", "1", f"{record['speed.over_unquantized']:.3f}"))
    rows.append(("size.quantized_share", "0", f"{record['size.quantized_share']:.4f}"))
    missed = record.rounded_to_nearest
    if missed:
        rows.append(("layers that GPTQ had no tokens for", "", str(len(missed))))
    title = f"{record.model.name}: {record.scheme['name']}"
    print_table(Table(title=title, columns=("", "before", "after"), rows=tuple(rows)))

    if record.float_weights:
        print_table(_left(record.float_weights))
    worst = sorted(
        record.each("quantization.activation_error"), key=lambda m: m.value, reverse=True
    )
    rows = [(m.where, f"{m.value:.3g}") for m in worst[:10]]
    title = "Largest errors of activations, of their power"
    print_table(Table(title=title, columns=("tensor", "error"), rows=tuple(rows)))
    if "sensitivity" in record.tables:
        columns = record.tables["sensitivity"]
        rows = [
            (group, f"{without:.5g}", f"{only:.5g}")
            for group, without, only in zip(*columns.values(), strict=True)
        ]
        title = "Perplexity by what is quantised"
        print_table(Table(title=title, columns=("", "all but it", "it alone"), rows=tuple(rows)))
