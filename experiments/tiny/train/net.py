"""The model: a LLaMA decoder whose parameter names are those of a Hugging Face folder."""
import math

import torch
import torch.nn.functional as F
from torch import nn

# The keys and values of config.json that shape the model.
CONFIG = dict(vocab_size=1536, hidden_size=256, intermediate_size=512, num_hidden_layers=5,
              num_attention_heads=8, num_key_value_heads=4, head_dim=32,
              max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
              bos_token_id=1, eos_token_id=2, pad_token_id=3)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (rotate-half)."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        hidden, width = config["hidden_size"], self.heads * self.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def rotate(self, x, cos, sin):
        first, second = x.split(self.head_dim // 2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, x, cos, sin, mask, cache=None, start=None):
        batch, steps, _ = x.shape
        shape = (batch, steps, -1, self.head_dim)
        q = self.rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = self.rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if cache is not None:
            keys, values = cache
            if start is None:  # prompt: positions 0 .. steps-1
                keys[:, :, :steps], values[:, :, :steps] = k, v
            else:  # one new token per row, each at its own position
                rows = torch.arange(batch)
                keys[rows, :, start], values[rows, :, start] = k[:, :, 0], v[:, :, 0]
                k, v = keys[:, :, :mask.shape[-1]], values[:, :, :mask.shape[-1]]
        share, seen = self.heads // self.kv_heads, k.shape[2]
        q = q.reshape(batch, self.kv_heads, share * steps, self.head_dim)
        scores = (q @ k.transpose(2, 3)).view(batch, self.kv_heads, share, steps, seen)
        weights = (scores * self.head_dim ** -.5 + mask).softmax(-1)
        mixed = weights.view(batch, self.kv_heads, share * steps, seen) @ v
        mixed = mixed.view(batch, self.heads, steps, self.head_dim).transpose(1, 2)
        return self.o_proj(mixed.reshape(batch, steps, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention_args):
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class TinyLlama(nn.Module):
    """Tied embeddings: the output matrix is `model.embed_tokens`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        half = torch.arange(0, config["head_dim"], 2).float() / config["head_dim"]
        positions = torch.arange(config["max_position_embeddings"]).float()
        angles = torch.outer(positions, config["rope_theta"] ** -half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def matrices(self):
        """Name -> linear layer, for all that are quantised (not the embedding)."""
        return {name: part for name, part in self.named_modules() if isinstance(part, nn.Linear)}

    def hidden(self, ids):
        """(batch, steps) ids -> (batch, steps, hidden) states after the final norm."""
        return self._run(ids, self.cos[:ids.shape[1]], self.sin[:ids.shape[1]],
                         causal_mask(ids.shape[1]), None, None)

    def prefill(self, ids, cache):
        """As `hidden`, and fills the cache."""
        return self._run(ids, self.cos[:ids.shape[1]], self.sin[:ids.shape[1]],
                         causal_mask(ids.shape[1]), cache, None)

    def step(self, ids, positions, cache):
        """(batch,) ids at (batch,) positions -> (batch, hidden)."""
        seen = torch.arange(int(positions.max()) + 1)[None] <= positions[:, None]
        mask = torch.where(seen, 0., -1e9)[:, None, None, None]
        cos, sin = self.cos[positions][:, None, None], self.sin[positions][:, None, None]
        return self._run(ids[:, None], cos, sin, mask, cache, positions)[:, 0]

    def _run(self, ids, cos, sin, mask, cache, start):
        x = self.model.embed_tokens(ids)
        for number, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, None if cache is None else cache[number], start)
        return self.model.norm(x)

    def logits(self, states):
        return states @ self.model.embed_tokens.weight.T

    def new_cache(self, batch, length):
        shape = (batch, self.config["num_key_value_heads"], length, self.config["head_dim"])
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.model.layers]


def causal_mask(steps):
    return torch.full((steps, steps), -1e9).triu(1)


def count_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def random_start(net, seed):
    """Small normal weights; the matrices that write to the residual stream start smaller."""
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * net.config["num_hidden_layers"])
    for name, part in net.matrices().items():
        scale = .5 * part.in_features ** -.5
        if name.endswith(("o_proj", "down_proj")):
            scale /= depth
        part.weight.data = scale * torch.randn(part.weight.shape, generator=generator)
