"""Optimisation without a model: learning-rate schedule, epoch order, parameter groups, dropout seeds.

Order, schedule and seeds are pure functions of (seed, epoch, step), so a resumed run continues bit for
bit, and several processes compute what one would.
"""

import hashlib
import math
import random

import torch
from torch import nn

from runtime import devices


def lr_at(step, total, peak, warmup):
    """Learning rate of a step (from 0) of `total`: linear warm-up, then a cosine to zero."""
    warmup = min(warmup, total // 2)  # a short run still reaches its peak
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def epoch_order(records, seed, epoch):
    """The records in the order of one epoch."""
    records = list(records)
    random.Random(f"order:{seed}:{epoch}").shuffle(records)
    return records


def dropout_seed(seed, step):
    """Seed of the first micro-batch of a step; the others count on from it.

    A function of the micro-batch alone, so neither a restart nor the number of processes changes a mask.
    """
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{step}".encode()).digest()[:7])


def parameter_groups(model, weight_decay):
    """Weight decay on the weights of Linear layers only: not on biases, norms, embeddings and gains."""
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    decayed = {id(p) for p in linear}
    others = [p for p in model.parameters() if id(p) not in decayed]
    return [
        {"params": linear, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizer(model, lr, weight_decay):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused into one kernel on a GPU."""
    device = next(model.parameters()).device
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr, fused=devices.on_gpu(device))


def average_and_clip(model, tokens, max_norm):
    """Turn gradients of a summed loss into those of its mean over `tokens`, then clip their norm.

    Dividing once by the real count is exact however the tokens fall on micro-batches and however short
    the last step of an epoch is. Returns the norm before clipping.
    """
    torch._foreach_div_([p.grad for p in model.parameters()], tokens)
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
