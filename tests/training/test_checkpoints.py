"""Checkpoints: what is written when, that damage and mix-ups are found by name, that nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from monovl_jax import cli
from monovl_jax.config import ConfigError
from monovl_jax.parallel import fingerprint
from monovl_jax.recipes.launch import find_start
from monovl_jax.training import checkpoint
from monovl_jax.training.files import place, sealed
from monovl_jax.training.inventory import checkpoints, verify
from monovl_jax.training.metrics import RunLog, read_log
from monovl_jax.training.store import DamagedError, DiskFullError, RunError, StageStore
from monovl_jax.training.trainable import split_tree
from tests.training.worlds import plain_parameters, recipe

ADAM = optax.adam(1e-3)
FROZEN = {"text": jnp.asarray(np.random.default_rng(0).standard_normal((40, 30)), jnp.bfloat16)}
META = {"position": 7}


def trained(step: int) -> tuple[dict, Any]:
    """(trainable, opt_state), other numbers at every step."""
    leaf = jnp.asarray(np.random.default_rng(step).standard_normal((64, 50)), jnp.float32)
    tree = {"visual": {"gate": leaf, "norm": leaf[0]}}
    return tree, jax.tree.map(lambda x: x + step, ADAM.init(tree))


def target(tree: Any) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def same(a: Any, b: Any) -> bool:
    return fingerprint.fingerprints(a) == fingerprint.fingerprints(b)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is at step 6 of its stage S0, with checkpoints of steps 4 and 6."""
    checkpoint.claim_run(tmp_path / "run", checkpoint.experiment(recipe()))
    with StageStore(tmp_path / "run", "S0") as store:
        store.save_base(FROZEN)
        for step in (2, 4, 6):
            store.save(step, *trained(step), META)
    return tmp_path / "run"


def restored(run: Path, step: int, stage: str = "S0") -> Any:
    return StageStore(run, stage).restore(step, *target(trained(step)))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


# --- fingerprints ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_a_fingerprint_sees_every_change(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, (2, 3, 4))
    array = jnp.asarray(values, dtype)
    mark = fingerprint.fingerprints({"a": array})["a"]
    assert mark.startswith(f"{dtype}[2,3,4] ")
    others = [
        array.at[0, 1, 2].set(jnp.asarray(1 - values[0, 1, 2], dtype)),
        jnp.roll(array, 1, axis=2),
        array.reshape(3, 2, 4),
        array.astype("float16"),
    ]
    others += [jnp.swapaxes(array, 0, 1)]
    assert len({mark, *(fingerprint.fingerprints({"a": other})["a"] for other in others)}) == 1 + len(others)
    assert fingerprint.fingerprints({"a": array + 0 if dtype != "bool" else array.copy()})["a"] == mark


def test_negative_zero_and_nan_have_their_own_bits() -> None:
    values = [jnp.float32(0.0), jnp.float32(-0.0), jnp.float32(np.nan)]
    assert len({fingerprint.fingerprints([value])["0"] for value in values}) == 3


def test_another_mesh(run_python: Callable[..., str]) -> None:
    """Saved by 8 devices, read back by 4 and by 1: the same bits and fingerprints."""
    run_python(
        """
import tempfile, jax, jax.numpy as jnp, numpy as np
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import parameter_shardings
from monovl_jax.parallel.fingerprint import fingerprints
from monovl_jax.training.store import StageStore, abstract
host = {"decoder": {"head": np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32), "norm": np.ones(16, np.float32)}}
run = tempfile.mkdtemp()
eight = make_mesh(data=1, fsdp=4, tensor=2)
tree = jax.device_put(host, parameter_shardings(host, eight))
with StageStore(run, "S") as store:
    store.save_base(tree)
    store.save(1, tree, {}, {})
for mesh in (make_mesh(1, 2, 2, jax.devices()[:4]), make_mesh(1, 1, 1, jax.devices()[:1])):
    want = abstract(tree, parameter_shardings(tree, mesh))
    back, _, _ = StageStore(run, "S").restore(1, want, {})
    for got in (back, StageStore(run, "S").restore_base(want)):
        assert fingerprints(got) == fingerprints(tree) == fingerprints(jax.tree.map(jnp.asarray, host))
        assert got["decoder"]["head"].sharding.mesh.size == mesh.size
        np.testing.assert_array_equal(got["decoder"]["head"], host["decoder"]["head"])
""",
        devices=8,
    )


# --- what is written ------------------------------------------------------------------------------------------------------------------


def test_a_save_writes_what_is_trained_and_nothing_else(run: Path) -> None:
    base = files(run / "stages/S0/base")
    with StageStore(run, "S0") as store:
        store.save_base(FROZEN)
        store.save(8, *trained(8), META)
        store.wait()
        assert store.all_steps() == [6, 8]
        meta = store.meta(8)
    assert files(run / "stages/S0/base") == base, "the base is written once"
    assert set(meta["leaves"]) == {"trainable/visual/gate", "trainable/visual/norm"} | {
        *(f"opt_state/0/{moment}/visual/{leaf}" for moment in ("mu", "nu") for leaf in ("gate", "norm")),
        "opt_state/0/count",
    }
    written = sum(size for _, size in files(run / "stages/S0/steps/8/state").values())
    assert written < 1.3 * 3 * 4 * (64 * 50 + 50), "three float32 numbers for each that is trained"
    assert meta["position"] == 7 and meta["base"] == json.loads((run / "stages/S0/base.json").read_text())["digest"]


def test_what_comes_back_is_what_was_saved(run: Path) -> None:
    trainable, opt_state, meta = restored(run, 6)
    assert same((trainable, opt_state), trained(6)) and meta["step"] == 6
    assert type(opt_state) is type(trained(6)[1])
    assert same(StageStore(run, "S0").restore_base(target(FROZEN)), FROZEN)
    one, frozen = StageStore(run, "S0").restore_parameters(4, lambda tree: jax.tree.map(lambda _: target(FROZEN)["text"].sharding, tree))
    assert same(one, trained(4)[0]) and same(frozen, FROZEN)


def test_a_save_in_the_background_keeps_the_numbers_of_its_step(run: Path) -> None:
    trainable, opt_state = trained(8)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with StageStore(run, "S0") as store:
        store.save(8, trainable, opt_state, META)
        for _ in range(20):
            trainable, opt_state = bump((trainable, opt_state))
    assert same(restored(run, 8)[:2], trained(8))


def test_milestones_stay_and_keep_their_base(run: Path) -> None:
    with StageStore(run, "S0", keep=1, milestone_every=4) as store:
        for step in (8, 10, 12, 14):
            store.save(step, *trained(step), META)
        store.wait()
        assert store.all_steps() == [4, 8, 12, 14]
        store.save_final({"all": jnp.ones(3)}, {"loss": 1.0})
        store.drop_steps()
        assert store.all_steps() == [4, 8, 12]
    assert same(restored(run, 8)[:2], trained(8)) and same(StageStore(run, "S0").restore_base(target(FROZEN)), FROZEN)
    with StageStore(run, "S0") as store:
        store.drop_steps()
    assert {path.name for path in (run / "stages/S0").iterdir()} == {"final", "final.json", "trained.json"}


def test_a_kill_in_the_middle_of_a_save_or_a_removal(run: Path) -> None:
    """What it leaves is no checkpoint, is listed as a leftover, and goes with the next save."""
    stage = run / "stages/S0"
    shutil.copytree(stage / "steps/6", stage / "steps/8.orbax-checkpoint-tmp")
    shutil.rmtree(stage / "steps/8.orbax-checkpoint-tmp/meta")
    shutil.copytree(stage / "steps/6/state", stage / "steps/.dropped/2/state")
    shutil.copytree(stage / "base", stage / "final.orbax-checkpoint-tmp")
    store = StageStore(run, "S0")
    assert store.all_steps() == [4, 6] and not store.has_final()
    assert [entry.path.name for entry in checkpoints(run) if entry.kind == "leftover"] == [
        "final.orbax-checkpoint-tmp",
        ".dropped",
        "8.orbax-checkpoint-tmp",
    ]
    with store:
        store.save(8, *trained(8), META)
    assert sorted(path.name for path in (stage / "steps").iterdir()) == ["6", "8"]
    assert sorted(path.name for path in stage.iterdir()) == ["base", "base.json", "steps"]


# --- damage ---------------------------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> None:
    """Other bytes in the middle of the largest file, of the same length."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(run: Path) -> None:
    folder = run / "stages/S0/steps/6"
    spoil(folder / "state")
    with pytest.raises(DamagedError, match="go on from step 4") as error:
        restored(run, 6)
    assert str(folder) in str(error.value)
    shutil.rmtree(folder)  # what the message says
    assert StageStore(run, "S0").latest() == 4 and same(restored(run, 4)[:2], trained(4))


def test_sound_files_with_other_numbers_are_damage_too(run: Path) -> None:
    """The arrays of another step: every checksum of the files is right."""
    steps = run / "stages/S0/steps"
    shutil.rmtree(steps / "6/state")
    shutil.copytree(steps / "4/state", steps / "6/state")
    with pytest.raises(DamagedError, match=r"steps/6/state is damaged: opt_state/0/count, .* and 4 more leaves came back with other bits"):
        restored(run, 6)
    (steps / "4/meta/metadata").write_text("{")
    with pytest.raises(DamagedError, match=r"steps/4 is damaged.*start the stage again, for there is none before it"):
        restored(run, 4)


def test_a_step_without_its_base_does_not_load(run: Path) -> None:
    stage = run / "stages/S0"
    other = {"text": FROZEN["text"] + 1}
    with pytest.raises(RunError, match=r"holds other frozen parameters than this run.*steps/6 needs them"):
        StageStore(run, "S0").save_base(other)
    record = stage / "base.json"
    text = record.read_text()
    record.unlink()
    with pytest.raises(RunError, match=r"steps/6 needs the frozen parameters with the digest \w{12}, and there is none"):
        restored(run, 6)
    with StageStore(run.parent / "other", "S0") as store:
        store.save_base(other)
    shutil.copy(run.parent / "other/stages/S0/base.json", record)
    with pytest.raises(RunError, match=r"and .*base has \w{12}: put its own base"):
        restored(run, 6)
    record.write_text(text)
    spoil(stage / "base")
    with pytest.raises(DamagedError, match=r"stages/S0/base is damaged.*to start the stage again"):
        StageStore(run, "S0").restore_base(target(FROZEN))


def test_another_config_stage_or_optimizer(run: Path) -> None:
    trainable, opt_state = target(trained(6))
    store = StageStore(run, "S0")
    with pytest.raises(RunError, match=r"of another config or stage: .*gate is float32\[64,50\] there and float32\[64,51\] here"):
        wider = {"visual": {**trainable["visual"], "gate": jax.ShapeDtypeStruct((64, 51), jnp.float32)}}
        store.restore(6, wider, opt_state)
    with pytest.raises(RunError, match=r"state of another optimizer: opt_state/0/count is .* absent here.*--init-stage S0 --init-step 6"):
        store.restore(6, trainable, target(optax.sgd(0.1, 0.9).init(trained(6)[0])))
    shutil.copytree(run / "stages/S0", run / "stages/S1.1")
    with pytest.raises(RunError, match=r"optimizer state of stage 'S0', not of 'S1.1'\. To drop the optimizer state .*--init-stage S1.1"):
        restored(run, 6, "S1.1")


# --- a full disk ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    with pytest.raises(DiskFullError) as error, StageStore(small_disk / "run", "S0", keep=9) as store:
        store.save_base(FROZEN)
        for step in range(1, 20):
            store.save(step, *trained(step), META)
    store = StageStore(small_disk / "run", "S0")
    latest = store.latest()
    assert latest is not None and 1 <= latest < 19
    message = str(error.value)
    assert f"the disk is full: {store.step_folder(latest + 1)} could not be written, the checkpoint of step {latest} is whole" in message
    assert same(restored(small_disk / "run", latest)[:2], trained(latest))
    assert not list((small_disk / "run").rglob("*tmp*"))


def test_other_errors_of_a_disk_are_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StageStore(run, "S0") as store:
        manager = store.manager
        for text, kind, words in (
            ("Failed to write: Disk quota exceeded [os_error_code='122']", DiskFullError, "the disk is full"),
            ("Failed to write: Input/output error\nat line 3", RunError, r"could not be written \(Failed to write: Input/output error\)"),
        ):

            def refuse(*_: Any, text: str = text, **__: Any) -> None:
                raise ValueError(text)

            monkeypatch.setattr(manager, "save", refuse)
            with pytest.raises(kind, match=rf"{words}.*the checkpoint of step 6 is whole"):
                store.save(8, *trained(8), META)


# --- records --------------------------------------------------------------------------------------------------------------------------


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def test_a_digit_of_the_experiment_is_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / "experiment.json", "10000.0", "90000.0")
    for read in (lambda: checkpoint.read_recipe(run), lambda: checkpoint.load_run(run), lambda: find_start(run)):
        with pytest.raises(DamagedError, match=r"experiment\.json is damaged \(its contents do not fit its digest\)"):
            read()
    with pytest.raises(DamagedError):
        checkpoint.claim_run(run, checkpoint.experiment(recipe()))
    assert cli.checkpoints_verify(str(run)) == cli.checkpoints_ls(str(run)) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "experiment.json" in out and out.count("PASS") == 3, "the checkpoints are still read"


def test_the_kept_config_of_the_weights_is_under_a_checksum(tmp_path: Path) -> None:
    model = dataclasses.replace(recipe().model, upstream='{"template": "internlm2-chat"}')
    checkpoint.claim_run(tmp_path / "run", checkpoint.experiment(dataclasses.replace(recipe(), model=model)))
    change(tmp_path / "run/experiment.json", "internlm2", "internlm3")
    with pytest.raises(DamagedError, match="do not fit its digest"):
        checkpoint.read_experiment(tmp_path / "run")


def test_swapped_steps_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = run / "stages/S0/steps"
    (steps / "4").rename(steps / "x")
    (steps / "6").rename(steps / "4")
    (steps / "x").rename(steps / "6")
    for step, other in ((4, 6), (6, 4)):
        with pytest.raises(DamagedError, match=rf"steps/{step} holds the checkpoint of step {other}, not of step {step}"):
            restored(run, step)
    assert cli.checkpoints_verify(str(run)) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["PASS", "FAIL", "FAIL"]


def test_the_position_of_a_step_is_under_a_checksum(run: Path) -> None:
    path = run / "stages/S0/steps/6/meta/metadata"
    change(path, '"position": 7', '"position": 8')
    with pytest.raises(DamagedError, match="do not fit its checksum"):
        restored(run, 6)
    change(path, '"position": 8', '"position": 7')
    assert restored(run, 6)[2]["position"] == 7


def test_steps_of_the_first_version_are_read(run: Path) -> None:
    """Format 2 had no checksum; its step number is compared all the same."""
    path = run / "stages/S0/steps/6/meta/metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="has format 3"):
        restored(run, 6)
    path.write_text(json.dumps(record | {"format": 2}))
    assert same(restored(run, 6)[:2], trained(6))
    path.write_text(json.dumps(record | {"format": 2, "step": 4}))
    with pytest.raises(DamagedError, match="of step 4, not of step 6"):
        restored(run, 6)


DAMAGED_RECORDS = ["", "{}", "null", "[1]", '{"digest": 3, "leaves": {}}', '{"digest": "x", "leaves": {"a": 1}}', "[" * 9999, "\udcff"]


@pytest.mark.parametrize("text", DAMAGED_RECORDS)
@pytest.mark.parametrize("name", ["base.json", "final.json", "trained.json", "done.json"])
def test_damaged_records_of_a_stage(run: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "done.json" and text.startswith("{"):
        text = '{"checksum": "0"}'  # its fields are free, but for the checksum
    with StageStore(run, "S0") as store:
        store.save_final({"all": jnp.ones(3)}, {"steps": 6})
        store.finish({"steps": 6})
    (run / "stages/S0" / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    readers = {"base.json": store.base_record, "final.json": store.final_record, "trained.json": store.trained, "done.json": store.record}
    with pytest.raises(DamagedError, match=rf"{name} is damaged"):
        readers[name]()
    assert cli.checkpoints_verify(str(run)) == cli.checkpoints_ls(str(run)) == 1
    assert "PASS" in capsys.readouterr().out, "the rest is still read"


@pytest.mark.parametrize("piece", ["_METADATA", "manifest.ocdbt", "d"])
@pytest.mark.parametrize("where", ["base", "steps/6/state"])
def test_missing_pieces_of_orbax_folders(run: Path, where: str, piece: str) -> None:
    path = run / "stages/S0" / where / piece
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    if (where, piece) != ("base", "_METADATA"):  # that is only needed to learn the shapes
        with pytest.raises(DamagedError, match=r"is damaged"):
            StageStore(run, "S0").restore_base(target(FROZEN)) if where == "base" else restored(run, 6)
    assert [bool(verdict.problems) for verdict in verify(run)] == [where == "base", False, where != "base"]


@pytest.mark.parametrize("where", ["base", "steps/6/state", "steps/6/meta"])
@pytest.mark.parametrize("damage", ["pipe", "device", "deep"])
def test_orbax_never_opens_what_would_stop_it(run: Path, where: str, damage: str) -> None:
    """A pipe waits for ever, a device has no end, and JSON of 100,000 brackets ends the process."""
    folder = run / "stages/S0" / where
    path = folder / "metadata" if where.endswith("meta") else folder / "_METADATA"
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "device":
        path.symlink_to("/dev/zero")
    else:
        path.with_name("zarr.json").write_text("[" * 100_000)
    store = StageStore(run, "S0")
    with pytest.raises(DamagedError, match="is damaged"):
        store.restore_base(target(FROZEN)) if where == "base" else restored(run, 6)
    assert [bool(verdict.problems) for verdict in verify(run)] == [where == "base", False, where != "base"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", 7),
        ("identity", []),
        ("upstream", None),
        ("digest", 5),
        ("recipe.stages", {}),
        ("recipe.stages", [3]),
        ("recipe.model", "x"),
        ("recipe.model.decoder.num_layers", "two"),
        ("recipe.model.decoder.num_layers", True),
        ("recipe.model.decoder.num_layers", -1),
        ("recipe.model.decoder.experts", "all"),
        ("recipe.stages.0.steps", 1.5),
        ("recipe.stages.0.trainable", "x"),
        ("recipe.stages.0.mixture", {"a": "b"}),
        ("recipe.seed", None),
    ],
)
def test_experiments_with_wrong_types(run: Path, field: str, value: Any) -> None:
    """Also with a digest that fits: what somebody wrote by hand."""
    record = json.loads((run / "experiment.json").read_text())
    *path, last = field.split(".")
    holder: Any = record
    for key in path:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    holder[int(last) if isinstance(holder, list) else last] = value
    if field != "digest" and isinstance(record["recipe"], dict):
        record["digest"] = checkpoint._digest(record)
    (run / "experiment.json").write_text(json.dumps(sealed(record)))
    with pytest.raises(RunError, match=r"experiment\.json"):
        checkpoint.read_recipe(run)


SHIPPED = Path(__file__).parent / "shipped"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("experiment_*.json")), ids=lambda path: path.stem)
def test_experiments_of_the_first_version_go_on(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What version 0.1.0 wrote is claimed by the same recipe of this version, which may have fields that were not there then."""
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run/experiment.json")
    mine = checkpoint.read_recipe(tmp_path / "run")
    identity = checkpoint.read_experiment(tmp_path / "run")["identity"]
    assert checkpoint.claim_run(tmp_path / "run", checkpoint.experiment(mine, identity)) is True
    with pytest.raises(RunError, match=r"stages\[\w+(\.\d)?\]\.steps is \d+ there"):
        longer = dataclasses.replace(mine, stages=(dataclasses.replace(mine.stages[0], steps=9999), *mine.stages[1:]))
        checkpoint.claim_run(tmp_path / "run", checkpoint.experiment(longer, identity))

    # a field that does not exist yet
    record = json.loads(path.read_text())
    del record["recipe"]["stages"][0]["clip"], record["recipe"]["model"]["decoder"]["tie_embeddings"]
    record["digest"] = checkpoint._digest(record)
    (tmp_path / "run/experiment.json").write_text(json.dumps(record))
    assert checkpoint.claim_run(tmp_path / "run", checkpoint.experiment(mine, identity)) is True


def test_the_checkpoints_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Read by stage and step before any stage has finished, and by name what was saved last."""
    run, wanted = tmp_path / "run", recipe()
    first, second = (stage.name for stage in wanted.stages[:2])
    checkpoint.claim_run(run, checkpoint.experiment(wanted))
    with pytest.raises(RunError, match=r"no stage has saved a checkpoint yet; wait for the first"):
        checkpoint.load_run(run, step="latest")
    for stage in wanted.stages[:2]:
        with StageStore(run, stage.name, asynchronous=False) as store:
            for step in (2, 4):
                trainable, frozen = split_tree(plain_parameters(wanted.model, step), wanted.trainable_paths(stage))
                if step == 2:
                    store.save_base(frozen)
                store.save(step, trainable, {}, META)
            if stage.name == first:
                store.save_final(plain_parameters(wanted.model, 9), {"steps": 4})
    assert checkpoint.find_step(run, None, "latest") == (second, 4) and checkpoint.find_step(run, first, "latest") == (first, None)
    latest = checkpoint.load_run(run, step="latest")[1]
    assert same(latest, checkpoint.load_run(run, second, step=4)[1]) and not same(latest, checkpoint.load_run(run, second, step=2)[1])
    assert same(checkpoint.load_run(run, first, step="latest")[1], checkpoint.load_run(run)[1])
    with pytest.raises(RunError, match=r"has no checkpoint of step 3; it has: 2, 4"):
        checkpoint.load_run(run, step=3)
    with pytest.raises(RunError, match=r"has no stage 'S9'"):
        checkpoint.load_run(run, "S9", step="latest")


# --- monovl checkpoints ---------------------------------------------------------------------------------------------------------------


def test_ls_and_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.checkpoints_ls(str(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["S0", "base"], ["S0", "step"], ["S0", "step"]]
    assert "1 leaves  frozen leaves, needed by 2 steps" in lines[0] and "step 6" in lines[2] and "the run goes on here" in lines[2]
    assert cli.checkpoints_verify(str(run)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["PASS"] * 3

    shutil.rmtree(run / "stages/S0/steps/6/state")
    shutil.copytree(run / "stages/S0/steps/4/state", run / "stages/S0/steps/6/state")
    spoil(run / "stages/S0/base")
    assert cli.checkpoints_verify(str(run)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["FAIL", "PASS", "FAIL"]
    assert "base: text is bfloat16[40,30] " in lines[0] or "base: text cannot be read" in lines[0]
    assert "opt_state/0/mu/visual/gate is float32[64,50] " in lines[2] and lines[2].endswith("; and 2 more")
    assert [len(verdict.problems) for verdict in verify(run)] == [1, 0, 7]


def test_ls_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.checkpoints_ls(str(tmp_path)) == cli.checkpoints_verify(str(tmp_path)) == 2
    assert capsys.readouterr().err.count("is no run directory: it has no experiment.json") == 2


@pytest.mark.usefixtures("bucket")
def test_paths_of_a_bucket_keep_their_form() -> None:
    store = StageStore("gs://bucket/runs/one", "S0")
    assert isinstance(store.step_folder(3), epath.Path)
    assert str(store.step_folder(3)) == "gs://bucket/runs/one/stages/S0/steps/3" == str(place(str(store.step_folder(3))))
    assert isinstance(place("runs/one"), Path) and place("runs/one").is_absolute()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """`gs://` held in memory: what goes through epath lands there. Orbax's arrays do not, they have a driver of their own."""
    from fsspec import registry
    from fsspec.implementations.memory import MemoryFileSystem

    class Fake(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store: dict = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    monkeypatch.setitem(sys.modules["fsspec.registry"].__dict__["_registry"], "gcs", Fake)
    assert registry["gcs"] is Fake
    return "gs://bucket/runs/one"


def test_a_bucket_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"^nosuch://bucket/run: Protocol not known: nosuch"):
        place("nosuch://bucket/run")

    def missing(scheme: str) -> None:
        raise ImportError(f"Please install what reads {scheme}")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(OSError, match=r"^gs://bucket/run: Please install what reads gcs"):
        find_start("gs://bucket/run")


def test_a_run_in_a_bucket(bucket: str) -> None:
    """Experiment, records and logs, without a file system under them."""
    wanted = checkpoint.experiment(recipe())
    assert checkpoint.claim_run(bucket, wanted) is False and checkpoint.claim_run(bucket, wanted) is True
    assert checkpoint.read_recipe(bucket) == recipe()
    with pytest.raises(RunError, match="holds another experiment"):
        checkpoint.claim_run(bucket, checkpoint.experiment(recipe(seed=3)))
    with checkpoint.run_lock(bucket):
        pass
    row = {"stage": "S0", "loss": 1.0, "part_losses": [1.0], "grad_norms": {}}
    for reached, first in ((0, 1), (2, 3)):
        with RunLog(bucket, {"S0": reached}, {"S0": 0}, progress=False, tensorboard=False) as log:
            for step in range(first, first + 3):
                log.write({**row, "step": step})
            log.event("something")
    assert [r["step"] for r in read_log(f"{bucket}/log.jsonl")] == [1, 2, 3, 4, 5]
    store = StageStore(bucket, "S0")
    assert store.all_steps() == [] and store.base_record() is None and not store.has_final()
    with pytest.raises(RunError, match="no stage has finished; finished: none"):
        find_start(bucket)
    with pytest.raises(ConfigError, match="is no run directory, and weights are read from files; mount the bucket or copy the folder"):
        find_start("gs://bucket/runs")
    store.finish({"loss": 1.0})
    assert store.record() == {"loss": 1.0}
    complete = place(f"{bucket}/stages/S0/steps/4")
    (complete / "commit_success.txt").write_text("")
    (place(f"{bucket}/stages/S0/steps/5") / "state").write_text("")
    assert store.all_steps() == [4], "step 5 has no mark that it is complete"
    store._discard(complete)
    assert store.all_steps() == []
