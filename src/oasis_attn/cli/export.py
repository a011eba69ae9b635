"""`oasis export`: write a model in a format that inference engines read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_json,
    print_saved,
    print_servable,
    print_table,
    working,
)


def export(
    model: Model,
    out: Annotated[Path, Option(help="A new .gguf file, or a new folder.")],
    format: Annotated[
        str | None,
        Option(
            help="gguf (for llama.cpp), or transformers (a folder for transformers and engines that"
            " read such folders). Default: gguf if --out ends in .gguf.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        Option(
            help="Type of the weights. gguf: q8_0 (default), q4_0, f16, bf16 or f32; transformers:"
            " auto (default: that of the model), float32, bfloat16 or float16.",
            show_default=False,
        ),
    ] = None,
    with_code: Annotated[
        bool,
        Option(
            "--with-code",
            help="Write the code of an OASIS model into its folder, for loading with"
            " trust_remote_code=True.",
        ),
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a model so that other programs can serve it without oasis-attn.

    A prefix becomes part of the tokenizer, or a PEFT adapter if it was tuned.

    Nulls of [bold]oasis convert --null-from-sink[/bold] become a PEFT adapter. Other OASIS models
    need [bold]--with-code[/bold], or must first be converted to a family of transformers with
    [bold]oasis convert[/bold].

    Example: [bold]oasis export smollm2 --weights q4_0 --out smollm2.gguf[/bold]

    Example: [bold]oasis export prefixed --format transformers --out served[/bold]

    Example: [bold]oasis export retrofitted --format transformers --out served[/bold]

    Example: [bold]oasis export oasis-model --with-code --out with-code[/bold]

    To serve a model: [bold]llama-server -m smollm2.gguf[/bold], or
    [bold]vllm serve ./served --dtype bfloat16[/bold].
    """
    from oasis_attn.devices import check_device
    from oasis_attn.hub.export_options import check_export
    from oasis_attn.hub.locate import find_model

    check_export(out, format, weights, with_code)
    check_device(device)
    find_model(model)

    from oasis_attn.quantization.export_checkpoint import PEFT_ADAPTER, export_checkpoint
    from oasis_attn.report import Table

    with working(f"exporting {model}", as_json=as_json) as report:
        facts = export_checkpoint(
            model,
            out,
            format=format,
            weights=weights,
            with_code=with_code,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        print_json(facts)
    else:
        rows = tuple(
            (name, _text(value)) for name, value in facts.items() if name not in ("file", "folder")
        )
        print_table(Table(title="Exported", columns=("", ""), rows=rows, text_columns=2))
        if "file" in facts:
            print_saved(out, purpose="serve it", command=("llama-server", "-m", out))
        elif with_code or PEFT_ADAPTER in facts.values():  # no engine applies them
            print_saved(out)
        else:
            print_servable(out)


def _text(value: Any) -> str:
    if isinstance(value, dict):  # counts of tensors by type
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
