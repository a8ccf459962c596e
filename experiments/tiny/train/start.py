"""Structured starting weights: heads that look one or two tokens back, and heads that copy.

From random weights a model of this size needs millions of tokens before it begins to copy words
from its prompt. Here the copying circuit of two layers ("induction") is written into the weights
before training: in layer 0 the first heads attend to the token 1 and 2 places back and note in a
subspace of their own what stood there; in the next layers the first heads look for a place whose
note matches the present token, and fetch what stands there. Everything stays plain LLaMA weights.

The heads of layer 0 need a query and a key that do not depend on the token. A random unit vector
`common` is added to every embedding for that.
"""
import math

import torch

EMBEDDING_SCALE = .3
FINAL_GAIN = .1  # of the last norm: small first logits with the tied output matrix
LOOK_BACK_SHARPNESS = 6.0  # logit gap per rotary frequency
MATCH_SCALE = 1.7
WRITE_GAIN = .5
NOISE = .1  # how much of the random start stays in structured queries and keys; without it
#             some rows would be zero in both, and could never learn
COPY_LAYERS = (1, 2, 3)
FAST, SLOW = .02, .012  # rotary frequencies (radians per token): above FAST tell places apart,
#                         below SLOW hardly turn within the context and can compare content


def orthonormal_rows(count, common, generator):
    """(count, hidden): orthonormal rows, all orthogonal to `common`."""
    columns = torch.randn(len(common), count + 1, generator=generator)
    columns[:, 0] = common
    return torch.linalg.qr(columns)[0][:, 1:].T


@torch.no_grad()
def structured_start(net, seed):
    config = net.config
    hidden, head = config["hidden_size"], config["head_dim"]
    share = config["num_attention_heads"] // config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)
    frequency = config["rope_theta"] ** -(torch.arange(0, head, 2).float() / head)
    fast = (frequency > FAST).float()
    slow = (frequency < SLOW).float().repeat(2)[:, None]

    common = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    table = EMBEDDING_SCALE * torch.randn(config["vocab_size"], hidden, generator=generator)
    table -= (table @ common)[:, None] * common
    net.model.embed_tokens.weight.copy_(table + EMBEDDING_SCALE * math.sqrt(hidden) * common)
    net.model.norm.weight.fill_(FINAL_GAIN)

    notes = orthonormal_rows(share * head + head, common, generator)
    identity = notes[share * head:]  # what a token is, for comparing
    attention = net.model.layers[0].self_attn
    scale = math.sqrt(LOOK_BACK_SHARPNESS * math.sqrt(head) / (hidden / 2))
    attention.k_proj.weight[:head] *= NOISE
    attention.k_proj.weight[:head] += scale * torch.cat([fast, 0 * fast])[:, None] * common
    attention.v_proj.weight[:head] = identity
    for number in range(share):
        rows = slice(number * head, (number + 1) * head)
        turn = frequency * (number + 1)
        query = torch.cat([fast * turn.cos(), -fast * turn.sin()])
        attention.q_proj.weight[rows] *= NOISE
        attention.q_proj.weight[rows] += scale * query[:, None] * common
        attention.o_proj.weight[:, rows] = WRITE_GAIN * notes[rows].T

    for layer in COPY_LAYERS:
        attention = net.model.layers[layer].self_attn
        fetched = orthonormal_rows(head, common, generator)
        attention.k_proj.weight[:head] *= NOISE
        attention.k_proj.weight[:head] += MATCH_SCALE * slow * notes[:head]
        attention.v_proj.weight[:head] = fetched
        for number in range(share):
            rows = slice(number * head, (number + 1) * head)
            attention.q_proj.weight[rows] *= NOISE
            attention.q_proj.weight[rows] += MATCH_SCALE * slow * identity
            attention.o_proj.weight[:, rows] = WRITE_GAIN * fetched.T
