"""The options of the commands that calibrate a scheme on one text and measure it on another."""

from __future__ import annotations

from typing import Annotated

from typer import Option

SchemeOption = Annotated[
    list[str] | None,
    Option(
        metavar="NAME=VALUE",
        help="Change an option of the scheme, such as weight.bits=4 or rotation=hadamard;"
        " repeatable.",
    ),
]
Calibration = Annotated[
    str,
    Option(
        help="Corpus for calibration, and for the search of a prefix: a name, or a local text file."
    ),
]
CalibrationSplit = Annotated[str, Option(help="Split of the calibration corpus.")]
Evaluation = Annotated[
    str | None,
    Option(
        help="Corpus for the measurements. Default: the calibration corpus.", show_default=False
    ),
]
EvaluationSplit = Annotated[str, Option(help="Split of the evaluation corpus.")]
Window = Annotated[int, Option(help="Tokens per window.")]
Windows = Annotated[
    int,
    Option(
        help="Maximum number of windows for calibration, and for the measurements. They are spread"
        " over the split."
    ),
]
RotationSeed = Annotated[int, Option(help="Random seed of the rotation.")]
