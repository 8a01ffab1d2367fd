"""Runs recorded cases (docs/parity.md) and compares every output that counts with what PyTorch gave."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monovl_jax import jsontext
from monovl_jax.config import ConfigError, ModelConfig, read_config
from monovl_jax.convert.key_table import tree_to_upstream
from monovl_jax.convert.weights import WeightsError, load_weights
from monovl_jax.evaluation.parity_files import MAX_ARRAY_BYTES, case_file, read_arrays
from monovl_jax.evaluation.parity_preprocess import Check, run_preprocess_case
from monovl_jax.inference.generate import abstract_model, greedy
from monovl_jax.model import Ops
from monovl_jax.model.vlm import PADDING, TEXT, VISUAL
from monovl_jax.training.losses import weighted_nll

MODEL_GROUPS = ("mono_internvl", "mono_internvl_1_5")
IGNORED_LABEL = -100

MAX_SCORES = 1 << 26
"""Most pairs of tokens (rows * tokens^2) of a batch: attention in float32 keeps one number per pair and head."""

Arrays = dict[str, np.ndarray]


class UnknownCase(ValueError):
    """A case that this program does not understand; the message says what and where."""


def run_case(folder: str | Path) -> list[Check]:
    """Runs one case in float32 on the default device and returns one Check per compared output.

    Raises UnknownCase for a folder, group, input or output that is not understood, ConfigError or WeightsError for a broken model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UnknownCase(f"{folder} is no folder; give the folder of a recorded case")
    try:
        return _run_case(folder)
    except EXPECTED_ERRORS:
        raise
    except Exception as error:  # a wrong type or shape deep inside a case that somebody else wrote
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UnknownCase(f"{folder} is no case that can be run ({reason}); record it again") from error


def _run_case(folder: Path) -> list[Check]:
    case = _case_json(folder)
    if case is None or "compare" not in case:
        try:
            return run_preprocess_case(folder)
        except ValueError as error:
            raise UnknownCase(str(error)) from None
    if case.get("group") not in MODEL_GROUPS:
        raise UnknownCase(
            f"{folder / 'case.json'}: group {case.get('group')!r} is not supported; known: preprocess, {', '.join(MODEL_GROUPS)}"
        )
    return _ModelCase(folder, case).checks()


def case_logits(folder: str | Path, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one model case, computed in `dtype`, and the recorded ones: both float32[n, V], at the places that are not padding.

    Raises UnknownCase for a case without recorded logits, and as `run_case` does.
    """
    folder = Path(folder)
    case = _case_json(folder)
    if case is None or case.get("group") not in MODEL_GROUPS or "logits" not in case.get("compare", {}):
        raise UnknownCase(f"{folder} is no case with recorded logits; leave it out")
    model = _ModelCase(folder, case, dtype)
    places = model._batch()["segment_ids"] > 0
    return model._logits()[places], model.recorded["logits"].astype(np.float32)[places]


def _case_json(folder: Path) -> dict[str, Any] | None:
    path = folder / "case.json"
    try:
        if not case_file(folder, "case.json").exists():
            return None
    except ValueError as error:
        raise UnknownCase(str(error)) from None
    try:
        case = jsontext.read(path)
    except (jsontext.JsonError, OSError) as error:
        raise UnknownCase(f"{path} is not valid JSON: {error}") from None
    if not isinstance(case, dict):
        raise UnknownCase(f"{path}: expected an object")
    return case


def _arrays(folder: Path, name: str) -> Arrays:
    try:
        return read_arrays(folder, name)
    except ValueError as error:
        raise UnknownCase(str(error)) from None


class _ModelCase:
    """One recorded case of a model: its inputs, its weights and how each recorded output is made."""

    def __init__(self, folder: Path, case: dict[str, Any], dtype: Any = jnp.float32):
        self.folder, self.case = folder, case
        self.inputs, self.recorded = _arrays(folder, "inputs.npz"), _arrays(folder, "outputs.npz")
        if not any(name.endswith("input_ids") for name in self.inputs):
            raise UnknownCase(f"{folder / 'inputs.npz'}: there is no input_ids")
        if not isinstance(case["compare"], dict) or not case["compare"]:
            raise UnknownCase(
                f"{folder / 'case.json'}: compare is {case['compare']!r}; expected an object of outputs with their tolerances"
            )
        config = read_config(folder)
        prefixes = [name.removesuffix("pixel_values") for name in self.inputs if name.endswith("pixel_values")]
        if prefixes and (pixels := self._pixels(prefixes[0])) is not None:
            config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, tile_size=pixels.shape[1]))
        self.config: ModelConfig = config
        self.ops = Ops(dtype=dtype)
        self.graphdef, _ = abstract_model(config)
        self.params = jax.tree.map(jnp.asarray, load_weights(folder, config, np.float32))
        self.memo: dict[str, Any] = {}

    # ---- inputs

    def _input(self, name: str, prefix: str = "") -> np.ndarray | None:
        return self.inputs.get(prefix + name)

    def _per_token(self, name: str, prefix: str, shape: tuple[int, ...]) -> np.ndarray | None:
        array = self._input(name, prefix)
        if array is not None and array.shape != shape:
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: {prefix}{name} has shape {array.shape}, but input_ids {shape}")
        return array

    def _integers(self, name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind not in "biu":
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: {name} is {array.dtype}; expected whole numbers")
        return array

    def _token_id(self, name: str, default: Any) -> int:
        value = self.case.get(name, default)
        if value is None:
            raise UnknownCase(f"{self.folder / 'case.json'}: {name} is missing")
        whole = np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.integer)
        if not whole or not 0 <= int(value) < 1 << 31:
            raise UnknownCase(f"{self.folder / 'case.json'}: {name} is {value!r}; expected a token id")
        return int(value)

    def _batch(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The recorded inputs as a batch: the tiles of the whole batch, in order, fill the visual slots of its rows, in order."""
        ids = self._input("input_ids", prefix)
        if ids is None or ids.ndim != 2:
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: {prefix}input_ids is missing or not [rows, tokens]")
        rows, length = self._integers(prefix + "input_ids", ids).shape
        if rows * length**2 > MAX_SCORES:
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: {prefix}input_ids has {rows} rows of {length} tokens; record fewer")
        if ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.decoder.vocab_size:
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: {prefix}input_ids must lie in [0, {self.config.decoder.vocab_size})")
        mask = self._per_token("attention_mask", prefix, ids.shape)
        mask = np.ones_like(ids) if mask is None else self._integers(prefix + "attention_mask", mask)
        positions = self._per_token("position_ids", prefix, ids.shape)
        positions = np.broadcast_to(np.arange(length), ids.shape) if positions is None else positions
        context = self._token_id("img_context_token_id", self.inputs.get(prefix + "img_context_token_id"))
        visual = ids == context
        batch = {
            "tokens": ids.astype(np.int32),
            "token_types": np.where(visual, VISUAL, np.where(mask != 0, TEXT, PADDING)).astype(np.int8),
            "positions": positions.astype(np.float32),
            "segment_ids": (mask != 0).astype(np.int32),
        }
        tiles = self._tiles(prefix)
        if tiles is None or not visual.any():
            if visual.any():
                raise UnknownCase(f"{self.folder}: the prompt has {int(visual.sum())} visual slots but no pixel_values")
            return batch
        v = self.config.vision.tokens_per_tile
        if visual.sum() != len(tiles) * v:
            raise UnknownCase(
                f"{self.folder}: {int(visual.sum())} visual slots for {len(tiles)} flagged tiles of {v} visual tokens; they must agree"
            )
        first = np.concatenate([[0], np.cumsum(visual.sum(1))])
        spans = [(int(a) // v, -(-int(b) // v)) for a, b in itertools.pairwise(first)]
        k = max(1, max(b - a for a, b in spans))
        batch["tiles"] = np.zeros((rows, k, *tiles.shape[1:]), tiles.dtype)
        batch["visual_index"] = np.full(ids.shape, -1, np.int32)
        batch["visual_slot"] = np.full((rows, k * v), -1, np.int32)
        for row, (a, b) in enumerate(spans):
            where = np.flatnonzero(visual[row])
            own = int(first[row]) - a * v + np.arange(len(where))
            batch["tiles"][row, : b - a] = tiles[a:b]
            batch["visual_index"][row, where] = own
            batch["visual_slot"][row, own] = where
        return batch

    def _pixels(self, prefix: str = "") -> np.ndarray | None:
        """Normalised float32 [n, H, W, 3], or uint8 as it is."""
        pixels = self._input("pixel_values", prefix)
        if pixels is None:
            return None
        if pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[-1]):
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: pixel_values has shape {pixels.shape}; expected [tiles, 3, H, W]")
        pixels = pixels.transpose(0, 2, 3, 1) if pixels.shape[1] == 3 else pixels
        if pixels.shape[1] != pixels.shape[2]:
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: pixel_values are {pixels.shape[1]} x {pixels.shape[2]}; tiles are square")
        return pixels

    def _tiles(self, prefix: str) -> np.ndarray | None:
        pixels, flags = self._pixels(prefix), self._input("image_flags", prefix)
        if pixels is None:
            return None
        if flags is not None and flags.size != len(pixels):
            raise UnknownCase(f"{self.folder / 'inputs.npz'}: image_flags has {flags.size} entries for {len(pixels)} tiles")
        return pixels if flags is None else pixels[flags.reshape(-1) == 1]

    # ---- outputs

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def _logits(self, prefix: str = "") -> np.ndarray:
        def run(params, batch):
            model = nnx.merge(self.graphdef, params)
            return model.logits(model(batch, self.ops)[0], self.ops)

        logits = self._once("logits" + prefix, lambda: np.asarray(jax.jit(run)(self.params, self._batch(prefix))))
        return logits[..., : self.config.decoder.vocab_size]

    def _vit_embeds(self) -> np.ndarray:
        def run(params, pixels):
            return nnx.merge(self.graphdef, params).visual_tokens(pixels[None], self.ops)[0]

        pixels = self._pixels()
        if pixels is None:
            raise UnknownCase(f"{self.folder}: vit_embeds is compared but there are no pixel_values")
        tokens = np.asarray(jax.jit(run)(self.params, pixels))
        return tokens.reshape(len(pixels), -1, tokens.shape[-1])

    def _loss_and_gradients(self, weighted: bool) -> tuple[float, Arrays]:
        labels, weights = self._input("labels"), self._input("loss_weight")
        if labels is None or (weighted and weights is None):
            raise UnknownCase(f"{self.folder}: a loss is compared, but inputs.npz has no {'loss_weight' if weighted else 'labels'}")
        batch = self._batch()
        for name in ("labels", "loss_weight"):
            self._per_token(name, "", batch["tokens"].shape)
        shifted = self._integers("labels", labels)[:, 1:]
        supervised = shifted != IGNORED_LABEL
        asked = shifted[supervised]
        if asked.size and not 0 <= asked.min() <= asked.max() < self.config.decoder.vocab_size:
            raise UnknownCase(
                f"{self.folder / 'inputs.npz'}: labels must be {IGNORED_LABEL} or lie in [0, {self.config.decoder.vocab_size})"
            )
        w = weights[:, 1:].astype(np.float32) if weighted and weights is not None else supervised.astype(np.float32)
        total = w.sum()
        last = ((0, 0), (0, 1))
        targets, w = np.pad(np.where(supervised, shifted, 0), last), np.pad(w * supervised, last)

        def loss(params, batch, targets, w, total):
            model = nnx.merge(self.graphdef, params)
            hidden, _ = model(batch, self.ops)
            flat = hidden.reshape(-1, hidden.shape[-1])
            vocab = self.config.decoder.vocab_size
            return weighted_nll(flat, model.decoder.head_kernel(), targets, w, vocab) / total

        arguments = self.params, batch, targets.reshape(-1), w.reshape(-1), total
        kind = "grad_weighted:" if weighted else "grad:"
        if not any(name.startswith(kind) for name in self.case["compare"]):  # they would take as much memory as the model again
            return float(self._once("compiled loss", lambda: jax.jit(loss))(*arguments)), {}
        value, gradients = self._once("compiled loss", lambda: jax.jit(jax.value_and_grad(loss)))(*arguments)
        return float(value), dict(tree_to_upstream(self.config, jax.device_get(gradients)))

    def _generated(self) -> dict[str, np.ndarray]:
        ids = self.recorded.get("generated_ids", self.recorded.get("gen_scores"))
        if ids is not None and ids.ndim < 2:
            raise UnknownCase(f"{self.folder / 'outputs.npz'}: generated_ids or gen_scores has shape {ids.shape}; record them again")
        if ids is None:
            raise UnknownCase(f"{self.folder / 'outputs.npz'}: a generation is compared, but neither generated_ids nor gen_scores is there")
        steps = self.recorded["generated_ids"].shape[1] if "generated_ids" in self.recorded else ids.shape[0]
        batch: dict[str, Any] = self._batch()
        scores = steps * len(batch["tokens"]) * self.config.decoder.vocab_size * 4
        if scores > MAX_ARRAY_BYTES or (batch["tokens"].shape[1] + steps) ** 2 > MAX_SCORES:
            raise UnknownCase(f"{self.folder / 'outputs.npz'}: {steps} generated tokens are too many for a case; record fewer")
        mask = batch["segment_ids"]
        batch["positions"] = np.where(mask, np.cumsum(mask, axis=1) - 1, 1).astype(np.float32)
        batch["key_length"] = np.int32(mask.shape[1])
        settings = self.case.get("generate") or {}
        if not isinstance(settings, dict):
            raise UnknownCase(f"{self.folder / 'case.json'}: generate is {settings!r}; expected null or an object")
        eos = settings.get("eos", [])
        stop = np.asarray(eos).reshape(-1)
        if stop.size and not (np.issubdtype(stop.dtype, np.integer) and 0 <= stop.min() <= stop.max() < 1 << 31):
            raise UnknownCase(f"{self.folder / 'case.json'}: generate.eos is {eos!r}; expected a token id or a list of them")
        made = greedy(
            self.graphdef,
            self.params,
            batch,
            stop.astype(np.int32),
            np.int32(self._token_id("pad_token_id", 0)),
            ops=self.ops,
            max_new_tokens=steps,
            keep_scores=True,
        )
        assert made.scores is not None
        n = int(made.steps)
        return {"generated_ids": np.asarray(made.ids)[:, :n], "gen_scores": np.asarray(made.scores)[:n]}

    def _output(self, name: str) -> np.ndarray:
        if name.startswith(("grad:", "grad_weighted:")):
            kind, _, tensor = name.partition(":")
            loss = "loss_weighted" if kind == "grad_weighted" else "loss"
            gradients = self._once(loss, lambda: self._loss_and_gradients(kind == "grad_weighted"))[1]
            if tensor not in gradients:
                raise UnknownCase(f"{self.folder / 'case.json'}: {name} names no tensor of this model")
            return gradients[tensor]
        if name in ("loss", "loss_weighted"):
            return np.asarray(self._once(name, lambda: self._loss_and_gradients(name == "loss_weighted"))[0], np.float32)
        if name in ("generated_ids", "gen_scores"):
            return self._once("generated", self._generated)[name]
        if name == "vit_embeds":
            return self._vit_embeds()
        if name == "logits":
            return self._logits()
        for prefix in {n.removesuffix("input_ids") for n in self.inputs if n.endswith("input_ids")} - {""}:
            if name == f"logits_{prefix.rstrip('_')}" or name.startswith(f"logits_{prefix}"):
                return self._logits(prefix)
        raise UnknownCase(f"{self.folder / 'case.json'}: do not know how to compute the output {name!r}")

    def _valid(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Where attention_mask is 1, for outputs per token; elsewhere values are arbitrary."""
        for prefix in [""] + [n.removesuffix("attention_mask") for n in self.inputs]:
            mask = self.inputs.get(prefix + "attention_mask")
            if mask is not None and name.startswith("logits") and (not prefix or prefix in name + "_") and mask.shape == shape[:2]:
                return mask != 0
        return None

    def checks(self) -> list[Check]:
        return [self._check(name, rule) for name, rule in self.case["compare"].items()]

    def _check(self, name: str, rule: Any) -> Check:
        if name not in self.recorded:
            raise UnknownCase(f"{self.folder / 'outputs.npz'}: {name!r} is compared, but not recorded")
        tolerances = [rule[k] for k in ("atol", "rtol") if k in rule] if isinstance(rule, dict) else []
        exact = isinstance(rule, dict) and rule.get("exact") is True
        if not exact and not (tolerances and all(isinstance(t, int | float) and not isinstance(t, bool) for t in tolerances)):
            raise UnknownCase(f"{self.folder / 'case.json'}: compare[{name!r}] is {rule!r}; expected exact, or atol and rtol")
        want, got = self.recorded[name], np.asarray(self._output(name))
        tolerance = "exact" if exact else f"atol {rule.get('atol', 0):g} rtol {rule.get('rtol', 0):g}"
        if want.shape != got.shape:
            return Check(name, float("inf"), tolerance, False, f"shape {got.shape}, recorded {want.shape}")
        valid = self._valid(name, want.shape)
        if valid is not None:
            want, got = want[valid], got[valid]
        difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
        largest = float(difference.max(initial=0.0))
        limit = 0.0 if exact else rule.get("atol", 0.0) + rule.get("rtol", 0.0) * np.abs(want.astype(np.float64))
        return Check(name, largest, tolerance, bool(np.all(difference <= limit)))


EXPECTED_ERRORS = (UnknownCase, ConfigError, WeightsError)
"""What a broken case may raise; a caller prints the message and exits with 2."""
