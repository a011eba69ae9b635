"""`oasis diagnose`: sinks and outliers of any decoder model, on real text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, TrustRemoteCode, print_table, working


def diagnose(
    model: Annotated[
        str, Argument(help="Hub id, local folder, GGUF file, or [bold]smollm2[/bold].")
    ],
    corpus: Annotated[
        str, Option(help="A corpus by name, or a local .txt, .jsonl or .jsonl.gz file.")
    ] = "stdlib",
    split: Annotated[str, Option(help="Which split of the corpus to read.")] = "validation",
    text: Annotated[
        Path | None, Option(help="Read this file whole, instead of a corpus.", show_default=False)
    ] = None,
    window: Annotated[int, Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, Option(help="Windows to read, at most.")] = 16,
    out: Annotated[
        Path | None, Option(help="Write the record to this JSON file.", show_default=False)
    ] = None,
    figures: Annotated[
        Path | None, Option(help="Write PNG figures to this folder.", show_default=False)
    ] = None,
    joint: Annotated[
        bool, Option("--joint", help="The joint distribution over depth and positions, too.")
    ] = False,
    causal: Annotated[
        bool, Option("--causal", help="The loss without each depth source, too: a pass for each.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, attention sinks and activation outliers, per layer and head.

    Example: [bold]oasis diagnose smollm2 --text book.txt --figures figures[/bold]
    """
    from oasis_attn.data import Corpus, load_corpus
    from oasis_attn.data.readers import file_documents
    from oasis_attn.files import check_writable
    from oasis_attn.measure import diagnose as measure
    from oasis_attn.modeling.loading import load_model
    from oasis_attn.report import layer_table, summary_table
    from oasis_attn.report.figures import save_figures

    if out is not None:
        check_writable(out)
    if figures is not None:
        check_writable(figures / "any.png", "figures")
    if text is None:
        source = load_corpus(corpus, split)
    else:
        source = Corpus(name=str(text), split="whole", reader=partial(file_documents, text))
    # Reads the text, so that what is wrong with it is told before a model is loaded.
    data = {"corpus": source.name, "split": source.split, "sha256": source.sha256}
    with working(f"diagnosing {model}"):
        loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
        record = measure(
            loaded,
            source.texts(),
            tokenizer=tokenizer,
            window=window,
            windows=windows,
            data=data,
            joint=joint,
            causal=causal,
        )
    if out is not None:
        record.save(out)
    if figures is not None:
        save_figures(record, figures)
    if as_json:
        print(record.to_json())
    else:
        print_table(summary_table(record))
        print_table(layer_table(record))
