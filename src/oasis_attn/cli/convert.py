"""`oasis convert`: convert a pretrained model to OASIS, or back, without changing its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from oasis_attn.cli.terminal import (
    AsJson,
    TrustRemoteCode,
    pairs,
    print_json,
    print_table,
    working,
)
from oasis_attn.errors import check_choice


def convert(
    model: Annotated[
        str, Argument(help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold].")
    ],
    out: Annotated[Path, Argument(help="A new folder for the converted model.")],
    variant: Annotated[
        str | None,
        Option(help="A variant of `oasis variants`. Default: oasis.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option(
            "--config",
            metavar="NAME=VALUE",
            help="Override a setting of the variant's configuration; repeatable.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        Option(
            help="Data type of the saved weights: auto (as the model), float32, bfloat16,"
            " float16, ..."
        ),
    ] = "auto",
    to_vanilla: Annotated[
        bool,
        Option("--to-vanilla", help="Convert an OASIS checkpoint back to its own model family."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Convert a pretrained model. Its outputs are unchanged until it is trained.

    Example: [bold]oasis convert smollm2 converted --config depth_block_size=4[/bold]
    """
    from oasis_attn.files import check_free
    from oasis_attn.hub.locate import DTYPES, find_model
    from oasis_attn.modeling.settings import check_names
    from oasis_attn.modeling.variants import settings_of

    changed = pairs("--config", settings)
    if variant is not None:
        settings_of(variant)
    check_names(changed)
    check_choice("dtype", dtype, DTYPES)
    check_free(out)
    find_model(model)

    from oasis_attn.hub.convert import convert_checkpoint
    from oasis_attn.report import Table

    with working(f"converting {model}", as_json=as_json):
        converted = convert_checkpoint(
            model,
            out,
            variant=variant,
            overrides=changed,
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
        print_table(Table(title="Converted", columns=("", ""), rows=rows, text_columns=2))
