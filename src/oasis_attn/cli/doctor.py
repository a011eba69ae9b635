"""`oasis doctor`: find out why quantization breaks a model, and what helps."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Option, confirm

from oasis_attn.cli import calibration as options
from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_json,
    print_saved,
    print_sentences,
    print_table,
    working,
)


def doctor(
    model: Model,
    out: Annotated[
        Path | None,
        Option(
            help="Folder for the records of one model and scheme. Results in it are not measured"
            " again, so that an interrupted run continues. Default: doctor-NAME, with the last part"
            " of the model's name.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str,
        Option(help="A scheme of `oasis quantize`; weights get one scale per output channel."),
    ] = "w8a8-static-linear",
    scheme_option: options.SchemeOption = None,
    tolerance: Annotated[
        float, Option(help="Largest acceptable increase of perplexity: 0.05 is 5 %.")
    ] = 0.05,
    try_all: Annotated[
        bool, Option("--all", help="Try all remedies, even if one is good enough.")
    ] = False,
    apply: Annotated[
        Path | None,
        Option(
            help="Apply the best remedy, and write the quantized model to this new folder.",
            show_default=False,
        ),
    ] = None,
    calibration: options.PrefixCalibration = "stdlib",
    calibration_split: options.CalibrationSplit = "train",
    evaluation: options.Evaluation = None,
    evaluation_split: options.EvaluationSplit = "test",
    window: options.Window = 256,
    windows: options.Windows = 8,
    seed: options.RotationSeed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Find out why quantization makes a model worse, try remedies, and rank them.

    It ends with the commands that apply the best remedy.

    Example: [bold]oasis doctor smollm2 --apply quantized[/bold]
    """
    from oasis_attn.devices import check_device
    from oasis_attn.files import check_free
    from oasis_attn.quantization.options import check_doctor
    from oasis_attn.quantization.remedies import REMEDIES, per_channel
    from oasis_attn.quantization.schemes import Scheme
    from oasis_attn.study.doctor_folder import stored_results

    varied = options.varied_scheme(scheme, scheme_option)
    check_doctor(tolerance=tolerance, window=window, windows=windows, seed=seed)
    check_device(device)
    out = out or Path(f"doctor-{_last_part(model)}")
    if apply is not None:
        check_free(apply, "apply")
    corpora = options.check_inputs(
        model, calibration, calibration_split, evaluation, evaluation_split
    )
    stored_results(
        out,
        scheme=per_channel(varied),
        seed=seed,
        corpora=corpora,
        window=window,
        windows=windows,
    )

    from oasis_attn.report import conclusion
    from oasis_attn.report.remedies import doctor_conclusion, doctor_table
    from oasis_attn.study.apply_remedy import check_targets, steps
    from oasis_attn.study.doctor import doctor as consult

    arguments: dict[str, Any] = {
        "calibration": calibration,
        "calibration_split": calibration_split,
        "evaluation": evaluation,
        "evaluation_split": evaluation_split,
        "window": window,
        "windows": windows,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    if apply is not None:
        check_targets(apply, out)
    with working(model, as_json=as_json) as report:
        result = consult(
            model,
            out,
            scheme=varied,
            tolerance=tolerance,
            try_all=try_all,
            seed=seed,
            progress=report,
            **arguments,
        )
    record = result.record
    tried = Scheme.from_dict(record.scheme)
    applicable = [remedy.name for remedy in REMEDIES if remedy.applies_to(tried)]
    found = steps(record, out / "quantized" if apply is None else apply, arguments)
    said = {
        "diagnosis": conclusion(result.diagnosis),
        "conclusion": doctor_conclusion(result.diagnosis, record, applicable),
        "commands": tuple(step.line for step in found),
    }
    if as_json:
        print_json(said | {"record": record.to_dict()})
    else:
        print_sentences("Diagnosis", said["diagnosis"])
        print_table(doctor_table(record))
        print_sentences("Conclusion", said["conclusion"])
        print_saved(out, purpose="make a page of it", command=("oasis", "report", out))
        print("\nTo apply the best:", *said["commands"], sep="\n")
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if apply is not None or (terminal and confirm("\nRun these commands now?")):
        for step in found:
            with working(f"oasis {step.command}", as_json=as_json) as report:
                step.run(progress=report)
            print(f"Saved: {step.out}.", file=sys.stderr)


def _last_part(model: str) -> str:
    """The last part of a model's name: a folder, a file without its suffix, or a Hub id."""
    path = Path(os.path.abspath(model))  # so that `.` and `..` have a name
    return path.stem if path.suffix == ".gguf" else path.name
