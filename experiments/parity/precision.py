"""What bfloat16 changes: logits of the recorded cases computed in float32 and in bfloat16, against PyTorch's in float32.

    python -m experiments.parity.precision CASE_DIR... [--out experiments/results/precision.json]

Weights are the same; `Ops.dtype` is what differs (norms, softmax, rotary tables and logits stay float32). Cases without recorded logits are
named and left out. The models of the recorded cases are tiny and untrained, so that tokens lie close together: the share of places with the
same likeliest token says less about a trained model than the differences do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from monovl_jax.evaluation.parity import UnknownCase, case_logits


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Logits [n, V] against others: largest and root-mean-square difference over their spread, KL(want || got), share of equal argmax."""
    p, q = (jax.nn.log_softmax(jnp.asarray(x), axis=-1) for x in (want, got))
    return {
        "largest": float(np.abs(got - want).max() / want.std()),
        "rms": float(np.sqrt(np.mean((got - want) ** 2)) / want.std()),
        "kl": float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))),
        "same_argmax": float(np.mean(got.argmax(-1) == want.argmax(-1))),
    }


def main(cases: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> dict[str, Any]:
    """Prints one line per dtype over all places of all cases."""
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"float32": [], "bfloat16": []}
    used = []
    for case in cases:
        try:
            for dtype, found in pairs.items():
                found.append(case_logits(case, jnp.dtype(dtype)))
            used.append(case.name)
        except UnknownCase as error:
            print(f"left out: {error}")
    result: dict[str, Any] = {"cases": used, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for dtype, found in pairs.items():
        each = [compare(*pair) for pair in found]
        places = sum(len(got) for got, _ in found)
        worst = {name: max(e[name] for e in each) for name in ("largest", "rms", "kl")}
        same = sum(e["same_argmax"] * len(got) for e, (got, _) in zip(each, found, strict=True)) / places
        result[dtype] = {**worst, "same_argmax": same, "places": places}
        print(
            f"{dtype:9s} worst case of {len(each)}: largest {worst['largest']:.1e} of the logits' spread, rms {worst['rms']:.1e}, "
            f"KL {worst['kl']:.1e}; likeliest token the same at {same:.1%} of {places} places"
        )
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    tyro.cli(main)
