"""A small Mono-InternVL in PyTorch, written for the tests of the recorder: the released names and layout, the interface of
upstream's chat model (forward, extract_feature, generate, num_image_token), no cache.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


def tiny_config(attention_experts: bool = False) -> dict[str, Any]:
    """config.json of a model with 16 patches and 4 visual tokens per tile."""
    language = dict(
        architectures=["InternLM2VEForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, rms_norm_eps=1e-5, rope_theta=10000, pad_token_id=2, bias=False,
    )  # fmt: skip
    if attention_experts:
        language |= dict(use_attention_ve=True, attention_ve_output=True)
    vision = dict(model_type="intern_vit_patch", hidden_size=16, patch_size=14, image_size=56)
    parts = dict(vision_config=vision, llm_config=language)
    return dict(model_type="internvl_chat", ps_version="v2", select_layer=-1, downsample_ratio=0.5, force_image_size=56, **parts)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the halves of x [B, heads, T, head_dim] by positions [B, T]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].to(x.dtype) * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv, self.theta = c["num_attention_heads"], c["num_key_value_heads"], c["rope_theta"]
        self.dim = c["hidden_size"] // self.heads
        packed = (self.heads + 2 * self.kv) * self.dim
        self.wqkv, self.wo = nn.Linear(c["hidden_size"], packed, bias=False), nn.Linear(c["hidden_size"], c["hidden_size"], bias=False)
        if c.get("use_attention_ve"):
            self.wqkv_ve = nn.Linear(c["hidden_size"], packed, bias=False)
            self.wo_ve = nn.Linear(c["hidden_size"], c["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor, visual: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        experts = hasattr(self, "wqkv_ve")
        packed = torch.where(visual, self.wqkv_ve(x), self.wqkv(x)) if experts else self.wqkv(x)
        group = self.heads // self.kv
        packed = packed.view(batch, length, self.kv, group + 2, self.dim).permute(0, 2, 3, 1, 4)
        q = packed[:, :, :group].reshape(batch, self.heads, length, self.dim)
        k, v = (packed[:, :, slot].repeat_interleave(group, 1) for slot in (group, group + 1))
        scores = rotate(q, positions, self.theta) @ rotate(k, positions, self.theta).transpose(-1, -2) * self.dim**-0.5
        mixed = scores.masked_fill(~allowed, torch.finfo(x.dtype).min).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return torch.where(visual, self.wo_ve(mixed), self.wo(mixed)) if experts else self.wo(mixed)


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.feed_forward = SwiGLU(c["hidden_size"], c["intermediate_size"])
        self.feed_forward_ve = SwiGLU(c["hidden_size"], c["intermediate_size"])
        self.attention_norm, self.ffn_norm = (Norm(c["hidden_size"], c["rms_norm_eps"]) for _ in range(2))

    def forward(self, x: torch.Tensor, visual: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), visual, positions, allowed)
        normed = self.ffn_norm(x)
        return x + torch.where(visual, self.feed_forward_ve(normed), self.feed_forward(normed))


class TinyMono(nn.Module):
    """The whole pipeline; `img_context_token_id` is set from outside, as upstream's is."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c, v = config["llm_config"], config["vision_config"]
        side = config["force_image_size"] // v["patch_size"]
        self.num_image_token = int(side**2 * config["downsample_ratio"] ** 2)
        self.img_context_token_id: int | None = None
        self.vision_model, self.vision_model.embeddings = nn.Module(), nn.Module()
        embeddings = self.vision_model.embeddings
        embeddings.class_embedding = nn.Parameter(torch.randn(1, 1, v["hidden_size"]))
        embeddings.patch_embedding = nn.Conv2d(3, v["hidden_size"], v["patch_size"], v["patch_size"])
        embeddings.position_embedding = nn.Parameter(torch.randn(1, 1 + side**2, v["hidden_size"]))
        wide = 4 * v["hidden_size"]
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, c["hidden_size"]), nn.GELU(), nn.Linear(c["hidden_size"], c["hidden_size"])
        )
        self.language_model, self.language_model.model = nn.Module(), nn.Module()
        self.language_model.model.tok_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.language_model.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.language_model.model.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.language_model.output = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    @classmethod
    def write(cls, folder: Path, config: dict[str, Any], seed: int = 0) -> None:
        """A folder of random weights in the released layout."""
        torch.manual_seed(seed)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(cls(config).state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype) -> "TinyMono":
        model = cls(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        weights = {name: value for part in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(part).items()}
        model.load_state_dict(weights)
        return model.to(torch_dtype)

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeddings = self.vision_model.embeddings
        x = embeddings.patch_embedding(pixel_values)
        tiles, width, side, _ = x.shape
        x = x.flatten(2).transpose(1, 2) + embeddings.position_embedding[:, 1:]
        half = side // 2
        x = x.view(tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(tiles, half * half, 4 * width)
        return self.mlp1(x)

    def decode(self, x: torch.Tensor, visual: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        length = x.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & (mask[:, None, None, :] == 1)
        states = [x]
        for layer in self.language_model.model.layers:
            states.append(layer(states[-1], visual, positions, allowed))
        return [*states[:-1], self.language_model.model.norm(states[-1])]

    def embed(self, ids: torch.Tensor, vit_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        visual = (ids == self.img_context_token_id)[..., None]
        x = self.language_model.model.tok_embeddings(ids)
        return x.masked_scatter(visual, vit_embeds.to(x.dtype)), visual

    def forward(
        self, pixel_values, input_ids, attention_mask=None, position_ids=None, image_flags=None, labels=None, output_hidden_states=None
    ) -> SimpleNamespace:  # fmt: skip
        used = self.extract_feature(pixel_values)[image_flags.squeeze(-1) == 1]
        x, visual = self.embed(input_ids, used.flatten(0, 1))
        positions = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        states = self.decode(x, visual, positions.expand(input_ids.shape), attention_mask)
        logits = self.language_model.output(states[-1]).float() if x.dtype == torch.float32 else self.language_model.output(states[-1])
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss, hidden_states=tuple(states) if output_hidden_states else None)

    def generate(self, pixel_values, input_ids, attention_mask, generation_config) -> SimpleNamespace:
        x, visual = self.embed(input_ids, self.extract_feature(pixel_values).flatten(0, 1))
        mask, scores, new = attention_mask, [], []
        for _ in range(generation_config.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            scores.append(self.language_model.output(self.decode(x, visual, positions, mask)[-1][:, -1]))
            new.append(scores[-1].argmax(-1))
            if generation_config.eos_token_id is not None and (new[-1] == generation_config.eos_token_id).all():
                break
            x = torch.cat([x, self.language_model.model.tok_embeddings(new[-1])[:, None]], 1)
            visual, mask = F.pad(visual, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=1)
        bos = torch.ones(len(input_ids), 1, dtype=torch.long)
        return SimpleNamespace(sequences=torch.cat([bos, torch.stack(new, 1)], 1), scores=tuple(scores))
