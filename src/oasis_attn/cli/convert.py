"""`oasis convert`: a pretrained model becomes OASIS, or goes back, without changing a logit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, pair, print_json, print_table, working


def convert(
    model: Annotated[
        str, Argument(help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold].")
    ],
    out: Annotated[Path, Argument(help="A new folder for the converted model.")],
    variant: Annotated[
        str | None,
        Option(help="A name that `oasis variants` lists; default oasis.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option(
            "--set", metavar="NAME=VALUE", help="Override a setting of the variant; repeatable."
        ),
    ] = None,
    dtype: Annotated[
        str,
        Option(help="Of the saved weights: auto (the model's), float32, bfloat16, float16, ..."),
    ] = "auto",
    to_vanilla: Annotated[
        bool, Option("--to-vanilla", help="Back to a checkpoint of the model's own family.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Convert a pretrained model; it computes the same function until it is trained.

    Example: [bold]oasis convert smollm2 converted --set depth_block_size=4[/bold]
    """
    from oasis_attn.modeling.convert import convert_checkpoint
    from oasis_attn.report import Table

    with working(f"converting {model}"):
        converted = convert_checkpoint(
            model,
            out,
            variant=variant,
            settings=dict(pair("--set", text) for text in settings or ()),
            dtype=dtype,
            back=to_vanilla,
            trust_remote_code=trust_remote_code,
        )
    facts = {
        "folder": str(out),
        "model_type": converted.config.model_type,
        "family": converted.config.get_text_config().model_type,
        "dtype": str(converted.dtype).removeprefix("torch."),
        "parameters": converted.num_parameters(),
        **getattr(converted.config, "settings", {}),
    }
    if as_json:
        print_json(facts)
    else:
        rows = tuple((name, str(value)) for name, value in facts.items())
        print_table(Table(title="Converted", columns=("", ""), rows=rows))
