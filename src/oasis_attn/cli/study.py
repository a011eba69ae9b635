"""`oasis study`: a grid of variants, corpora and seeds: run, looked at, judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer

from oasis_attn.cli.terminal import AsJson, pair, print_json, print_table

study = Typer(
    name="study",
    help="Train, measure, quantise and compare variants over corpora and seeds.",
    epilog="Start with: oasis study run smoke --out studies/smoke",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

PlanName = Annotated[str, Argument(help="A plan that `oasis study plans` lists, or a .yaml file.")]
Out = Annotated[Path, Argument(help="The study's folder.")]


@study.command()
def plans(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="Print this one as YAML.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the plans that come with the package, or print one, to be changed.

    Example: [bold]oasis study plans paper > mine.yaml[/bold]
    """
    from oasis_attn.errors import check_choice
    from oasis_attn.report import Table
    from oasis_attn.study.plan_file import load_plan, shipped_plans

    if name is not None:
        check_choice("name", name, shipped_plans())
        if as_json:
            print_json(load_plan(name).to_dict())
        else:
            print(shipped_plans()[name], end="")
        return
    found = [load_plan(name) for name in shipped_plans()]
    if as_json:
        print_json({plan.name: plan.to_dict() for plan in found})
    else:
        rows = tuple((plan.name, str(len(plan.cells)), plan.about) for plan in found)
        print_table(Table(title="Plans", columns=("plan", "cells", "about"), rows=rows, words=3))


@study.command()
def run(
    plan: PlanName,
    out: Annotated[Path, Option(help="A new folder, or one where this plan was begun.")],
    reuse: Annotated[
        list[Path] | None,
        Option(
            metavar="FOLDER",
            help="Take over what another study has finished of the same cells; repeatable.",
        ),
    ] = None,
    workers: Annotated[int, Option(help="Cells at once; each takes a core.")] = 1,
    cluster: Annotated[
        str | None,
        Option(help="A job per cell, through submitit: slurm or local.", show_default=False),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="A parameter of submitit's executor, such as slurm_partition; repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every cell that has no record yet; interrupted or killed, the same command goes on.

    Example: [bold]oasis study run smoke --out studies/smoke --workers 2[/bold]
    """
    from oasis_attn.errors import UserError
    from oasis_attn.study.launch import Cluster
    from oasis_attn.study.plan_file import load_plan
    from oasis_attn.study.run import run_study

    given = dict(pair("--set", text) for text in parameters or ())
    if given and cluster is None:
        raise UserError("--set: it is for --cluster")
    launcher = None if cluster is None else Cluster(cluster, given)
    loaded = load_plan(plan)
    ended = run_study(loaded, out, reuse=reuse or (), workers=workers, launcher=launcher)
    _print_status(ended, loaded.name, as_json)
    if ended.left:
        raise Exit(1)


@study.command()
def status(out: Out, as_json: AsJson = False) -> None:
    """Show how far a study is, and what failed.

    Example: [bold]oasis study status studies/smoke[/bold]
    """
    from oasis_attn.study.folder import StudyFolder

    folder = StudyFolder.open(out)
    _print_status(folder.status(), folder.plan.name, as_json)


@study.command()
def table(out: Out, as_json: AsJson = False) -> None:
    """Print the verdict, the comparisons and the means of the cells there are.

    Tables of a large plan are wider than a terminal: `oasis study report` writes the same ones in
    Markdown.

    Example: [bold]oasis study table studies/smoke[/bold]
    """
    from dataclasses import asdict

    from oasis_attn.study.folder import StudyFolder
    from oasis_attn.study.results import Results
    from oasis_attn.study.tables import results_tables
    from oasis_attn.study.verdict import judge

    folder = StudyFolder.open(out)
    results = Results(folder.plan, folder.records())
    verdicts = judge(results)
    if as_json:
        compared = [each for row in folder.plan.compare for each in results.comparisons(row)]
        print_json(
            {
                "verdict": [asdict(judged) for judged in verdicts],
                "comparisons": [asdict(each) for each in compared],
            }
        )
    else:
        for each in results_tables(results, verdicts):
            print_table(each)


@study.command()
def report(
    out: Out,
    page: Annotated[
        Path | None,
        Option(help="The page; default report/index.html in the folder.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page, and beside it the tables in Markdown and the figures as PNG.

    Example: [bold]oasis study report studies/smoke --page smoke/index.html[/bold]
    """
    from oasis_attn.study.folder import StudyFolder
    from oasis_attn.study.page import write_report

    written = write_report(StudyFolder.open(out), page or out / "report" / "index.html")
    if as_json:
        print_json([str(path) for path in written])
    else:
        print("\n".join(str(path) for path in written))


@study.command()
def cell(
    where: Annotated[str, Argument(help="A plan, or a study's folder.")],
    cell_id: Annotated[str, Argument(metavar="CELL", help="As in the names of its records.")],
    out: Annotated[
        Path | None,
        Option(help="The record to write; in a study's folder, its own.", show_default=False),
    ] = None,
    check: Annotated[
        Path | None,
        Option(
            help="Compare with this record, or with a study's folder that has one: code 1 if they"
            " differ.",
            show_default=False,
        ),
    ] = None,
    tied: Annotated[bool, Option("--tied", hidden=True)] = False,
    as_json: AsJson = False,
) -> None:
    """Run one cell, as its record says; with --check, see whether its numbers come again.

    Example: [bold]oasis study cell smoke pydoc-nano-oasis-s0-... --out cell.json[/bold]
    """
    from oasis_attn.study.worker import run_alone, tie

    if tied:
        tie()
    record, different = run_alone(where, cell_id, out=out, check=check)
    if as_json:
        print(record.to_json())
    elif check is None:
        from oasis_attn.report import summary_table

        print_table(summary_table(record))
    else:
        print("\n".join(different) or f"{len(record.metrics)} numbers, none of them different")
    if different:
        raise Exit(1)


def _print_status(ended, name: str, as_json: bool) -> None:
    from dataclasses import asdict

    from oasis_attn.study.tables import status_table

    if as_json:
        print_json(asdict(ended) | {"left": ended.left})
    else:
        print_table(status_table(ended, name))
