"""Frozen video encoders: uint8 frames -> normalised pixels -> features -> stored (int8 or float16) form.

`FAMILIES` lists the supported types of models. The default is V-JEPA 2. Every step is determined
by the `Settings` in the manifest, so preprocessing and inference always agree.
Shapes: B clips, F frames, N = T*H*W video tokens, E video width, S pixels along an edge.
"""

import math
from collections import deque
from dataclasses import dataclass
from functools import cache
from itertools import count
from statistics import median

import torch
import torch.nn.functional as F
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

import video
from runtime import devices, hub
from runtime.cli import note
from runtime.errors import UserError, VideoError
from runtime.feature_cache import IMAGENET, Settings, is_count
from runtime.files import read_json
from runtime.names import counted

PREPROCESSORS = (
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
MAX_SIZE = 4096  # pixels along an edge of the frames
MAX_ERROR = 0.03  # of int8 storage, see `quantisation_error`; 0.008 for Gaussian features


@dataclass(frozen=True)
class Family:
    """How a type of model of transformers turns pixels into tokens.

    A video model takes clips (B, F, 3, S, S). An image model takes single frames (B*F, 3, S, S), so T = F.
    Both return tokens (., P + N, E), where the first P tokens (CLS, registers) are not on the grid.
    A model with a feature map returns (., E, H, W) instead, see `feature_map`.
    """

    images: bool = False
    cls: bool = False  # the first token is a CLS; it may be followed by `num_register_tokens`
    feature_map: bool = False
    time_last: bool = False  # tokens are ordered by (H, W, T), not (T, H, W)
    fixed_frames: bool = False  # accepts only config.num_frames frames, as in its training
    size: str | None = None  # config attribute that is S; None: S is in the preprocessor file
    mean_std: tuple | None = None  # used without a preprocessor file; None: the file is required
    pixels: str = "pixel_values"  # name of the model's first argument
    options: tuple = ()  # other arguments of the model, as pairs (name, value)
    model: type = AutoModel
    unused: tuple = ()  # modules after the tokens; their weights may be missing


FAMILIES = {  # by the model_type in config.json
    "vjepa2": Family(
        size="crop_size",
        mean_std=IMAGENET,
        pixels="pixel_values_videos",
        options=(("skip_predictor", True),),
    ),
    "videomae": Family(size="image_size", fixed_frames=True),
    "timesformer": Family(size="image_size", fixed_frames=True, cls=True, time_last=True),
    "vivit": Family(size="image_size", fixed_frames=True, cls=True, unused=("pooler.",)),
    "videoprism_vision_model": Family(
        size="image_size",
        fixed_frames=True,
        mean_std=((0.0,) * 3, (1.0,) * 3),
        pixels="pixel_values_videos",
    ),
    "siglip": Family(images=True, size="image_size", model=SiglipVisionModel, unused=("head.",)),
    "clip": Family(images=True, size="image_size", cls=True, model=CLIPVisionModel),
    "dinov2": Family(images=True, cls=True),
    "dinov2_with_registers": Family(images=True, cls=True),
    "dinov3_vit": Family(images=True, cls=True),
    "mobilenet_v2": Family(images=True, feature_map=True),
    "resnet": Family(images=True, feature_map=True),
    "convnext": Family(images=True, feature_map=True),
    "convnextv2": Family(images=True, feature_map=True),
}
FAMILIES |= {f"{name}_vision_model": FAMILIES[name] for name in ("siglip", "clip")}


def transform(frames, size, resize, mean_std=IMAGENET):
    """Resize and normalise one clip on its device: uint8 (F, H, W, 3) -> float32 (F, 3, size, size).

    mean_std: mean and standard deviation of the three channels, on a scale from 0 to 1.
    resize:
        "squash" keeps the whole picture and loses the aspect ratio.
        "crop" is the published transform of V-JEPA 2: it scales the shorter edge to size * 256/224
        and takes the central crop, at the same pixels as Meta's code. If an odd number of pixels is
        cut off, VJEPA2VideoProcessor of transformers crops one pixel further up or left.
        "pad" keeps the whole picture and the aspect ratio, and fills the rest with the mean colour,
        which is zero after normalisation.
    A new mode also needs an entry in `feature_cache.CHOICES` and in the help of --resize.
    """
    x = frames.permute(0, 3, 1, 2).float()  # (F, 3, H, W)
    height, width = x.shape[-2:]
    new = {
        "squash": (size, size),
        "crop": _scaled(height, width, size * 256 // 224, min(height, width)),
        "pad": _scaled(height, width, size, max(height, width)),
    }[resize]
    if new != (height, width):
        x = F.interpolate(x, new, mode="bilinear", antialias=True, align_corners=False)
    # rounded because the published transform resizes 8-bit images
    x = x.round().clamp(0, 255) / 255
    mean, std = constants(mean_std, x.device)
    x = (x - mean) / std
    top, left = (round((edge - size) / 2) for edge in new)
    if resize == "crop":
        x = x[..., top : top + size, left : left + size]
    if resize == "pad":
        x = F.pad(x, (-left, size - new[1] + left, -top, size - new[0] + top))
    return x  # (F, 3, size, size)


@cache
def constants(mean_std, device):
    """Return mean and standard deviation as tensors (3, 1, 1) on a device.

    They are cached because creating them again for each clip would synchronise with the GPU.
    """
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in mean_std]


def _scaled(height, width, target, edge):
    return tuple(max(1, int(target * n / edge)) for n in (height, width))


def quantise(features):
    """Quantise features (..., N, E) to int8, with an affine map per clip and channel.

    Returns {"features": int8 (..., N, E), "scale": (..., E), "offset": (..., E)}, where
    x = scale * features + offset. The offset is (min + max) / 2, so that channels whose values are far
    from zero keep their precision.
    """
    low, high = features.aminmax(dim=-2)  # (..., E)
    offset, scale = (low + high) / 2, (high - low) / 254
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # no division by 0 if max = min
    q = ((features - offset.unsqueeze(-2)) / scale.unsqueeze(-2)).round().clamp(-127, 127)
    return {"features": q.to(torch.int8), "scale": scale, "offset": offset}


def quantisation_error(features, stored):
    """Return the relative error of quantised features, (...), of float features (..., N, E).

    stored: the result of `quantise(features)`. The error of a token is the norm of its rounding error,
    divided by the norm of the token after subtracting the mean token of its clip. It is averaged over
    the tokens of a clip, so that a few tokens of large norm do not hide the error of all others. It is
    0.8 % for Gaussian features, and 10 % if every 512th token is 30 times larger, because such tokens
    set the scale of each channel.
    """
    scale, offset = stored["scale"].unsqueeze(-2), stored["offset"].unsqueeze(-2)  # (..., 1, E)
    error = (stored["features"] * scale + offset - features).norm(dim=-1)  # (..., N)
    size = (features - features.mean(-2, keepdim=True)).norm(dim=-1)
    return (error / size.clamp(min=torch.finfo(size.dtype).tiny)).mean(-1)


def feature_map(model, pixels):
    """Compute the feature map of an image model: frames (., 3, S, S) -> (., E, H, W).

    It is the last one, unless config.out_indices lists others by their place in `hidden_states`, as for
    transformers' backbones. Several are stacked along E; the coarser ones are enlarged to the finest grid.
    Raises UserError if the model has no hidden state with that index.
    """
    indices = getattr(model.config, "out_indices", None)
    if not indices:
        return model(pixel_values=pixels).last_hidden_state
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    if not isinstance(indices, list | tuple) or not all(
        type(i) is int and -len(states) <= i < len(states) for i in indices
    ):
        raise UserError(
            f"--encoder: out_indices is {indices} in config.json, but the model has hidden states from 0 to"
            f" {len(states) - 1}"
        )
    maps = [states[i] for i in indices]
    grid = max(x.shape[-2:] for x in maps)
    return torch.cat([F.interpolate(x, grid) if x.shape[-2:] != grid else x for x in maps], 1)


def pool_space(features, grid, pool):
    """Average over squares of pool x pool tokens, not over time: (B, N, E) -> (B, N / pool^2, E)."""
    t, h, w = grid
    x = features.unflatten(1, (t, h // pool, pool, w // pool, pool))
    return x.mean((3, 5)).flatten(1, 3)


class VideoEncoder:
    """A frozen video encoder and the settings with which it computes features."""

    def __init__(self, model, settings, device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.settings, self.device = settings, device
        self.family = FAMILIES[model.config.model_type]

    @classmethod
    def from_pretrained(cls, name, device, dtype, num_frames, sampling, resize, pool, store):
        """Load a model from `name`, a folder or Hub id.

        Raises UserError if it cannot be loaded, is of an unknown type, or is incompatible with `num_frames`
        or `pool`.
        """
        model, folder = _load(name, dtype)
        config, kind = model.config, model.config.model_type
        size, mean_std = _preprocessing(preprocessor_file(folder, name), config)
        grid, width = _grid(model, size, num_frames, pool)
        settings = Settings(
            encoder_fingerprint=hub.fingerprint(folder),
            family=kind,
            num_frames=num_frames,
            sampling=sampling,
            resize=resize,
            size=size,
            mean_std=mean_std,
            pool=pool,
            grid=grid,
            width=width,
            cls=FAMILIES[kind].cls,
            store=store,
            compute_dtype=str(dtype).removeprefix("torch."),
        )
        return cls(model, settings, device)

    @classmethod
    def from_manifest(cls, manifest, device, name=None):
        """Load the encoder that computed a cache.

        On a GPU it computes in the dtype of the cache. On a CPU it computes in float32, because bfloat16 is
        several times slower on most CPUs; features then differ from those in bfloat16 by 2 % of their
        standard deviation.
        name: the encoder's folder or Hub id, if it is no longer the one in the manifest. Raises
        UserError if the fingerprint of that model differs.
        """
        settings = manifest.settings
        dtype = getattr(torch, settings.compute_dtype) if devices.on_gpu(device) else torch.float32
        name = name or hub.recorded("encoder", manifest.info, "--encoder")
        model, folder = _load(name, dtype)
        fingerprint = hub.fingerprint(folder)
        if fingerprint != settings.encoder_fingerprint:
            raise UserError(
                f"--encoder {name} is a different model (fingerprint {fingerprint}): the checkpoint was"
                f" trained on features of {manifest.info['encoder']} ({settings.encoder_fingerprint})"
            )
        return cls(model, settings, device)

    @torch.inference_mode()
    def encode(self, clips, together=None):
        """Encode B clips: {"features": (B, N, E), "cls": (B, E)}, float32 on the device.

        For an image model, "cls" is the mean over the frames. Without a CLS token, there is no "cls".
        clips: uint8 arrays (F, H, W, 3), each with its own H and W.
        together: whether the clips are encoded in one batch. The default is True on a GPU and False on
        a CPU. A batch is faster, but the last bits of the result may depend on the batch size, because
        it selects the matmul kernels.
        """
        s, dtype = self.settings, next(self.model.parameters()).dtype
        pixels = [transform(self._upload(c), s.size, s.resize, s.mean_std) for c in clips]
        pixels = torch.stack(pixels)  # (B, F, 3, S, S)
        if s.sampling == "still":
            pixels = pixels[:, :1].expand_as(pixels)
        together = devices.on_gpu(self.device) if together is None else together
        groups = [pixels] if together else pixels.split(1)
        groups = [self._tokens(g.to(dtype)) for g in groups]
        t, h, w = s.grid
        x = torch.cat([features for features, _ in groups])
        encoded = {"features": pool_space(x, (t, h * s.pool, w * s.pool), s.pool)}
        if s.cls:
            encoded["cls"] = torch.cat([cls for _, cls in groups])
        return encoded

    def _tokens(self, pixels):
        """Apply the model: (B, F, 3, S, S) -> tokens (B, N, E) in the order (T, H, W), and the CLS (B, E)."""
        family, (t, h, w), pool = self.family, self.settings.grid, self.settings.pool
        places = h * w * pool * pool
        pixels = pixels.flatten(0, 1) if family.images else pixels
        if family.feature_map:
            x = feature_map(self.model, pixels).flatten(2).mT
        else:
            x = self.model(**{family.pixels: pixels}, **dict(family.options)).last_hidden_state
        x = x.float()  # (., P + N, E)
        wanted = places if family.images else t * places
        prefix = x.shape[1] - wanted
        if prefix != _prefix(family, self.model.config):
            raise UserError(
                f"the encoder returns {x.shape[1]} tokens, which do not fit its grid of {wanted} tokens"
            )
        cls, x = x[:, 0], x[:, prefix:]
        if family.images:  # (B*F, H*W, E) -> (B, F*H*W, E)
            cls, x = cls.unflatten(0, (-1, t)).mean(1), x.unflatten(0, (-1, t)).flatten(1, 2)
        if family.time_last:
            x = x.unflatten(1, (places, t)).transpose(1, 2).flatten(1, 2)
        return x, cls

    def _upload(self, clip):
        frames = torch.as_tensor(clip)
        if not devices.on_gpu(self.device):
            return frames
        return frames.pin_memory().to(self.device, non_blocking=True)

    @torch.inference_mode()
    def launch(self, clips, measure=False):
        """Start encoding B clips. Returns a function that waits and returns the result of `stored`.

        On a GPU, all work is queued, including the copy back to the host, so the caller can prepare the
        next batch in the meantime.
        measure: add the `quantisation_error` of each clip to its dict as "error" if the store is int8.
        """
        batch = self.encode(clips)
        x = batch["features"]  # (B, N, E)
        batch |= quantise(x) if self.settings.store == "int8" else {"features": x.half()}
        if "cls" in batch:
            batch["cls"] = batch["cls"].half()
        if measure and self.settings.store == "int8":
            batch["error"] = quantisation_error(x, batch)
        finite = batch["features"] if self.settings.store == "fp16" else x
        batch["finite"] = finite.isfinite().flatten(1).all(1)  # (B,)
        batch = {k: v.to("cpu", non_blocking=True) for k, v in batch.items()}  # into pinned memory
        done = torch.cuda.Event() if devices.on_gpu(self.device) else None
        if done:
            # of this device: that of a thread other than the main one, as in the web demo, is GPU 0
            done.record(torch.cuda.current_stream(self.device))

        def finish():
            if done:
                done.synchronize()
            usable = batch.pop("finite").tolist()
            # Clone each clip: saving a view would write the whole batch to disk.
            return [
                {k: v[i].clone() for k, v in batch.items()} if ok else None
                for i, ok in enumerate(usable)
            ]

        return finish

    def stored(self, clips):
        """Encode B clips and return B dicts in the stored form of `feature_cache.save_features`.

        The entry of a clip is None if its features contain NaN or infinity.
        """
        return self.launch(clips)()


def encode_files(encoder, clips, batch_size, pool):
    """Decode and encode clips in batches. Yields a pair (key, result) for each clip.

    clips: {key: (path, span)}, where span is (start, end) in seconds, or None for the whole file.
    pool: a `WorkerPool` for decoding. A result is (`Source`, stored features, decoder), see
    `feature_cache.save_features`, or a VideoError if the file cannot be decoded or is damaged, or
    if its features contain NaN or infinity.
    """

    def launch(batch):
        # without the frames, to free memory
        names = [(key, source, clip.decoder) for key, source, clip in batch]
        frames = [clip.frames for *_, clip in batch]
        return names, encoder.launch(frames, measure=next(numbers) == 0)

    def collect(names, finish):
        records = finish()
        note_quantisation([r.pop("error").item() for r in records if r and "error" in r])
        for (key, source, decoder), stored in zip(names, records, strict=True):
            if stored is None:
                yield key, VideoError("non_finite", "the encoder returned NaN or infinity")
            else:
                yield key, (source, stored, decoder)

    batch, running, numbers = [], deque(), count()
    jobs = ((key, *clip, encoder.settings.num_frames) for key, clip in clips.items())
    too_long = 0  # spans that end after the end of their file
    ahead = 2 * (batch_size + pool.workers)  # so that decoding continues while a batch is encoded
    for key, result in pool.map(video.decode_source, jobs, ahead):
        if isinstance(result, VideoError):
            yield key, result
        elif damage := result[1].damage:
            yield key, VideoError(*damage)
        else:
            batch.append((key, *result))
            span = clips[key][1]
            too_long += bool(span) and span[1] > result[1].duration + 0.1
        if len(batch) == batch_size:
            # queue this batch on the GPU before collecting the previous one, so that it stays busy
            running.append(launch(batch))
            batch = []
            while len(running) > (1 if devices.on_gpu(encoder.device) else 0):
                yield from collect(*running.popleft())
    running += [launch(batch)] if batch else []
    for launched in running:
        yield from collect(*launched)
    if too_long:
        what = counted(too_long, "clip ends", "clips end")
        note(f"note: {what} after the end of the video; the end of the video is used instead")


def note_quantisation(errors):
    """Print the median of the quantisation errors of some clips, as a warning if it is high."""
    if not errors:
        return
    error = median(errors)  # a clip of constant colour has a large error that does not matter
    text = f"int8 storage: relative error {error:.1%} (median of the first {counted(len(errors), 'clip')})"
    if error > MAX_ERROR:
        text = (
            f"WARNING: {text}, more than {MAX_ERROR:.0%}. A few tokens are much larger than the"
            " others, and the others lose precision. Use --store fp16 with another --features folder;"
            " it takes twice the space."
        )
    note(text)


def family_of(folder, name):
    """Return the `Family` of the model in a folder. Raises UserError if it is of an unknown type."""
    kind = hub.read_config(folder).get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(
            f"--encoder {name} is a model of type {kind!r}. Possible types: {', '.join(FAMILIES)}"
        )
    return family


def preprocessor_file(folder, name):
    """Return the path of a model's preprocessor file, or None if the model has and needs none.

    Raises UserError if a required file is missing, or if the model is of an unknown type.
    """
    path = next((folder / file for file in PREPROCESSORS if (folder / file).is_file()), None)
    if path is None and family_of(folder, name).mean_std is None:
        raise UserError(
            f"--encoder {name} has no {PREPROCESSORS[1]}, which must contain the mean and standard"
            " deviation of its pixels"
        )
    return path


def _load(name, dtype):
    """Return a model and its folder. Raises UserError if it is not an encoder or cannot be loaded."""
    folder = hub.find_model(name, "--encoder")
    family = family_of(folder, name)
    return hub.load_model(family.model, folder, "--encoder", family.unused, dtype=dtype), folder


def _prefix(family, config):
    """Return the number of tokens before those of the grid: CLS and registers."""
    return (1 + getattr(config, "num_register_tokens", 0)) if family.cls else 0


def _grid(model, size, num_frames, pool):
    """Return the grid (T, H, W) of pooled tokens and their width E.

    Raises UserError if `num_frames` or `pool` does not fit the model.
    """
    config, family = model.config, FAMILIES[model.config.model_type]
    if family.fixed_frames and num_frames != config.num_frames:
        raise UserError(
            f"--num-frames {num_frames}: this encoder accepts only {config.num_frames} frames, as in its"
            f" training; use --num-frames {config.num_frames}"
        )
    tubelet, patch = getattr(config, "tubelet_size", 1), getattr(config, "patch_size", None)
    if not isinstance(tubelet, int):  # (frames, pixels, pixels)
        tubelet, patch, _ = tubelet
    patch = patch if isinstance(patch, int) or patch is None else patch[0]
    if num_frames % tubelet:
        raise UserError(f"--num-frames {num_frames} must be a multiple of {tubelet}")
    if family.feature_map:
        with torch.inference_mode():
            x = feature_map(model.eval(), torch.zeros(1, 3, size, size, dtype=model.dtype))
        width, side, _ = x.shape[1:]
    elif size % patch:
        raise UserError(
            f"the encoder's frames of {size} pixels are not a multiple of its patches of {patch}"
        )
    else:
        width, side = config.hidden_size, size // patch
    if side % pool:
        raise UserError(f"--pool {pool} does not divide the encoder's {side} x {side} grid")
    return (num_frames // tubelet, side // pool, side // pool), width


def _preprocessing(path, config):
    """Return the edge S of the frames, and the mean and standard deviation of pixels from 0 to 1.

    path: the preprocessor file, or None. Raises UserError if one of these values is not in it.
    A preprocessor computes (p * rescale_factor - offset - mean) / std from p = 0 .. 255, which equals
    (p / 255 - mean') / std' with mean' = (offset + mean) / (255 * rescale_factor) and
    std' = std / (255 * rescale_factor).
    """
    family = FAMILIES[config.model_type]
    if path is None:
        return getattr(config, family.size), family.mean_std
    try:
        p = read_json(path, "preprocessor")
        p = p.get("video_processor") or p.get("image_processor") or p  # of processor_config.json
        scale = 255 * p.get("rescale_factor", 1 / 255) if p.get("do_rescale", True) else 255
        offset = 1 if p.get("offset") else 0
        normalise = p.get("do_normalize", True)
        mean, std = (p["image_mean"], p["image_std"]) if normalise else ((0, 0, 0), (1, 1, 1))
        mean_std = tuple((offset + m) / scale for m in mean), tuple(v / scale for v in std)
        edge = p.get("crop_size") if p.get("do_center_crop") else p["size"]
        size = getattr(config, family.size) if family.size else _edge(edge)
        if isinstance(size, tuple):
            raise UserError(f"{path}: frames of {size[0]} x {size[1]} pixels are not square")
        ok = (
            all(len(v) == 3 and all(map(math.isfinite, v)) for v in mean_std)
            and min(mean_std[1]) > 0
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        ok = False
    if not ok or not (is_count(size) and size <= MAX_SIZE):
        raise UserError(
            f"{path} does not contain a valid size, mean and standard deviation of the pixels"
        )
    return size, mean_std


def _edge(size):
    """Return the edge of 224, {"shortest_edge": 224} or {"height": 224, "width": 224}.

    If the size is not square, return (height, width).
    """
    if not isinstance(size, dict) or "shortest_edge" in size:
        return size["shortest_edge"] if isinstance(size, dict) else size
    height, width = size["height"], size["width"]
    return height if height == width else (height, width)
