"""Measure time, memory and FLOP/s of variants of a computation, and check that they agree.

Variants are timed alternately (A B A B), so that a change in the machine's load affects all of them.
"""

import os
import statistics
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bench.inputs import Shapes
from runtime import devices
from runtime.errors import FAILED, UserError
from runtime.provenance import processor


@dataclass(frozen=True)
class Setup:
    """Settings that all groups of the benchmark share."""

    shapes: Shapes
    device: torch.device
    folder: Path  # for the files that a group writes
    peak_flops: float  # FLOP/s of a large matrix product


def check(what, found, allowed):
    """Return the difference between two variants. Raises UserError if it is above `allowed` or NaN."""
    if not found <= allowed:
        raise UserError(
            f"not equal: {what} differs by {found:.2e}, allowed {allowed:.2e}", code=FAILED
        )
    return found


def difference(found, reference):
    """Compute the largest absolute difference, relative to the reference's largest entry."""
    return ((found - reference).abs().max() / reference.abs().max()).item()


# ---- measuring -----------------------------------------------------------------------------------


def compare(variants, device, seconds, warmed_up=False):
    """Time callables alternately, in at least three rounds. Returns {name: [seconds]}."""

    def synchronise():
        if devices.on_gpu(device):
            torch.cuda.synchronize(device)

    for run in () if warmed_up else variants.values():
        run()
    times, began = {name: [] for name in variants}, time.perf_counter()
    while min(map(len, times.values())) < 3 or time.perf_counter() - began < seconds:
        for name, run in variants.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            times[name].append(time.perf_counter() - start)
    return times


def matmul_peak(device):
    """Measure FLOP/s of a large matrix product, the practical upper limit of this machine."""
    on_gpu = devices.on_gpu(device)
    n, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(compare({"matmul": lambda: a @ b}, device, 0.5)["matmul"])


def attention_formulas():
    """Extend torch's FLOP formulas of attention to fewer key and value heads than query heads.

    torch's own formulas raise an error for such inputs. These count FLOPs as if each key and value head
    were repeated.
    """

    def with_repeated_heads(formula):
        def count(*args, **kwargs):
            heads = max(x.shape[1] for x in args[:4] if getattr(x, "ndim", 0) == 4)

            def repeat(x):
                return x.new_empty((x.shape[0], heads, *x.shape[2:]), device="meta")

            head, tail = args[:4], args[4:]
            head = [repeat(x) if getattr(x, "ndim", 0) == 4 else x for x in head]
            return formula(*head, *tail, **kwargs)

        count._get_raw = True  # torch then passes tensors instead of their shapes
        return count

    attention = {op: f for op, f in flop_registry.items() if "scaled_dot_product" in str(op)}
    return {op: with_repeated_heads(formula) for op, formula in attention.items()}


def inspect(run, device):
    """Call `run` once and return (FLOPs of its matrix products, peak bytes).

    The peak is the largest total size of the tensors that the call holds at once, without those that
    existed before.
    """
    with FlopCounterMode(display=False, custom_mapping=attention_formulas()) as counter:
        if devices.on_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            cpu = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
                run()
            events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            events.sort(key=lambda e: e.start_ns())
            peak = max(accumulate(e.nbytes() for e in events))
    return counter.get_total_flops(), peak


def measure(setup, unit, variants, differences):
    """Yield a row for each of {name: (callable, number of items it processes)}, the reference first.

    differences: {name: difference from the reference}, where one was measured.
    """
    next(iter(variants.values()))[0]()  # allocates gradients, which must not count for a variant
    counts = {name: inspect(run, setup.device) for name, (run, _) in variants.items()}
    runs, reference = {name: run for name, (run, _) in variants.items()}, None
    times = compare(runs, setup.device, setup.shapes.seconds, warmed_up=True)
    for name, (_, items) in variants.items():
        row = rate(name, unit, times[name], items, reference, differences.get(name))
        reference = reference or row["median"]
        flops, row["peak_bytes"] = counts[name]
        if flops:
            row["flops_per_second"] = flops / statistics.median(times[name])
            row["share_of_matmul"] = row["flops_per_second"] / setup.peak_flops
        yield row


def rates(times, unit, items):
    """Yield a row for each of {name: [seconds]}, the reference first."""
    reference = None
    for name, seconds in times.items():
        row = rate(name, unit, seconds, items, reference)
        reference = reference or row["median"]
        yield row


def rate(name, unit, seconds, items, reference=None, max_abs_diff=None):
    """Make a row: median items per second, interquartile range, factor over the `reference` median."""
    rates = [items / t for t in seconds]
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return {
        "name": name,
        "unit": unit,
        "median": median,
        "iqr": high - low,
        "factor": median / reference if reference else 1.0,
        "max_abs_diff": max_abs_diff,
        "peak_bytes": None,
    }


def left_out(name, reason):
    """Make a row without figures."""
    row = dict.fromkeys(("median", "iqr", "factor", "max_abs_diff", "peak_bytes"))
    return {"name": name, "unit": "", **row, "left_out": reason}


def device_name(device):
    if devices.on_gpu(device):
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"
