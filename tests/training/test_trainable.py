"""The trainable split: by regex, strict, without touching a frozen leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monovl_jax.config import mono_internvl_2b, tiny
from monovl_jax.model import VLM
from monovl_jax.training.trainable import (
    TrainableError,
    cast,
    check_tree,
    digests,
    flatten,
    initialise_experts,
    merge_trees,
    model_structure,
    parameters,
    select,
    split_trainable,
    unflatten,
)
from tests.training.worlds import VISUAL, plain_parameters

STORED = {"vision/class_embedding", "vision/class_position"}


@pytest.fixture(scope="module")
def model() -> VLM:
    return VLM(tiny("ffn+attention"), nnx.Rngs(0))


def test_split_by_regex_and_merge_back(model: VLM) -> None:
    graphdef, trainable, frozen = split_trainable(model, VISUAL)
    assert set(flatten(trainable)) == {
        *("vision/kernel", "vision/bias", "vision/position_embedding"),
        *(f"projector/{name}" for name in ("norm_scale", "norm_bias", "kernel1", "bias1", "kernel2", "bias2")),
        *(f"decoder/blocks/mlp/visual/{name}" for name in ("gate", "up", "down")),
    }
    merged = merge_trees(trainable, frozen)
    assert digests(merged) == digests(parameters(model))
    again = nnx.merge(graphdef, trainable, frozen)
    assert again.config == model.config and digests(parameters(again)) == digests(merged)
    with pytest.raises(TrainableError, match="in two of the trees"):
        merge_trees(trainable, merged)


def test_stored_leaves_are_never_trained(model: VLM) -> None:
    _, trainable, frozen = split_trainable(model, [".*"])
    assert set(flatten(frozen)) == STORED and not STORED & set(flatten(trainable))
    with pytest.raises(TrainableError, match="stored for export"):
        split_trainable(model, ["class_embedding$"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^decoder/blocks/mlp/visula/", r"'\^decoder/blocks/mlp/visula/' matches no parameter; nearest: .*decoder/blocks/mlp/visual/"),
        ("^kernel1", "nearest: .*"),
        ("(", "not a regular expression"),
    ],
)
def test_unknown_pattern(model: VLM, pattern: str, message: str) -> None:
    with pytest.raises(TrainableError, match=message):
        split_trainable(model, [*VISUAL, pattern])


def test_abstract_model_of_the_released_size() -> None:
    shape = model_structure(mono_internvl_2b())
    chosen = select(shape.paths, VISUAL, shape.stored)
    visual = sum(int(np.prod(leaf.shape)) for path, leaf in flatten(shape.shapes).items() if path in chosen and "/mlp/" in path)
    assert visual == 1_207_959_552  # 24 * 3 * 2048 * 8192, the paper's "1.2B"


def test_cast_copies() -> None:
    tree = {"a": {"b": jnp.ones(3)}, "c": jnp.arange(3)}
    same, copied = cast(tree, jnp.float32), cast(tree, jnp.float32, copy=True)
    assert same["a"]["b"] is tree["a"]["b"] or same["a"]["b"].unsafe_buffer_pointer() == tree["a"]["b"].unsafe_buffer_pointer()
    assert copied["a"]["b"].unsafe_buffer_pointer() != tree["a"]["b"].unsafe_buffer_pointer()
    assert cast(tree, jnp.bfloat16)["a"]["b"].dtype == jnp.bfloat16 and cast(tree, jnp.bfloat16)["c"].dtype == jnp.int32


def test_experts_start_as_copies() -> None:
    tree = plain_parameters(tiny("ffn+attention"))
    before, after = digests(tree), digests(initialise_experts(tree))
    for path in before:
        if "/visual/" in path:
            assert before[path] != before[path.replace("/visual/", "/text/")]
            assert after[path] == before[path.replace("/visual/", "/text/")]
        else:
            assert after[path] == before[path]
    with pytest.raises(TrainableError, match="no visual experts"):
        initialise_experts(plain_parameters(tiny("none")))


def test_digests_tell_bits_apart() -> None:
    zero, negative = {"x": np.zeros(2, np.float32)}, {"x": -np.zeros(2, np.float32)}
    assert digests(zero) != digests(negative) and digests(zero) == digests({"x": jnp.zeros(2)})
    assert digests(zero) != digests({"x": np.zeros(2, np.int32)})


def test_check_tree_lists_everything() -> None:
    shapes = jax.eval_shape(lambda: {"a": {"b": jnp.ones(3)}, "c": jnp.ones(2)})
    with pytest.raises(TrainableError, match=r"here: a/b is missing; d is unknown; c has shape \[1\], the model has \[2\]"):
        check_tree({"c": jnp.ones(1), "d": jnp.ones(1)}, shapes, "here")


def test_flatten_is_the_inverse_of_unflatten() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert unflatten(flatten(tree)) == tree and list(flatten(tree)) == ["a/b", "a/c/d", "e"]
