"""`oasis variants`: list the variants of the architecture."""

from __future__ import annotations

from oasis_attn.cli.terminal import AsJson, print_json, print_table


def variants(as_json: AsJson = False) -> None:
    """List the variants. A variant is a name for a set of `OasisConfig` settings.

    Example: [bold]oasis variants --json[/bold]
    """
    from oasis_attn.modeling.variants import variants as all_variants
    from oasis_attn.report import variants_table

    if as_json:
        print_json(all_variants())
    else:
        print_table(variants_table(all_variants()))
