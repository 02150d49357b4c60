"""bench.py's synthetic clips, and its groups without a language model: disk, loader, preprocessing."""

import time
import warnings
from functools import partial
from itertools import cycle, islice, pairwise
from types import SimpleNamespace

import numpy as np
import torch
from transformers import VJEPA2Config, VJEPA2Model

import preprocess_ssv2
import video
from bench.timing import check, compare, difference, left_out, measure, rate, rates
from dataset import (
    FeatureDataset,
    batches,
    collate,
    load_features,
    loader,
    save_features,
)
from encoder import VideoEncoder, pool_space, quantise
from runtime import devices
from runtime.decode_workers import WorkerPool
from worlds.toy_ssv2 import write_video

PROMPT = [5, 6, 7, 8]  # as many tokens as "a video showing:" has


def make_clips(s, count):
    """Clips in stored form, int8: {"features" (count, N, E), "scale", "offset" (count, E)}.

    Scales are powers of two and offsets few bits, so that float16 holds the very same values and both
    kinds of file give the same answer. Each clip lies around a mean of its own, or all captions
    would be alike; some channels lie far from zero, as those of vision transformers do.
    """
    tokens = s["grid"][0] * s["grid"][1] * s["grid"][2]
    x = torch.randn(count, tokens, s["E"]) + torch.randn(count, 1, s["E"])
    scale = 2.0 ** -torch.randint(5, 7, (count, s["E"]))
    offset = torch.randint(-32, 32, (count, s["E"])) / 32
    offset[:, :: max(1, s["E"] // 8)] += 20
    q = (x / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"features": q, "scale": scale, "offset": offset}


def dequantised(stored, dtype):
    """float (B, N, E)"""
    x = stored["features"].to(dtype) * stored["scale"][:, None].to(dtype)
    return x + stored["offset"][:, None].to(dtype)


class Words:
    """In a tokenizer's place: texts are numbers already."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False, return_tensors=None):
        return {"input_ids": torch.tensor([PROMPT]) if return_tensors else PROMPT}

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in rows]


def bench_features(place):
    """Disk: bytes, writing and reading of clips; the loader with worker processes."""
    s, count = place.shapes, 8
    x = dequantised(make_clips(s, count), torch.float32)  # (B, N, E)
    pooled = pool_space(x, s["grid"], 2)  # (B, N/4, E)
    forms = {
        "fp16": (x, {"features": x.half()}, 1),
        "int8": (x, quantise(x), 1),
        "fp16_pool2": (pooled, {"features": pooled.half()}, 2),
        "int8_pool2": (pooled, quantise(pooled), 2),
    }
    writes, reads, paths = {}, {}, {}
    for name, (_, stored, p) in forms.items():
        grid = (s["grid"][0], s["grid"][1] // p, s["grid"][2] // p)
        settings = {"grid": grid, "width": s["E"], "store": name.removesuffix("_pool2")}
        clips = [{k: v[i].clone() for k, v in stored.items()} for i in range(count)]
        paths[name] = [place.folder / f"{name}_{i}.pt" for i in range(count)]

        def write(clips=clips, paths=paths[name]):
            for path, clip in zip(paths, clips, strict=True):
                save_features(path, path.stem, clip, "none")

        def load(paths=paths[name], settings=settings):
            return collate([load_features(p, p.stem, settings) | {"captions": []} for p in paths])

        write()
        writes[f"{name}_write"], reads[f"{name}_read"] = write, load

    def reference_read():  # as in bench/speed.py
        clips = [torch.load(str(p), weights_only=True)["features"].float() for p in paths["fp16"]]
        return torch.stack(clips)

    sizes = {name: paths[name][0].stat().st_size for name in forms}
    for name, (exact, *_) in forms.items():
        error = dequantised(reads[f"{name}_read"](), torch.float32) - exact
        spread = (exact - exact.mean((0, 1))).norm()
        largest = exact.abs().max()
        row = rate(name, "bytes/clip", [1, 1], sizes[name])
        row["factor"] = sizes["fp16"] / sizes[name]
        row["max_abs_diff"] = (error.abs().max() / largest).item()
        check(f"what {name} holds", row["max_abs_diff"], 1e-2)
        yield row | {"relative_error": (error.norm() / spread).item()}
    seconds = place.shapes["seconds"] / 4
    yield from rates(compare(writes, place.device, seconds), "clips/s", count)
    yield from rates(
        compare({"reference_read": reference_read} | reads, place.device, seconds), "clips/s", count
    )
    yield from loader_rows(place, paths["int8"])


def loader_rows(place, paths):
    """Clips a second out of the loader that train.py uses, without the workers' start."""
    s, clips = place.shapes, 48 * place.shapes["B"]
    records = [{"id": p.stem} for p in islice(cycle(paths), clips)]
    settings = {"grid": s["grid"], "width": s["E"], "store": "int8"}
    folder = paths[0].parent
    data = FeatureDataset(
        folder.parent, folder.name, records, settings, Words(), lambda _: [("label", "x")] * 2
    )
    times = {}
    start = 8  # batches: when they are there, two of each of four workers lie ready
    for workers in (0, 2, 4):
        times[f"loader_{workers}"] = []
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # four workers on two cores are worth a look here
                loaded = batches(loader(data, s["B"], workers, place.device))
                arrived = [time.perf_counter() for _ in loaded]
            times[f"loader_{workers}"].append(arrived[-1] - arrived[start])
    yield from rates(times, "clips/s", clips - (start + 1) * s["B"])


def bench_preprocess(place):
    """From webm files like SSv2's to files of features: each stage, then all of them."""
    frames, count = place.shapes["encoder"][-1], place.shapes["videos"]
    paths = [place.folder / f"clip{i}.webm" for i in range(count)]
    for i, path in enumerate(paths):
        write_clip(path, i)
    clips = [video.decode(path, frames, backend="pyav").frames for path in paths]
    encoder, stages = make_encoder(place), {}
    for row in decode_rows(place, paths, clips):
        if row["name"].startswith("decode_workers"):
            stages["decoding"] = max(row["median"], stages.get("decoding", 0))
        yield row
    together = "batched_encode" if devices.on_gpu(place.device) else "encode_one_by_one"
    for row in encode_rows(place, encoder, clips[:8]):
        if row["name"] == together:  # what preprocess_ssv2.py does on this device
            stages["encoding"] = row["median"]
        yield row
    stored = encoder.stored(clips[:8])

    def save():
        for i, clip in enumerate(stored):
            save_features(place.folder / f"saved{i}.pt", f"saved{i}", clip, "none")

    for row in rates(compare({"save": save}, place.device, 1), "clips/s", len(stored)):
        stages["saving"] = row["median"]
        yield row

    workers = 16 if devices.on_gpu(place.device) else 2
    args = SimpleNamespace(batch_size=8, workers=workers, timeout=60, num_frames=frames)
    todo = {("all", str(i)): path for i, path in enumerate(paths * 4)}
    (place.folder / "all").mkdir()
    for key, error in preprocess_ssv2.encode(encoder, todo, place.folder, args):
        check(f"clip {key[1]}, {error}", float(error is not None), 0.0)
    done = sorted(p.stat().st_mtime for p in (place.folder / "all").glob("*.pt"))
    every = [b - a for a, b in pairwise(done[7::8])]  # batches of eight are written together
    row = rate("pipeline", "clips/s", every, 8)
    slowest = min(stages, key=stages.get)
    if not devices.on_gpu(place.device):
        slowest += ", and all stages share the cores"
    yield row | {"factor": None, "bottleneck": slowest, "stages": stages}


def quarters(arrived):
    """Seconds between every fourth of the arrivals: the start of the processes is not in them."""
    return [b - a for a, b in pairwise(arrived[:: len(arrived) // 4])]


def decode_rows(place, paths, clips):
    """The decoders in this process, then worker processes. clips: the frames as PyAV gives them."""
    frames = place.shapes["encoder"][-1]

    def decoded(backend):
        return [video.decode(path, frames, backend=backend).frames for path in paths]

    backends = ["pyav", "decord"]
    try:
        import decord  # noqa: F401
    except (ImportError, OSError):
        yield left_out("decode_decord", "decord cannot be imported")
        backends = ["pyav"]
    for backend in backends:
        same = all(map(np.array_equal, clips, decoded(backend)))
        check(f"share of clips that {backend} decodes to other frames", 1.0 - same, 0.0)
    times = {f"decode_{b}": partial(decoded, b) for b in backends}
    times = compare(times, place.device, place.shapes["seconds"] / 2)
    for workers in (1, 4, 8, 16) if devices.on_gpu(place.device) else (1, 2, 4):
        jobs = ((n, path, frames) for n, path in enumerate(paths * 4))
        results = WorkerPool(workers, 60).map(video.decode, jobs)
        arrived = [time.perf_counter() for _ in results]
        times[f"decode_workers_{workers}"] = quarters(arrived)
    yield from rates(times, "clips/s", len(paths))


def encode_rows(place, encoder, clips):
    def one_by_one():
        return torch.cat([encoder.encode([clip]) for clip in clips])

    def batched():
        return encoder.encode(clips, together=True)

    def verify(features):
        found = difference(features["batched_encode"], features["encode_one_by_one"])
        allowed = 5e-2 if devices.on_gpu(place.device) else 1e-5
        return {"batched_encode": check("features of a batch", found, allowed)}

    variants = {"encode_one_by_one": one_by_one, "batched_encode": batched}
    variants = {name: (run, len(clips)) for name, run in variants.items()}
    yield from measure(place, "clips/s", variants, verify)


def make_encoder(place):
    """V-JEPA 2 with random weights; 16 x 16 pixels and two frames become a token."""
    layers, heads, side, frames = place.shapes["encoder"]
    config = VJEPA2Config(
        crop_size=side,
        frames_per_clip=frames,
        hidden_size=place.shapes["E"],
        num_attention_heads=heads,
        num_hidden_layers=layers,
        pred_hidden_size=48,  # the predictor is not used
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )
    settings = {"grid": [frames // 2, side // 16, side // 16], "size": side, "resize": "squash"}
    settings |= {"pool": 1, "sampling": "bin_centres", "store": "int8"}
    dtype = torch.bfloat16 if devices.on_gpu(place.device) else torch.float32
    return VideoEncoder(VJEPA2Model(config).to(dtype), settings, place.device)


def write_clip(path, seed):
    """A webm like SSv2's: VP9, 428x240, 12 frames/s, 2-6 s; a bright square over moving texture."""
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(24, 73))
    texture = rng.integers(60, 180, (15, 40, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    video = np.stack([np.roll(texture, 2 * i, 1)[:, :428] for i in range(frames)])
    for i, image in enumerate(video):
        left = 20 + 300 * i // frames
        image[80:150, left : left + 70] = 230
    write_video(path, video)
