"""Plots and pages of the ablations, made from runs and summaries alone: no number is typed by hand."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Run = dict[str, Any]

LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKS = ("o", "s", "^", "D", "v", "P")
GREYS = ("0.0", "0.35", "0.55", "0.2", "0.45", "0.65")
"""Told apart by line, mark and shade, so that a print in black and white loses nothing."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes.

    arms: one row per arm with a mark for each seed and a bar at the mean; `value` is a function of a run.
    curve: a score against the samples seen, mean and range of the seeds; `value` names the score.
    """

    kind: Literal["arms", "curve"]
    title: str
    value: Callable[[Run], float] | str
    label: str


def draw(panels: Sequence[Panel], runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Writes the plot of an experiment; an arm without runs is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        (_arms if panel.kind == "arms" else _curve)(panel, ax, runs)
        ax.set_title(panel.title, fontsize=11)
        ax.grid(axis="x" if panel.kind == "arms" else "both", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    curves = [ax for panel, ax in zip(panels, axes[0], strict=True) if panel.kind == "curve"]
    if curves:
        figure.legend(*curves[-1].get_legend_handles_labels(), loc="outside center right", fontsize=8, frameon=False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure. The same figure gives the same bytes: no date, no version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _arms(panel: Panel, ax: Any, runs: Mapping[str, Sequence[Run]]) -> None:
    assert callable(panel.value)
    for number, (_, mine) in enumerate(runs.items()):
        values = np.array([panel.value(run) for run in mine])
        ax.plot(values, np.full(len(values), number), MARKS[number % 6], mfc="none", color=GREYS[number % 6], markersize=7)
        ax.plot([values.mean()] * 2, [number - 0.28, number + 0.28], color="black", linewidth=2)
    ax.set_yticks(range(len(runs)), list(runs))
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_xlabel(f"{panel.label}\nmarks: seeds; bar: their mean", fontsize=9)


def points(run: Run, key: str) -> tuple[list[int], list[float]]:
    """(rows seen since stage 0, score) wherever a run was scored."""
    rows, values, before = [], [], 0
    for record in run["stages"][1:]:
        for point in record["curve"]:
            rows.append(before + point["rows"])
            values.append(point[key])
        before += record["rows"]
    return rows, values


def _curve(panel: Panel, ax: Any, runs: Mapping[str, Sequence[Run]]) -> None:
    assert isinstance(panel.value, str)
    for number, (name, mine) in enumerate(runs.items()):
        rows = points(mine[0], panel.value)[0]
        values = np.array([points(run, panel.value)[1] for run in mine])
        mean = values.mean(0)
        shift = 0.004 * max(rows) * (number - (len(runs) - 1) / 2)  # so that whiskers do not lie on each other
        style = {"color": GREYS[number % 6], "linestyle": LINES[number % 6], "marker": MARKS[number % 6], "markersize": 4}
        whiskers = {"yerr": (mean - values.min(0), values.max(0) - mean), "elinewidth": 0.8, "capsize": 1.5}
        ax.errorbar(np.array(rows) + shift, mean, label=name, linewidth=1.2, **style, **whiskers)
    ax.set_xlabel("packed rows seen after stage 0\nlines: mean over seeds; whiskers: their range", fontsize=9)
    ax.set_ylabel(panel.label, fontsize=9)


# ---- pages ---------------------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.2f} ± {deviation:.2f}"


def claims_table(summary: Mapping[str, Any]) -> str:
    """What was claimed, what came out at each seed, and the word."""
    rows = [
        (
            claim["text"],
            ", ".join(f"{d:+.2f}" for d in claim["differences"]),
            f"{claim['mean']:+.2f} [{claim['low']:+.2f}, {claim['high']:+.2f}]",
            f"{claim['minimum']:g} {claim['unit']}",
            f"**{claim['word']}**",
        )
        for claim in summary["claims"]
    ]
    return table(("claim", "difference at each seed", "mean and 90% interval", "wanted at least", "verdict"), rows)


def page(experiment: Any, summary: Mapping[str, Any]) -> str:
    """The page of an experiment."""
    columns = [f"{column.label}, {column.unit}" for column in experiment.columns]
    arms = [
        (
            f"{name}: {experiment.arm(name).text}",
            f"{max(found['parameters'][1:]) / 1e6:.2f} M",
            *(spread(found["scores"][column.label]) for column in experiment.columns),
        )
        for name, found in summary["arms"].items()
    ]
    tried = [
        (name, ", ".join(f"{rate}: {score:.1f}" for rate, score in found["tried"].items()) or "taken over", _chosen(found))
        for name, found in summary["rates"].items()
    ]
    n = len(summary["seeds"])
    parts = [
        f"# {experiment.title}\n\n{experiment.published}",
        "Verdict: **" + str(summary["verdict"]) + "** (rule: `experiments/verdict.py`).",
        claims_table(summary),
        "![plot](plot.png)",
        f"Mean ± standard deviation over {n} seeds; trained: parameters of the largest stage.",
        table(("arm", "trained", *columns), arms),
        f"Learning rates were tried at seed {summary['tuning_seed']}, which is not scored; behind each is its {experiment.score.label}.",
        table(("arm", "rates tried", "chosen"), tried),
    ]
    parts += [experiment.reading] if experiment.reading else []
    parts.append(
        f"{summary['links']} stages were trained in {summary['seconds'] / 60:.1f} minutes of one process, on {summary['device']} "
        f"({summary['cpus']} cores, {summary['machine']}, jax {summary['jax']}).\n\n"
        f"    python -m experiments.ablations.{experiment.name}\n"
    )
    return "\n\n".join(parts)


def _chosen(found: Mapping[str, Any]) -> str:
    """The rate taken, and whether a better one may lie beyond those tried."""
    rates = sorted(map(float, found["tried"]))
    at_edge = len(rates) > 1 and found["chosen"] in (rates[0], rates[-1])
    return f"{found['chosen']:g}" + (", the edge of those tried" if at_edge else "")


def index(entries: Sequence[tuple[Any, Mapping[str, Any] | None]]) -> str:
    """The list of all experiments: (experiment, summary or None where it has not run)."""
    rows = [
        (
            f"[{experiment.title}]({experiment.name}/page.md)" if summary else experiment.title,
            str(summary["verdict"] or "measured") if summary else "not run",
            f"{summary['seconds'] / 60:.1f}" if summary else "",
        )
        for experiment, summary in entries
    ]
    minutes = sum(summary["seconds"] for _, summary in entries if summary) / 60
    text = (
        f"Written by `python -m experiments.ablations`: {minutes:.0f} minutes of one process, of which two work at once; what several "
        "experiments share is counted in each. [All plots on one page](index.html)."
    )
    return f"# Ablations\n\n{text}\n\n" + table(("experiment", "result", "minutes of one process"), rows) + "\n"


def gallery(entries: Sequence[tuple[Any, Mapping[str, Any] | None]], folder: Path) -> str:
    """One HTML page with every plot inside it: it loads nothing."""
    body = []
    for experiment, summary in entries:
        picture = folder / experiment.name / "plot.png"
        if summary is None or not picture.is_file():
            continue
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        claims = "".join(f"<li>{html.escape(c['text'])}: <b>{html.escape(c['word'])}</b></li>" for c in summary["claims"])
        body.append(
            f"<h2>{html.escape(experiment.title)}</h2><p>{html.escape(experiment.published)}</p><ul>{claims}</ul>"
            f'<img alt="{html.escape(experiment.title)}" src="data:image/png;base64,{data}">'
        )
    style = "body{font:16px sans-serif;max-width:72em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    head = f'<meta charset="utf-8"><title>Ablations</title><style>{style}</style>'
    return f"<!doctype html><html lang=en>{head}<h1>Ablations</h1>{''.join(body)}</html>\n"
