"""Schedules, the decay mask, and one update against AdamW written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from monovl_jax.config import DecoderConfig, ModelConfig, mono_internvl_1_5_2b, mono_internvl_2b
from monovl_jax.recipes.evip import STAGES, evip_2b
from monovl_jax.recipes.evip_plus_plus import STAGES as STAGES_PLUS_PLUS
from monovl_jax.recipes.evip_plus_plus import evip_plus_plus_2b
from monovl_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from monovl_jax.training.stages import Recipe, RecipeError, Stage
from monovl_jax.training.trainable import count, flatten, model_structure, split_tree
from tests.training.worlds import recipe, stage


def test_cosine_schedule() -> None:
    rate = learning_rate_schedule(stage(steps=12, warmup_steps=4, learning_rate=0.1, final_fraction=0.1))
    np.testing.assert_allclose([rate(s) for s in range(4)], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    assert float(rate(4)) == pytest.approx(0.1)
    assert float(rate(8)) == pytest.approx(0.1 * (0.1 + 0.9 / 2))
    assert float(rate(12)) == pytest.approx(0.01)
    assert all(float(rate(s)) > float(rate(s + 1)) for s in range(4, 11))


def test_constant_schedule() -> None:
    rate = learning_rate_schedule(stage(steps=10, warmup_steps=2, learning_rate=0.1, schedule="constant"))
    np.testing.assert_allclose([rate(s) for s in range(5)], [0.05, 0.1, 0.1, 0.1, 0.1], rtol=1e-6)
    assert float(learning_rate_schedule(stage(steps=1, warmup_steps=0, learning_rate=0.1))(0)) == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    config = ModelConfig(
        decoder=DecoderConfig(attention_bias=True, experts="ffn+attention", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2)
    )
    mask = flatten(decay_mask(model_structure(config).shapes))
    spared = {path for path, decays in mask.items() if not decays}
    assert spared == {
        *("vision/bias", "vision/class_embedding", "vision/class_position"),
        *("projector/norm_scale", "projector/norm_bias", "projector/bias1", "projector/bias2"),
        *("decoder/norm", "decoder/blocks/attention_norm", "decoder/blocks/ffn_norm"),
        *(f"decoder/blocks/attention/{e}/{b}" for e in ("text", "visual") for b in ("qkv_bias", "out_bias")),
    }


def test_update_is_adamw() -> None:
    """Two steps against the formulas of Loshchilov and Hutter, with clipping."""
    s = stage(schedule="constant", warmup_steps=0, learning_rate=0.1, weight_decay=0.3, clip=1.0, eps=1e-8)
    optimizer = make_optimizer(s)
    params = {"decoder": {"head": jnp.array([[1.0, -2.0]]), "norm": jnp.array([3.0, 4.0])}}
    expected, m, v = ({k: np.asarray(p, np.float64) for k, p in params["decoder"].items()}, {}, {})
    state = optimizer.transform.init(params)
    assert float(optimizer.learning_rate(state)) == pytest.approx(0.1)
    for t in (1, 2):
        grads = {"head": np.array([[3.0, 0.0]]) * t, "norm": np.array([0.0, 4.0])}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g / max(norm, 1.0)
            m[k] = 0.9 * m.get(k, 0) + 0.1 * g
            v[k] = 0.95 * v.get(k, 0) + 0.05 * g**2
            update = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            expected[k] = expected[k] - 0.1 * (update + (0.3 * expected[k] if k == "head" else 0))
        updates, state = optimizer.transform.update({"decoder": {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for k, want in expected.items():
        np.testing.assert_allclose(params["decoder"][k], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="a/b"), "letters, digits"),
        (dict(trainable=()), "at least one regex"),
        (dict(steps=0), "steps is 0"),
        (dict(batch_size=5), "no multiple of accumulation 2"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(mixture={"a": 0.0}), "weight 0.0"),
        (dict(text_rows=0), "together"),
        (dict(warmup_steps=7), "more than the 6 steps"),
    ],
)
def test_bad_stage(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        stage(**changes)


@pytest.mark.parametrize("changes", [dict(schedule="linear"), dict(loss_weighting="mean")])
def test_bad_choice(changes: dict) -> None:
    """Where annotations are checked, as in these tests, they speak first."""
    with pytest.raises((RecipeError, TypeCheckError), match=next(iter(changes))):
        stage(**changes)


def test_bad_recipe() -> None:
    with pytest.raises(RecipeError, match="two stages called"):
        recipe(stages=(stage(), stage()))
    with pytest.raises(RecipeError, match="copy_experts_before is 'S9'"):
        recipe(copy_experts_before="S9")
    with pytest.raises(RecipeError, match=r"stage 'S1\.1': trainable pattern 'nothing' matches no parameter"):
        recipe().trainable_paths(stage(trainable=("nothing",)))
    with pytest.raises(RecipeError, match=r"no stage 'S7'; it has: S0, S1\.1, S2"):
        recipe().stage("S7")


FFN, ATTENTION_QKV_OUT = 1_207_959_552, 24 * (2048 * 4096 + 2048 * 2048)
OUTSIDE = 1024 * (14 * 14 * 3 + 1 + 1024) + 12_595_200  # patch embedding without the unused class rows; projector


@pytest.mark.parametrize(
    ("made", "stages", "trained"),
    [
        (evip_2b(), STAGES, [OUTSIDE + FFN] * 2 + [OUTSIDE + FFN + ATTENTION_QKV_OUT]),
        (
            evip_plus_plus_2b(),
            STAGES_PLUS_PLUS,
            [OUTSIDE + FFN + ATTENTION_QKV_OUT] * 2 + [OUTSIDE + FFN + 2 * ATTENTION_QKV_OUT],
        ),
    ],
)
def test_recipes_of_the_2b_model(made: Recipe, stages: list[Stage], trained: list[int]) -> None:
    """What each stage trains, and that optimizer state exists for nothing else; by eval_shape, so nothing is allocated."""
    assert list(made.stages) == stages and [s.name for s in stages] == ["S1.1", "S1.2", "S1.3", "S2"]
    assert made.model in (mono_internvl_2b(), mono_internvl_1_5_2b())
    shapes = model_structure(made.model).shapes
    vocabulary_padding = 2 * 2048 * (made.model.decoder.padded_vocab_size - made.model.decoder.vocab_size)
    total = (3_111_355_392 if made.model == mono_internvl_2b() else 3_413_345_280) - 2 * 1024
    for s, expected in zip(stages, [*trained, total + vocabulary_padding], strict=True):
        trainable, _ = split_tree(shapes, made.trainable_paths(s))
        assert count(trainable) == expected
        state = jax.eval_shape(make_optimizer(s).transform.init, trainable)
        moments = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state) if leaf.shape)
        assert moments == 2 * expected
        assert s.tiles_per_row * 256 < s.sequence_length
