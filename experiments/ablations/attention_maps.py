"""Claim: visual tokens look close by in the first layers, and text looks at pictures little in shallow layers, more in deep ones.

Mono-InternVL (arXiv 2410.08202) figure 5, second-hand: visual attention of layer 1 is local; visual-text interaction is weak in shallow
layers and grows with depth.

Here: the staged model of `evip_stages` at its scored seeds, on held-out scenes of 4 x 4 visual tokens (2 x 2 tiles of 2 x 2 tokens, in the
order of the sequence). Mean over heads and scenes of

    distance   between a visual token and the visual tokens before it, weighted by attention, divided by the plain mean: below 1 is local
    to picture share of its attention that text after the picture gives to visual tokens, divided by their share of the tokens it may see

    python -m experiments.ablations.attention_maps    -> experiments/results/ablations/attention_maps/page.md
    on a pod: any checkpoint that monovl convert import reads; nothing is trained
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.ablations import evip_stages, pages
from experiments.ablations.chains import Lab
from experiments.ablations.measurement import Measurement, Result, Within
from experiments.ablations.runner import ExperimentError, main
from monovl_jax.config import ModelConfig
from monovl_jax.model import VLM, Ops
from monovl_jax.model.decoder import block
from monovl_jax.model.rope import rope_table
from monovl_jax.training.trainable import Tree, model_structure

ARM = "staged"
SCENES = 32


def attention_weights(config: ModelConfig, parameters: Tree, batch: dict[str, jax.Array], ops: Ops) -> np.ndarray:
    """float32[L, B, T, T]: what every token (row) gives to every earlier one (column), mean over heads. Layers run one by one."""
    model: VLM = nnx.merge(model_structure(config).graphdef, parameters)
    seen: list[np.ndarray] = []

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        scores = jnp.einsum("btkge,bske->bkgts", q, k) * q.shape[-1] ** -0.5
        t = q.shape[1]
        allowed = jnp.tril(jnp.ones((t, t), bool)) & (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
        weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, -1e30), axis=-1)
        seen.append(np.asarray(jnp.where(allowed, weights.mean((1, 2)), 0)))
        return jnp.einsum("bkgts,bske->btkge", weights, v)

    ops = dataclasses.replace(ops, attention=attention)
    h = model.embed(batch["tokens"], batch["tiles"], batch["visual_index"], batch["visual_slot"], ops)
    routing, decoder = model.route(batch["token_types"], ops), config.decoder
    table = rope_table(batch["positions"], decoder.head_dim, decoder.rope, decoder.max_position_embeddings, h.shape[1])
    for layer in range(decoder.num_layers):
        mine = jax.tree.map(lambda leaf: leaf[layer], parameters["decoder"]["blocks"])  # noqa: B023
        h, _ = block(mine, h, table, batch["segment_ids"], routing, None, decoder, ops)
    return np.stack(seen)


def places(tiles: int, per_tile: int) -> np.ndarray:
    """float[n, 2]: (row, column) in tokens of each visual token of a square of square tiles, in the order of the sequence."""
    side, inner = round(tiles**0.5), round(per_tile**0.5)
    order = [(r, c, y, x) for r in range(side) for c in range(side) for y in range(inner) for x in range(inner)]
    return np.array([(r * inner + y, c * inner + x) for r, c, y, x in order], float)


def locality(weights: np.ndarray, at: np.ndarray) -> float:
    """Attention-weighted distance to earlier visual tokens over the plain mean. weights: [B, n, n] among visual tokens."""
    n = len(at)
    distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
    before = np.tril(np.ones((n, n)), -1)
    share = weights * before
    total = share.sum(-1)[:, 1:]
    mean = (share * distance).sum(-1)[:, 1:] / np.where(total > 0, total, 1)
    plain = (before * distance).sum(-1)[1:] / before.sum(-1)[1:]
    return float((mean / plain).mean())


def to_picture(weights: np.ndarray, visual: np.ndarray, text: np.ndarray) -> float:
    """Share of attention of text tokens on visual ones over what even attention would give. weights [B, T, T]; visual, text: bool[B, T]."""
    t = np.arange(weights.shape[1])
    ratios = []
    for w, v, x in zip(weights, visual, text, strict=True):
        ratios += [w[i, v].sum() * (i + 1) / max(1, v[: i + 1].sum()) for i in t[x]]
    return float(np.mean(ratios))


def measure(lab: Lab, results: Path) -> Result:
    """One entry per scored seed: both measures per layer, and the mean map of the first and last layers."""
    experiment, size, setting = evip_stages.EXPERIMENT, lab.setting.size, lab.setting
    arm = experiment.arm(ARM)
    rate = experiment.rate(results, arm, size)
    if rate is None:
        raise ExperimentError("attention_maps needs the staged model; run python -m experiments.ablations.evip_stages first")
    batch, text = setting.scenes(SCENES if size.questions >= SCENES else size.questions)
    visual = np.asarray(batch["token_types"]) == 1
    config, runs = setting.config(arm.experts, arm.attention_output), []
    for seed in size.seeds:
        lab.run(arm, rate, seed)
        weights = attention_weights(config, lab.parameters(lab.chain(arm, rate, seed)[-1]), batch, setting.ops)
        n = int(visual[0].sum())
        first = int(np.flatnonzero(visual[0])[0])
        among = weights[:, :, first : first + n, first : first + n]
        at = places(n // config.vision.tokens_per_tile, config.vision.tokens_per_tile)
        runs.append(
            {
                "seed": seed,
                "locality": [locality(layer, at) for layer in among],
                "to_picture": [to_picture(layer, visual, text) for layer in weights],
                "maps": [np.round(layer.mean(0), 4).tolist() for layer in (among[0], among[-1])],
            }
        )
    return {"scenes": len(visual), "layers": config.decoder.num_layers, "visual_tokens": int(visual[0].sum()), "runs": runs}


def draw(result: Result, path: Path) -> None:
    """Both measures by layer, and what visual tokens look at in the first and the last layer (first seed)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.2), layout="constrained")
    axes = figure.subplots(1, 4)
    layers = np.arange(1, result["layers"] + 1)
    names = (("locality", "distance looked, plain mean = 1"), ("to_picture", "attention of text on visual tokens, even = 1"))
    for ax, (key, label) in zip(axes, names):
        for number, run in enumerate(result["runs"]):
            style = {"color": pages.GREYS[number], "linestyle": pages.LINES[number], "marker": pages.MARKS[number]}
            ax.plot(layers, run[key], label=f"seed {run['seed']}", **style)
        ax.axhline(1, color="0.8", linewidth=0.8)
        ax.set_xlabel("layer")
        ax.set_xticks(layers)
        ax.set_ylabel(label, fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    maps = result["runs"][0]["maps"]
    most = max(np.max(m) for m in maps)
    for ax, weights, name in zip(axes[2:], maps, ("first layer", "last layer")):
        shown = ax.imshow(weights, cmap="Greys", vmin=0, vmax=most)
        ax.set_title(f"visual tokens, {name}", fontsize=10)
        ax.set_xlabel("looked at (number in the sequence)", fontsize=9)
        ax.set_ylabel("looking", fontsize=9)
        ax.set_xticks(range(0, len(weights), 4))
    figure.colorbar(shown, ax=list(axes[2:]), label="share of attention")
    pages.save(figure, path)


def tables(result: Result) -> str:
    """Mean over seeds by layer."""
    rows = [
        (
            str(layer + 1),
            pages.spread([run["locality"][layer] for run in result["runs"]]),
            pages.spread([run["to_picture"][layer] for run in result["runs"]]),
        )
        for layer in range(result["layers"])
    ]
    head = f"{result['scenes']} held-out scenes of {result['visual_tokens']} visual tokens; mean ± standard deviation over the seeds.\n\n"
    return head + pages.table(("layer", "distance looked, plain mean = 1", "attention of text on visual tokens, even = 1"), rows)


def _more_local_at_first(run: dict[str, Any]) -> float:
    return run["locality"][-1] - run["locality"][0]


def _more_to_picture_later(run: dict[str, Any]) -> float:
    half = len(run["to_picture"]) // 2
    return float(np.mean(run["to_picture"][half:]) - np.mean(run["to_picture"][: max(1, half)]))


EXPERIMENT = Measurement(
    name="attention_maps",
    title="Where attention looks",
    published="Mono-InternVL figure 5 (second-hand): layer 1 looks close by; visual-text interaction grows with depth.",
    measure=measure,
    draw=draw,
    tables=tables,
    claims=(
        Within("the first layer looks closer by than the last", _more_local_at_first, 0.05, "of the plain mean"),
        Within("text looks at pictures more in the deeper half", _more_to_picture_later, 0.05, "of even attention"),
    ),
    after=("evip_stages",),
    reading=(
        "Text looks at the picture more in the deeper half at every seed, as in the paper; but not growing from the first layer on: it "
        "looks about evenly in the first and the last of the four layers, and a third of that in the two between. Locality is in those "
        "two, 5% to 7% closer than the plain mean, and not in the first, whose sharpest habit is that the second token of a tile looks "
        "at the tile's first. Sixteen visual tokens leave little room to look close by or far away; the paper's pictures have "
        "thousands."
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT)
