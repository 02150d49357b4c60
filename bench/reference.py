"""The original's arithmetic, the reference of the equality checks and timings.

Keys and values of all video tokens are materialised, logits are computed at every position, and a pass
trains on one caption per clip. Standardisation and positions, which the original lacks, are included so
that both compute the same function. All functions use the weights of the optimised modules, so their
gradients can be compared directly.
"""

import torch
import torch.nn.functional as F

from bench.inputs import PROMPT
from captioner import chunked_cross_entropy
from runtime import devices

IGNORED = -100  # target of a position without loss


def soft_prompts(qformer, features):
    """Map features, float (B, N, E), to soft prompts (B, Q, D)."""
    t, h, w = qformer.pos
    pos = (t[:, None, None] + h[None, :, None] + w).flatten(0, 2)  # (N, D)
    kv = qformer.project((features - qformer.mean) / qformer.std) + pos  # (B, N, D)
    x = qformer.queries.expand(len(features), -1, -1)  # (B, Q, D)
    for block in qformer.blocks:
        y, qkv, cross = block.norm_self(x), block.qkv, block.cross
        x = x + attention(y, y, block.num_heads, qkv.weight, qkv.bias, block.out)
        weight = torch.cat([cross.q.weight, cross.k.weight, cross.v.weight])  # (3D, D)
        bias = torch.cat([cross.q.bias, torch.zeros_like(cross.q.bias), cross.v.bias])
        x = x + attention(block.norm_cross(x), kv, block.num_heads, weight, bias, cross.out)
        x = x + block.mlp(block.norm_mlp(x))
    return F.layer_norm(x, x.shape[-1:]) * qformer.gain


def attention(x, kv, num_heads, weight, bias, out):
    """Compute nn.MultiheadAttention as a function of its weights. Returns (B, Q, D).

    x: (B, Q, D). kv: (B, N, D). weight (3D, D), bias (3D,): of query, key and value, stacked.
    out: the output projection.
    """
    query = x.transpose(0, 1)  # (Q, B, D)
    kv = query if kv is x else kv.transpose(0, 1)  # torch projects equal inputs in one product
    width, no_bias_kv, dropout = x.shape[-1], (None, None, False), 0.0
    y, _ = F.multi_head_attention_forward(
        *(query, kv, kv, width, num_heads, weight, bias, *no_bias_kv, dropout),
        *(out.weight, out.bias),
        need_weights=False,
    )
    return y.transpose(0, 1)


def following_tokens(captions, start, length):
    """Return the targets of all positions but the last in B rows of text, flattened: (B*(length-1),).

    captions: B token lists that begin at position `start`. All other targets are IGNORED.
    """
    labels = torch.full((len(captions), length), IGNORED)
    for row, caption in zip(labels, captions, strict=True):
        row[start:][: len(caption)] = torch.tensor(caption)
    return labels[:, 1:].flatten()


def loss_everywhere(head, hidden, targets):
    """Compute the summed cross-entropy with logits at every position.

    hidden: (B*L, D). targets: (B*L,).
    """
    logits = head(hidden)  # (B*L, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(hidden.device)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def loss_where_labelled(head, hidden, targets):
    """Compute the same value from only the positions with a target, in chunks. targets: on the host."""
    positions = (targets != IGNORED).nonzero()[:, 0]  # (M,)
    labelled = targets[positions].to(hidden.device)
    hidden = hidden.index_select(0, positions.to(hidden.device))  # (M, D)
    return chunked_cross_entropy(head, hidden, labelled).sum()


def loss(lm, soft, captions, cross_entropy=loss_everywhere):
    """Compute the summed cross-entropy of one caption per clip.

    soft: (B, Q, D). captions: B token lists.
    """
    rows = [PROMPT + c for c in captions]
    length = max(map(len, rows))
    ids = torch.tensor([r + [0] * (length - len(r)) for r in rows])  # (B, L)
    prefix = soft.shape[1]
    targets = following_tokens(captions, prefix + len(PROMPT), prefix + length)
    words = lm.get_input_embeddings()(ids.to(soft.device))  # (B, L, D)
    out = lm.base_model(inputs_embeds=torch.cat([soft, words], 1), use_cache=False)
    hidden = out.last_hidden_state[:, :-1].flatten(0, 1)  # (B*(Q+L-1), D)
    return cross_entropy(lm.get_output_embeddings(), hidden, targets)


@torch.inference_mode()
def captions(lm, qformer, features, max_new_tokens):
    """Caption clips with `generate`, eight at a time. Returns token lists.

    features: float16 (B, N, E) on the host.
    """
    rows, device = [], qformer.queries.device
    words = lm.get_input_embeddings()(torch.tensor([PROMPT], device=device))  # (1, L, D)
    for group in features.split(8):
        with devices.autocast(device):
            soft = soft_prompts(qformer, group.to(device)).to(words.dtype)
        embeds = torch.cat([soft, words.expand(len(soft), -1, -1)], 1)  # (8, Q+L, D)
        rows += lm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        ).tolist()
    return [row[: row.index(0)] if 0 in row else row for row in rows]
