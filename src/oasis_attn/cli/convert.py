"""`oasis convert`: convert a pretrained model to OASIS, or back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from oasis_attn.cli.calibration import check_inputs
from oasis_attn.cli.terminal import (
    AsJson,
    Device,
    Model,
    TrustRemoteCode,
    pairs,
    print_json,
    print_saved,
    print_sentences,
    print_servable,
    print_table,
    working,
)
from oasis_attn.errors import UserError, check_choice

if TYPE_CHECKING:
    from oasis_attn.records import ConversionRecord

_WITH_NULL = "Options with --null-from-sink"


def convert(
    model: Model,
    out: Annotated[Path, Option(help="A new folder for the converted model.")],
    variant: Annotated[
        str | None,
        Option(
            help="A variant of `oasis variants`. Default: oasis; with --null-from-sink, kv_null.",
            show_default=False,
        ),
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
            help="Data type of the saved weights: auto (that of the model), float32,"
            " bfloat16, float16, ..."
        ),
    ] = "auto",
    to_vanilla: Annotated[
        bool,
        Option("--to-vanilla", help="Convert an OASIS checkpoint back to its own model family."),
    ] = False,
    to_sinks: Annotated[
        bool,
        Option(
            "--to-sinks",
            help="Convert an OASIS checkpoint with a plain null and no depth routing to a family"
            " with attention sinks, which transformers and engines load without oasis-attn.",
        ),
    ] = False,
    null_from_sink: Annotated[
        bool,
        Option(
            "--null-from-sink",
            help="Move the attention sink of the model into a null, without training. This changes"
            " the outputs; the effect is measured.",
        ),
    ] = False,
    null_from_bos: Annotated[
        bool,
        Option(
            "--null-from-bos",
            rich_help_panel=_WITH_NULL,
            help="Make the first null from BOS, for a model that is trained"
            " with BOS in front of every text. The saved tokenizer no longer adds BOS.",
        ),
    ] = False,
    nulls: Annotated[
        int | None,
        Option(
            help="Maximum number of nulls of each head; those after the"
            " first replace secondary sinks. Default: 1.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    prune_neurons: Annotated[
        int | None,
        Option(
            help="Maximum number of MLP neurons to switch off. They write"
            " massive activations that the model with nulls no longer needs. Default: 0.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        Option(
            help="Corpus to compute the nulls from, a name or a local text file. Default: stdlib.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    calibration_split: Annotated[
        str | None,
        Option(
            help="Split of the calibration corpus. Default: train.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        Option(
            help="Corpus for the measurements. Default: the calibration corpus.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    evaluation_split: Annotated[
        str | None,
        Option(
            help="Split of the evaluation corpus. Default: test.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    window: Annotated[
        int | None,
        Option(
            help="Tokens per window. Default: 512.", show_default=False, rich_help_panel=_WITH_NULL
        ),
    ] = None,
    windows: Annotated[
        int | None,
        Option(
            help="Maximum number of windows for calibration, and for the"
            " measurements. They are spread over the split. Default: 16.",
            show_default=False,
            rich_help_panel=_WITH_NULL,
        ),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Convert a pretrained model to a variant of OASIS, or back.

    The outputs are unchanged until the model is trained, unless --null-from-sink is given.

    Example: [bold]oasis convert smollm2 --config depth_block_size=4 --out converted[/bold]

    Example: [bold]oasis convert smollm2 --null-from-sink --out retrofitted[/bold]
    """
    from oasis_attn.devices import check_device
    from oasis_attn.files import check_free
    from oasis_attn.hub.locate import DTYPES, find_model
    from oasis_attn.modeling.settings import check_names
    from oasis_attn.modeling.variants import settings_of

    options: dict[str, Any] = {
        "null_from_bos": null_from_bos or None,
        "nulls": nulls,
        "prune_neurons": prune_neurons,
        "calibration": calibration,
        "calibration_split": calibration_split,
        "evaluation": evaluation,
        "evaluation_split": evaluation_split,
        "window": window,
        "windows": windows,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if options and not null_from_sink:
        raise UserError(f"{next(iter(options))}: it has an effect only with --null-from-sink")
    if null_from_sink and to_vanilla:
        raise UserError("to_vanilla: cannot be combined with --null-from-sink")
    if to_sinks and (to_vanilla or null_from_sink):
        raise UserError("to_sinks: cannot be combined with --to-vanilla or --null-from-sink")
    changed = pairs("--config", settings)
    if null_from_sink:
        from oasis_attn.hub.null_options import check_null_from_sink

        limits = {
            name: options[name]
            for name in ("nulls", "prune_neurons", "window", "windows")
            if name in options
        }
        check_null_from_sink(changed, **limits)
    if variant is not None:
        settings_of(variant)
    check_names(changed)
    check_choice("dtype", dtype, DTYPES)
    check_device(device)
    check_free(out)
    if null_from_sink:
        check_inputs(
            model,
            calibration or "stdlib",
            calibration_split or "train",
            evaluation,
            evaluation_split or "test",
        )
    else:
        find_model(model)

    common: dict[str, Any] = {
        "variant": variant,
        "overrides": changed,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    if null_from_sink:
        from oasis_attn.measure.sink_conversion import null_from_sink_checkpoint

        with working(f"converting {model}", as_json=as_json) as report:
            record = null_from_sink_checkpoint(model, out, progress=report, **common, **options)
        conclusion = list(_conclusion(record, prune_neurons or 0))
        if as_json:
            print_json({"conclusion": conclusion, "record": record.to_dict()})
        else:
            _show(record, conclusion)
            purpose = "measure what 8 bits cost, and what helps"
            print_saved(out, purpose=purpose, command=("oasis", "doctor", out))
        return

    from oasis_attn.hub.convert import convert_checkpoint
    from oasis_attn.report import Table

    with working(f"converting {model}", as_json=as_json):
        converted = convert_checkpoint(model, out, back=to_vanilla, sinks=to_sinks, **common)
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
        del facts["folder"]
        rows = tuple(
            (name, f"{value:,}" if name == "parameters" else str(value))
            for name, value in facts.items()
        )
        print_table(Table(title="Converted", columns=("", ""), rows=rows, text_columns=2))
        if to_sinks:
            print_servable(out)
        elif to_vanilla:
            print_saved(out, purpose="measure it", command=("oasis", "diagnose", out))
        else:
            command = "oasis", "train", "--from", out, "--out", f"{out}-trained"
            print_saved(out, purpose="train it", command=command)


_SHOWN = ("perplexity.windowed", "outlier.max_activation", "sink.mass", "sink.max_mass")


def _show(record: ConversionRecord, conclusion: list[str]) -> None:
    from oasis_attn.report import Table
    from oasis_attn.report.tables import number

    rows = [(name, *map(number, record.before_after(name))) for name in _SHOWN]
    rows.append(("null.mass", "", number(record.metric("null.mass", "after").value)))
    count = f"{record.nulls} null{'s' if record.nulls > 1 else ''}"
    first = "the first token" if record.bos is None else f"BOS {record.bos!r}"
    times = Counter(map(repr, record.texts))
    later = ", ".join(f"{text} ({n} times)" if n > 1 else text for text, n in times.items())
    origins = " and ".join(filter(None, (first, later)))
    title = f"{record.model.name} with {count}, from {origins}"
    if record.neurons:
        places = ", ".join(f"{unit} of layer {layer}" for layer, unit in record.neurons)
        title += f", without the MLP neurons {places}"
    print_table(Table(title=title, columns=("metric", "before", "after"), rows=tuple(rows)))

    rows = []
    for where in ("before", "after"):
        largest = record.tables[where]["largest"]
        layer, row = max(enumerate(largest), key=lambda item: abs(item[1]["value"]))
        place = (layer, row["channel"], row["position"])
        rows.append((where, repr(row["text"]), *map(str, place), number(row["value"])))
    columns = ("", "token", "layer", "channel", "position", "value")
    title = "Largest activation"
    print_table(Table(title=title, columns=columns, rows=tuple(rows), text_columns=2))
    if conclusion:
        print_sentences("Conclusion", conclusion)


def _conclusion(record: ConversionRecord, prune_neurons: int) -> Iterator[str]:
    """What the numbers are of, and what to do if the sink remains."""
    from oasis_attn.measure.sink_tokens import THRESHOLD

    before, after = record.before_after("sink.max_mass")
    if record.bos is not None:
        yield (
            "The texts begin with BOS before, and not after. Perplexity is that of all tokens of"
            " the text but the first. The saved tokenizer does not add BOS."
        )
    elif record.data.bos is not None and before > THRESHOLD and after > before / 2:
        yield (
            f"The first token, BOS, remains a sink (sink.max_mass {after:.4g}). If the model is"
            " trained with BOS in front of every text, convert it with --null-from-bos."
        )
    if prune_neurons and not record.neurons:
        yield "No neuron was pruned: none is massive, or the model needs those that are."
