"""Tables, figures and self-contained HTML pages from records.

Only `report.figures` imports matplotlib.
"""

from __future__ import annotations

from oasis_attn.report.conclusion import conclusion
from oasis_attn.report.tables import (
    Table,
    activation_table,
    head_table,
    label,
    layer_table,
    number,
    sink_table,
    summary_table,
    variants_table,
)

__all__ = [
    "Table",
    "activation_table",
    "conclusion",
    "head_table",
    "label",
    "layer_table",
    "number",
    "sink_table",
    "summary_table",
    "variants_table",
]
