"""Compare ways to compute the same: equality first, then time turn by turn, memory and FLOP/s."""

import os
import platform
import re
import statistics
import time
from collections import namedtuple
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from runtime import devices
from runtime.errors import UserError

# shapes: of the preset; folder: for files; peak: FLOP/s of a large matrix product
Place = namedtuple("Place", "shapes device folder peak")


def wait(device):
    if devices.on_gpu(device):
        torch.cuda.synchronize(device)


def matmul_peak(device):
    """FLOP/s of a large matrix product: what can be had here, not what the data sheet says."""
    on_gpu = devices.on_gpu(device)
    n, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(compare({"matmul": lambda: a @ b}, device, 0.5)["matmul"])


def compare(variants, device, seconds, warm=False):
    """Time callables turn by turn, A B A B …, three rounds at least: {name: [seconds]}."""
    for run in () if warm else variants.values():
        run()
    times, began = {name: [] for name in variants}, time.perf_counter()
    while min(map(len, times.values())) < 3 or time.perf_counter() - began < seconds:
        for name, run in variants.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return times


def attention_formulas():
    """torch's FLOP formulas of attention, for kernels that take fewer key and value heads than query heads.

    They compute as if each key and value head were repeated; torch's own formulas refuse them.
    """

    def repeated(formula):
        def count(*args, **kwargs):
            tensors = [getattr(arg, "ndim", 0) == 4 and n < 4 for n, arg in enumerate(args)]
            heads = max(arg.shape[1] for arg, is_one in zip(args, tensors, strict=True) if is_one)
            args = [
                arg.new_empty((arg.shape[0], heads, *arg.shape[2:]), device="meta")
                if is_one
                else arg
                for arg, is_one in zip(args, tensors, strict=True)
            ]
            return formula(*args, **kwargs)

        count._get_raw = True  # tensors, not their shapes
        return count

    attention = {op: f for op, f in flop_registry.items() if "scaled_dot_product" in str(op)}
    return {op: repeated(formula) for op, formula in attention.items()}


def inspect(run, device, compiled=False):
    """Call `run` under counters: (what it returns, FLOPs of its matrix products, peak bytes).

    The peak is the most that the call's tensors hold at once, beyond what was there before.
    compiled: by torch.compile, which would run uncompiled ever after a call under the FLOP counter;
    the FLOPs are then None.
    """
    counting = FlopCounterMode(display=False, custom_mapping=attention_formulas())
    with nullcontext() if compiled else counting as counter:
        if devices.on_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            result = run()
            most = torch.cuda.max_memory_allocated(device) - before
        else:
            cpu = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
                result = run()
            events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            events.sort(key=lambda e: e.start_ns())
            most = max(accumulate(e.nbytes() for e in events))
    return result, None if compiled else counter.get_total_flops(), most


def measure(place, unit, variants, verify):
    """Rows of {name: (callable, items it does)}; the first is the reference.

    verify: gets {name: what the variant returned}, before anything is timed; raises UserError where
    variants do not agree, and returns {name: difference from the reference}.
    """
    next(iter(variants.values()))[0]()  # or the reference alone would pay for the gradients' memory
    seen = {  # warms up, too
        name: inspect(run, place.device, compiled=name == "compile")
        for name, (run, _) in variants.items()
    }
    found = verify({name: result for name, (result, *_) in seen.items()})
    runs, first = {name: run for name, (run, _) in variants.items()}, None
    times = compare(runs, place.device, place.shapes["seconds"], warm=True)
    for name, (_, items) in variants.items():
        row = rate(name, unit, times[name], items, first, found.get(name))
        first = first or row["median"]
        row["peak_bytes"] = seen[name][2]
        if flops := seen[name][1]:
            row["flops_per_second"] = flops / statistics.median(times[name])
            row["share_of_matmul"] = row["flops_per_second"] / place.peak
        yield row


def rates(times, unit, items):
    """Rows of {name: [seconds]}; the first is the reference."""
    first = None
    for name, seconds in times.items():
        row = rate(name, unit, seconds, items, first)
        first = first or row["median"]
        yield row


def rate(name, unit, seconds, items, first=None, found=None):
    """A row: items a second, the spread between the quartiles, the factor over `first`."""
    rates = [items / t for t in seconds]
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return {
        "name": name,
        "unit": unit,
        "median": median,
        "iqr": high - low,
        "factor": median / first if first else 1.0,
        "max_abs_diff": found,
        "peak_bytes": None,
    }


def left_out(name, why):
    """A row that says why it has no figure."""
    row = dict.fromkeys(("median", "iqr", "factor", "max_abs_diff", "peak_bytes"))
    return {"name": name, "unit": "", **row, "left_out": why}


def check(what, found, allowed):
    """Raise UserError if two ways to compute the same do not agree; return the difference."""
    if not found <= allowed:
        raise UserError(f"not equal: {what} differs by {found:.2e}, allowed {allowed:.2e}", code=1)
    return found


def difference(ours, reference):
    """Largest absolute difference, relative to the largest entry of the reference."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def device_name(device):
    if devices.on_gpu(device):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


NOTES = {  # what rows of some groups say beside the columns that all have
    "ms_per_clip": "{:.1f} ms a clip",
    "ms_per_caption": "{:.1f} ms a caption",
    "largest_micro_batch": "the tensors of {} clips at once fit in 24 GB",
    "bytes_at_8": "{:.3g} bytes at 8 clips with weights and optimizer",
    "memory_factor": "{:.1f} times less memory",
    "identical_captions": "{:.0%} the same captions",
    "relative_error": "{:.2%} error",
    "bottleneck": "slowest stage: {}",
    "left_out": "left out: {}",
}


def markdown(result):
    """The table, and above it what ran where."""

    def number(x):
        return "" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    lines = [
        f"{result['device']}; `{result['command']}`; torch {result['versions']['torch']};"
        f" a large matrix product runs at {result['matmul_flops'] / 1e9:,.0f} GFLOP/s",
        "",
        "| group | variant | median | spread | unit | factor | difference | peak memory | of matmul | |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    for r in result["rows"]:
        memory, share = r.get("peak_bytes"), r.get("share_of_matmul")
        cells = [
            r["group"],
            f"`{r['name']}`",
            number(r["median"]),
            number(r["iqr"]),
            r["unit"],
            "" if r["factor"] is None else f"{r['factor']:.2f}",
            "" if r["max_abs_diff"] is None else f"{r['max_abs_diff']:.0e}",
            "" if memory is None else f"{memory / 1e6:,.0f} MB",
            "" if share is None else f"{share:.0%}",
            ", ".join(text.format(r[key]) for key, text in NOTES.items() if key in r),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Difference: the largest, relative to the reference's largest entry; of a training step, of"
        " its gradient (L2). Peak memory: tensors of the call, weights not counted. Of matmul: matrix"
        " products done a second, those done again on the way back included, against one large"
        " product; on a CPU without those inside fused attention. Files are read from the page cache.",
    ]
    lines += ["", "Equal before anything was timed (found, allowed):", ""]
    lines += [f"- {e['what']}: {e['found']:.1e}, {e['allowed']:g}" for e in result["equal"]]
    return "\n".join(lines)


SUMMARY = {  # the README's rows: what it says, of which row, and which figure if not the factor
    "Q-Former, forward and backward: absorbed attention": ("qformer", "absorbed"),
    "memory of logits and loss: labelled places only, in chunks": (
        "loss",
        "chunked",
        "memory_factor",
    ),
    "training, per caption: absorbed attention": ("train", "absorbed"),
    "+ int8 features, logits where a label is": ("train", "chunked"),
    "+ bfloat16 throughout the language model": ("train", "bfloat16"),
    "+ 2 captions behind one prefix": ("train", "captions_2"),
    "+ 4 captions": ("train", "captions_4"),
    "+ 8 captions": ("train", "captions_8"),
    "captions written, batches of 8": ("evaluate", "shared_prefix_8"),
    "batches of 64": ("evaluate", "shared_prefix_64"),
    "batches of 256": ("evaluate", "shared_prefix_256"),
    "disk: int8 instead of fp16": ("features", "int8"),
    "disk: int8, 2 x 2 tokens pooled": ("features", "int8_pool2"),
    "reading a clip's features, checksum included": ("features", "int8_read"),
    "encoding clips in batches of 8 (done on a GPU only)": ("preprocess", "batched_encode"),
}


def summary(results):
    """The README's table: factors over the reference, a column per device."""
    columns = {
        r["device"]: {(row["group"], row["name"]): row for row in r["rows"]} for r in results
    }
    if not any(r["preset"] == "full" for r in results):
        columns["a CUDA GPU, `--preset full`"] = None

    def cell(rows, group, name, field="factor"):
        if rows is None:
            return "not yet measured"
        row = rows[group, name]
        return "left out" if "left_out" in row else f"{row[field]:.1f}x"

    lines = [f"| times the reference | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for text, where in SUMMARY.items():
        lines.append(f"| {text} | {' | '.join(cell(c, *where) for c in columns.values())} |")
    return "\n".join(lines)
