"""The routed layers against the reference: values, all gradients, what must not leak, what must not be computed."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import make_routing, routed_linear, routed_swiglu
from pallas_kernels.routing import SMALL
from tests.pallas_kernels.helpers import LAYERS, TOLERANCE, close, make_inputs, masks, same, stack
from tests.quick import compiler_options, quick_jit

IMPLEMENTATIONS = ("reference", "xla")
SHAPES = ((1, 1, 1), (33, 5, 7), (100, 8, 12))
"""(tokens, width in, width inside or out); the last is the one most tests share."""
BIG = SHAPES[-1]


PROGRAMS = 4


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five programs per switch in place of seventeen: the same code, compiled in a third of the time. `all_programs` in a name: all."""
    if "all_programs" not in request.node.name:
        monkeypatch.setattr("pallas_kernels.routing.BLOCKS", PROGRAMS)


def layer(kind: str, x: jax.Array, weights: Any, expert: jax.Array, implementation: str | None) -> jax.Array:
    routing = make_routing(expert)
    if kind == "swiglu":
        return routed_swiglu(x, weights, routing, implementation)
    kernels, biases = zip(*weights, strict=True)
    return routed_linear(x, kernels, routing, biases, implementation)


@functools.cache
def compiled(kind: str, implementation: str):
    """(x, weights, expert, dy) -> (y, (dx, dweights)); compiled once per shape, whatever the experts."""

    def run(x, weights, expert, dy):
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, expert, implementation), x, weights)
        return y, pull(dy)

    return quick_jit(run)


MASKS = masks(BIG[0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference(kind: str, dtype: str, mask: str) -> None:
    x, weights, dy = make_inputs(kind, BIG, dtype)
    expert = MASKS[mask].astype(np.int32)
    want, got = (compiled(kind, i)(x, weights, expert, dy) for i in IMPLEMENTATIONS)
    close(got, want, TOLERANCE[dtype])
    y, (dx, _) = got
    assert y.dtype == dtype and not np.any(np.asarray(y)[expert < 0]) and not np.any(np.asarray(dx)[expert < 0])


@st.composite
def routed(draw) -> tuple[tuple[int, int, int], np.ndarray, int]:
    shape = draw(st.sampled_from(SHAPES))
    seed = draw(st.integers(0, 2**32 - 1))
    shares = np.asarray(draw(st.tuples(*[st.integers(0, 5)] * 3).filter(any)))
    return shape, np.random.default_rng(seed).choice([-1, 0, 1], shape[0], p=shares / shares.sum()).astype(np.int32), seed


@settings(max_examples=40, deadline=None)
@given(routed())
@example(((1, 1, 1), np.int32([0]), 0))
@example(((1, 1, 1), np.int32([1]), 0))
@example(((1, 1, 1), np.int32([-1]), 0))
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference_for_any_shape_and_mask(kind: str, case: tuple) -> None:
    shape, expert, seed = case
    x, weights, dy = make_inputs(kind, shape, seed=seed)
    want, got = (compiled(kind, i)(x, weights, expert, dy) for i in IMPLEMENTATIONS)
    close(got, want, 1e-5)


def test_the_reference_is_each_expert_on_its_own_tokens() -> None:
    """The oracle itself, against plain loops in float64."""
    expert = MASKS["random"].astype(np.int32)
    x, weights, dy = make_inputs("linear", BIG)
    y, (dx, dw) = compiled("linear", "reference")(x, weights, expert, dy)
    for e, (kernel, bias) in enumerate(weights):
        mine = expert == e
        np.testing.assert_allclose(y[mine], x[mine].astype(float) @ kernel + bias, atol=1e-5)
        np.testing.assert_allclose(dx[mine], dy[mine].astype(float) @ kernel.T, atol=1e-5)
        np.testing.assert_allclose(dw[e][0], x[mine].T.astype(float) @ dy[mine], atol=1e-4)
        np.testing.assert_allclose(dw[e][1], dy[mine].sum(0), atol=1e-4)
    x, weights, dy = make_inputs("swiglu", BIG)
    y, _ = compiled("swiglu", "reference")(x, weights, expert, dy)
    for e, (gate, up, down) in enumerate(weights):
        rows = x[expert == e].astype(float)
        g = rows @ gate
        np.testing.assert_allclose(y[expert == e], (g / (1 + np.exp(-g)) * (rows @ up)) @ down, atol=1e-5)


# ---- what must not leak --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_weights_stay_with_their_expert(kind: str, implementation: str, bad: float) -> None:
    run, expert = compiled(kind, implementation), MASKS["random"].astype(np.int32)
    x, weights, dy = make_inputs(kind, BIG)
    y, (dx, dw) = run(x, weights, expert, dy)
    for e in (0, 1):
        poisoned = tuple(tuple(np.full_like(w, bad) for w in ws) if i != e else ws for i, ws in enumerate(weights))
        y_bad, (dx_bad, dw_bad) = run(x, poisoned, expert, dy)
        mine = expert == e
        same((y_bad[mine], dx_bad[mine], dw_bad[e]), (y[mine], dx[mine], dw[e]))
        assert not np.any(np.asarray(y_bad)[expert < 0]) and not np.isfinite(y_bad[expert == 1 - e]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_weights_of_an_idle_expert_reach_nothing(kind: str, implementation: str) -> None:
    run, expert = compiled(kind, implementation), np.where(np.arange(BIG[0]) < 90, 0, -1).astype(np.int32)
    x, (text, visual), dy = make_inputs(kind, BIG)
    y, (dx, dw) = run(x, (text, visual), expert, dy)
    y_bad, (dx_bad, dw_bad) = run(x, (text, tuple(np.full_like(w, np.nan) for w in visual)), expert, dy)
    same((y_bad, dx_bad, dw_bad[0]), (y, dx, dw[0]))
    if implementation == "xla":  # the reference runs the idle expert on zeros, and 0 * nan is its own gradient's affair
        assert not any(np.any(w) for w in dw_bad[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_padding_rows_reach_nothing(kind: str, implementation: str, bad: float) -> None:
    run, expert = compiled(kind, implementation), MASKS["random"].astype(np.int32)
    x, weights, dy = make_inputs(kind, BIG)
    clean = run(x, weights, expert, dy)
    x[expert < 0], dy[expert < 0] = bad, bad
    same(run(x, weights, expert, dy), clean)


@pytest.mark.parametrize("kind", LAYERS)
def test_bad_rows_of_one_expert_stay_with_it(kind: str) -> None:
    run, expert = compiled(kind, "xla"), MASKS["random"].astype(np.int32)
    x, weights, dy = make_inputs(kind, BIG)
    y, (dx, dw) = run(x, weights, expert, dy)
    x[np.flatnonzero(expert == 1)[3]] = np.nan
    y_bad, (dx_bad, dw_bad) = run(x, weights, expert, dy)
    text = expert == 0
    same((y_bad[text], dx_bad[text], dw_bad[0]), (y[text], dx[text], dw[0]))


# ---- under transformations -----------------------------------------------------------------------------------------------------------


def deep(kind: str, implementation: str | None, remat: bool, policy: Any = None, recomputed: bool = False):
    """(weights stacked over layers, x, expert) -> scalar; layers run by scan, residual, so that the depth matters."""

    def loss(weights, x, expert):
        routing = make_routing(expert)

        def step(x, w):
            if kind == "swiglu":
                return x + routed_swiglu(x, w, routing, implementation, recomputed=recomputed), None
            return x + routed_linear(x, [k for k, _ in w], routing, [b for _, b in w], implementation), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step, policy=policy) if remat else step, x, weights)[0] ** 2)

    return loss


@pytest.mark.parametrize(
    ("kind", "remat"), [*((kind, remat) for kind in LAYERS for remat in ("none", "full", "save")), ("swiglu", "recomputed")]
)
def test_in_scan_and_under_remat(kind: str, remat: str) -> None:
    shape, expert = (80, 6, 6), MASKS["random"][:80].astype(np.int32)
    x = make_inputs(kind, shape)[0]
    weights = stack(*(make_inputs(kind, shape, seed=s)[1] for s in (1, 2)))
    policy = jax.checkpoint_policies.save_only_these_names("gate", "up") if remat == "save" else None
    want = quick_jit(jax.value_and_grad(deep(kind, "reference", False), (0, 1)))(weights, x, expert)
    loss = deep(kind, "xla", remat != "none", policy, remat == "recomputed")
    close(quick_jit(jax.value_and_grad(loss, (0, 1)))(weights, x, expert), want, 1e-5)


@pytest.mark.parametrize("options", ["all_programs", pytest.param("default_compiler", marks=pytest.mark.slow)])
def test_as_users_run_it(options: str) -> None:
    """Once with all programs, and once with XLA's own options, which fuse what the quick ones do not."""
    x, weights, dy = make_inputs("swiglu", BIG)

    def run(x, weights, expert, dy):
        y, pull = jax.vjp(lambda x, w: layer("swiglu", x, w, expert, "xla"), x, weights)
        return y, pull(dy)

    run = quick_jit(run) if options == "all_programs" else jax.jit(run)
    for mask in ("random", "all_visual", "one_visual_token"):
        expert = MASKS[mask].astype(np.int32)
        close(run(x, weights, expert, dy), compiled("swiglu", "reference")(x, weights, expert, dy), 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_tokens_and_over_routings(kind: str) -> None:
    shape = (20, 3, 4)
    inputs = [make_inputs(kind, shape, seed=s) for s in range(3)]
    weights, x = inputs[0][1], np.stack([i[0] for i in inputs])
    experts = np.random.default_rng(3).integers(-1, 2, (3, 20)).astype(np.int32)

    def loss(x, weights, expert, implementation):
        return jnp.sum(layer(kind, x, weights, expert, implementation) ** 2)

    for axes, expert, transform in (((0, None, None), experts[0], lambda f: f), ((0, None, 0), experts, jax.grad)):
        want, got = (
            quick_jit(jax.vmap(transform(functools.partial(loss, implementation=i)), axes))(x, weights, expert) for i in IMPLEMENTATIONS
        )
        close(got, want, 1e-5)


def test_forward_mode_is_a_clear_error() -> None:
    x, weights, _ = jax.tree.map(jnp.asarray, make_inputs("swiglu", (20, 3, 4)))
    expert = jnp.zeros(20, jnp.int32)
    with pytest.raises(TypeError, match=r"can't apply forward-mode .* to a custom_vjp"):
        jax.jit(lambda x: jax.jvp(lambda x: layer("swiglu", x, weights, expert, "xla"), (x,), (x,))).lower(x)


def test_leading_dimensions_are_flattened_in_order() -> None:
    x, weights, _ = make_inputs("linear", (24, 4, 6))
    expert = np.random.default_rng(0).integers(-1, 2, (2, 12)).astype(np.int32)
    run = quick_jit(lambda x, w, e: layer("linear", x, w, e, "xla"))
    same(run(x.reshape(2, 12, 4), weights, expert), np.asarray(run(x, weights, expert.reshape(-1))).reshape(2, 12, 6))


def test_no_bias_and_one_bias() -> None:
    x, ((text, bias), (visual, _)), _ = make_inputs("linear", (24, 4, 6))
    expert = (np.arange(24) % 2).astype(np.int32)

    def loss(x, kernels, biases, implementation):
        return jnp.sum(routed_linear(x, kernels, make_routing(jnp.asarray(expert)), biases, implementation) ** 2)

    for biases in (None, (bias, None), (None, bias)):
        want, got = (
            quick_jit(jax.value_and_grad(functools.partial(loss, implementation=i), (0, 1, 2)))(x, (text, visual), biases)
            for i in IMPLEMENTATIONS
        )
        close(got, want, 1e-5)


@pytest.mark.parametrize("routed", [True, False])
def test_biases_and_a_gate_per_token(routed: bool) -> None:
    """Each expert's y = (silu(x gate + b) * (x up + b)) down + b, times sigmoid(x kernel + b); NaN stays where it is."""
    x, experts, dy = make_inputs("swiglu", (24, 4, 6))
    expert = np.random.default_rng(0).integers(-1, 2, 24).astype(np.int32) if routed else np.ones(24, np.int32)
    rng = np.random.default_rng(1)
    biases = tuple((rng.normal(size=6), None, rng.normal(size=4)) for _ in range(2))
    gates = tuple((rng.normal(size=(4, 1)), rng.normal(size=1)) for _ in range(2))
    biases, gates = jax.tree.map(lambda a: np.float32(a), (biases, gates))

    def run(x, experts, biases, gates, dy):
        routing = make_routing(jnp.asarray(expert)) if routed else None

        def f(*a):
            x, experts, biases, gates = a
            return routed_swiglu(x, experts, routing, "xla", biases=biases, token_gates=gates, expert=None if routed else 1)

        y, pull = jax.vjp(f, x, experts, biases, gates)
        return y, pull(dy)

    def plain(x, experts, biases, gates, dy):
        def f(x, experts, biases, gates):
            y = 0
            for e, ((gate, up, down), (b, _, c), (kernel, k)) in enumerate(zip(experts, biases, gates, strict=True)):
                one = ((jax.nn.silu(x @ gate + b) * (x @ up)) @ down + c) * jax.nn.sigmoid(x @ kernel + k)
                y = y + jnp.where((expert == e)[:, None], one, 0)
            return y

        y, pull = jax.vjp(f, x, experts, biases, gates)
        return y, pull(dy)

    run = quick_jit(run)
    got = run(x, experts, biases, gates, dy)
    close(got, quick_jit(plain)(x, experts, biases, gates, dy), 1e-5)
    nan = jax.tree.map(lambda a: np.full_like(a, np.nan), (experts[0], biases[0], gates[0]))
    x[expert < 0], dy[expert < 0] = np.nan, np.nan
    y, (dx, *dw) = run(x, (nan[0], experts[1]), (nan[1], biases[1]), (nan[2], gates[1]), dy)
    mine = expert != 0
    same((y[mine], dx[mine], [d[1] for d in dw]), (got[0][mine], got[1][0][mine], [d[1] for d in got[1][1:]]))


@pytest.mark.parametrize(("tokens", "taken"), [(SMALL - 1, "reference"), (SMALL, "xla")])
def test_few_tokens_are_not_sorted(tokens: int, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small mixed batch is the masked program itself, so it cannot be slower."""
    monkeypatch.setattr("pallas_kernels.routing.checkify.debug_check", lambda *_, **__: None)  # numbers its errors from trace to trace
    x, weights, _ = make_inputs("swiglu", (tokens, 2, 3))

    def program(implementation: str | None) -> str:
        run = jax.jit(lambda x, w, e: layer("swiglu", x, w, e, implementation))
        return run.lower(x, weights, np.zeros(tokens, np.int32)).as_text()

    assert program(None) == program(taken)
    assert ("stablehlo.case" in program(None)) == (taken == "xla")


# ---- what must not be computed -------------------------------------------------------------------------------------------------------


def count_matmuls(f: Any, *args: Any) -> int:
    """Matmuls in the program XLA made; those of every branch of a switch are counted."""
    return len(re.findall(r"\bdot\(", jax.jit(f).lower(*args).compile(compiler_options()).as_text()))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(("kind", "weight_matmuls"), [("linear", 1), ("swiglu", 3)])
def test_a_frozen_expert_has_no_weight_gradient(kind: str, weight_matmuls: int, remat: bool) -> None:
    shape, expert = (64, 4, 4), np.zeros(64, np.int32)
    x = make_inputs(kind, shape)[0]
    text, visual = (stack(*(make_inputs(kind, shape, seed=s)[1][e] for s in (1, 2))) for e in (0, 1))
    loss = deep(kind, "xla", remat)
    both = count_matmuls(jax.value_and_grad(loss), (text, visual), x, expert)
    visual_alone = count_matmuls(
        jax.value_and_grad(lambda visual, text, x, expert: loss((text, visual), x, expert)), visual, text, x, expert
    )
    assert both - visual_alone == weight_matmuls * PROGRAMS, "the frozen expert's weight gradient, in each program of its switch"


def test_the_forward_pass_has_no_other_matmuls() -> None:
    expert = np.zeros(64, np.int32)
    x, weights, _ = make_inputs("swiglu", (64, 4, 4))
    sort = count_matmuls(lambda e: make_routing(e).slot, expert)
    assert count_matmuls(lambda x, w, e: layer("swiglu", x, w, e, "xla"), x, weights, expert) == sort + 2 * 3 * PROGRAMS


# ---- errors --------------------------------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def routing_of(tokens: int):
    return quick_jit(make_routing)(jnp.zeros(tokens, jnp.int32))


def test_shapes_that_disagree() -> None:
    k, routing = zeros(3, 4), routing_of(9)
    ffn = (k, k, k.T)
    for call, message in (
        (lambda: routed_linear(zeros(2, 4, 3), (k, k), routing), r"\(2, 4, 3\), 8 tokens.*made for 9"),
        (lambda: routed_linear(zeros(0, 3), (k, k), routing), r"\(0, 3\); give at least one token"),
        (lambda: routed_linear(zeros(9, 3), (k, k.astype(int)), routing), "dtypes float32, int32; they must be real floating"),
        (
            lambda: routed_swiglu(zeros(9, 3), (ffn, ffn), routing, token_gates=((zeros(3, 1), None),)),
            "token_gates have shapes .*each of 2",
        ),
        (lambda: routed_swiglu(zeros(9, 3), (ffn, ffn), routing, biases=((zeros(5), None, None),) * 2), r"biases have shapes .*\(4,\)"),
        (lambda: routed_linear(zeros(9, 3), (k, k, k), routing), "3 experts were given.*made for 2"),
        (lambda: routed_linear(zeros(9, 3), (k, zeros(3, 5)), routing), r"\(3, 4\), \(3, 5\)"),
        (lambda: routed_linear(zeros(9, 7), (k, k), routing), r"all must be \[7, M\]"),
        (lambda: routed_swiglu(zeros(9, 3), (ffn,), routing), "1 experts were given.*made for 2"),
        (lambda: routed_swiglu(zeros(9, 3), (ffn, (k, k, k)), routing), r"expert 1 has shapes.*expected.*\(4, 3\)"),
        (lambda: routed_swiglu(zeros(9, 4), (ffn, ffn), routing), r"expert 0 has shapes.*expected.*\(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("biases", [(zeros(5), zeros(5)), (zeros(4),), (zeros(1), None)])
def test_biases_that_do_not_fit(biases: tuple) -> None:
    with pytest.raises(ValueError, match="bias"):
        routed_linear(zeros(9, 3), (zeros(3, 4), zeros(3, 4)), routing_of(9), biases)


def test_an_unknown_implementation() -> None:
    with pytest.raises(Exception, match="'cuda'"):  # by the annotation here, by a ValueError elsewhere
        routed_linear(zeros(9, 3), (zeros(3, 4), zeros(3, 4)), routing_of(9), implementation="cuda")
