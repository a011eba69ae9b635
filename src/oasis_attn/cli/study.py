"""`oasis study`: train, measure and compare a grid of variants, corpora and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option, Typer

from oasis_attn.cli.command import Command, Group
from oasis_attn.cli.terminal import AsJson, pairs, print_json, print_saved, print_table

if TYPE_CHECKING:
    from oasis_attn.study.storage import Status

study = Typer(
    name="study",
    cls=Group,
    help="Train, measure, quantize and compare variants over corpora and seeds.",
    epilog="Start with: oasis study run smoke --out studies/smoke",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

PlanName = Annotated[
    str, Argument(metavar="PLAN", help="A plan of `oasis study plans`, or a .yaml file.")
]
StudyPath = Annotated[Path, Argument(metavar="FOLDER", help="The folder of the study.")]


@study.command(cls=Command)
def plans(
    name: Annotated[
        str | None,
        Argument(metavar="NAME", help="Print this plan as YAML.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the plans of the package, or print one as a template for your own.

    Example: [bold]oasis study plans paper > mine.yaml[/bold]
    """
    from oasis_attn.errors import check_choice
    from oasis_attn.study.lookup import shipped_plans

    texts = shipped_plans()
    if name is not None:
        check_choice("name", name, texts)
        if not as_json:
            print(texts[name], end="")
            return

    from oasis_attn.report import Table
    from oasis_attn.study.plan_file import load_plan

    if name is not None:
        print_json(load_plan(name).to_dict())
        return
    found = [load_plan(each) for each in texts]
    if as_json:
        print_json({plan.name: plan.to_dict() for plan in found})
    else:
        rows = tuple((plan.name, str(len(plan.trials)), plan.about) for plan in found)
        columns = ("plan", "trials", "question")
        print_table(Table(title="Plans", columns=columns, rows=rows, text_columns=3))


@study.command(cls=Command)
def run(
    plan: PlanName,
    out: Annotated[Path, Option(help="A new folder, or one in which this plan was started.")],
    reuse_from: Annotated[
        list[Path] | None,
        Option(
            metavar="FOLDER",
            help="Copy the records of identical trials from this study, which must have one;"
            " repeatable.",
        ),
    ] = None,
    workers: Annotated[
        int, Option(help="Number of trials that run at once; each uses one core.")
    ] = 1,
    cluster: Annotated[
        str | None,
        Option(help="Run each trial as a job with submitit: slurm or local.", show_default=False),
    ] = None,
    executor_option: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUE",
            help="Set a parameter of submitit's executor, such as slurm_partition; repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every trial that has no record yet. After an interruption, run the same command again.

    Example: [bold]oasis study run smoke --out studies/smoke --workers 2[/bold]
    """
    from oasis_attn.errors import UserError, check_whole
    from oasis_attn.study.launch import ClusterLauncher
    from oasis_attn.study.lookup import plan_path
    from oasis_attn.study.plan_file import load_plan
    from oasis_attn.study.storage import StudyFolder

    options = pairs("--executor-option", executor_option)
    if options and cluster is None:
        raise UserError("--executor-option: requires --cluster")
    check_whole("workers", workers, 1)
    launcher = None if cluster is None else ClusterLauncher(cluster, options)
    loaded = load_plan(plan)
    StudyFolder.check(out, loaded)
    for folder in reuse_from or ():
        plan_path(folder)
    loaded.check()

    from oasis_attn.study.run import run_study

    status = run_study(loaded, out, reuse_from=reuse_from or (), workers=workers, launcher=launcher)
    _print_status(status, loaded.name, as_json)
    if status.left:
        raise Exit(1)
    if not as_json:
        command = "oasis", "study", "report", out
        print_saved(out, purpose="see verdicts, tables and figures", command=command)


@study.command(cls=Command)
def status(path: StudyPath, as_json: AsJson = False) -> None:
    """Show the progress of a study, and the reasons for failures.

    Example: [bold]oasis study status studies/smoke[/bold]
    """
    from oasis_attn.study.lookup import plan_path

    plan_path(path)

    from oasis_attn.study.storage import StudyFolder

    folder = StudyFolder.open(path)
    _print_status(folder.status(), folder.plan.name, as_json)


@study.command(cls=Command)
def table(path: StudyPath, as_json: AsJson = False) -> None:
    """Print verdicts, comparisons and means of the finished trials.

    A table that is wider than the terminal is printed in parts. `oasis study report` writes the
    same tables in Markdown and HTML.

    Example: [bold]oasis study table studies/smoke[/bold]
    """
    from dataclasses import asdict

    from oasis_attn.study.lookup import plan_path

    plan_path(path)

    from oasis_attn.study.results import Results
    from oasis_attn.study.storage import StudyFolder
    from oasis_attn.study.tables import results_tables
    from oasis_attn.study.verdict import judge

    folder = StudyFolder.open(path)
    results = Results(folder.plan, folder.records())
    verdicts = judge(results)
    if as_json:
        compared = [each for name in folder.plan.compare for each in results.comparisons(name)]
        print_json(
            {
                "verdicts": [asdict(each) for each in verdicts],
                "comparisons": [asdict(each) for each in compared],
            }
        )
    else:
        for each in results_tables(results, verdicts):
            print_table(each)


@study.command(cls=Command)
def report(
    path: StudyPath,
    page: Annotated[
        Path | None,
        Option(
            help="Path of the page. Default: report/index.html in the folder.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an HTML page, and next to it the tables in Markdown and the figures as PNG files.

    Example: [bold]oasis study report studies/smoke --page smoke/index.html[/bold]
    """
    from oasis_attn.study.lookup import plan_path

    plan_path(path)

    from oasis_attn.study.storage import StudyFolder
    from oasis_attn.study.study_report import write_report

    written = write_report(StudyFolder.open(path), page or path / "report" / "index.html")
    if as_json:
        print_json([str(each) for each in written])
    else:
        print("\n".join(str(each) for each in written))


@study.command(cls=Command)
def trial(
    where: Annotated[str, Argument(metavar="STUDY", help="A plan, or the folder of a study.")],
    trial_id: Annotated[str, Argument(metavar="TRIAL", help="The id of the trial.")],
    out: Annotated[
        Path | None,
        Option(
            help="Path of the record. Default: its place in the folder of the study.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        Path | None,
        Option(
            help="Compare with this record, or with that of a study's folder, and print whether the"
            " results reproduce. The exit code is 1 if they do not.",
            show_default=False,
        ),
    ] = None,
    exit_with_parent: Annotated[bool, Option("--exit-with-parent", hidden=True)] = False,
    as_json: AsJson = False,
) -> None:
    """Run one trial. With --check, check that the results reproduce.

    Example: [bold]oasis study trial smoke arith-nano-oasis-s0-... --out trial.json[/bold]
    """
    from oasis_attn.study import worker

    if exit_with_parent:
        worker.exit_with_parent()
    record, compared = worker.run_alone(where, trial_id, out=out, check=check)
    if as_json and compared is not None:
        from dataclasses import asdict

        comparison = {"reproduced": compared.reproduced} | asdict(compared)
        print_json({"record": record.to_dict(), "comparison": comparison})
    elif as_json:
        print(record.to_json())
    else:
        from oasis_attn.report import summary_table

        if compared is None:
            print_table(summary_table(record))
        else:
            print(compared.text)
        print_saved(out)
    if compared is not None and not compared.reproduced:
        raise Exit(1)


def _print_status(status: Status, name: str, as_json: bool) -> None:
    from dataclasses import asdict

    from oasis_attn.study.tables import status_table

    if as_json:
        print_json(asdict(status) | {"left": status.left})
    else:
        print_table(status_table(status, name))
