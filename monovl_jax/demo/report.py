"""report.html of a demo run: one self-contained page with curves, scores, a gallery, the frozen-text proof, time and memory."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monovl_jax import jsontext
from monovl_jax.demo.materials import OPENMOJI_CREDIT
from monovl_jax.demo.world import EvaluationItem

TASK_NAMES = {
    "digits": "Handwritten digits (last 360 scans)",
    "words": "Unseen words, fixed letter pitch",
    "words_natural": "Unseen words, natural spacing (reported only)",
    "scene_what": "What is at a place",
    "scene_where": "Where is a thing",
    "scene_count": "How many",
    "scene_colour": "Ground colour",
    "scene_there": "Is there a thing",
    "captions": "Captions, exact",
    "single": "One thing on one tile (taught in S1.1)",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } .note { color: #666; font-size: 13px; } img.curve { width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px; font-size: 13px; overflow-wrap: anywhere; }
.card img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.wrong { border: 2px solid #b00; } .wrong b.got::after { content: " (wrong)"; color: #b00; }
"""


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _picture(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return _uri(buffer.getvalue())


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + cells("th", head) + "".join(cells("td", row) for row in rows) + "</table>"


def read_log(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of log.jsonl by stage, without skipped updates."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = jsontext.loads(line)
        if row["loss"] is not None:
            rows.setdefault(row["stage"], []).append(row)
    return rows


def _curves(log: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(log), figsize=(3.2 * len(log), 3.2), squeeze=False)
    for axis, (stage, rows) in zip(axes[0], log.items(), strict=True):
        steps = [row["step"] for row in rows]
        for part, (name, line) in enumerate((("pictures" if stage != "S0" else "text", "-"), ("text", "--"))):
            values = np.array([row["part_losses"][part] for row in rows if len(row["part_losses"]) > part])
            if len(values):
                width = max(1, len(values) // 40)
                smooth = np.convolve(np.pad(values, (width // 2, width - 1 - width // 2), mode="edge"), np.ones(width) / width, "valid")
                axis.plot(steps[: len(values)], smooth, line, color="black", linewidth=1.2, label=name)
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0][0].set_ylabel("loss (nats per supervised token)")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f'<img class="curve" alt="loss by stage" src="{_uri(buffer.getvalue())}">'


def _scores(result: Mapping[str, Any]) -> str:
    stages = list(result["scores"])
    last = result["scores"][stages[-1]]
    head = ["held-out task", "n", "untrained", *stages, "no picture", "other picture"]
    rows = []
    for task, name in TASK_NAMES.items():
        value = last[task]
        by_stage = [f"{result['scores'][s][task]['exact']:.1f}" for s in stages]
        rows.append([name, value["n"], f"{value['untrained']:.1f}", *by_stage, f"{value['blind']:.1f}", f"{value['shuffled']:.1f}"])
    for name, key in (("Text perplexity, held-out prose", "text_perplexity"), ("Text perplexity, scenes told in words", "told_perplexity")):
        values = result[key]
        rows.append([name, "", f"{values['S0']:.3f}", *(f"{values[s]:.3f}" for s in stages), "", ""])
    return _table(head, rows)


def _frozen(result: Mapping[str, Any]) -> str:
    rows = []
    for stage, proof in result["frozen"].items():
        changed = "every SHA-256 kept" if not proof["changed"] else f"{len(proof['changed'])} changed"
        same = "bitwise those of stage 0" if proof["text_logits_as_S0"] else "changed (text parameters train here)"
        rows.append([stage, proof["frozen_leaves"], changed, same])
    return _table(["stage", "frozen tensors", "frozen tensors after the stage", "text-only logits"], rows)


def _gallery(record: Mapping[str, Any], sets: Mapping[str, Sequence[EvaluationItem]]) -> str:
    cards = []
    for shown in record["gallery"]:
        item = sets[shown["task"]][shown["index"]]
        cards.append(
            f'<div class="card{"" if shown["right"] else " wrong"}"><img alt="{html.escape(item.question)}" src="{_picture(item.image)}">'
            f"<div>{html.escape(item.question)}?</div><div>answer: {html.escape(item.answer.strip())}</div>"
            f'<div>generated: <b class="got">{html.escape(shown["answer"].strip()) or "(nothing)"}</b></div></div>'
        )
    return f'<div class="gallery">{"".join(cards)}</div>'


def write_report(
    run_dir: Path, result: Mapping[str, Any], records: Mapping[str, Any], sets: Mapping[str, Sequence[EvaluationItem]]
) -> Path:
    """Writes report.html into the run directory and returns its path."""
    log = read_log(run_dir)
    last = list(records)[-1]
    scoring = result["evaluation_seconds"]
    times = [
        [stage, result["steps"][stage], f"{seconds:.0f}", f"{scoring[stage]:.0f}", f"{_data_wait(log.get(stage, [])):.1%}"]
        for stage, seconds in result["seconds"].items()
    ]
    total = sum(result["seconds"].values())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>monovl demo</title><style>{STYLE}</style>
<h1>A monolithic vision-language model learns to see</h1>
<p>A small Mono-InternVL-1.5, trained by EViP on an embedded world: stage S0 makes a language model from text alone; S1.1 and S1.2
train visual parameters only, S1.3 adds text attention, S2 everything. All scores are exact match of greedily generated answers on
held-out pictures, in percent.</p>
<h2>Scores</h2>{_scores(result)}
<p class="note">Held out: pairs of drawings never seen together and drawings at places where they never stood (half each); the last 360
scans of the digits in file order (the set does not name its writers, so they may overlap); words never rendered in training. Reading is of
letters at a fixed pitch in fonts seen in training; natural spacing is only reported. "Untrained" is the model after S0 with fresh vision,
"no picture" the last model asked without one, "other picture" the last model shown somebody else's.</p>
<h2>Loss</h2>{_curves(log)}
<h2>Delta tuning keeps the language model</h2>{_frozen(result)}
<h2>Gallery after {html.escape(last)}</h2><p class="note">Up to two wrong answers per task first, where there are any.</p>
{_gallery(records[last]["evaluation"], sets)}
<h2>Time and memory</h2>{_table(["stage", "steps", "training s", "scoring s", "waiting for data"], times)}
<p>Training {total:.0f} s in all, peak resident memory {result["peak_rss_bytes"] / 1e9:.2f} GB,
jax {html.escape(result["jax"])} on {html.escape(", ".join(sorted(set(result["devices"]))))}.</p>
<h2>Credits</h2><p class="note">{html.escape(OPENMOJI_CREDIT)} Digits: UCI optical recognition of handwritten digits, by way of
scikit-learn (BSD-3-Clause). Fonts: DejaVu, by way of matplotlib. Prose: Python's documentation (PSF licence).</p></html>"""
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _data_wait(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([row["data_wait"] for row in rows])) if rows else 0.0
