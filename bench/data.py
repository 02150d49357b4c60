"""Benchmark files, the loader, decoding and encoding: the groups of bench/speed.py without an LM."""

import time
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice, pairwise

import numpy as np
import torch

import video
from bench.inputs import Words, dequantised, make_clips, make_encoder, write_clip
from bench.timing import check, compare, difference, left_out, measure, rate, rates
from dataset import FeatureDataset, batches, collate, loader
from encoder import pool_space, quantise
from runtime import devices
from runtime.decode_workers import WorkerPool
from runtime.feature_cache import Settings, load_features, save_features


def bench_features(setup):
    """Measure the size of cached clips, writing and reading them, and the loader with workers."""
    s, count = setup.shapes, 8
    x = dequantised(make_clips(s, count), torch.float32)  # (B, N, E)
    pooled = pool_space(x, s.grid, 2)  # (B, N/4, E)
    forms = {
        "fp16": (x, {"features": x.half()}, 1),
        "int8": (x, quantise(x), 1),
        "fp16_pool2": (pooled, {"features": pooled.half()}, 2),
        "int8_pool2": (pooled, quantise(pooled), 2),
    }
    writes, reads, paths = {}, {}, {}
    for name, (exact, stored, pool) in forms.items():
        settings = cache_settings(s, name.removesuffix("_pool2"), pool)
        clips = [{k: v[i].clone() for k, v in stored.items()} for i in range(count)]
        paths[name] = [setup.folder / f"{name}_{i}.pt" for i in range(count)]
        writes[f"{name}_write"] = partial(write_clips, paths[name], clips)
        reads[f"{name}_read"] = partial(read_clips, paths[name], settings)

        writes[f"{name}_write"]()
        size = paths[name][0].stat().st_size
        row = rate(name, "bytes/clip", [1, 1], size)
        row["factor"] = paths["fp16"][0].stat().st_size / size
        error = dequantised(reads[f"{name}_read"](), torch.float32) - exact
        row["max_abs_diff"] = check(name, (error.abs().max() / exact.abs().max()).item(), 1e-2)
        spread = (exact - exact.mean((0, 1))).norm()
        yield row | {"relative_error": (error.norm() / spread).item()}

    def reference_read():
        clips = [torch.load(str(p), weights_only=True)["features"].float() for p in paths["fp16"]]
        return torch.stack(clips)

    reads = {"reference_read": reference_read} | reads
    yield from rates(compare(writes, setup.device, s.seconds / 4), "clips/s", count)
    yield from rates(compare(reads, setup.device, s.seconds / 4), "clips/s", count)
    yield from loader_rows(setup, paths["int8"])


def cache_settings(s, store, pool=1):
    """Return the settings of a manifest that are needed to read a clip."""
    grid = (s.grid[0], s.grid[1] // pool, s.grid[2] // pool)
    return Settings(grid=grid, width=s.E, store=store)


def write_clips(paths, clips):
    for path, clip in zip(paths, clips, strict=True):
        save_features(path, path.stem, clip, "none")


def read_clips(paths, settings):
    return collate([load_features(p, p.stem, settings) | {"captions": []} for p in paths])


def loader_rows(setup, paths):
    """Measure clips per second of the loader that train.py uses, once its workers are running."""
    s, quarter = setup.shapes, 20  # batches
    first = 8  # first timed batch: by then each of four workers has prefetched two
    records = [{"id": p.stem} for p in islice(cycle(paths), (first + 1 + 4 * quarter) * s.B)]
    folder = paths[0].parent
    data = FeatureDataset(
        *(folder.parent, folder.name, records, cache_settings(s, "int8"), Words()),
        lambda record: [("label", "x")] * 2,
    )
    times = {}
    for workers in (0, 2, 4):
        loaded = batches(loader(data, s.B, workers, setup.device))
        arrived = [time.perf_counter() for _ in loaded]
        times[f"loader_{workers}"] = intervals(arrived[first::quarter])
    yield from rates(times, "clips/s", quarter * s.B)


def intervals(times):
    return [after - before for before, after in pairwise(times)]


def bench_preprocess(setup):
    """Measure decoding and encoding of webm files like SSv2's."""
    paths = [setup.folder / f"clip{i}.webm" for i in range(setup.shapes.videos)]
    for i, path in enumerate(paths):
        write_clip(path, i)
    yield from decode_rows(setup, paths)
    frames = setup.shapes.encoder[-1]
    clips = [video.decode(path, frames, backend="pyav").frames for path in paths[:8]]
    yield from encode_rows(setup, make_encoder(setup.shapes, setup.device), clips)


def decode_rows(setup, paths):
    """Measure the decoders in this process, then decoding in worker processes."""
    frames = setup.shapes.encoder[-1]

    def decoded(backend):
        return [video.decode(path, frames, backend=backend).frames for path in paths]

    runs = {"decode_pyav": partial(decoded, "pyav")}
    if find_spec("decord"):
        runs["decode_decord"] = partial(decoded, "decord")
        same = all(map(np.array_equal, decoded("pyav"), decoded("decord")))
        check("share of clips with the same frames from decord", 1.0 - same, 0.0)
    else:
        yield left_out("decode_decord", "decord is not installed")
    times = compare(runs, setup.device, setup.shapes.seconds / 2)
    for workers in (1, 4, 8, 16) if devices.on_gpu(setup.device) else (1, 2, 4):
        jobs = ((i, path, frames) for i, path in enumerate(paths * 4))
        results = WorkerPool(workers, timeout=60).map(video.decode, jobs)
        arrived = [time.perf_counter() for _ in results]
        # times per quarter of the clips, without the start of the processes
        times[f"decode_workers_{workers}"] = intervals(arrived[:: len(paths)])
    yield from rates(times, "clips/s", len(paths))


def encode_rows(setup, encoder, clips):
    """Measure encoding clip by clip and as one batch."""
    variants = {
        "encode_one_by_one": lambda: torch.cat(
            [encoder.encode([clip])["features"] for clip in clips]
        ),
        "batched_encode": lambda: encoder.encode(clips, together=True)["features"],
    }
    found = difference(variants["batched_encode"](), variants["encode_one_by_one"]())
    check("features of a batch", found, 5e-2 if devices.on_gpu(setup.device) else 1e-5)
    work = {name: (run, len(clips)) for name, run in variants.items()}
    yield from measure(setup, "clips/s", work, {"batched_encode": found})
