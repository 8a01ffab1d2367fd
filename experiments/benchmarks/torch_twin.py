"""A plain eager PyTorch twin of Mono-InternVL: a second opinion on the JAX model, and the other side of benchmarks.

Written from the facts of the papers and of upstream's code (OpenGVLab/Mono-InternVL @5b17ab4), not from this library, and it imports
nothing of it: where the two agree, neither is likely to be wrong. It keeps upstream's way of computing: one fused wqkv, both experts on
every token and a blend by the mask, a key-value cache that grows by concatenation, the text experts alone in decoding. The module names
are upstream's, so a released folder loads with a strict load_state_dict.

    python -m experiments.benchmarks.torch_twin CASE_DIR...     # check it against recorded cases (docs/parity.md)

It needs torch, safetensors and numpy, in an environment of its own:

    python -m venv .venv-torch && .venv-torch/bin/pip install torch safetensors numpy
"""

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

UNSUPERVISED = -100
Cache = list[tuple[Tensor, Tensor]]  # per layer: rotated keys and values, [B, kv heads, tokens so far, head_dim]


# --- configuration ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwinConfig:
    """What of an upstream config.json the maths depends on; absent fields take upstream's class defaults."""

    vision_width: int
    image_size: int
    tile_size: int
    patch_size: int
    downsample_ratio: float
    ps_version: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    attention_bias: bool
    norm_eps: float
    rope_theta: float
    rope_kind: str  # "plain", "linear" or "dynamic"
    rope_factor: float
    max_positions: int
    tied: bool
    attention_experts: bool
    output_experts: bool

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "TwinConfig":
        """Read upstream's config.json, already parsed."""
        vision, llm = config["vision_config"], config["llm_config"]
        scaling = llm.get("rope_scaling") or {}
        heads = llm.get("num_attention_heads", 32)
        experts = bool(llm.get("use_attention_ve"))  # this project's keys: the 1.5 config is not published
        image_size = vision.get("image_size", 224)
        return cls(
            vision_width=vision.get("hidden_size", 3200),
            image_size=image_size,
            tile_size=config.get("force_image_size") or image_size,
            patch_size=vision.get("patch_size", 14),
            downsample_ratio=config.get("downsample_ratio", 0.5),
            ps_version=config.get("ps_version", "v1"),
            vocab_size=llm.get("vocab_size", 103168),
            hidden=llm.get("hidden_size", 4096),
            intermediate=llm.get("intermediate_size", 11008),
            layers=llm.get("num_hidden_layers", 32),
            heads=heads,
            kv_heads=llm.get("num_key_value_heads") or heads,
            attention_bias=llm.get("bias", True),
            norm_eps=llm.get("rms_norm_eps", 1e-6),
            rope_theta=float(llm.get("rope_theta", 10000)),
            rope_kind=scaling.get("type", "plain"),
            rope_factor=float(scaling.get("factor", 1.0)),
            max_positions=llm.get("max_position_embeddings", 2048),
            tied=llm.get("tie_word_embeddings", False),
            attention_experts=experts,
            output_experts=experts and bool(llm.get("attention_ve_output", True)),
        )

    @property
    def merge(self) -> int:
        """Patches along each side of a visual token."""
        return round(1 / self.downsample_ratio)

    @property
    def num_image_token(self) -> int:
        return (self.tile_size // self.patch_size // self.merge) ** 2


# --- parts ------------------------------------------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """float32 for half precision, so that a float64 run stays one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PatchEmbeddings(nn.Module):
    """Patches, plus a position table that is resized to the grid at hand; the class row takes part in nothing."""

    def __init__(self, c: TwinConfig):
        super().__init__()
        self.side = c.image_size // c.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, c.vision_width))
        self.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch_size, stride=c.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.side**2, c.vision_width))

    def forward(self, pixels: Tensor) -> Tensor:
        """[K, 3, H, W] to [K, rows, columns, width]."""
        patches = self.patch_embedding(pixels).permute(0, 2, 3, 1)
        table = at_least_float32(self.position_embedding[:, 1:]).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=patches.shape[1:3], mode="bicubic", align_corners=False)
        return patches + table.permute(0, 2, 3, 1).to(patches.dtype)


def pixel_shuffle(x: Tensor, merge: int, version: str) -> Tensor:
    """[K, rows, columns, C] to [K, tokens, merge * merge * C]; v1 lists the tokens column by column, v2 row by row."""
    tiles, rows, columns, width = x.shape
    x = x.reshape(tiles, rows // merge, merge, columns // merge, merge, width)
    outer = (1, 3) if version == "v2" else (3, 1)
    return x.permute(0, *outer, 2, 4, 5).reshape(tiles, rows // merge * (columns // merge), merge * merge * width)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_table(c: TwinConfig, positions: Tensor, key_length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_dim] of the positions [B, T].

    Args:
      key_length: all keys attended to, cached and padded ones too; beyond max_positions the dynamic base follows it.
    """
    size, theta, wide = c.hidden // c.heads, c.rope_theta, torch.promote_types(dtype, torch.float32)
    if c.rope_kind == "dynamic" and key_length > c.max_positions:
        theta *= (c.rope_factor * key_length / c.max_positions - (c.rope_factor - 1)) ** (size / (size - 2))
    elif c.rope_kind not in ("plain", "linear", "dynamic"):
        raise ValueError(f"rope_scaling type {c.rope_kind!r} is none of plain, linear, dynamic")
    frequencies = theta ** -(torch.arange(0, size, 2, device=positions.device, dtype=wide) / size)
    steps = positions.to(wide) / (c.rope_factor if c.rope_kind == "linear" else 1.0)
    angles = (steps[..., None] * frequencies).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention; the rows of wqkv come per key head: its query heads, the key, the value."""

    def __init__(self, c: TwinConfig):
        super().__init__()
        self.kv_heads, self.group, self.size = c.kv_heads, c.heads // c.kv_heads, c.hidden // c.heads
        shapes = {"wqkv": (c.hidden, (c.heads + 2 * c.kv_heads) * self.size), "wo": (c.heads * self.size, c.hidden)}
        for name, (inner, outer) in shapes.items():
            setattr(self, name, nn.Linear(inner, outer, bias=c.attention_bias))
        self.wqkv_ve = nn.Linear(*shapes["wqkv"], bias=c.attention_bias) if c.attention_experts else None
        self.wo_ve = nn.Linear(*shapes["wo"], bias=c.attention_bias) if c.output_experts else None

    def forward(self, x: Tensor, visual: Tensor | None, rope: tuple[Tensor, Tensor], allowed: Tensor, past: Any) -> tuple[Tensor, Any]:
        batch, length, _ = x.shape
        packed = blend(self.wqkv, self.wqkv_ve, x, visual).view(batch, length, self.kv_heads, self.group + 2, self.size)
        q = packed[..., : self.group, :].flatten(2, 3).transpose(1, 2)  # query head = key head * group + slot
        k, v = packed[..., -2, :].transpose(1, 2), packed[..., -1, :].transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        keys, values = (each.repeat_interleave(self.group, dim=1) for each in (k, v))
        scores = q @ keys.transpose(2, 3) / self.size**0.5
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = at_least_float32(scores).softmax(-1).to(q.dtype)
        mixed = (weights @ values).transpose(1, 2).reshape(batch, length, -1)
        return blend(self.wo, self.wo_ve, mixed, visual), (k, v)


class FeedForward(nn.Module):
    def __init__(self, c: TwinConfig):
        super().__init__()
        self.w1 = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.w3 = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.w2 = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def blend(text: nn.Module, visual_expert: nn.Module | None, x: Tensor, visual: Tensor | None) -> Tensor:
    """Both experts on all tokens, then a choice by the mask [B, T, 1]; no mask (decoding) or no visual expert: text alone."""
    if visual is None or visual_expert is None:
        return text(x)
    return text(x) * (1 - visual) + visual_expert(x) * visual


class Layer(nn.Module):
    def __init__(self, c: TwinConfig):
        super().__init__()
        self.attention = Attention(c)
        self.feed_forward, self.feed_forward_ve = FeedForward(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = RMSNorm(c.hidden, c.norm_eps), RMSNorm(c.hidden, c.norm_eps)

    def forward(self, x: Tensor, visual: Tensor | None, rope: tuple[Tensor, Tensor], allowed: Tensor, past: Any) -> tuple[Tensor, Any]:
        attended, present = self.attention(self.attention_norm(x), visual, rope, allowed, past)
        x = x + attended
        return x + blend(self.feed_forward, self.feed_forward_ve, self.ffn_norm(x), visual), present


# --- the model --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Generated:
    """Greedy decoding: the new tokens [B, N], and the logits that each was chosen from, [N, B, vocabulary]."""

    ids: Tensor
    scores: Tensor


class MonoInternVL(nn.Module):
    """The whole model. `image_id` is the token whose places visual tokens fill; config.json does not know it."""

    def __init__(self, config: TwinConfig, image_id: int):
        super().__init__()
        c = self.config = config
        self.image_id, self.recompute = image_id, False  # recompute: gradient checkpointing of every layer
        self.vision_model = nn.ModuleDict({"embeddings": PatchEmbeddings(c)})
        width = c.vision_width * c.merge**2
        self.mlp1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.hidden))
        embeddings, layers = nn.Embedding(c.vocab_size, c.hidden), nn.ModuleList(Layer(c) for _ in range(c.layers))
        decoder = nn.ModuleDict({"tok_embeddings": embeddings, "layers": layers, "norm": RMSNorm(c.hidden, c.norm_eps)})
        self.language_model = nn.ModuleDict({"model": decoder})
        if not c.tied:
            self.language_model["output"] = nn.Linear(c.hidden, c.vocab_size, bias=False)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """[K, 3, H, W] to [K, num_image_token, hidden]."""
        patches = self.vision_model["embeddings"](pixel_values)
        return self.mlp1(pixel_shuffle(patches, self.config.merge, self.config.ps_version))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_flags: Tensor | None) -> Tensor:
        """Token embeddings [B, T, hidden] with the visual tokens of the flagged tiles at the places of image_id, in order."""
        x = self.language_model["model"]["tok_embeddings"](input_ids)
        if pixel_values is None:
            return x
        visual = self.visual_tokens(pixel_values)
        visual = visual if image_flags is None else visual[image_flags.flatten() == 1]
        places = (input_ids == self.image_id)[..., None].expand_as(x)
        if places.sum() != visual.numel():
            raise ValueError(f"{int((input_ids == self.image_id).sum())} places for {visual.shape[:2].numel()} visual tokens")
        return x.masked_scatter(places, visual.to(x.dtype))

    def decode(
        self, x: Tensor, key_mask: Tensor, positions: Tensor, visual: Tensor | None, past: Cache | None = None, last_only: bool = False
    ) -> tuple[Tensor, Cache]:
        """Embeddings [B, T, hidden] to float32 logits and the cache.

        Args:
          key_mask: [B, cached + T], 1 for tokens.
          visual: [B, T, 1] in the dtype of x, or None for the text experts alone.
          last_only: logits of the last place only (upstream computes all of them).
        """
        queries, keys = x.shape[1], key_mask.shape[1]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        allowed = causal & (key_mask == 1)[:, None, None, :]
        rope = rope_table(self.config, positions, keys, x.dtype)
        decoder = self.language_model["model"]
        cache: Cache = []
        for number, layer in enumerate(decoder["layers"]):
            given = (x, visual, rope, allowed, past[number] if past else None)
            x, present = checkpoint(layer, *given, use_reentrant=False) if self.recompute and self.training else layer(*given)
            cache.append(present)
        x = decoder["norm"](x[:, -1:] if last_only else x)
        head = decoder["tok_embeddings"] if self.config.tied else self.language_model["output"]
        return at_least_float32(F.linear(x, head.weight)), cache

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        position_ids: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Cache]:
        """Logits and cache of whole rows; positions are 0 .. T-1 unless given."""
        x = self.embed(input_ids, pixel_values, image_flags)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=x.device).expand_as(input_ids)
        visual = (input_ids == self.image_id)[..., None].to(x.dtype)
        return self.decode(x, attention_mask, position_ids, visual, last_only=last_only)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of `prefill`."""
        return self.prefill(**inputs)[0]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        *,
        steps: int,
        eos: Collection[int] = (),
        pad_id: int = 2,
    ) -> Generated:
        """Greedy decoding of at most `steps` tokens, as transformers does it: a finished row goes on with pad_id."""
        ends = torch.tensor(sorted(eos), dtype=input_ids.dtype, device=input_ids.device)
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        mask, positions = attention_mask, (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        logits, cache = self.prefill(input_ids, mask, pixel_values, image_flags, positions, last_only=True)
        ids, scores = [], []
        while True:
            scores.append(logits[:, -1])
            token = logits[:, -1].argmax(-1).masked_fill(finished, pad_id)
            ids.append(token)
            finished = finished | torch.isin(token, ends)
            if len(ids) == steps or bool(finished.all()):
                return Generated(torch.stack(ids, 1), torch.stack(scores))
            mask = F.pad(mask, (0, 1), value=1)
            positions = mask.sum(1, keepdim=True) - 1
            x = self.language_model["model"]["tok_embeddings"](token[:, None])
            logits, cache = self.decode(x, mask, positions, None, cache)


def loss_of(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross entropy of labels[t] under logits[t - 1], or its mean weighted by weight[t]; labels of -100 do not count."""
    target = labels[:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), ignore_index=UNSUPERVISED, reduction="none")
    counts = (target != UNSUPERVISED).to(each.dtype) if weight is None else weight[:, 1:].to(each.dtype)
    return (each * counts.flatten()).sum() / counts.sum()


def load(folder: Path, image_id: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MonoInternVL:
    """The model of a folder in the released layout; every parameter is set once and every key is used.

    Raises:
      RuntimeError: keys or shapes do not fit the config.
    """
    config = TwinConfig.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    if not weights:
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = MonoInternVL(config, image_id)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device, dtype).eval()


# --- recorded cases ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """One compared output: the largest difference, and whether it lies within the case's tolerance."""

    case: str
    output: str
    difference: float
    passed: bool
    limit: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        limit = "exact" if self.limit.get("exact") else f"{self.limit['atol']:.0e} + {self.limit['rtol']:.0e}*|x|"
        return f"{'PASS' if self.passed else 'FAIL'}  {self.case:40} {self.output:68} {self.difference:9.2e}  ({limit})"


def run_inputs(
    model: MonoInternVL, inputs: dict[str, np.ndarray], generate: dict[str, Any] | None, wanted: Collection[str], steps: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Every output of docs/parity.md that `wanted` names and these inputs can give."""
    dtype = model.mlp1[1].weight.dtype
    given = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    given["pixel_values"] = given["pixel_values"].to(dtype)
    labels, weight = given.pop("labels", None), given.pop("loss_weight", None)
    gradients = any(name.startswith("grad:") for name in wanted)
    outputs: dict[str, Tensor] = {}
    with torch.set_grad_enabled(gradients):
        logits = outputs["logits"] = model(**given)
        if labels is not None:
            loss = outputs["loss"] = loss_of(logits, labels)
            if weight is not None:
                outputs["loss_weighted"] = loss_of(logits, labels, weight)
    if gradients:
        model.zero_grad()
        loss.backward()
        outputs |= {f"grad:{name}": p.grad for name, p in model.named_parameters() if p.grad is not None and f"grad:{name}" in wanted}
    with torch.no_grad():
        outputs["vit_embeds"] = model.visual_tokens(given["pixel_values"])
    if generate is not None:
        given.pop("position_ids", None)
        eos = [generate["eos"]] if "eos" in generate else []
        made = model.generate(**given, steps=steps, eos=eos, pad_id=pad_id)
        outputs |= {"generated_ids": made.ids, "gen_scores": made.scores}
    return {name: value.detach().numpy() for name, value in outputs.items()}


def check_case(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[Checked]:
    """Run a recorded model case and compare every output that its case.json counts."""
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    with np.load(folder / "inputs.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "img_context_token_id"}
    with np.load(folder / "outputs.npz") as file:
        expected = {name: file[name] for name in case["compare"]}
    model = load(folder, case["img_context_token_id"], dtype)
    steps = expected["generated_ids"].shape[1] if "generated_ids" in expected else 0
    ours: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for prefix in (name.removesuffix("input_ids") for name in arrays if name.endswith("input_ids")):
        inputs = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        made = run_inputs(model, inputs, case["generate"], case["compare"], steps, case["pad_token_id"])
        for name in expected:  # "logits_short_fresh" is "logits" of the inputs "short_..."
            source = next((key for key in made if name == key or (prefix and name.startswith(f"{key}_{prefix[:-1]}"))), None)
            if source is not None:
                ours[name], masks[name] = made[source], inputs["attention_mask"]
    for name, limit in case["compare"].items():
        label = f"{folder.parent.name}/{folder.name}"
        if name not in ours or ours[name].shape != expected[name].shape:
            yield Checked(label, name, float("inf"), False, limit)
            continue
        mine, theirs = ours[name].astype(np.float64), expected[name].astype(np.float64)
        if name.startswith("logits"):
            mine, theirs = mine[masks[name] == 1], theirs[masks[name] == 1]
        difference = np.abs(mine - theirs)
        allowed = 0.0 if limit.get("exact") else limit["atol"] + limit["rtol"] * np.abs(theirs)
        yield Checked(label, name, float(difference.max(initial=0.0)), bool((difference <= allowed).all()), limit)


# --- the other side of benchmarks -------------------------------------------------------------------------------------------------------


class Jobs:
    """A model and what a benchmark asks of it; every job gives its seconds and something to compare."""

    def __init__(self, folder: Path, image_id: int):
        self.model = load(folder, image_id)
        self.optimizer: torch.optim.Optimizer | None = None

    def prefill(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Logits of the last place; upstream computes those of all."""
        with torch.no_grad():
            began = time.perf_counter()
            logits, _ = self.model.prefill(**given, last_only=True)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "values": logits[:, -1].flatten().tolist()}

    def decode(self, given: dict[str, Tensor], steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        made = self.model.generate(**given, steps=steps)
        return {"seconds": time.perf_counter() - began, "values": made.ids.flatten().tolist()}

    def train(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """A step of delta tuning: AdamW on patch embedding, projector and visual FFNs, gradients clipped at 1."""
        if self.optimizer is None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith(("vision_model.", "mlp1.")) or ".feed_forward_ve." in name)
            self.trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
            self.model.train()
        given = dict(given)
        labels = given.pop("labels")
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = loss_of(self.model(**given), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return {"seconds": time.perf_counter() - began, "values": [loss.item()]}


def serve() -> None:
    """Answers jobs, one line of JSON each, from standard input until it ends: {"folder", "image_id"}, then {"job", "inputs", "threads"}."""
    start = json.loads(sys.stdin.readline())
    jobs, inputs = Jobs(Path(start["folder"]), start["image_id"]), {}
    for line in sys.stdin:
        request = json.loads(line)
        path = request.pop("inputs")
        torch.set_num_threads(request.pop("threads"))
        if path not in inputs:
            with np.load(path) as file:
                inputs[path] = {name: torch.from_numpy(file[name]) for name in file.files}
        print(json.dumps(getattr(jobs, request.pop("job"))(inputs[path], **request)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Check the twin against the cases (0 when all pass, else 1), or serve a benchmark."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.torch_twin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", type=Path, metavar="CASE_DIR")
    parser.add_argument("--float64", action="store_true", help="compute in float64")
    parser.add_argument("--serve", action="store_true", help="answer the jobs of experiments.benchmarks.inference on standard input")
    given = parser.parse_args(arguments)
    if given.serve:
        serve()
        return 0
    if not given.cases:
        parser.error("give at least one case folder")
    torch.set_num_threads(1)
    failed = 0
    for folder in given.cases:
        for checked in check_case(folder, torch.float64 if given.float64 else torch.float32):
            failed += not checked.passed
            print(checked)
    print("every output passes" if not failed else f"{failed} outputs FAIL")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
