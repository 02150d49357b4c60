"""Optimisation and seeds: step size, learning-rate schedule, epoch order, parameter groups, dropout, samples.

Order, schedule and seeds are pure functions of (seed, epoch, step), so a resumed run continues bit for
bit, and several processes compute what one would.
"""

import hashlib
import math
import random

import torch
from torch import nn

from runtime import devices
from runtime.errors import UserError

CLIPS_PER_STEP = 64  # unless both --batch-size and --grad-accum are given


def split_step(batch_size, grad_accum, processes):
    """Return (clips per micro-batch, micro-batches per step), with defaults for values that are None.

    The defaults make a step of 64 clips. If both values are None, each process gets one micro-batch, or
    two if there is only one process: on a GPU, 32 clips at once need 14 GB and 64 need 23 GB. Raises
    UserError if 64 clips cannot be divided evenly.
    """
    if batch_size and grad_accum:
        return batch_size, grad_accum
    if batch_size:
        if CLIPS_PER_STEP % batch_size:
            raise UserError(
                f"--batch-size {batch_size} does not divide {CLIPS_PER_STEP} clips per step; also set --grad-accum"
            )
        return batch_size, CLIPS_PER_STEP // batch_size
    count = grad_accum or max(2, processes)
    if CLIPS_PER_STEP % count == 0:
        return CLIPS_PER_STEP // count, count
    if grad_accum:
        raise UserError(
            f"--grad-accum {grad_accum} does not divide {CLIPS_PER_STEP} clips per step; also set --batch-size"
        )
    raise UserError(
        f"{CLIPS_PER_STEP} clips per step cannot be shared equally by {processes} processes; set --batch-size and"
        " --grad-accum"
    )


def lr_at(step, total, peak, warmup):
    """Return the learning rate of a step (from 0) of `total`: linear warm-up, then a cosine to zero."""
    warmup = min(warmup, total // 2)  # a short run still reaches its peak
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def epoch_order(records, seed, epoch):
    """Return the records in the order of one epoch."""
    records = list(records)
    random.Random(f"order:{seed}:{epoch}").shuffle(records)
    return records


def dropout_seed(seed, step):
    """Return the seed of a step's first micro-batch; micro-batch n of the step uses this seed + n.

    The seed depends on nothing else, so neither a restart nor the number of processes changes a mask.
    """
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{step}".encode()).digest()[:7])


def uniforms(names, count, length, seed):
    """Return float64 (B, count, length) in [0, 1), a pure function of (seed, name, n) for each caption n.

    names: of the B clips.
    """
    rows = [
        [[rng.random() for _ in range(length)] for rng in generators]
        for generators in (
            [random.Random(f"sample:{seed}:{name}:{n}") for n in range(count)] for name in names
        )
    ]
    return torch.tensor(rows, dtype=torch.float64)


def parameter_groups(model, weight_decay):
    """Group parameters so that weight decay applies to the weights of Linear layers only.

    Biases, norms, queries, positions and gains have none.
    """
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    decayed = {id(p) for p in linear}
    others = [p for p in model.parameters() if id(p) not in decayed]
    return [
        {"params": linear, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizer(model, lr, weight_decay):
    """Return AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused into one kernel on a GPU."""
    device = next(model.parameters()).device
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr, fused=devices.on_gpu(device))


def average_and_clip(model, tokens, max_norm):
    """Turn gradients of a summed loss into those of its mean over `tokens`, then clip their norm.

    Gradients are divided once per step, by the real number of tokens. The result is therefore exact even
    if micro-batches differ in size or the last step of an epoch is short. Returns the norm before
    clipping.
    """
    torch._foreach_div_([p.grad for p in model.parameters()], tokens)
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
