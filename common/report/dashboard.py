"""Save a view of the W&B project with panels for training and comparison: `make dashboard`.

Needs the extra `dashboard`. W&B calls the package a public preview, so no other module imports it.
"""

from __future__ import annotations

import os
from typing import Any

from common.run.tracking import resolve_mode
from common.types import UserError

# Metrics as common/run/tracking.py names them. A section: its title, then title and metrics of each panel; a name that
# ends with $ is a pattern.
SECTIONS: dict[str, dict[str, list[str]]] = {
    "Accuracy": {"accuracy": [r"^eval/[^/]*/accuracy$"], "calibration error": [r"^eval/[^/]*/ece$"]},
    "Rewards": {
        "reward": ["train/reward"],
        "each reward": [r"^train/rewards/.*/mean$"],
        "spread within groups": ["train/reward_std"],
        "groups without a difference": ["train/frac_reward_zero_std"],
    },
    "Completions": {
        "tokens": ["train/completions/mean_length"],
        "cut off": ["train/completions/clipped_ratio"],
        "entropy": ["train/entropy"],
    },
    "Optimiser": {
        "loss": ["train/loss"],
        "gradient norm": ["train/grad_norm"],
        "learning rate": ["train/learning_rate"],
        "sampler and trainer disagree": ["train/sampling/sampling_logp_difference/mean"],
    },
    "Time": {"seconds of an update": ["train/step_time"], "by phase": [r"^time/.*_s$"]},
}
COLUMNS = ("method.name", "data.name", "shots", "seed")  # pinned in the list of runs


def workspace(entity: str, project: str, name: str = "few-shot training") -> Any:
    """Build the view without saving it: lines over updates, runs grouped, mean and range over seeds.

    Raises:
        UserError: The package is not installed.
    """
    try:
        import wandb_workspaces.expr as expr
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as spaces
    except ImportError as error:
        raise UserError(
            "the dashboard needs the package wandb-workspaces; install it with uv pip install wandb-workspaces"
        ) from error

    panels: Any = reports  # the package has no type hints

    def line(title: str, metrics: list[str]) -> Any:
        pattern = metrics[0] if metrics[0].endswith("$") else None
        return panels.LinePlot(
            title=title,
            x="step",
            y=[] if pattern else metrics,
            metric_regex=pattern,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            smoothing_type="none",
        )

    # seconds are rarely of interest, so their section is folded
    sections = [
        spaces.Section(name=section, panels=[line(*panel) for panel in lines.items()], is_open=section != "Time")
        for section, lines in SECTIONS.items()
    ]
    tables = spaces.Section(name="Replies and tables", panels=[panels.RunComparer()], is_open=False)
    return spaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*sections, tables],
        settings=spaces.WorkspaceSettings(x_axis="step", max_runs=40),
        runset_settings=spaces.RunsetSettings(
            groupby=[expr.Metric("Group")], pinned_columns=[f"config:{column}.value" for column in COLUMNS]
        ),
        auto_generate_panels=False,
    )


def save(entity: str, project: str) -> str:
    """Save the view in the project and return its address.

    Raises:
        UserError: No API key is present, or the package is missing.
    """
    if resolve_mode("auto") != "online":
        raise UserError("a dashboard is saved on W&B's server: log in with wandb login, or set WANDB_API_KEY")
    os.environ.setdefault("WANDB_SILENT", "true")
    return str(workspace(entity, project).save().url)
