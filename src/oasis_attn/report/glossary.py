"""The glossary of metrics as tables and as the page docs/metrics.md.

python -m oasis_attn.report.glossary > docs/metrics.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from oasis_attn.metrics import SECTIONS, Definition
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table

_HEAD = """\
# What every metric means

Every number in a record has one of these names, and every name one definition: `oasis metrics NAME`
prints it. A metric has a paper's name only where it is that paper's to the letter. `<eps>` and the
like stand for a value: `sink.rate@<eps>` is `sink.rate@0.3` and `sink.rate@0.2`. A value for one
tensor, layer, source or model has the same name and a `where`.

This page is written by `python -m oasis_attn.report.glossary > docs/metrics.md`.
"""


def glossary_table(definitions: Iterable[Definition]) -> Table:
    """A row per metric: what it is, its unit, and which direction is better."""
    rows = tuple((d.name, d.definition, d.unit, _better(d)) for d in definitions)
    return Table(columns=("metric", "definition", "unit", "better"), rows=rows, text_columns=4)


def definition_table(definition: Definition) -> Table:
    """All that is said of one metric, a row per field."""
    rows = (
        ("definition", definition.definition),
        ("unit", definition.unit),
        ("better", _better(definition)),
        ("protocol", definition.protocol),
        ("source", _source(definition)),
    )
    return Table(title=definition.name, columns=("", ""), rows=rows, text_columns=2)


def glossary_page() -> str:
    """docs/metrics.md: a table per subject."""
    return "\n".join([_HEAD, *(_section(title, rows) for title, rows in SECTIONS.items())])


def _section(title: str, definitions: Sequence[Definition]) -> str:
    rows = tuple(
        (f"`{d.name}`", d.definition, d.unit, _better(d), d.protocol, _source(d))
        for d in definitions
    )
    columns = ("metric", "definition", "unit", "better", "protocol", "source")
    return f"## {title}\n\n{markdown(Table(columns=columns, rows=rows, text_columns=len(columns)))}"


def _better(definition: Definition) -> str:
    return definition.better or "-"


def _source(definition: Definition) -> str:
    return definition.source + ("; in earlier records only" if definition.retired else "")


if __name__ == "__main__":
    print(glossary_page(), end="")
