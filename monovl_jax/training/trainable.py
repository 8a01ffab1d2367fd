"""Parameters as nested dicts, and which of them a stage trains.

A path joins the keys of a leaf with `/`: `vision/kernel`, `projector/kernel1`, `decoder/embedding`, `decoder/blocks/mlp/visual/gate`.
A stage lists regexes over paths; what none of them matches is frozen: no gradient, no optimizer state, no float32 copy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monovl_jax.config import ModelConfig
from monovl_jax.model import VLM
from monovl_jax.model.patch_embed import Stored

Tree = dict[str, Any]
"""A nested dict of arrays (or of ShapeDtypeStructs)."""

STACKED = "decoder/blocks/"
"""Leaves under this path have a leading layer axis, which does not count as a dimension of the parameter."""

Initial = Callable[[], Tree]
"""Makes the parameters that a run starts from."""


class TrainableError(ValueError):
    """Trainable patterns or parameters that do not fit the model; the message names the regex or path and the mend."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its numbers.

    graphdef: of nnx, to merge with parameters inside jit. shapes: nested dict of ShapeDtypeStruct. stored: paths of the leaves that
    the checkpoint holds and nothing uses (`patch_embed.Stored`); they are never trained.
    """

    graphdef: Any
    shapes: Tree
    stored: frozenset[str]

    @property
    def paths(self) -> list[str]:
        return list(flatten(self.shapes))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{path: leaf} of a nested dict, in sorted order of paths."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, path = tree[key], f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The nested dict of {path: leaf}."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def parameters(model: nnx.Module) -> Tree:
    """The parameters of a model as a nested dict; the arrays are shared, not copied."""
    return nnx.to_pure_dict(nnx.state(model))


def structure(model: nnx.Module) -> Structure:
    """The structure of a model, concrete or abstract."""
    graphdef, state = nnx.split(model)
    stored = frozenset("/".join(map(str, path)) for path, leaf in nnx.to_flat_state(state) if isinstance(leaf, Stored))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
    return Structure(graphdef, shapes, stored)


@functools.lru_cache(maxsize=16)
def model_structure(config: ModelConfig) -> Structure:
    """The structure of the model of a config; allocates nothing, whatever the size."""
    return structure(nnx.eval_shape(lambda: VLM(config, nnx.Rngs(0))))


def random_parameters(config: ModelConfig, seed: int) -> Tree:
    """Freshly initialised float32 parameters; traceable, so that `jax.jit` with out_shardings places them as they are made."""
    return parameters(VLM(config, nnx.Rngs(seed)))


def select(paths: Iterable[str], patterns: Sequence[str], stored: frozenset[str] = frozenset()) -> frozenset[str]:
    """The paths that any regex matches (`re.search`; anchor with ^ and $ where it matters), stored leaves left out.

    Raises TrainableError for a regex that is not valid or matches no parameter, naming the nearest paths.
    """
    paths, chosen = list(paths), set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise TrainableError(f"trainable pattern {pattern!r} is not a regular expression ({error})") from None
        matched = [path for path in paths if compiled.search(path)]
        if not matched:
            raise TrainableError(f"trainable pattern {pattern!r} matches no parameter; nearest: {', '.join(_nearest(pattern, paths))}")
        if stored.issuperset(matched):
            raise TrainableError(
                f"trainable pattern {pattern!r} matches only {', '.join(matched)}, stored for export and never used; drop the pattern"
            )
        chosen.update(matched)
    return frozenset(chosen - stored)


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    plain = re.sub(r"[\^$()?*+\\]", "", pattern.split("|")[0])
    closeness = {path: difflib.SequenceMatcher(None, plain, path[: len(plain) + 8]).ratio() for path in paths}
    return sorted(paths, key=lambda path: -closeness[path])[:4]


def split_tree(tree: Tree, chosen: frozenset[str]) -> tuple[Tree, Tree]:
    """(trainable, frozen): two nested dicts that share no leaf and together hold every leaf."""
    flat = flatten(tree)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def split_trainable(model: nnx.Module, patterns: Sequence[str]) -> tuple[Any, Tree, Tree]:
    """(graphdef, trainable, frozen) of a model, concrete or abstract.

    A leaf is trainable when any regex matches its path; `Stored` leaves never are. Raises TrainableError for a regex that matches nothing.
    """
    shape = structure(model)
    trainable, frozen = split_tree(parameters(model), select(shape.paths, patterns, shape.stored))
    return shape.graphdef, trainable, frozen


def merge_trees(*trees: Mapping[str, Any]) -> Tree:
    """One nested dict of several. Raises TrainableError when two hold the same leaf."""
    flat: dict[str, Any] = {}
    for tree in trees:
        piece = flatten(tree)
        if both := sorted(flat.keys() & piece.keys()):
            raise TrainableError(f"{both[0]!r} is in two of the trees to merge; split them by one set of patterns")
        flat |= piece
    return unflatten({path: flat[path] for path in sorted(flat)})


def check_tree(tree: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises TrainableError listing missing, unknown and misshapen leaves. `where` begins the message."""
    have, want = flatten(tree), flatten(expected)
    wrong = [f"{path} is missing" for path in sorted(want.keys() - have.keys())]
    wrong += [f"{path} is unknown" for path in sorted(have.keys() - want.keys())]
    wrong += [
        f"{path} has shape {list(have[path].shape)}, the model has {list(want[path].shape)}"
        for path in sorted(have.keys() & want.keys())
        if tuple(have[path].shape) != tuple(want[path].shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise TrainableError(f"{where}: {'; '.join(wrong[:6])}{more}")


def cast(tree: Tree, dtype: Any, copy: bool = False) -> Tree:
    """Floating leaves in `dtype`. copy: always new arrays, so that the result may be donated."""
    return jax.tree.map(lambda x: jnp.array(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype, copy=copy), tree)


def initialise_experts(tree: Tree) -> Tree:
    """A tree whose visual experts (FFN and, where present, attention) are copies of the text experts; other leaves are shared.

    Text and picture slots are then read alike at the first step (Mono-InternVL section 3.2). Raises TrainableError without experts.
    """
    flat = flatten(tree)
    visual = [path for path in flat if path.startswith("decoder/blocks/") and "/visual/" in path]
    if not visual:
        raise TrainableError("the model has no visual experts to initialise; set decoder.experts to 'ffn' or 'ffn+attention'")
    return unflatten(
        {path: jnp.array(flat[path.replace("/visual/", "/text/")], copy=True) if path in visual else x for path, x in flat.items()}
    )


def digests(tree: Mapping[str, Any]) -> dict[str, str]:
    """{path: sha256 hex} over dtype, shape and bytes of every leaf. Equal digests mean equal bits."""

    def digest(leaf: Any) -> str:
        array = np.ascontiguousarray(leaf)
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()

    return {path: digest(leaf) for path, leaf in flatten(tree).items()}


def count(tree: Mapping[str, Any]) -> int:
    """How many numbers a tree holds."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())
