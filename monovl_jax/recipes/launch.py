"""`monovl train`: a recipe on a user's own data. Everything that can be wrong is looked at before anything compiles.

What it writes into the run directory, beside what `training.checkpoint` and `training.metrics` describe: `config.json`, the tokenizer's
files and those that travel with the first weights (`model_files`), so that the directory is a model, here and when exported; `data.json`,
what each stage reads; `bad_samples.jsonl`; `index/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from monovl_jax import jsontext
from monovl_jax.config import ConfigError, ModelConfig, config_to_json, read_config
from monovl_jax.convert.checkpoint import PARAMS, is_imported, load_imported, read_marker
from monovl_jax.convert.key_table import upstream_shapes
from monovl_jax.convert.weights import WeightFiles, WeightsError, check_names, load_weights
from monovl_jax.data.chat import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TEMPLATES, template_named
from monovl_jax.data.errors import SampleError
from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.meta import EVERYTHING, DataSet, MetaError, file_digest, read_meta, shares
from monovl_jax.data.pictures import RootError
from monovl_jax.data.pipeline import Batch, Part
from monovl_jax.data.shards import PreparedSource
from monovl_jax.data.sources import BadSamples, Encoding, First, source_lengths
from monovl_jax.data.tiling import TilingConfig
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.model import Ops
from monovl_jax.parallel import hosts
from monovl_jax.parallel.hosts import HostsError, in_turn
from monovl_jax.parallel.mesh import MeshError, make_mesh, row_share
from monovl_jax.recipes.feed import Feed
from monovl_jax.recipes.find import adapted, find_recipe
from monovl_jax.recipes.model_files import copy_files, model_files
from monovl_jax.training import checkpoint
from monovl_jax.training.checkpoint import RunError, StageStore, load_run, load_step, read_experiment, read_recipe, step_store
from monovl_jax.training.devices import compiler_options
from monovl_jax.training.files import AnyPath, is_remote, write_bytes
from monovl_jax.training.files import place as located
from monovl_jax.training.loop import Records, TrainingError, check_mesh, train
from monovl_jax.training.profiling import parse_profile
from monovl_jax.training.stages import Recipe, RecipeError, Stage
from monovl_jax.training.step import BatchError
from monovl_jax.training.trainable import Initial, TrainableError, Tree

CONTROL_TOKENS = "control_tokens"
"""In the identity of a run: that control tokens in texts are text. Absent where they are trusted, as in every run of version 0.1.0."""

DATA, BAD_SAMPLES, INDEX = "data.json", "bad_samples.jsonl", "index"

INDEXING_INTERVAL = 5.0
"""Seconds between two lines about an index in the making."""

Say = Callable[[str], None]


def _silent(text: str) -> None:
    del text


class LaunchError(ValueError):
    """A run that cannot start; one sentence with what is wrong, where, and the mend."""


EXPECTED_ERRORS = (
    LaunchError,
    MetaError,
    RootError,
    ConfigError,
    WeightsError,
    RecipeError,
    RunError,
    TrainableError,
    TrainingError,
    BatchError,
    MeshError,
    HostsError,
    SampleError,
    OSError,
)
"""What `prepare` and `Launch.run` raise when the user, the data or the disk is at fault."""


# ---- the start ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights to begin with. load: reads them, onto the mesh where the format can be read in pieces. words: for people.
    identity: JSON value that tells these weights from others."""

    config: ModelConfig
    load: Callable[[Mesh], Tree]
    words: str
    identity: Any


def find_start(path: str | AnyPath, stage: str | None = None, step: int | None = None) -> Start:
    """The weights of a run directory (after `stage`, by default its last finished one), an imported model, or a released folder.

    path: a run directory may be in a bucket (gs://...). step: of a stage, the step checkpoint whose parameters are taken, without the
    optimizer state. Nothing is loaded yet, but names and shapes are checked. Raises ConfigError, WeightsError or RunError.
    """
    path = located(path) if is_remote(path) else Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give a run directory or a model folder")
    if (path / checkpoint.EXPERIMENT).is_file():
        recipe = read_recipe(path)
        if step is not None:
            chosen = stage or recipe.stages[-1].name
            base = step_store(path, chosen, step)[1].check_step(step)["base"]
            identity = {"run": read_experiment(path)["digest"], "stage": chosen, "step": step, "base": base}
            return Start(recipe.model, lambda mesh: load_step(path, chosen, step, mesh)[1], f"{path} at step {step} of {chosen}", identity)
        finished = [s.name for s in recipe.stages if StageStore(path, s.name).has_final()]
        chosen = stage or (finished or [""])[-1]
        if chosen not in finished:
            which = f"stage {chosen!r} has not finished" if chosen else "no stage has finished"
            raise RunError(f"{path}: {which}; finished: {', '.join(finished) or 'none'}. --init-step takes one of its step checkpoints")
        digest = read_experiment(path)["digest"]
        return Start(recipe.model, lambda mesh: load_run(path, chosen, mesh)[1], f"{path} after {chosen}", {"run": digest, "stage": chosen})
    if not isinstance(path, Path):
        raise ConfigError(f"{path} is no run directory, and weights are read from files; mount the bucket or copy the folder")
    if stage is not None or step is not None:
        raise ConfigError(f"{path} is a model folder, not a run; it has no stage {stage or 'of that step'!r}")
    config = read_config(path)
    if is_imported(path):
        read_marker(path)
        files = sorted(file for file in (path / PARAMS).rglob("*") if file.is_file())
        digest = hashlib.sha256("".join(f"{file.name}{file_digest(file, blocks=4)}" for file in files).encode()).hexdigest()[:16]
        return Start(config, lambda mesh: load_imported(path, config, mesh), str(path), {"imported": digest})
    check_names(WeightFiles(path), config)
    files = sorted(file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in path.glob(pattern))
    digest = hashlib.sha256("".join(f"{file.name}{file_digest(file)}" for file in files).encode()).hexdigest()[:16]
    return Start(config, lambda mesh: load_weights(path, config), str(path), {"weights": digest})


def check_start(config: ModelConfig, start: Start) -> None:
    """Raises ConfigError when weights belong to another model: anything of the decoder or the vision path but the tile size differs.

    Templates and tile limits may differ: they are how the model is used.
    """

    def parts(c: ModelConfig) -> dict[str, Any]:
        vision = dataclasses.asdict(c.vision) | {"tile_size": None}
        sections = (("vision", vision), ("decoder", dataclasses.asdict(c.decoder)), ("model", {"expert_of_type": c.expert_of_type}))
        return {f"{section}.{key}": value for section, fields in sections for key, value in fields.items()}

    here, there = parts(config), parts(start.config)
    if differ := [f"{key} is {there[key]!r} there and {here[key]!r} in the recipe" for key in here if here[key] != there[key]]:
        raise ConfigError(
            f"{start.words} is of another model config: {'; '.join(differ)}. Change the recipe's model, or give other weights"
        )


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, where: Path) -> None:
    """Raises LaunchError when pictures or turns cannot be written in the vocabulary, or an id lies beyond the model's."""
    if config.template not in TEMPLATES:
        raise LaunchError(f"the recipe's model has the chat template {config.template!r}; known: {', '.join(TEMPLATES)}")
    missing = []
    for token in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, TEMPLATES[config.template].stop):
        try:
            if tokenizer.encode(token) != [tokenizer.id_of(token)]:
                missing.append(token)
        except ValueError:
            missing.append(token)
    if missing:
        raise LaunchError(
            f"the tokenizer in {where} has no special token {', '.join(missing)}; add each to its vocabulary as one special token"
        )
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise LaunchError(
            f"the tokenizer in {where} has ids up to {tokenizer.vocab_size - 1}, the recipe's model has decoder.vocab_size "
            f"{config.decoder.vocab_size}; set it to {tokenizer.vocab_size} or more, or give another tokenizer"
        )


# ---- the data ----------------------------------------------------------------------------------------------------------------------


def check_mixtures(recipe: Recipe, sets: Mapping[str, DataSet], meta: Path) -> list[str]:
    """Names of the data sets that the recipe uses. Raises LaunchError for a mixture that names one which META.json does not have."""
    used: set[str] = set()
    for stage in recipe.stages:
        for mixture in (stage.mixture, stage.text_mixture):
            if absent := [name for name in mixture if name != EVERYTHING and name not in sets]:
                raise LaunchError(
                    f"stage {stage.name!r} asks for the data sets {_listed(mixture)}, and {meta} does not have {_listed(absent)}; it has "
                    f"{_listed(sets)}. Name them so there, or write a recipe with mixture={{'*': 1.0}}, which takes all of them"
                )
            used |= set(sets) if EVERYTHING in mixture else set(mixture)
    return sorted(used)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


@dataclasses.dataclass
class OwnData:
    """The sources of a run, made on first use and indexed when made. Called as a `feed.MakeParts`.

    summary: {stage: [{rows, data_set, samples, bad, share, mean_tokens, mean_tiles}]} of the stages asked for so far.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    sets: Mapping[str, DataSet]
    bad: BadSamples
    index_dir: Path
    seed: int
    strict: bool
    verify_images: bool
    say: Say
    trust_control_tokens: bool = False

    def __post_init__(self) -> None:
        self._made: dict[tuple[str, int, int], tuple[JsonlSource | PreparedSource, First]] = {}
        self.summary: dict[str, list[dict[str, Any]]] = {}

    def tiling(self, data: DataSet, tiles: int) -> TilingConfig:
        """How pictures are cut: at most into what META.json or else the model says, and what one row of the stage has room for."""
        model = self.model
        most = (data.max_dynamic_patch if model.dynamic_tiles else 1) or model.max_tiles
        if tiles:
            most = min(most, max(1, tiles - model.use_thumbnail))
        return TilingConfig(
            tile_size=model.vision.tile_size,
            min_tiles=min(model.min_tiles, most),
            max_tiles=most,
            use_thumbnail=model.use_thumbnail,
            normalization=model.vision.pixel_statistics,
        )

    def source(self, name: str, tokens: int, tiles: int) -> tuple[JsonlSource | PreparedSource, First]:
        """(all good samples of a data set for rows of this size, the part that repeat_time leaves)."""
        key = (name, tokens, tiles)
        if key not in self._made:
            data = self.sets[name]
            encoding = Encoding(
                self.tokenizer,
                dataclasses.replace(template_named(self.model.template), trust_control_tokens=self.trust_control_tokens),
                self.tiling(data, tiles),
                self.model.vision.tokens_per_tile,
                max_length=tokens,
                max_tiles=tiles,
            )
            common: dict[str, Any] = dict(
                bad=self.bad,
                strict=self.strict,
                verify_images=self.verify_images,
                augment_seed=self.seed if data.data_augment else None,
            )
            if data.prepared:
                source = PreparedSource(data.root, encoding, **common)
            else:
                files: dict[str, Any] = dict(image_root=data.root, cache_dir=self.index_dir, progress=self._progress(name))
                source = JsonlSource(data.annotation, encoding, **files, **common)
            good, bad = len(source), source.rejected
            self._made[key] = source, First(source, data.used(good))
            self.say(f"data set {name!r} for rows of {tokens} tokens and {tiles} tiles: {good} good samples, {bad} bad")
            if data.length is not None and data.length != good + bad:
                self.say(f"note: META.json says that {name!r} has {data.length} samples; {data.annotation} has {good + bad}")
        return self._made[key]

    def _check_not_empty(self, stage: Stage, needed: Mapping[str, First]) -> None:
        """Raises LaunchError when a data set that must give samples has none, with the reason."""
        for name, first in needed.items():
            if len(first):
                continue
            source, data = first.source, self.sets[name]
            assert isinstance(source, JsonlSource | PreparedSource)
            if len(source):
                why = f"repeat_time {data.repeat_time} of its {len(source)} good samples leaves none; raise it"
            else:
                line, reason = source.first_rejected or (0, "it is empty")
                why = f"{source.rejected} bad ones, the first in line {line}: {reason} All are listed in {self.bad.path}"
            raise LaunchError(f"the data set {name!r} ({data.annotation}) has no sample to train on: {why}")

    def _progress(self, name: str) -> Callable[[int, int], None]:
        spoke = [time.monotonic()]

        def tell(done: int, total: int) -> None:
            if time.monotonic() - spoke[0] >= INDEXING_INTERVAL:
                spoke[0] = time.monotonic()
                self.say(f"indexing {name!r}: {done / max(1, total):.0%}")

        return tell

    def __call__(self, stage: Stage, mixture: Mapping[str, float], tokens: int, tiles: int) -> list[Part]:
        names = list(self.sets) if EVERYTHING in mixture else list(mixture)
        sources = {name: self.source(name, tokens, tiles) for name in names}
        sizes = {name: len(first) * max(1.0, self.sets[name].repeat_time) for name, (_, first) in sources.items()}
        self._check_not_empty(stage, {name: first for name, (_, first) in sources.items() if name in mixture or not any(sizes.values())})
        weights = shares(dict(mixture), sizes)
        rows = self.summary.setdefault(stage.name, [])
        kind = "text" if any(row["rows"] == "main" for row in rows) else "main"
        for name, weight in weights.items():
            every, first = sources[name]
            lengths = source_lengths(every, np.arange(len(first)))
            mean = lengths.mean(axis=0).round(2).tolist() if len(lengths) else [0.0, 0.0]
            row = {"rows": kind, "data_set": name, "samples": len(first), "bad": every.rejected}
            rows.append(row | {"share": weight / sum(weights.values()), "mean_tokens": mean[0], "mean_tiles": mean[1]})
        return [Part(sources[name][1], weight, name) for name, weight in weights.items()]


# ---- the run -----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Launch:
    """A run that is ready to start. Make one with `prepare`."""

    recipe: Recipe
    run_dir: AnyPath
    feed: Feed
    data: OwnData
    ops: Ops
    initial: Initial | None
    files: list[AnyPath]
    identity: dict[str, Any]
    mesh: Mesh
    say: Say

    def __post_init__(self) -> None:
        self._told = self.data.bad.count

    def write_files(self) -> None:
        """Writes config.json, the files of the model and data.json into the run directory, by now ours."""
        if jax.process_index() == 0:
            copy_files(self.files, self.run_dir)
            write_bytes(self.run_dir / "config.json", config_to_json(self.recipe.model).encode())
            checkpoint.write_json(self.run_dir / DATA, self.data.summary)

    def batches(self, stage: Stage, position: int) -> Iterator[tuple[Batch, ...]]:
        """The feed, with a line whenever a picture turned out broken when it was decoded."""
        with contextlib.closing(self.feed(stage, position)) as batches:
            for batch in batches:
                if self.data.bad.count > self._told:
                    self._told = self.data.bad.count
                    self.say(f"{stage.name}: {self._bad()}")
                yield batch

    def _bad(self) -> str:
        total = self.data.bad.total
        return f"bad samples so far: {total}, left out and listed in {self.data.bad.path}" if total else "bad samples so far: none"

    def check(self) -> None:
        """Makes the first batch of every stage and says what is in it; nothing is trained. Raises SampleError with `strict`."""
        for stage in self.recipe.stages:
            for kind, pipeline in zip(("main", "text"), self.feed.pipelines(stage), strict=True):
                if pipeline is None:
                    continue
                with pipeline.batches(0) as batches:
                    next(batches)
                    stats = batches.stats
                self.say(
                    f"{stage.name}: the first batch ({kind} rows) holds {stats.samples} samples in {stats.rows} rows, {stats.supervised} "
                    f"supervised tokens; {stats.token_efficiency:.0%} of token slots and {stats.tile_efficiency:.0%} of tile slots are used"
                )
        self.say(self._bad())

    def run(self, checkpoint_every: int = 500, **options: Any) -> Records:
        """Trains what is left of the recipe; see `training.loop.train` for the options, the result and what it raises."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs pages about an error of which we say a sentence
        records = train(
            self.recipe,
            self.run_dir,
            self.batches,
            data_state=self.feed,
            initial=self.initial,
            ops=self.ops,
            frozen_dtype=self.ops.dtype,
            mesh=self.mesh,
            identity=self.identity,
            claimed=self.write_files,
            checkpoint_every=checkpoint_every,
            **options,
        )
        self.say(self._bad())
        return records


def run_options(profile: str | None, xla_option: Sequence[str], say: Say = print) -> dict[str, Any]:
    """Options of `Launch.run` as the command line spells them; says which XLA options are used. Raises LaunchError."""
    try:
        options = compiler_options(jax.devices()[0].device_kind, xla_option)
        steps = None if profile is None else parse_profile(profile)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    if options:
        say(f"XLA options: {' '.join(f'{name}={value}' for name, value in options.items())}")
    return {"profile": steps, "xla_options": options}


def make_ops(dtype: str | None = None, remat: str | None = None) -> Ops:
    """How to compute. By default float32 without remat on CPU, bfloat16 with `save_projections` elsewhere."""
    cpu = jax.default_backend() == "cpu"
    chosen: Any = remat or ("none" if cpu else "save_projections")
    return Ops(dtype=jnp.dtype(dtype or ("float32" if cpu else "bfloat16")).type, remat=chosen)


def check_run_dir(run_dir: AnyPath, recipe: Recipe, identity: Mapping[str, Any]) -> None:
    """Raises RunError when the run directory belongs to another experiment, or is no place for a run. Creates nothing."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"{run_dir} is a file; give a directory")
    if (run_dir / checkpoint.EXPERIMENT).exists():
        # What the loop itself adds (the compute dtype) is compared by the loop.
        known = read_experiment(run_dir).get("identity", {})
        checkpoint.claim_run(run_dir, checkpoint.experiment(recipe, {**known, **identity}))
    elif held := [p.name for pattern in ("config.json", "*.safetensors", "*.bin") for p in run_dir.glob(pattern)]:
        raise RunError(
            f"{run_dir} holds {held[0]} but no {checkpoint.EXPERIMENT}: it is a model folder, not a run. Give another run directory"
        )


def check_same_data(run_dir: AnyPath, summary: Mapping[str, Any]) -> None:
    """Raises RunError when a run that is continued would read other samples than before (pictures have come or gone)."""
    path = run_dir / DATA
    if not path.exists():
        return
    before = jsontext.read(path)
    for stage, rows in summary.items():
        for old, new in zip(before.get(stage, []), rows, strict=False):
            if (old["data_set"], old["samples"]) != (new["data_set"], new["samples"]):
                raise RunError(
                    f"{run_dir}: in stage {stage!r} the data set {new['data_set']!r} has {new['samples']} good samples now and had "
                    f"{old['samples']} when the run began; bring the pictures back, or give another run directory"
                )


def prepare(
    recipe: str,
    meta: Path,
    *,
    init: str | Path | None = None,
    init_stage: str | None = None,
    init_step: int | None = None,
    tokenizer: Path | None = None,
    run_dir: str | AnyPath | None = None,
    stages: Sequence[str] = (),
    steps: int | None = None,
    seed: int | None = None,
    trainable: Sequence[str] = (),
    batch_size: int | None = None,
    accumulation: int | None = None,
    learning_rate: float | None = None,
    sequence_length: int | None = None,
    strict: bool = False,
    verify_images: bool = False,
    dtype: str | None = None,
    remat: str | None = None,
    threads: int = 4,
    index_dir: Path | None = None,
    mesh: tuple[int, int, int] = (-1, 1, 1),
    distributed: bool | None = None,
    trust_control_tokens: bool = False,
    say: Say = print,
) -> Launch:
    """Everything up to the first step: recipe, weights, tokenizer, mesh and run directory checked, the data indexed. Compiles nothing.

    See docs/training.md for the arguments, which are those of `monovl train`; mesh: sizes of data, fsdp and tensor. On several hosts each
    process calls this; process 0 alone speaks and makes the index. Raises one of EXPECTED_ERRORS.
    """
    hosts.start(distributed)
    if jax.process_index() > 0:
        say = _silent
    start = None if init is None else find_start(init, init_stage, init_step)
    chosen = adapted(
        find_recipe(recipe, None if start is None else start.config),
        stages,
        steps,
        seed,
        trainable=tuple(trainable) or None,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        sequence_length=sequence_length,
    )
    sets = read_meta(meta)
    used = check_mixtures(chosen, sets, meta)
    for stage in chosen.stages:
        chosen.trainable_paths(stage)
    grid = make_mesh(*mesh)
    check_mesh(chosen, grid)
    if start is not None:
        check_start(chosen.model, start)
        chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, upstream=start.config.upstream))
    folder = tokenizer or init
    if folder is None or is_remote(folder):
        raise LaunchError("no tokenizer; give --tokenizer DIR, a folder with tokenizer.json or tokenizer.model, or --init with one in it")
    folder = Path(folder)
    try:
        words = Tokenizer.from_folder(folder)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    check_tokenizer(words, chosen.model, folder)
    files = model_files(folder, None if init is None else located(init))
    given = Path("runs") / chosen.name if run_dir is None else run_dir
    place = located(given) if is_remote(given) else Path(given)
    near = place if isinstance(place, Path) else Path("runs") / chosen.name  # for the index and what is appended to: not in a bucket
    identity = {
        "data": {name: sets[name].identity() for name in used},
        "verify_images": verify_images,
        "tokenizer": words.fingerprint(),
        "initial": None if start is None else start.identity,
    }
    if not trust_control_tokens and (place / checkpoint.EXPERIMENT).exists() and CONTROL_TOKENS not in read_experiment(place)["identity"]:
        trust_control_tokens = True
        say(f"{place} was begun with control tokens in texts taken for such, and goes on so")
    if not trust_control_tokens:
        identity[CONTROL_TOKENS] = "text"
    check_run_dir(place, chosen, identity)

    names = ", ".join(f"{stage.name} ({stage.steps} steps)" for stage in chosen.stages)
    parameters = sum(math.prod(shape) for shape in upstream_shapes(chosen.model).values())  # without the padding of the vocabulary
    say(f"recipe {chosen.name}: {names}; {parameters:,} parameters; run directory {place}")
    if grid.size > 1:
        shape = ", ".join(f"{axis} {size}" for axis, size in grid.shape.items())
        say(f"mesh {shape}: {grid.size} {jax.devices()[0].device_kind} devices of {jax.process_count()} processes")
    if start is None:
        say(f"warning: no --init, so the run starts from RANDOM weights (seed {chosen.seed})")
    else:
        say(f"weights from {start.words}")
    if chosen.copy_experts_before:
        mark = "" if start is None else "warning: "  # whoever brings weights may have trained experts in them
        say(f"{mark}before {chosen.copy_experts_before} the visual experts are replaced by copies of the text experts, as the recipe says")

    def index() -> tuple[OwnData, Feed]:
        used_sets, bad = {name: sets[name] for name in sets if name in used}, BadSamples(near / BAD_SAMPLES)
        data = OwnData(
            chosen.model, words, used_sets, bad, index_dir or near / INDEX, chosen.seed, strict, verify_images, say, trust_control_tokens
        )
        feed = Feed(chosen.model.vision, words.id_of(IMAGE_CONTEXT), data, threads=threads, share=row_share(grid))
        for stage in chosen.stages:
            try:
                feed.pipelines(stage)
            except SampleError:
                raise
            except ValueError as error:
                raise LaunchError(f"stage {stage.name!r}: {error}") from None
        return data, feed

    data, feed = in_turn(index)
    check_same_data(place, data.summary)
    initial = None if start is None else partial(start.load, grid)
    return Launch(chosen, place, feed, data, make_ops(dtype, remat), initial, files, identity, grid, say)
