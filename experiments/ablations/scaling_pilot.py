"""A pattern for planning a real run: three model sizes x three data budgets, a fitted curve, and how far it can be trusted.

No paper's claim, no verdict, one seed. Each run has its own schedule, down to its own end. Fitted in logarithms by least squares:

    nats per answer token = exp(c) * parameters^a * samples^b

with the range of 500 refits on resampled residuals, and the honest check: the largest model with the most data, predicted from the others.

    python -m experiments.ablations.scaling_pilot     -> experiments/results/ablations/scaling_pilot/page.md
    on a pod: monovl plan evip --topology v5e:16x16   (the time of a step; the curve says how many are worth it)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from experiments.ablations import pages
from experiments.ablations.chains import VISUAL, Arm, Lab, Step
from experiments.ablations.measurement import Measurement, Result
from experiments.ablations.runner import main
from experiments.ablations.setting import Setting

WIDTHS = (0.5, 1.0, 1.5)
BUDGETS = (1.0, 2.0, 4.0)
RATE = 3e-3
"""For the width of `Size`; a model k times as wide gets a k-th of it."""


def fit(parameters: np.ndarray, rows: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """(c, a, b) of log loss = c + a log parameters + b log rows."""
    return np.linalg.lstsq(_design(parameters, rows), np.log(loss), rcond=None)[0]


def predict(coefficients: np.ndarray, parameters: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The fitted loss."""
    return np.exp(_design(parameters, rows) @ coefficients)


def _design(parameters: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(parameters, float), np.log(parameters), np.log(rows)], axis=-1)


def uncertainty(parameters: np.ndarray, rows: np.ndarray, loss: np.ndarray, times: int = 500) -> np.ndarray:
    """float[times, 3]: refits on residuals drawn anew."""
    coefficients, rng = fit(parameters, rows, loss), np.random.default_rng(0)
    fitted = predict(coefficients, parameters, rows)
    residuals = np.log(loss) - np.log(fitted)
    return np.stack([fit(parameters, rows, fitted * np.exp(rng.choice(residuals, len(residuals)))) for _ in range(times)])


def measure(lab: Lab, results: Path) -> Result:
    """Trains the nine models, each from the language model of its own size."""
    del results
    size, runs = lab.setting.size, []
    for width in WIDTHS:
        wide = dataclasses.replace(
            size, hidden_size=round(width * size.hidden_size), intermediate_size=round(width * size.intermediate_size)
        )
        own = Lab(Setting(wide, lab.setting.world), lab.folder)
        for budget in BUDGETS:
            step = Step("S1", VISUAL, (("clean", 1.0), ("tasks", 1.0)), budget)
            record = own.run(Arm(f"{width:g} wide", "", "ffn", (step,)), RATE / width, size.tuning_seed)[-1]
            keys = ("trainable_parameters", "rows", "seconds")
            runs.append({"width": width, "budget": budget, **{k: record[k] for k in keys}, **record["scores"]})
            print(f"scaling_pilot: width {width:g}, budget {budget:g}: {runs[-1]['answer_nll']:.3f} nats", flush=True)
    n, d, loss = (np.array([run[key] for run in runs], float) for key in ("trainable_parameters", "rows", "answer_nll"))
    resampled = uncertainty(n, d, loss)
    held_out = fit(n[:-1], d[:-1], loss[:-1])
    return {
        "runs": runs,
        "coefficients": fit(n, d, loss).tolist(),
        "intervals": np.percentile(resampled, (5, 95), axis=0).T.tolist(),
        "held_out": {"predicted": float(predict(held_out, n[-1:], d[-1:])[0]), "measured": float(loss[-1])},
    }


def draw(result: Result, path: Path) -> None:
    """Measured points, the fitted curve of each size, and the range of its refits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    n, rows, loss = (np.array([run[key] for run in result["runs"]], float) for key in ("trainable_parameters", "rows", "answer_nll"))
    refits = uncertainty(n, rows, loss)
    for number, width in enumerate(WIDTHS):
        mine = [run for run in result["runs"] if run["width"] == width]
        n, rows = (np.array([run[key] for run in mine], float) for key in ("trainable_parameters", "rows"))
        size, along = np.full(50, n[0]), np.geomspace(rows.min(), rows.max(), 50)
        style = {"color": pages.GREYS[number], "linestyle": pages.LINES[number]}
        ax.plot(rows, [run["answer_nll"] for run in mine], pages.MARKS[number], mfc="none", color=pages.GREYS[number])
        ax.plot(along, predict(np.array(result["coefficients"]), size, along), label=f"{n[0] / 1e6:.2f} M trained parameters", **style)
        low, high = np.percentile([predict(refit, size, along) for refit in refits], (5, 95), axis=0)
        ax.fill_between(along, low, high, color=pages.GREYS[number], alpha=0.12, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sorted({run["rows"] for run in result["runs"]}))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(ScalarFormatter())
    ax.set_xlabel("packed rows seen after stage 0")
    ax.set_ylabel("answers, nats per token")
    ax.set_title("marks: runs; lines: the fit over all of them; bands: 5% to 95% of refits", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    pages.save(figure, path)


def tables(result: Result) -> str:
    """The runs, the exponents with their ranges, and the prediction of the largest run."""
    rows = [
        (f"{run['trainable_parameters'] / 1e6:.2f} M", str(run["rows"]), f"{run['answer_nll']:.3f}", f"{run['visual']:.1f}")
        for run in result["runs"]
    ]
    named = zip(("c", "a (parameters)", "b (samples)"), result["coefficients"], result["intervals"])
    fitted = [(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}") for name, value, (low, high) in named]
    held = result["held_out"]
    return "\n\n".join(
        (
            pages.table(("trained parameters", "rows", "nats per answer token", "visual score, %"), rows),
            pages.table(("coefficient", "fit", "5% to 95% of refits"), fitted),
            f"The largest run, predicted from the other eight: {held['predicted']:.3f} nats; measured: {held['measured']:.3f}. "
            "One seed: the ranges know the scatter around the curve, not that of a second seed.",
        )
    )


EXPERIMENT = Measurement(
    name="scaling_pilot",
    title="A scaling pilot",
    published="Not from a paper: users asked for matched-budget pilots before a real run.",
    measure=measure,
    draw=draw,
    tables=tables,
    reading=(
        "What the pilot shows is that one law with two exponents is too simple here, and the plot says so before any money is spent: "
        "the smallest model hardly gains from more data, the middle one gains most and ends below its band, and the largest is not "
        "ahead of it on any budget but the smallest. The largest run came out 3% above its prediction. For a real run: more budgets for "
        "the two larger models, and a second seed, before the fit is trusted beyond its points."
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT)
