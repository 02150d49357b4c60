"""V-JEPA 2 encoder: uint8 frames -> normalised pixels -> features -> stored (int8 or float16) form.

Every step is determined by the `Settings` in the manifest, so preprocessing and inference always
agree. Shapes: B clips, F frames, N = T*H*W video tokens, E video width.
"""

from collections import deque
from functools import cache
from itertools import count
from statistics import median

import torch
import torch.nn.functional as F
from transformers import AutoModel

import video
from feature_cache import Settings
from runtime import devices, hub
from runtime.cli import note
from runtime.errors import UserError, VideoError
from runtime.names import counted

# ImageNet mean and standard deviation, used by V-JEPA 2 (Assran et al. 2025, arXiv:2506.09985)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_ERROR = 0.03  # of int8 storage, see `quantisation_error`; 0.008 for Gaussian features


def transform(frames, size, resize):
    """Resize and normalise one clip on its device: uint8 (F, H, W, 3) -> float32 (F, 3, size, size).

    resize:
        "squash" keeps the whole picture and loses the aspect ratio.
        "crop" is the published transform of V-JEPA 2: it scales the shorter edge to size * 256/224 and
        takes the central crop. Its edges are those of Meta's code. If an odd number of pixels is cut off,
        VJEPA2VideoProcessor of transformers crops one pixel further up or left.
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
    mean, std = constants(x.device)
    x = (x - mean) / std
    top, left = (round((edge - size) / 2) for edge in new)
    if resize == "crop":
        x = x[..., top : top + size, left : left + size]
    if resize == "pad":
        x = F.pad(x, (-left, size - new[1] + left, -top, size - new[0] + top))
    return x  # (F, 3, size, size)


@cache
def constants(device):
    """Return MEAN and STD as tensors (3, 1, 1) on a device.

    They are cached because creating them again for each clip would synchronise with the GPU.
    """
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD)]


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


def pool_space(features, grid, pool):
    """Average over squares of pool x pool tokens, not over time: (B, N, E) -> (B, N / pool^2, E)."""
    t, h, w = grid
    x = features.unflatten(1, (t, h // pool, pool, w // pool, pool))
    return x.mean((3, 5)).flatten(1, 3)


class VideoEncoder:
    """A frozen V-JEPA 2 model and the settings with which it computes features."""

    def __init__(self, model, settings, device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.settings, self.device = settings, device

    @classmethod
    def from_pretrained(cls, name, device, dtype, num_frames, sampling, resize, pool, store):
        """Load a model from `name`, a folder or Hub id.

        Raises UserError if it cannot be loaded, is not V-JEPA 2, or is incompatible with `num_frames`
        or `pool`.
        """
        model, fingerprint = _load(name, dtype)
        config = model.config
        patch, tubelet = config.patch_size, config.tubelet_size
        side = config.crop_size // (patch if isinstance(patch, int) else patch[0])
        if num_frames % tubelet:
            raise UserError(f"--num-frames {num_frames} must be a multiple of {tubelet}")
        if side % pool:
            raise UserError(f"--pool {pool} does not divide the encoder's {side} x {side} grid")
        settings = Settings(
            encoder_fingerprint=fingerprint,
            num_frames=num_frames,
            sampling=sampling,
            resize=resize,
            size=config.crop_size,
            pool=pool,
            grid=(num_frames // tubelet, side // pool, side // pool),
            width=config.hidden_size,
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
        name: its folder or Hub id, if it is no longer the one in the manifest. Raises UserError if it is
        another model.
        """
        settings = manifest.settings
        dtype = getattr(torch, settings.compute_dtype) if devices.on_gpu(device) else torch.float32
        name = name or hub.recorded("encoder", manifest.info, "--encoder")
        model, fingerprint = _load(name, dtype)
        if fingerprint != settings.encoder_fingerprint:
            raise UserError(
                f"--encoder {name} is a different model (fingerprint {fingerprint}): the checkpoint was"
                f" trained on features of {manifest.info['encoder']} ({settings.encoder_fingerprint})"
            )
        c, patch = model.config, model.config.patch_size
        side = c.crop_size // (patch if isinstance(patch, int) else patch[0]) // settings.pool
        if settings.grid != (settings.num_frames // c.tubelet_size, side, side):
            raise UserError(f"--encoder {name} does not produce a grid of {settings.grid} tokens")
        return cls(model, settings, device)

    @torch.inference_mode()
    def encode(self, clips, together=None):
        """Compute float32 features (B, N, E), on the device, of B clips.

        clips: uint8 arrays (F, H, W, 3), each with its own H and W.
        together: whether the clips are encoded in one batch. The default is True on a GPU and False on
        a CPU. A batch is faster, but the last bits of the result may depend on the batch size, because
        it selects the matmul kernels.
        """
        s, dtype = self.settings, next(self.model.parameters()).dtype
        pixels = [transform(self._upload(c), s.size, s.resize) for c in clips]
        pixels = torch.stack(pixels)  # (B, F, 3, S, S)
        if s.sampling == "still":
            pixels = pixels[:, :1].expand_as(pixels)
        together = devices.on_gpu(self.device) if together is None else together
        groups = [pixels] if together else pixels.split(1)
        x = torch.cat([self.model.get_vision_features(g.to(dtype)).float() for g in groups])
        t, h, w = s.grid
        return pool_space(x, (t, h * s.pool, w * s.pool), s.pool)

    def _upload(self, clip):
        frames = torch.as_tensor(clip)
        if not devices.on_gpu(self.device):
            return frames
        return frames.pin_memory().to(self.device, non_blocking=True)

    @torch.inference_mode()
    def launch(self, clips, measure=False):
        """Start to encode B clips. Returns a function that waits and returns the result of `stored`.

        measure: add the `quantisation_error` of each clip to its dict as "error" if the store is int8.

        On a GPU, all work is queued, including the copy back to the host, so the caller can prepare the
        next batch in the meantime.
        """
        x = self.encode(clips)  # (B, N, E)
        batch = quantise(x) if self.settings.store == "int8" else {"features": x.half()}
        if measure and self.settings.store == "int8":
            batch["error"] = quantisation_error(x, batch)
        finite = batch["features"] if self.settings.store == "fp16" else x
        batch["finite"] = finite.isfinite().flatten(1).all(1)  # (B,)
        batch = {k: v.to("cpu", non_blocking=True) for k, v in batch.items()}  # into pinned memory
        done = torch.cuda.Event() if devices.on_gpu(self.device) else None
        if done:
            done.record()

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


def encode_files(encoder, paths, batch_size, pool):
    """Decode and encode whole video files, {key: path}, in batches. Yields a pair (key, result) for each.

    pool: a `WorkerPool` for decoding. The result is (`Source`, stored features, decoder), see
    `feature_cache.save_features`, or a VideoError if the file cannot be decoded or is damaged, or if its
    features contain NaN or infinity.
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
    jobs = ((key, path, encoder.settings.num_frames) for key, path in paths.items())
    ahead = 2 * (batch_size + pool.workers)  # so that decoding continues while a batch is encoded
    for key, result in pool.map(video.decode_source, jobs, ahead):
        if isinstance(result, VideoError):
            yield key, result
        elif damage := result[1].damage:
            yield key, VideoError(*damage)
        else:
            batch.append((key, *result))
        if len(batch) == batch_size:
            # queue this batch on the GPU before collecting the previous one, so that it stays busy
            running.append(launch(batch))
            batch = []
            while len(running) > (1 if devices.on_gpu(encoder.device) else 0):
                yield from collect(*running.popleft())
    running += [launch(batch)] if batch else []
    for launched in running:
        yield from collect(*launched)


def note_quantisation(errors):
    """Print the median of the quantisation errors of the first clips, if any, and a warning if it is high."""
    if not errors:
        return
    error = median(errors)  # in a clip of constant colour the error is large and of no importance
    text = f"int8 storage: relative error {error:.1%} (median of the first {counted(len(errors), 'clip')})"
    if error > MAX_ERROR:
        text = (
            f"WARNING: {text}, more than {MAX_ERROR:.0%}: a few tokens are much larger than the others,"
            " which lose precision. Use --store fp16 with another --features folder; it takes twice the"
            " space"
        )
    note(text)


def _load(name, dtype):
    folder = hub.find_model(name, "--encoder")
    model = hub.load_model(AutoModel, folder, "--encoder", dtype=dtype)
    if not hasattr(model, "get_vision_features") or model.config.model_type != "vjepa2":
        raise UserError(f"--encoder {name} is a {model.config.model_type} model, not V-JEPA 2")
    return model, hub.fingerprint(folder)
