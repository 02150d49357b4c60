"""Check that the optimised code and the reference compute the same, before anything is timed."""

import copy
from functools import partial

import torch

from bench import reference
from bench.inputs import (
    TINY,
    Words,
    as_items,
    dequantised,
    make_captions,
    make_clips,
    make_lm,
    make_qformer,
    standardise,
)
from bench.timing import check, difference
from captioner import VideoCaptioner
from dataset import collate


def gradient(run, qformer):
    """Return the Q-Former's gradient after `run()` as one vector, and reset the gradient."""
    qformer.zero_grad()
    run()
    grads = [p.grad.flatten() for p in qformer.parameters()]
    qformer.zero_grad()
    return torch.cat(grads)


def equalities():
    """Compare the optimised training step with the reference in float64, on tiny shapes.

    The language model's norms always compute in float32, so losses agree only to 1e-6.
    Returns [{"what", "found", "allowed"}]. Raises UserError if a difference is above the tolerance.
    """
    s, dtype = TINY, torch.float64
    stored, captions = make_clips(s, s.B), make_captions(s, s.B, 3)
    stored |= {k: stored[k].to(dtype) for k in ("scale", "offset")}
    features = dequantised(stored, dtype)
    qformer = make_qformer(s, "cpu", dtype)
    standardise(qformer, features)
    model = VideoCaptioner(qformer, make_lm(s, "cpu", dtype), Words())
    batch = collate(as_items(stored, captions))
    direction = torch.randn(s.B, s.Q, s.D, dtype=dtype)

    def reference_loss():
        soft = reference.soft_prompts(qformer, features)
        return sum(reference.loss(model.lm, soft, c) for c in zip(*captions, strict=True))

    pairs = {
        "Q-Former": (
            lambda: (qformer(**stored) * direction).sum(),
            lambda: (reference.soft_prompts(qformer, features) * direction).sum(),
            1e-10,
        ),
        "3 captions behind one prefix": (
            lambda: model.loss(model.prefix(**stored), batch).sum(),
            reference_loss,
            1e-6,
        ),
    }
    lines = []
    for what, (optimised, original, allowed) in pairs.items():
        values = difference(optimised().detach(), original().detach())
        gradients = difference(
            *(gradient(lambda f=f: f().backward(), qformer) for f in (optimised, original))
        )
        for name, found in ((f"{what}, value", values), (f"{what}, gradient", gradients)):
            found = check(f"{name} in float64", found, allowed)
            lines.append({"what": f"{name}, float64", "found": found, "allowed": allowed})
    return lines


def check_gradients(variants, model, original_soft, captions):
    """Compare gradients of training variants with the reference in float32: {name: relative L2 error}.

    On a CPU all variants compute in float32 and must agree. On a GPU, the error of a variant may be 1.5
    times that of the reference under autocast, or 6 times if the language model also sums in bfloat16.
    Raises UserError if an error is larger.
    """
    lm = copy.deepcopy(model.lm).float()

    def one_pass(k):
        reference.loss(lm, original_soft(), [c[k] for c in captions]).backward()

    passes = [gradient(partial(one_pass, k), model.qformer) for k in range(len(captions[0]))]

    def error(name):
        run, k = variants[name]
        exact = sum(passes[:k])  # of k captions per clip
        return ((gradient(run, model.qformer) - exact).norm() / exact.norm()).item()

    errors = {name: error(name) for name in variants}
    autocast_error = errors.pop("reference")
    for name, found in errors.items():
        factor = 1.5 if name in ("absorbed", "int8", "chunked") else 6
        check(f"the gradient of {name}", found, max(1e-4, factor * autocast_error))
    return errors
