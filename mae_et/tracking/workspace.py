"""`python -m mae_et workspace`: a W&B dashboard of what our runs log, and a report of it, saved on the server."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from mae_et.config import ConfigError

Panels = Mapping[str, list[Any]]
"""Panels of the library by the name of their section."""

NAME = "mae_et scores against compute"
SCORES = ("eval/probe", "eval/knn20", "val/top1", "val/ap", "val/miou")
PICTURES = (
    "pictures/stages",
    *(f"{split}/{kind}" for kind in ("confusion", "detections", "scenes") for split in ("val", "test")),
)
GPUS = 8  # of one machine; those that a run has not stay empty
COMPUTE, FRACTION, HOURS = "compute/flops", "compute/fraction", "time/hours"
TITLES = {
    COMPUTE: "compute (FLOPs)",
    FRACTION: "fraction of the compute budget",
    HOURS: "hours of training",
    "RelativeTime(Process)": "seconds since the start",
}
# Beside a run's name in the table of runs.
COLUMNS = (
    "run:jobType",
    *(f"summary:best/eval/probe{what}" for what in ("", "_at_flops", "_at_hours")),
    *("config:curriculum.value.preset", "config:optim.value.base_lr", "config:optim.value.batch", "config:seed.value"),
    "config:parent_run_id.value",
)


def sections(reports: ModuleType) -> Panels:
    """What is shown, by the names that runs log.

    Args:
        reports: `wandb_workspaces.reports.v2`, whose panels these are.
    """

    def lines(axis: str, title: str, *metrics: str, **further: Any) -> Any:
        return reports.LinePlot(title=title, x=axis, y=list(metrics), title_x=TITLES[axis], **further)

    summary, machine = reports.SummaryMetric, "RelativeTime(Process)"
    spread = reports.ScatterPlot(
        title="best probe, and the compute it took (FLOPs)",
        x=summary("best/eval/probe_at_flops"),
        y=summary("best/eval/probe"),
    )
    gpus = range(GPUS)
    return {
        "Scores against compute": [*(lines(COMPUTE, score, score) for score in SCORES), spread],
        "Loss by stage": [
            lines(FRACTION, "loss; stages differ in what they ask", "train/loss"),
            lines(FRACTION, "B in px", "stage/bandwidth"),
            lines(FRACTION, "visible patches", "stage/visible"),
            lines(FRACTION, "learning rate", "train/lr"),
            lines(FRACTION, "norm of the gradient", "train/gradient_norm", log_y=True),
            lines(FRACTION, "steps left out, not finite", "train/skipped_steps"),
        ],
        "Throughput and data wait": [
            lines(FRACTION, "images per second", "throughput/images_per_second"),
            lines(FRACTION, "share of the time that waits for data", "throughput/data_wait", range_y=(0, 1)),
            lines(HOURS, "fraction of the compute budget", FRACTION),
            lines(HOURS, "hours to go", "eta/hours"),
        ],
        "Pictures": [
            reports.MediaBrowser(title=key, media_keys=[key], gallery_axis="step", num_columns=1) for key in PICTURES
        ],
        "Machine": [
            lines(machine, "GPUs: use in %", *(f"system/gpu.{i}.gpu" for i in gpus)),
            lines(machine, "GPUs: memory in %", *(f"system/gpu.{i}.memoryAllocated" for i in gpus)),
            lines(machine, "GPUs: power in W", *(f"system/gpu.{i}.powerWatts" for i in gpus)),
            lines(machine, "CPU: use in %", "system/cpu"),
            lines(machine, "memory in %", "system/memory_percent"),
            lines(machine, "memory of the process in MB", "system/proc.memory.rssMB"),
        ],
    }


def make_workspace(entity: str, project: str, grouped: bool = True) -> Any:
    """The dashboard, not saved; runs of one group, which differ in seed alone, are drawn as their mean and range.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    spaces, reports, expressions = _library()
    return spaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            spaces.Section(name=name, panels=panels, is_open=name != "Machine")
            for name, panels in sections(reports).items()
        ],
        settings=spaces.WorkspaceSettings(x_axis=FRACTION),
        runset_settings=spaces.RunsetSettings(
            groupby=[expressions.Metric("Group")] if grouped else [], pinned_columns=list(COLUMNS)
        ),
    )


def make_report(entity: str, project: str, grouped: bool = True) -> Any:
    """The same as a report, not saved, and a table of what tells the runs apart.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    _, reports, _ = _library()

    def grid(panels: list[Any]) -> Any:
        for place, panel in enumerate(panels):
            panel.layout = reports.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8)
        runs = reports.Runset(
            entity=entity, project=project, name="runs by experiment", groupby=["group"] if grouped else []
        )
        return reports.PanelGrid(runsets=[runs], panels=panels)

    blocks: list[Any] = [
        reports.P("Runs of one group differ in seed alone: lines are their means. Scores compare at equal compute.")
    ]
    for name, panels in sections(reports).items():
        blocks += [reports.H2(name), grid(panels)]
    comparer = reports.RunComparer(diff_only="split")
    blocks += [reports.H2("Runs compared"), grid([comparer])]
    comparer.layout = reports.Layout(x=0, y=0, w=24, h=16)
    return reports.Report(entity=entity, project=project, title=NAME, blocks=blocks, width="fluid")


def save(entity: str, project: str, report: bool = False, grouped: bool = True) -> Iterator[str]:
    """Save the dashboard on the server, then the report if asked for; yields the address of each.

    Raises:
        ConfigError: wandb-workspaces is not installed, nobody is logged in, or the server does not take it.
    """
    views = [make_workspace(entity, project, grouped), *([make_report(entity, project, grouped)] if report else [])]
    from wandb.errors import AuthenticationError, UsageError

    for view in views:
        try:
            address = view.save().url
        except Exception as error:  # the library's own, requests', or a plain one
            what = type(view).__name__.lower()
            hint = ""
            if isinstance(error, UsageError | AuthenticationError):
                hint = ". `wandb login` keeps a key; WANDB_BASE_URL names a server of your own"
            raise ConfigError(f"W&B did not save the {what} in {entity}/{project}: {error}{hint}") from error
        yield address


def add_command(commands: Any) -> None:
    """Add `workspace` to the sub-commands of `python -m mae_et`."""
    command: argparse.ArgumentParser = commands.add_parser(
        "workspace",
        help="a W&B dashboard of runs, ready made",
        description="Save a dashboard of a project's runs on W&B's server, and print its address: scores against "
        "compute, loss by stage, throughput, pictures, the machine. It needs a key (`wandb login`) and the extra "
        "mae_et[workspaces]. Each call makes a new one.",
    )
    command.add_argument("--entity", required=True, help="user or team of W&B")
    command.add_argument("--project", default="mae_et", help="as tracking.project of the runs; default: mae_et")
    command.add_argument("--report", action="store_true", help="save a report, too")
    command.add_argument(
        "--ungrouped", action="store_false", dest="grouped", help="a line a run, not one a group (tracking.group)"
    )
    command.set_defaults(action=_run)


def _run(options: argparse.Namespace) -> int:
    for address in save(options.entity, options.project, options.report, options.grouped):
        print(address)
    return 0


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    """wandb-workspaces: workspaces, reports, and names of what runs have."""
    try:
        from wandb_workspaces import expr, workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise ConfigError(f"dashboards need wandb-workspaces ({error}): pip install 'mae_et[workspaces]'") from None
    return workspaces, v2, expr
