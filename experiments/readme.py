"""Writes the tables of README.md, docs/kernels.md and docs/performance.md from experiments/results: no number there is typed by hand.

python -m experiments.readme          # after new results; a test fails when a page is out of date
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import kernel_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
BEGIN, END = "<!-- results: python -m experiments.readme -->", "<!-- end of results -->"

TASKS = {
    "digits": "handwritten digits",
    "words": "unseen words, fixed letter pitch",
    "captions": "captions, exact",
    "scene_what": "what is at a place",
    "scene_where": "where is a thing",
    "scene_count": "how many",
    "scene_colour": "ground colour",
    "scene_there": "is there a thing",
    "single": "one thing, as taught in S1.1",
    "words_natural": "unseen words, natural spacing (never trained)",
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo_table(demo: dict[str, Any]) -> str:
    """The demo's held-out scores after the last stage."""
    last = list(demo["scores"])[-1]
    lines = ["| held-out task | n | after " + last + " | no picture | untrained |", "|---|---|---|---|---|"]
    for task, name in TASKS.items():
        score = demo["scores"][last][task]
        lines.append(f"| {name} | {score['n']} | {score['exact']:.1f}% | {score['blind']:.1f}% | {score['untrained']:.1f}% |")
    return "\n".join(lines)


def ablation_table() -> str:
    """What came out of the papers' ablations; empty before any has run."""
    lines = ["| claim of a paper, small | result | command |", "|---|---|---|"]
    for path in sorted((RESULTS / "ablations").glob("*/summary.json")):
        summary, name = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        words = [claim["word"] for claim in summary["claims"]]
        if words:
            title = (path.parent / "page.md").read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
            counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
            page = f"experiments/results/ablations/{name}/page.md"
            lines.append(f"| [{title}]({page}) | {summary['verdict']} ({counted}) | `python -m experiments.ablations.{name}` |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def render() -> str:
    """The block between the markers."""
    demo, step, parity = _read("demo.json"), _read("train_step.json"), _read("parity.json")
    convert = _read("convert.json")
    minutes, memory = sum(demo["seconds"].values()) / 60, demo["peak_rss_bytes"] / 1e9
    text = list(demo["text_perplexity"].items())
    (first, before), (last, after) = text[0], text[-1]
    ratio = step["ratio_to_dense"]
    bench = "`python -m experiments.benchmarks.train_step`"
    outputs = f"{parity['cases']} recorded cases, {parity['checks']} outputs, {parity['failed']} outside tolerance"
    data = _read("data.json")
    packed = data["packing"]["shapes"]["rows of sft"]
    piped = (
        f"{data['tiles']['ratio_to_pillow']['prepared']:.2f}x bare Pillow; packing leaves {packed['token_waste']:.1%} of token slots and "
        f"{packed['tile_waste']:.1%} of tile slots of sft rows empty; the demo waits {data['demo_wait']['share']:.2%} of its time"
    )
    saved = [
        (
            f"the same steps with every expert on every token ({name})",
            f"{over['time']:.2f}x the time, {over['operations']:.2f}x the operations",
            bench,
        )
        for name, over in step.get("masked_both_over_routed", {}).items()
    ]
    converted = [
        (
            f"{way} of the 2B model ({convert['bytes'] / 1e9:.1f} GB), byte for byte",
            f"{convert[way]['ratio_to_copy']:.2f}x copying the files and reading them back; {convert[way]['rss_anon_gb']:.1f} GB of memory",
            "`python -m experiments.benchmarks.convert`",
        )
        for way in ("import", "export")
    ]
    inference, precision = _read("inference.json"), _read("precision.json")
    asked = [
        (name, f"{found['ratio']:.2f}x as fast as eager PyTorch (wanted: {found['bar']})", "`python -m experiments.benchmarks.inference`")
        for name, found in inference["results"].items()
    ]
    rows = [
        ("what", "measured", "command"),
        ("---", "---", "---"),
        ("parity with PyTorch, float32", f"{outputs}; logits within {parity['logits']:.1e}", "`monovl parity`"),
        ("the demo, all five stages", f"{minutes:.1f} minutes of training, {memory:.1f} GB", "`make demo`"),
        (
            f"text perplexity, {first} to {last}",
            f"{before:.2f} to {after:.2f}; bitwise unchanged while the text side is frozen",
            "`make demo`",
        ),
        ("a train step with visual FFN experts", f"{ratio['ffn']:.2f}x the dense model without experts", bench),
        ("with attention experts too", f"{ratio['ffn+attention']:.2f}x", bench),
        *saved,
        (
            "a routed FFN, 75% of the tokens visual",
            f"{kernel_tables.cpu_ratio('forward', 0.75):.2f}x a dense FFN forward, "
            f"{kernel_tables.cpu_ratio('forward + backward, text frozen', 0.75):.2f}x forward and backward with the text expert frozen",
            "`python -m pallas_kernels.benchmark --tokens 1024 --width 512 --inner 2048 --dtype float32`",
        ),
        ("pictures to packed batches, one core", piped, "`python -m experiments.benchmarks.data`"),
        *converted,
        *asked,
        (
            "bfloat16 instead of float32, recorded cases",
            f"logits differ by {precision['bfloat16']['rms']:.1%} of their spread (float32: {precision['float32']['rms']:.0e}); "
            f"likeliest token the same at {precision['bfloat16']['same_argmax']:.0%} of places",
            "`python -m experiments.parity.precision`",
        ),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""
Measured on two CPU cores with jax {demo["jax"]}; the files are in `experiments/results/`.

{table}

{demo_table(demo)}

{ablation_table()}
Not measured but estimated, by the TPU's compiler: `python -m pallas_kernels.benchmark --static v6e:2x2 --tokens 16384` (2048 -> 8192,
bfloat16, half of the tokens visual; routing and the order of the tokens are counted; more in [docs/kernels.md](docs/kernels.md)).

{kernel_tables.summary()}
"""


def routing_gap() -> str:
    """Why a train step gains less by routing than the operations it saves."""
    step = _read("train_step.json")
    ms, operations = {k: 1e3 * v for k, v in step["median_seconds"].items()}, step["matmul_operations"]
    lines = ["| experts | dense | routed | masked both | time saved | operations saved |", "|---|---|---|---|---|---|"]
    for name, over in step["masked_both_over_routed"].items():
        times = f"{ms['none']:.0f} ms | {ms[name]:.0f} ms | {ms[f'{name}, masked both']:.0f} ms"
        lines.append(f"| {name} | {times} | {over['time']:.2f}x | {over['operations']:.2f}x |")
    saved, gained = operations["ffn, masked both"] - operations["ffn"], ms["ffn, masked both"] - ms["ffn"]
    matmul = operations["ffn"] / saved * gained
    return f"""
{chr(10).join(lines)}

With FFN experts, routing saves {saved / 1e9:.1f} GFLOP and {gained:.0f} ms, {saved / gained / 1e6:.0f} GFLOP/s. At that speed all matmuls
of the routed step take {matmul:.0f} of its {ms["ffn"]:.0f} ms; the rest (softmax, norms, AdamW, gathers) is the same on both sides.
"""


PAGES: dict[Path, tuple[str, str, Callable[[], str]]] = {
    ROOT / "README.md": (BEGIN, END, render),
    ROOT / "docs" / "performance.md": (BEGIN, END, routing_gap),
    ROOT / "docs" / "kernels.md": (kernel_tables.BEGIN, kernel_tables.END, kernel_tables.render),
}
"""The pages with generated blocks: the markers around it, and what stands between them."""


def main() -> None:
    """Replaces the blocks."""
    for path, (begin, end, text) in PAGES.items():
        before, rest = path.read_text(encoding="utf-8").split(begin)
        path.write_text(before + begin + "\n" + text() + "\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
