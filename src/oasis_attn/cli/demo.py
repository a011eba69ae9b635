"""`oasis demo`: a short demonstration of the library with real models and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from oasis_attn.cli.terminal import AsJson, print_json, print_table


def demo(
    out: Annotated[
        Path, Option(help="A new folder for the report, figures, records and models.")
    ] = Path("demo"),
    pretrained: Annotated[str, Option(help="The pretrained model to diagnose.")] = "smollm2",
    steps: Annotated[int, Option(help="Training steps of each small model.")] = 250,
    windows: Annotated[
        int, Option(help="Maximum number of text windows for each measurement.")
    ] = 16,
    seed: Annotated[int, Option(help="Random seed of initial weights and data order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Diagnose a pretrained model, train three small models, compare them, and write a report.

    Takes about ten minutes on two cores.  Example: [bold]oasis demo --out demo[/bold]
    """
    from oasis_attn.errors import check_seed, check_whole
    from oasis_attn.files import check_free
    from oasis_attn.hub.locate import find_model

    check_whole("steps", steps, 1)
    check_whole("windows", windows, 1)
    check_seed("seed", seed)
    check_free(out)
    find_model(pretrained)

    from oasis_attn.study.demo import run_demo

    result = run_demo(out, pretrained=pretrained, steps=steps, windows=windows, seed=seed)
    if as_json:
        print_json(result.numbers())
    else:
        print_table(result.table)
        print(f"The report with all figures: {out / 'index.html'}")
