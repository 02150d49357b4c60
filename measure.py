"""Compare ways to compute the same: equality first, then time turn by turn, memory and FLOP/s."""

import platform
import re
import statistics
import time
from collections import namedtuple
from itertools import accumulate
from pathlib import Path

from cli import UserError

# shapes: of the preset; folder: for files; peak: FLOP/s of a large matrix product
Place = namedtuple("Place", "shapes device folder peak")


def wait(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device):
    """FLOP/s of a large matrix product: what can be had here, not what the data sheet says."""
    import torch

    on_gpu = device.type == "cuda"
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


def inspect(run, device):
    """Call `run` under counters: (what it returns, FLOPs of its matrix products, peak bytes).

    The peak is the most that the call's tensors hold at once, beyond what was there before.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        if device.type == "cuda":
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
    return result, counter.get_total_flops(), most


def measure(place, unit, variants, verify):
    """Rows of {name: (callable, items it does)}; the first is the reference.

    verify: gets {name: what the variant returned}, before anything is timed; raises UserError where
    variants do not agree, and returns {name: difference from the reference}.
    """
    seen = {
        name: inspect(run, place.device) for name, (run, _) in variants.items()
    }  # warms up, too
    found = verify({name: result for name, (result, *_) in seen.items()})
    runs, first = {name: run for name, (run, _) in variants.items()}, None
    times = compare(runs, place.device, place.shapes["seconds"], warm=True)
    for name, (_, items) in variants.items():
        row = rate(name, unit, times[name], items, first, found.get(name))
        first = first or row["median"]
        speed = seen[name][1] / statistics.median(times[name])
        row |= {"peak_bytes": seen[name][2], "flops_per_second": speed}
        yield row | {"share_of_matmul": speed / place.peak}


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
    import os

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
