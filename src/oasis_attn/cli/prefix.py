"""`oasis prefix`: find prefix tokens that make a model easier to quantize, without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from oasis_attn.cli import calibration as options
from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_saved,
    print_table,
    working,
)


def prefix(
    model: Model,
    out: Annotated[Path, Option(help="A new folder for the model with its prefix.")],
    method: Annotated[str, Option(help="greedy (CushionCache) or frequency (PrefixQuant).")] = (
        "greedy"
    ),
    length: Annotated[int, Option(help="Maximum number of prefix tokens.")] = 4,
    tune_steps: Annotated[
        int, Option(help="Steps of training for the keys and values of the prefix.")
    ] = 0,
    scheme: Annotated[
        str,
        Option(
            help="Static scheme to measure the effect with: w8a8-static-linear, w8a8-static-full,"
            " fp8-static or nvfp4."
        ),
    ] = "w8a8-static-linear",
    scheme_option: options.SchemeOption = None,
    calibration: options.PrefixCalibration = "stdlib",
    calibration_split: options.CalibrationSplit = "train",
    evaluation: options.Evaluation = None,
    evaluation_split: options.EvaluationSplit = "test",
    window: options.Window = 512,
    windows: options.Windows = 16,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Find prefix tokens that absorb the attention sinks of a model, and save the model with them.

    Example: [bold]oasis prefix smollm2 --tune-steps 32 --out prefixed[/bold]
    """
    from oasis_attn.devices import check_device
    from oasis_attn.files import check_free
    from oasis_attn.quantization.options import check_prefix

    varied = options.varied_scheme(scheme, scheme_option)
    check_prefix(
        varied, method=method, length=length, tune_steps=tune_steps, window=window, windows=windows
    )
    check_device(device)
    check_free(out)
    options.check_inputs(model, calibration, calibration_split, evaluation, evaluation_split)

    from oasis_attn.quantization.prefix_checkpoint import prefix_checkpoint
    from oasis_attn.report import Table
    from oasis_attn.report.tables import number

    with working(model, as_json=as_json) as report:
        record = prefix_checkpoint(
            model,
            out,
            method=method,
            length=length,
            tune_steps=tune_steps,
            scheme=varied,
            calibration=calibration,
            calibration_split=calibration_split,
            evaluation=evaluation,
            evaluation_split=evaluation_split,
            window=window,
            windows=windows,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        print(record.to_json())
        return
    names = dict.fromkeys(metric.name for metric in record.metrics)
    rows = tuple((name, *map(number, record.before_after(name))) for name in names)
    title = f"Prefix {record.text!r}, tokens {list(record.tokens)}"
    print_table(Table(title=title, columns=("metric", "before", "after"), rows=rows))
    command = ["oasis", "quantize", str(out), "--out", f"{out}-quantized", "--scheme", scheme]
    for change in scheme_option or ():
        command += ["--scheme-option", change]
    command += ["--simulate"] if varied.simulated_only else []
    print_saved(out, purpose="quantize it", command=command)
