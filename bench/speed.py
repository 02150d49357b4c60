"""Compare speed, memory and disk use with the original's arithmetic. Needs no data or downloads.

    python -m bench.speed                     (3 minutes on two cores; the model is scaled down)
    python -m bench.speed --preset full       (V-JEPA 2 ViT-L and Qwen2-1.5B; needs a CUDA GPU)

Weights are random and inputs synthetic. All variants are checked against the reference, then timed
alternately in the same run. The table goes to stdout; bench.json and bench.md are written to
results/bench/<device>/.

The reference (bench/reference.py) materialises keys and values of all video tokens, computes logits at
every position, trains on one caption per pass, reads float features with torch.load, encodes clips one at a
time, and captions eight clips at a time with `generate`.
"""

import runtime.start

import os

# silence the profiler that measures memory on a CPU; torch reads these when it is imported
os.environ["KINETO_LOG_LEVEL"] = "99"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import re
import tempfile
import time
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

import train
from bench import reference
from bench.data import bench_features, bench_preprocess
from bench.equality import check_gradients, equalities, gradient
from bench.inputs import (
    PROMPT,
    REAL,
    SMALL,
    Words,
    as_items,
    dequantised,
    in_host_memory,
    lm_dtype,
    make_captions,
    make_clips,
    make_lm,
    make_qformer,
    standardise,
)
from bench.tables import markdown, summary
from bench.timing import Setup, check, device_name, difference, left_out, matmul_peak, measure
from captioner import VideoCaptioner
from dataset import collate
from evaluate import to_device
from runtime import cli, devices
from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.files import read_json, write_atomic, write_json
from runtime.provenance import provenance

PRESETS = {"cpu": SMALL, "full": REAL}
DEVICES = {"cpu": "cpu", "full": "auto"}  # default --device of each preset


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="cpu",
        help="sizes of models and inputs: cpu (small) or full (real)",
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        metavar="GROUP",
        help=f"run only these groups and write no files: {', '.join(GROUPS)}",
    )
    parser.add_argument("--output", default="results/bench", help="folder for the result folder")
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="print the table of docs/speed.md from these bench.json files and exit",
    )
    parser.add_argument(
        "--device",
        help="cpu, cuda or cuda:N (default: cpu; with --preset full, cuda)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        print(summary([read_result(path) for path in args.table]))
        return
    device, _ = devices.resolve(args.device or DEVICES[args.preset], "auto")
    if args.preset == "full" and not devices.on_gpu(device):
        raise UserError("--preset full needs a CUDA GPU: on a CPU one step takes minutes")
    name = device_name(device)
    folder = Path(args.output, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
    cli.output_folder(folder, "--output").mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    result = {
        "device": name,
        "preset": args.preset,
        "command": f"python -m bench.speed --preset {args.preset}",
        **provenance(),
        "shapes": asdict(PRESETS[args.preset]),
        "matmul_flops": matmul_peak(device),
        "equal": equalities(),
        "rows": [],
    }
    # in the results folder, because the system's temporary folder may be in memory
    with tempfile.TemporaryDirectory(dir=folder) as files:
        setup = Setup(PRESETS[args.preset], device, Path(files), result["matmul_flops"])
        try:
            for group in args.groups or GROUPS:
                began = time.perf_counter()
                result["rows"] += [{"group": group, **row} for row in GROUPS[group](setup)]
                note(f"{group:<11} {time.perf_counter() - began:4.0f} s")
        finally:
            print(markdown(result))  # also if a check fails
    if not args.groups:
        write_json(folder / "bench.json", result)
        write_atomic(folder / "bench.md", markdown(result) + "\n")
        note(f"written to {folder}/bench.json and bench.md")


def read_result(path):
    result = read_json(path, "bench result")
    if not isinstance(result, dict) or not {"device", "preset", "rows"} <= result.keys():
        raise UserError(f"{path} was not written by bench/speed.py")
    return result


# ---- the groups that run a model ----------------------------------------------------------------


def bench_qformer(setup):
    """Measure the Q-Former, forward and backward, from features on the device."""
    s, device = setup.shapes, setup.device
    qformer = make_qformer(s, device)
    stored = to_device(make_clips(s, s.B), device)
    features = dequantised(stored, torch.float32)
    standardise(qformer, features)
    direction = torch.randn(s.B, s.Q, s.D, device=device)
    soft = {
        "reference": lambda: reference.soft_prompts(qformer, features),
        "absorbed": lambda: qformer(**stored),
    }

    def step(name):
        (soft[name]() * direction).sum().backward()

    def autocast_step(name):
        with devices.autocast(device):
            loss = (soft[name]() * direction).sum()
        loss.backward()

    with torch.no_grad():
        found = difference(soft["absorbed"](), soft["reference"]())
    check("soft prompts", found, 1e-5)
    gradients = [gradient(partial(step, name), qformer) for name in ("absorbed", "reference")]
    check("the Q-Former's gradient", difference(*gradients), 1e-4)
    variants = {name: (partial(autocast_step, name), s.B) for name in soft}
    yield from measure(setup, "clips/s", variants, {"absorbed": found})


def bench_loss(setup):
    """Measure output projection and cross-entropy of 24 captions after 64 soft prompts, both ways."""
    s, device, dtype = setup.shapes, setup.device, lm_dtype(setup.device)
    captions = [c[0] for c in make_captions(s, 24, 1)]
    start = 64 + len(PROMPT)
    length = start + max(map(len, captions))
    targets = reference.following_tokens(captions, start, length)
    head = torch.nn.Linear(s.D, s.V, bias=False, device=device, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(24, length, s.D, device=device, dtype=dtype, requires_grad=True)

    def step(cross_entropy):
        value = cross_entropy(head, hidden[:, :-1].flatten(0, 1), targets)
        (grad,) = torch.autograd.grad(value, hidden)
        return value.item(), grad

    functions = {"reference": reference.loss_everywhere, "chunked": reference.loss_where_labelled}
    (a, grad_a), (b, grad_b) = step(functions["chunked"]), step(functions["reference"])
    allowed = 2e-2 if devices.on_gpu(device) else 1e-5
    check("the loss in chunks", abs(a / b - 1), allowed)
    found = check("its gradient", difference(grad_a, grad_b), allowed)
    variants = {name: (partial(step, f), len(captions)) for name, f in functions.items()}
    original, chunked = measure(setup, "captions/s", variants, {"chunked": found})
    yield original
    yield chunked | {"memory_factor": original["peak_bytes"] / chunked["peak_bytes"]}


def bench_train(setup):
    """Measure training, from a micro-batch in host memory to gradients.

    Each variant adds one technique to the previous one.
    """
    s, device = setup.shapes, setup.device
    captions, stored = make_captions(s, s.B, 8), make_clips(s, s.B)
    floats = in_host_memory({"features": dequantised(stored, torch.float32).half()}, device)
    floats = floats["features"]  # exactly the same values as in int8
    batches = {k: collate(as_items(stored, [c[:k] for c in captions])) for k in (1, 2, 4, 8)}
    batches = {k: in_host_memory(batch, device) for k, batch in batches.items()}
    stored = in_host_memory(stored, device)
    qformer = make_qformer(s, device)
    standardise(qformer, floats)
    model = VideoCaptioner(qformer, make_lm(s, device, lm_dtype(device)), Words())

    def original_soft():
        return reference.soft_prompts(qformer, floats.to(device, non_blocking=True))

    def float_soft():
        one = torch.ones(s.B, s.E, device=device)
        return qformer(floats.to(device, non_blocking=True), one, 0 * one)

    def int8_soft():
        return qformer(**to_device(stored, device))

    def one_caption(soft, cross_entropy=reference.loss_everywhere):
        with devices.autocast(device):
            loss = reference.loss(model.lm, soft(), [c[0] for c in captions], cross_entropy)
        loss.backward()

    def bfloat16():
        with devices.autocast(device):
            soft = int8_soft().to(model.lm.dtype)
        first = [c[0] for c in captions]
        reference.loss(model.lm, soft, first, reference.loss_where_labelled).backward()

    # name: (function, captions per clip)
    variants = {
        "reference": (partial(one_caption, original_soft), 1),
        "absorbed": (partial(one_caption, float_soft), 1),
        "int8": (partial(one_caption, int8_soft), 1),
        "chunked": (partial(one_caption, int8_soft, reference.loss_where_labelled), 1),
        "bfloat16": (bfloat16, 1),
    }
    variants |= {
        f"captions_{k}": (lambda k=k: train.accumulate(model, [batches[k]]), k) for k in batches
    }
    if not devices.on_gpu(device):
        del variants["bfloat16"]

    differences = check_gradients(variants, model, original_soft, captions)
    work = {name: (run, s.B * k) for name, (run, k) in variants.items()}
    for row in measure(setup, "captions/s", work, differences):
        row["ms_per_caption"] = 1e3 / row["median"]
        row["ms_per_clip"] = row["ms_per_caption"] * variants[row["name"]][1]
        yield row
    if not devices.on_gpu(device):
        yield left_out("bfloat16", "slower than float32 on most CPUs")


def bench_evaluate(setup):
    """Measure greedy captioning from features in host memory."""
    s, device = setup.shapes, setup.device
    stored = make_clips(s, 32)
    floats = in_host_memory({"features": dequantised(stored, torch.float32).half()}, device)
    floats = floats["features"]
    qformer = make_qformer(s, device).requires_grad_(False)
    standardise(qformer, floats)
    model = VideoCaptioner(qformer, make_lm(s, device, lm_dtype(device)), Words()).eval()
    sizes = [n for n in (8, 64, 256) if n <= s.clips]
    batches = {n: {k: v[torch.arange(n) % 32] for k, v in stored.items()} for n in sizes}
    batches = {n: in_host_memory(batch, device) for n, batch in batches.items()}

    def original(count=16):
        rows = reference.captions(model.lm, qformer, floats[:count], s.tokens)
        return [" ".join(map(str, row)) for row in rows]

    def shared_prefix(count):
        return model.captions(to_device(batches[count], device), "label", s.tokens)

    variants = {"reference": (original, 16)}
    variants |= {f"shared_prefix_{n}": (partial(shared_prefix, n), n) for n in sizes}
    expected, identical = original(32), {"reference": 1.0}
    if len(set(expected)) < 8:
        raise UserError("the random language model writes too few different captions", code=FAILED)
    for n in sizes:
        pairs = list(zip(shared_prefix(n), cycle(expected), strict=False))
        identical[f"shared_prefix_{n}"] = share = sum(a == b for a, b in pairs) / n
        if not devices.on_gpu(device):  # in bfloat16, near ties may give other tokens
            check(f"share of different captions in batches of {n}", 1 - share, 0.0)
    for row in measure(setup, "captions/s", variants, {}):
        yield row | {"identical_captions": identical[row["name"]]}


GROUPS = {
    "qformer": bench_qformer,
    "loss": bench_loss,
    "train": bench_train,
    "evaluate": bench_evaluate,
    "features": bench_features,
    "preprocess": bench_preprocess,
}


if __name__ == "__main__":
    cli.run(main)
