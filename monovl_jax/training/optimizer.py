"""AdamW with warm-up, a constant or cosine schedule, clipping by global norm, and decay of matrices only."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from monovl_jax.training.stages import Stage
from monovl_jax.training.trainable import STACKED, Tree, flatten, unflatten

_UNDECAYED = re.compile(r"(^|[/_])(bias\d*|norm|norm_scale|scale)$")


class Optimizer(NamedTuple):
    """transform: the optax chain. schedule: step (from 0) to learning rate, float32."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule

    def learning_rate(self, state: Any) -> jax.Array:
        """float32[]: the rate that the next update with this state will use."""
        counts = optax.tree_utils.tree_get_all_with_path(state, "count")
        return jnp.asarray(self.schedule(counts[0][1]), jnp.float32)


def learning_rate_schedule(stage: Stage) -> optax.Schedule:
    """Step s (from 0) to the learning rate of step s + 1.

    Warm-up is linear and starts above zero: peak * (s + 1) / warmup_steps, so that no step is wasted (HF's starts with a step at 0).
    The cosine goes from the peak, at the first step after the warm-up, towards final_fraction * peak, which the step after the last would
    have: with a fraction of 0 the last step still learns.
    """
    peak, warmup, steps = stage.learning_rate, stage.warmup_steps, stage.steps

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if stage.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
            rate = peak * (stage.final_fraction + (1 - stage.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        else:
            rate = jnp.full_like(step, peak)
        return jnp.where(step < warmup, peak * (step + 1) / max(1, warmup), rate).astype(jnp.float32)

    return schedule


def decay_mask(trainable: Tree) -> Tree:
    """True for the leaves that decay: at least two dimensions per layer, and neither a norm nor a bias by name.

    Upstream (HF Trainer) leaves out biases and LayerNorms but decays RMSNorm scales; here no norm decays.
    """

    def decays(path: str, leaf: Any) -> bool:
        dimensions = len(leaf.shape) - path.startswith(STACKED)
        return dimensions >= 2 and not _UNDECAYED.search(path)

    return unflatten({path: decays(path, leaf) for path, leaf in flatten(trainable).items()})


def make_optimizer(stage: Stage) -> Optimizer:
    """The optimizer of a stage. Moments are float32, like the trainable masters it is made for."""
    schedule = learning_rate_schedule(stage)
    transform = optax.chain(
        optax.clip_by_global_norm(stage.clip),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps),
        optax.add_decayed_weights(stage.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule)
