"""The options of the commands that calibrate a scheme on one text and measure it on another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Option

from oasis_attn.cli.terminal import pairs

if TYPE_CHECKING:
    from oasis_attn.data import Corpus
    from oasis_attn.quantization.schemes import Scheme

SchemeOption = Annotated[
    list[str] | None,
    Option(
        metavar="NAME=VALUE",
        help="Change an option of the scheme, such as weight.bits=4 or rotation=hadamard;"
        " repeatable.",
    ),
]
Calibration = Annotated[str, Option(help="Corpus for calibration: a name, or a local text file.")]
PrefixCalibration = Annotated[
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


def varied_scheme(name: str, changes: list[str] | None) -> Scheme:
    """The scheme of this name with the changes of `--scheme-option`."""
    from oasis_attn.quantization.schemes import get_scheme

    return get_scheme(name).with_options(pairs("--scheme-option", changes))


def check_inputs(
    model: str, calibration: str, calibration_split: str, evaluation: str | None, split: str
) -> tuple[Corpus, Corpus]:
    """The texts; call it before loading.

    Raises:
        UserError: the model or a text cannot be found.
    """
    from oasis_attn.data import calibration_corpora
    from oasis_attn.hub.locate import find_model

    find_model(model)
    corpora = calibration_corpora(calibration, calibration_split, evaluation, split)
    for corpus in corpora:
        corpus.check()
    return corpora
