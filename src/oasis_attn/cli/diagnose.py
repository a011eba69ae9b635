"""`oasis diagnose`: measure attention sinks and activation outliers of a decoder model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    print_saved,
    print_sentences,
    print_table,
    working,
)
from oasis_attn.cli.text import given_text


def diagnose(
    model: Model,
    corpus: Annotated[
        str | None,
        Option(
            help="Name of a corpus, or a local .txt, .jsonl or .jsonl.gz file. Default: stdlib.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        Option(help="Split of the corpus. Default: validation.", show_default=False),
    ] = None,
    text: Annotated[
        str | None, Option(help="Measure this text instead of a corpus.", show_default=False)
    ] = None,
    text_file: Annotated[
        Path | None,
        Option(
            help="Measure the whole of this .txt, .jsonl or .jsonl.gz file instead of a corpus.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        Option(
            help="Tokens per window. Default: 512, or the whole of a shorter text.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[int, Option(help="Maximum number of windows, spread over the text.")] = 16,
    out: Annotated[
        Path | None, Option(help="Write the record to this JSON file.", show_default=False)
    ] = None,
    figures: Annotated[
        Path | None,
        Option(help="Write every figure to this folder, as PNG and SVG.", show_default=False),
    ] = None,
    joint: Annotated[
        bool,
        Option(
            "--joint",
            help="Also measure the joint distribution of attention over depth and positions.",
        ),
    ] = False,
    causal: Annotated[
        bool,
        Option(
            "--causal",
            help="Of a model with depth routing, also measure the loss without each depth source;"
            " one more pass per source.",
        ),
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, attention sinks and activation outliers; name their tokens and channels.

    Example: [bold]oasis diagnose smollm2 --text-file book.txt --figures figures[/bold]
    """
    from oasis_attn.data import load_corpus
    from oasis_attn.devices import check_device
    from oasis_attn.errors import UserError, check_whole, shown
    from oasis_attn.files import check_writable
    from oasis_attn.hub.locate import find_model

    if window is not None:
        check_whole("window", window, 2)
    check_whole("windows", windows, 1)
    check_device(device)

    if out is not None:
        check_writable(out)
    if figures is not None:
        check_writable(figures / "any.png", "figures")
    source = given_text(text, text_file)
    if source is None:
        source = load_corpus(corpus or "stdlib", split or "validation")
    else:
        for name, value in (("corpus", corpus), ("split", split)):
            if value is not None:
                raise UserError(f"{name}: {shown(value)} has no effect together with a text")
    find_model(model)
    if not isinstance(source, str):
        _ = source.sha256  # reads it, so that errors in it are reported before the model loads

    from oasis_attn.hub.loading import load_model
    from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
    from oasis_attn.measure import diagnose as measure
    from oasis_attn.report import (
        activation_table,
        conclusion,
        head_table,
        layer_table,
        sink_table,
        summary_table,
    )
    from oasis_attn.report.figures import diagnosis_figures, save_figures

    with working(f"diagnosing {model}", as_json=as_json):
        loaded, tokenizer = load_model(model, device=device, trust_remote_code=trust_remote_code)
        check_no_prefix_in_tokenizer(tokenizer, model)
        record = measure(
            loaded,
            source,
            tokenizer=tokenizer,
            window=window,
            windows=windows,
            joint=joint,
            causal=causal,
        )
    if out is not None:
        record.save(out)
    if figures is not None:
        save_figures(diagnosis_figures(record), figures)
    if as_json:
        print(record.to_json())
    else:
        for table in (summary_table, layer_table, activation_table, sink_table, head_table):
            print_table(table(record))
        print_sentences("Conclusion", conclusion(record))
        command = "oasis", "doctor", model
        purpose = "measure what 8 bits cost, and what helps"
        print_saved(out, figures, purpose=purpose, command=command)
