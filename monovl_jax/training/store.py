"""The folder of one stage: what is saved when, who may read it back, and how damage is found.

    RUN/stages/<stage>/base, base.json        the frozen leaves and their digest, written once when the stage starts
    RUN/stages/<stage>/steps/<n>/state        trainable leaves and optimizer state after step n
    RUN/stages/<stage>/steps/<n>/meta         step, data position, digest of the base it needs, fingerprint of every leaf
    RUN/stages/<stage>/final, final.json      every parameter of the model after the stage, and their fingerprints
    RUN/stages/<stage>/trained.json           steps, seconds, last loss when training ended
    RUN/stages/<stage>/done.json              the same and what the evaluation returned

Every piece is written beside its name and renamed when complete (in a bucket: marked as complete), and what goes is first renamed away: a
kill at any instant leaves the last complete one. `base.json` is written after `base` and is the sign that it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from monovl_jax import jsontext
from monovl_jax.config import ModelConfig
from monovl_jax.parallel import fingerprint
from monovl_jax.parallel.saved_folders import check_folder
from monovl_jax.training.files import CHECKSUM, AnyPath, is_intact, is_remote, place, remove_tree, sealed, write_json
from monovl_jax.training.trainable import TrainableError, Tree, check_tree

STEP_FORMAT = 3
"""3 has a checksum of the record; 2 has none, and is still read."""
DROPPED = ".dropped"
TEMPORARY = "*.orbax-checkpoint-tmp*"


class RunError(ValueError):
    """A run directory that cannot be used; the message says what differs or is missing, and the mend."""


class DamagedError(RunError):
    """A checkpoint that cannot be read back, or not with the bits that were written; the message names it and what to do."""


class DiskFullError(RunError):
    """No room for a checkpoint; those before it are whole."""


def abstract(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """ShapeDtypeStructs with a place each: what to restore, and where to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), tree, shardings)


def complete(path: AnyPath) -> bool:
    """Whether an Orbax folder is there and whole: renamed when complete, or marked so in a bucket."""
    return (path / "commit_success.txt").exists() if is_remote(path) else path.exists()


def together(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _is_full(error: BaseException) -> bool:
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in ("No space left", "quota exceeded"))


@contextlib.contextmanager
def writing(path: AnyPath, safe: str) -> Iterator[None]:
    """Turns the ways in which a disk refuses into one sentence. safe: what is not lost by it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        if _is_full(error):
            raise DiskFullError(
                f"the disk is full: {path} could not be written, {safe}; make room (`monovl checkpoints ls` shows what lies in a run), "
                "and run the same command again"
            ) from None
        raise RunError(f"{path} could not be written ({_first_line(error)}), {safe}; run the same command again") from error


@contextlib.contextmanager
def reading(path: AnyPath, mend: str) -> Iterator[None]:
    """Turns the ways in which a checkpoint can be unreadable into a DamagedError that names it."""
    try:
        yield
    except (RunError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax and what lies below it answer damaged files with errors of every kind
        raise DamagedError(f"{path} is damaged ({_first_line(error)}). {mend}") from error


# ---- Orbax folders -----------------------------------------------------------------------------------------------------------------


def save_tree(path: AnyPath, tree: Tree) -> None:
    """Writes a tree of arrays; the folder appears when it is complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def saved_shapes(path: AnyPath) -> Any:
    """The tree of an Orbax folder as ShapeDtypeStructs; nothing of the arrays is read."""
    check_folder(path)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(path)
    tree = getattr(metadata, "item_metadata", metadata).tree
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree)


def load_tree(path: AnyPath, target: Any) -> Any:
    """A tree as it was saved, placed as the ShapeDtypeStructs of `target` say."""
    check_folder(path)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def load_part(path: AnyPath, target: Any) -> Any:
    """The leaves of an Orbax folder for which `target` has a ShapeDtypeStruct with a sharding; others are `ocp.PLACEHOLDER` there."""
    check_folder(path)
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=target, restore_args=arguments))


def read_record(path: AnyPath, fields: Mapping[str, type], fix: str) -> dict[str, Any]:
    """A JSON object that `write_json` wrote, with these fields at least. Raises DamagedError when it is not what was written."""
    with reading(path, fix):
        record = jsontext.read(path, allow_nan=True)
    check_record(record, fields, path, fix)
    return {key: value for key, value in record.items() if key != CHECKSUM}


def check_record(record: Any, fields: Mapping[str, type], path: AnyPath, fix: str) -> None:
    """Raises DamagedError when a record lacks a field, has one of another type, or is not as it was sealed."""
    if not isinstance(record, dict):
        raise DamagedError(f"{path} is damaged (it holds a {type(record).__name__}, not an object). {fix}")
    for field, kind in fields.items():
        if not isinstance(record.get(field), kind) or isinstance(record.get(field), bool):
            raise DamagedError(f"{path} is damaged ({field} is {str(record.get(field))[:40]!r}, not of type {kind.__name__}). {fix}")
    if not all(isinstance(mark, str) for mark in record.get("leaves", {}).values()):
        raise DamagedError(f"{path} is damaged (a fingerprint is no text). {fix}")
    if not is_intact(record):
        raise DamagedError(f"{path} is damaged (its contents do not fit its checksum). {fix}")


def changed_leaves(tree: Any, marks: Mapping[str, str]) -> list[str]:
    """Paths of the leaves whose bits are not those that `fingerprint.fingerprints` saw."""
    return [path for path, mark in fingerprint.fingerprints(tree).items() if marks.get(path) != mark]


def damaged_leaves(path: AnyPath, marks: Mapping[str, str]) -> list[str]:
    """What is wrong with an Orbax folder, a phrase for each leaf; [] when every bit is as it was written.

    Reads one leaf at a time, on the first local device.
    """
    try:
        shapes = saved_shapes(path)
    except Exception as error:  # as in `reading`
        return [f"cannot be read ({_first_line(error)})"]
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = list(fingerprint.paths(shapes))
    wrong = [f"{name} is missing" for name in sorted(marks.keys() - set(names))]
    one = SingleDeviceSharding(jax.local_devices()[0])
    for number, (name, (_, leaf)) in enumerate(zip(names, leaves, strict=True)):
        target: list[Any] = [ocp.PLACEHOLDER] * len(names)
        target[number] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        try:
            array = jax.tree.leaves(load_part(path, jax.tree.unflatten(structure, target)), is_leaf=lambda x: x is ocp.PLACEHOLDER)[number]
            (mark,) = fingerprint.fingerprints({name: array}).values()
        except Exception as error:  # as in `reading`
            wrong.append(f"{name} cannot be read ({_first_line(error)})")
            continue
        if marks.get(name) != mark:
            wrong.append(f"{name} is {mark}, {marks.get(name, 'nothing')} was written")
    return wrong


# ---- a stage -----------------------------------------------------------------------------------------------------------------------


class StageStore:
    """The folder of one stage.

    keep: how many step checkpoints stay, beside those whose step `milestone_every` divides, which stay for good.
    asynchronous: write step checkpoints in the background, while training goes on; at most one at a time.
    """

    def __init__(
        self,
        run_dir: str | AnyPath,
        stage: str,
        keep: int = 2,
        asynchronous: bool = True,
        milestone_every: int | None = None,
    ):
        self.run_dir, self.stage = place(run_dir), stage
        self.folder = self.run_dir / "stages" / stage
        self.base, self.steps, self.final, self.done = (self.folder / name for name in ("base", "steps", "final", "done.json"))
        self._keep, self._milestone_every, self._asynchronous = keep, milestone_every, asynchronous
        self._manager: ocp.CheckpointManager | None = None
        self._writing: int | None = None

    def __enter__(self) -> StageStore:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        if kind is None:
            with self._saving():
                manager.wait_until_finished()
            manager.close()
            self._empty()
        else:  # another error is on its way: it says more than a save that failed beside it
            with contextlib.suppress(Exception):
                manager.close()

    # ---- what is there

    def step_folder(self, step: int) -> AnyPath:
        return self.steps / str(step)

    def all_steps(self) -> list[int]:
        """The complete step checkpoints, oldest first."""
        if not self.steps.exists():
            return []
        return sorted(int(path.name) for path in self.steps.iterdir() if path.name.isdecimal() and complete(path))

    def latest(self) -> int | None:
        """The last complete step checkpoint; None when there is none."""
        return (self.all_steps() or [None])[-1]

    def is_milestone(self, step: int) -> bool:
        """Whether a step checkpoint stays for good."""
        return bool(self._milestone_every) and step % self._milestone_every == 0

    def has_final(self) -> bool:
        return complete(self.final)

    def record(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while the stage is not done. Raises DamagedError."""
        fix = f"Delete {self.done} and run the same command again: the stage is evaluated once more"
        return read_record(self.done, {}, fix) if self.done.exists() else None

    def trained(self) -> dict[str, Any]:
        """What `save_final` recorded. Raises DamagedError."""
        fix = f"Put it back from a copy, or delete {self.folder} to train the stage again"
        return read_record(self.folder / "trained.json", {"steps": int}, fix)

    def base_record(self) -> dict[str, Any] | None:
        """{"digest", "leaves"} of the base; None when there is no complete one. Raises DamagedError."""
        return self._leaves_record(self.base.with_name("base.json"), f"Delete {self.folder} to start the stage again")

    def final_record(self) -> dict[str, Any] | None:
        """{"digest", "leaves"} of the final parameters; None when nothing was recorded. Raises DamagedError."""
        return self._leaves_record(self.final.with_name("final.json"), self._fix_final())

    def _fix_final(self) -> str:
        return f"Put {self.final} and final.json back from a copy, or delete {self.folder} to train the stage again"

    def _leaves_record(self, path: AnyPath, fix: str) -> dict[str, Any] | None:
        if not path.exists():
            return None
        record = read_record(path, {"digest": str, "leaves": dict}, fix)
        if record["digest"] != fingerprint.digest(record["leaves"]):
            raise DamagedError(f"{path} is damaged (its digest does not fit its leaves). {fix}")
        if record.get("stage", self.stage) != self.stage:
            raise DamagedError(f"{path} belongs to stage {record['stage']!r}, not to {self.stage!r}. {fix}")
        return record

    # ---- the base

    def save_base(self, frozen: Tree) -> None:
        """Writes the frozen leaves, unless the same ones are there. Raises RunError when others are, which checkpoints need."""
        leaves = fingerprint.fingerprints(frozen)
        record = sealed({"stage": self.stage, "digest": fingerprint.digest(leaves), "leaves": leaves})
        found = self.base_record()
        if found is not None and found["digest"] == record["digest"]:
            return
        if steps := self.all_steps():
            raise RunError(
                f"{self.base} holds other frozen parameters than this run would train with, and {self.step_folder(steps[-1])} needs them; "
                f"give another run directory, or delete {self.folder} to start the stage again"
            )
        self._sweep()
        with writing(self.base, f"the stage {self.stage!r} has not begun and nothing is lost"):
            if frozen:
                save_tree(self.base, frozen)
            together("base")
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.base.with_name("base.json"), record)
        together("base.json")

    def restore_base(self, target: Tree, config: ModelConfig | None = None) -> Tree:
        """The frozen leaves, placed as `target` says. Raises DamagedError when they are not what was written."""
        mend = f"Delete {self.folder} to start the stage again"
        record = self.base_record()
        if record is None:
            raise DamagedError(f"{self.base} is not complete. {mend}")
        return self._restore(self.base, target, record["leaves"], mend, config) if target else {}

    # ---- steps

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._sweep()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                keep_period=self._milestone_every,
                enable_async_checkpointing=self._asynchronous,
                cleanup_tmp_directories=True,
                todelete_subdir=None if is_remote(self.steps) else DROPPED,
            )
            self._manager = ocp.CheckpointManager(self.steps, options=options, item_names=("state", "meta"))
        return self._manager

    def _sweep(self) -> None:
        """Removes what a kill left half written or half deleted."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob(TEMPORARY), *self.folder.glob(f"{DROPPED}*"), self.steps / DROPPED]:
                remove_tree(leftover)
        together("sweep")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Errors of a save in words, those of one in the background included, and its leftovers removed."""
        last = self.latest()
        safe = f"the checkpoint of step {last} is whole" if last is not None else "the stage starts again from its beginning"
        try:
            with writing(self.step_folder(self._writing or 0), safe):
                yield
        except RunError:
            if jax.process_index() == 0 and self.steps.exists():
                self._remove_half_written()
            raise

    def _remove_half_written(self) -> None:
        """Writers of Orbax that have not failed yet make the folder again, so it is looked at once more."""
        for _ in range(20):
            leftovers = list(self.steps.glob(TEMPORARY))
            for leftover in leftovers:
                remove_tree(leftover)
            if not leftovers:
                return
            time.sleep(0.1)

    def save(self, step: int, trainable: Tree, opt_state: Any, meta: Mapping[str, Any]) -> None:
        """Writes a step checkpoint; `meta` is JSON. Complete on return unless asynchronous; waits for the one before.

        Raises DiskFullError, or RunError when it, or the one before, could not be written.
        """
        base = self.base_record()
        if base is None:
            raise RunError(f"{self.base} is not complete; save_base comes before the first step checkpoint")
        state = {"trainable": trainable, "opt_state": opt_state}
        leaves = fingerprint.fingerprints(state)
        if self._asynchronous and jax.default_backend() == "cpu":
            state = jax.tree.map(jnp.copy, state)  # Orbax would write from the very buffers that the next step overwrites
        record = sealed({"format": STEP_FORMAT, "stage": self.stage, **meta, "step": step, "base": base["digest"], "leaves": leaves})
        self.wait()
        self._writing = step
        with self._saving():
            self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record)))

    def wait(self) -> None:
        """Returns when the last save is complete. Raises what it ran into."""
        if self._manager is not None:
            with self._saving():
                self._manager.wait_until_finished()
            self._empty()

    def _empty(self) -> None:
        """Deletes the checkpoints that were renamed away."""
        if jax.process_index() == 0:
            remove_tree(self.steps / DROPPED)

    def _mend(self, step: int) -> str:
        before = [s for s in self.all_steps() if s < step]
        back = f"go on from step {before[-1]}, the checkpoint before it" if before else "start the stage again, for there is none before it"
        return f"Delete {self.step_folder(step)} and run the same command again to {back}"

    def _drop(self, step: int) -> str:
        return (
            f"To drop the optimizer state and continue from the parameters, begin a new run with --init {self.run_dir} "
            f"--init-stage {self.stage} --init-step {step}"
        )

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step. Raises DamagedError when it cannot be read."""
        folder = self.step_folder(step)
        with reading(folder, self._mend(step)):
            check_folder(folder / "meta")
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
                meta = checkpointer.restore(folder / "meta")
        fields = {"format": int, "stage": str, "step": int, "base": str, "leaves": dict}
        check_record(meta, fields, folder, self._mend(step))
        if meta["format"] not in (2, STEP_FORMAT) or (meta["format"] == STEP_FORMAT and CHECKSUM not in meta):
            raise DamagedError(f"{folder} has format {meta['format']!r}, this version reads 2 and {STEP_FORMAT}. {self._mend(step)}")
        if meta["step"] != step:
            raise DamagedError(
                f"{folder} holds the checkpoint of step {meta['step']}, not of step {step}: it was renamed or swapped. "
                f"Give it its own name back, or delete it"
            )
        return meta

    def check_step(self, step: int) -> dict[str, Any]:
        """The meta of a step whose base is there. Raises RunError when it needs another base."""
        meta, folder = self.meta(step), self.step_folder(step)
        if meta["stage"] != self.stage:
            raise RunError(f"{folder} holds the optimizer state of stage {meta['stage']!r}, not of {self.stage!r}. {self._drop(step)}")
        base = self.base_record()
        if base is None or base["digest"] != meta["base"]:
            there = "there is none" if base is None else f"{self.base} has {base['digest'][:12]}"
            raise RunError(
                f"{folder} needs the frozen parameters with the digest {meta['base'][:12]}, and {there}: put its own base and base.json "
                f"back, or delete {self.folder} to start the stage again"
            )
        return meta

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Tree, Any, dict[str, Any]]:
        """(trainable, opt_state, meta) of a step checkpoint, placed as the two abstract trees say, on whatever mesh it was written.

        Raises RunError when they do not fit (another config, stage or optimizer), DamagedError when its bits are not those written.
        """
        meta, folder = self.check_step(step), self.step_folder(step)
        target = {"trainable": trainable, "opt_state": opt_state}
        want = {path: fingerprint.kind(leaf) for path, leaf in fingerprint.paths(target).items()}
        have = {path: mark.split(" ")[0] for path, mark in meta["leaves"].items()}
        if differ := [path for path in sorted(want.keys() | have.keys()) if want.get(path) != have.get(path)]:
            what = "; ".join(f"{p} is {have.get(p, 'absent')} there and {want.get(p, 'absent')} here" for p in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            if all(path.startswith("opt_state/") for path in differ):
                raise RunError(f"{folder} holds the state of another optimizer: {what}{more}. {self._drop(step)}")
            raise RunError(f"{folder} is of another config or stage: {what}{more}. Give the run directory that belongs to this recipe")
        state = self._restore(folder / "state", target, meta["leaves"], self._mend(step))
        return state["trainable"], state["opt_state"], meta

    def restore_parameters(self, step: int, places: Callable[[Tree], Any]) -> tuple[Tree, Tree]:
        """(trainable, frozen) of a step, without the optimizer state. places: shapes of parameters -> a sharding for each.

        Raises RunError when its base is not there, DamagedError when its bits are not those written.
        """
        meta, folder = self.check_step(step), self.step_folder(step)
        with reading(folder, self._mend(step)):
            shapes = saved_shapes(folder / "state")
            target = jax.tree.map(lambda _: ocp.PLACEHOLDER, shapes)
            target["trainable"] = abstract(shapes["trainable"], places(shapes["trainable"]))
            trainable = load_part(folder / "state", target)["trainable"]
        self._check({"trainable": trainable}, meta["leaves"], folder, self._mend(step))
        with reading(self.base, f"Delete {self.folder} to start the stage again"):
            frozen = saved_shapes(self.base) if complete(self.base) else {}
        return trainable, self.restore_base(abstract(frozen, places(frozen)))

    def _restore(self, path: AnyPath, target: Any, marks: Mapping[str, str] | None, mend: str, config: ModelConfig | None = None) -> Any:
        if config is not None:
            try:
                with reading(path, mend):
                    check_tree(saved_shapes(path), target, str(path))
            except TrainableError as error:
                raise RunError(f"{error} (is it of another model config?); give another run directory, or delete this one") from None
        with reading(path, mend):
            tree = load_tree(path, target)
        if marks is not None:
            self._check(tree, marks, path, mend)
        return tree

    @staticmethod
    def _check(tree: Any, marks: Mapping[str, str], path: AnyPath, mend: str) -> None:
        if wrong := changed_leaves(tree, marks):
            more = f" and {len(wrong) - 3} more leaves" if len(wrong) > 3 else ""
            raise DamagedError(f"{path} is damaged: {', '.join(wrong[:3])}{more} came back with other bits than were written. {mend}")

    # ---- the end

    def save_final(self, parameters: Tree, record: Mapping[str, Any]) -> None:
        """Writes the whole model."""
        self.wait()
        leaves = fingerprint.fingerprints(parameters)
        last = self.latest()
        safe = "nothing is lost" if last is None else f"the checkpoint of step {last} is whole"
        self._sweep()
        with writing(self.final, safe):
            if jax.process_index() == 0:
                write_json(self.folder / "trained.json", sealed(record))
                final = {"stage": self.stage, "digest": fingerprint.digest(leaves), "leaves": leaves}
                write_json(self.final.with_name("final.json"), sealed(final))
            save_tree(self.final, parameters)

    def restore_final(self, target: Tree, config: ModelConfig | None = None) -> Tree:
        """The parameters after the stage, placed as `target` says. Raises RunError, or DamagedError when they are not what was written."""
        record = self.final_record()
        return self._restore(self.final, target, None if record is None else record["leaves"], self._fix_final(), config)

    def final_shapes(self) -> Tree:
        """The tree of the final parameters as ShapeDtypeStructs. Raises DamagedError."""
        with reading(self.final, self._fix_final()):
            return saved_shapes(self.final)

    def drop_steps(self) -> None:
        """Removes step checkpoints but milestones, and the base when none is left: a stage with a `final` is never continued."""
        self.__exit__()
        if not self.has_final():
            return
        self._sweep()
        if jax.process_index() != 0:
            return
        kept = False
        for step in self.all_steps():
            if self.is_milestone(step):
                kept = True
            else:
                self._discard(self.step_folder(step))
        if not kept:
            for path in (self.steps, self.base):
                self._discard(path)
            self.base.with_name("base.json").unlink(missing_ok=True)

    def _discard(self, path: AnyPath) -> None:
        """Renames away, then removes: no half of a checkpoint keeps its name."""
        if not path.exists():
            return
        if not is_remote(path):
            remove_tree(path.with_name(f"{DROPPED}-{path.name}"))
            path = path.rename(path.with_name(f"{DROPPED}-{path.name}"))
        remove_tree(path)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Marks the stage as done."""
        if jax.process_index() == 0:
            write_json(self.done, sealed(record))


__all__ = ["DamagedError", "DiskFullError", "RunError", "StageStore", "abstract", "damaged_leaves", "load_tree", "saved_shapes"]
