"""The demo model as it is trained: the glm4_moe architecture with its experts stacked for batched products.

`export()` writes the Hugging Face tensor names; tests/oracle/ compares that checkpoint with `transformers`.
"""

import dataclasses
import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn


@dataclasses.dataclass
class Shape:
    vocab: int = 256
    hidden: int = 128
    layers: int = 5
    dense_layers: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary: float = 0.5
    dense_inter: int = 256
    experts: int = 32
    top_k: int = 4
    moe_inter: int = 64
    shared_experts: int = 1
    routed_scale: float = 1.0
    rope_theta: float = 10000.0
    eps: float = 1e-5
    context: int = 1024


def rms_norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope_tables(shape: Shape, length: int):
    dim = int(shape.head_dim * shape.rotary)
    inv = 1.0 / shape.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(length).float(), inv)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    dim = cos.shape[-1]
    part, rest = x[..., :dim], x[..., dim:]
    half = torch.cat([-part[..., dim // 2 :], part[..., : dim // 2]], dim=-1)
    return torch.cat([part * cos + half * sin, rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.qkv = nn.Parameter(torch.empty((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden))
        self.o = nn.Parameter(torch.empty(s.hidden, s.heads * s.head_dim))

    def forward(self, x, cos, sin):
        s, (b, t, _) = self.s, x.shape
        q, k, v = F.linear(x, self.qkv).split([s.heads * s.head_dim] + [s.kv_heads * s.head_dim] * 2, dim=-1)
        q, k, v = (y.view(b, t, -1, s.head_dim).transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        k, v = (y.repeat_interleave(s.heads // s.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(b, t, -1), self.o)


class Mlp(nn.Module):
    def __init__(self, s: Shape, inter: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * inter, s.hidden))
        self.down = nn.Parameter(torch.empty(s.hidden, inter))

    def forward(self, x):
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class Moe(nn.Module):
    """Top-k by score + bias; gate weights from the scores alone (arXiv 2408.15664, Algorithm 1)."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.router = nn.Parameter(torch.empty(s.experts, s.hidden))
        self.register_buffer("bias", torch.zeros(s.experts))
        self.register_buffer("counts", torch.zeros(s.experts))  # tokens per expert of the last batch
        self.gate_up = nn.Parameter(torch.empty(s.experts, s.hidden, 2 * s.moe_inter))
        self.down = nn.Parameter(torch.empty(s.experts, s.moe_inter, s.hidden))
        self.shared = Mlp(s, s.moe_inter * s.shared_experts)

    def forward(self, x):
        s = self.s
        flat = x.reshape(-1, s.hidden)
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(F.linear(flat.float(), self.router.float()))
        ids = (scores.detach() + self.bias).topk(s.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scale

        copies = ids.reshape(-1)
        counts = torch.bincount(copies, minlength=s.experts)
        self.counts = counts.float()
        order = copies.argsort(stable=True)  # copies grouped by expert
        start = counts.cumsum(0) - counts
        place = torch.arange(len(copies)) - start[copies[order]]
        capacity = int(counts.max())
        slot = copies[order] * capacity + place
        rows = flat.new_zeros(s.experts * capacity, s.hidden).index_copy(0, slot, flat[order // s.top_k])
        gate, up = torch.bmm(rows.view(s.experts, capacity, -1), self.gate_up.to(rows.dtype)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down.to(rows.dtype)).view(-1, s.hidden)
        back = torch.empty_like(order)
        back[order] = slot
        y = (out[back].view(-1, s.top_k, s.hidden) * weights.to(out.dtype).unsqueeze(-1)).sum(1)
        return y.view_as(x) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, s: Shape, dense: bool):
        super().__init__()
        self.eps = s.eps
        self.attention_norm = nn.Parameter(torch.ones(s.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(s.hidden))
        self.attention = Attention(s)
        self.mlp = Mlp(s, s.dense_inter) if dense else Moe(s)

    def forward(self, x, cos, sin):
        x = x + self.attention(rms_norm(x, self.attention_norm, self.eps), cos, sin)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))


class Model(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed = nn.Parameter(torch.empty(s.vocab, s.hidden))
        self.layers = nn.ModuleList(Layer(s, i < s.dense_layers) for i in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        self.head = nn.Parameter(torch.empty(s.vocab, s.hidden))
        self.cos, self.sin = rope_tables(s, s.context)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scale = 0.02 if name in ("embed", "head") else p.shape[-1 if p.dim() == 2 else 1] ** -0.5
                if name.endswith((".o", "down")):
                    scale /= (2 * s.layers) ** 0.5
                nn.init.normal_(p, std=scale)

    def forward(self, ids):
        x = F.embedding(ids, self.embed)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(rms_norm(x, self.norm, self.s.eps), self.head)

    def moe_layers(self):
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)]

    def update_bias(self, u: float):
        """b_i += u * sign(mean(c) - c_i), from the counts of the batch just seen."""
        for moe in self.moe_layers():
            moe.bias += u * torch.sign(moe.counts.mean() - moe.counts)


def hf_config(s: Shape):
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.dense_inter,
        "moe_intermediate_size": s.moe_inter,
        "num_hidden_layers": s.layers,
        "first_k_dense_replace": s.dense_layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "partial_rotary_factor": s.rotary,
        "rope_theta": s.rope_theta,
        "rms_norm_eps": s.eps,
        "max_position_embeddings": s.context,
        "attention_bias": False,
        "use_qk_norm": False,
        "hidden_act": "silu",
        "n_routed_experts": s.experts,
        "n_shared_experts": s.shared_experts,
        "num_experts_per_tok": s.top_k,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": s.routed_scale,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def export(model: Model, folder: str):
    """Writes config.json, tokenizer_config.json and model.safetensors (bf16; correction biases fp32)."""
    s, out = model.s, {}

    def put(name, tensor, dtype=torch.bfloat16):
        out[name] = tensor.detach().to(dtype).contiguous()

    def put_mlp(prefix, gate_up, down):
        gate, up = gate_up.chunk(2, dim=0)
        put(prefix + "gate_proj.weight", gate)
        put(prefix + "up_proj.weight", up)
        put(prefix + "down_proj.weight", down)

    put("model.embed_tokens.weight", model.embed)
    put("model.norm.weight", model.norm)
    put("lm_head.weight", model.head)
    for i, layer in enumerate(model.layers):
        p = f"model.layers.{i}."
        put(p + "input_layernorm.weight", layer.attention_norm)
        put(p + "post_attention_layernorm.weight", layer.mlp_norm)
        q, k, v = layer.attention.qkv.split([s.heads * s.head_dim] + [s.kv_heads * s.head_dim] * 2)
        for name, tensor in (("q", q), ("k", k), ("v", v), ("o", layer.attention.o)):
            put(f"{p}self_attn.{name}_proj.weight", tensor)
        if isinstance(layer.mlp, Moe):
            put(p + "mlp.gate.weight", layer.mlp.router)
            put(p + "mlp.gate.e_score_correction_bias", layer.mlp.bias, torch.float32)
            for e in range(s.experts):
                put_mlp(f"{p}mlp.experts.{e}.", layer.mlp.gate_up[e].T, layer.mlp.down[e].T)
            put_mlp(p + "mlp.shared_experts.", layer.mlp.shared.gate_up, layer.mlp.shared.down)
        else:
            put_mlp(p + "mlp.", layer.mlp.gate_up, layer.mlp.down)
    os.makedirs(folder, exist_ok=True)
    save_file(out, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(hf_config(s), f, indent=2)
        f.write("\n")
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "ByteLevelTokenizer", "bos_token": "\0", "eos_token": "\0",
                   "model_max_length": s.context}, f, indent=2)
        f.write("\n")
