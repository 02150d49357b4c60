"""V-JEPA 2: uint8 frames -> normalised pixels -> features -> what is stored.

One set of `settings` (the manifest's) decides all of it, so that preprocessing and inference cannot
differ. Shapes: B clips, F frames, N = T*H*W video tokens, E video width.
"""

from functools import cache

import torch
import torch.nn.functional as F
from transformers import AutoModel

from dataset import Settings
from runtime import devices, hub
from runtime.errors import UserError

# ImageNet statistics, V-JEPA 2's (Assran et al. 2025, arXiv:2506.09985) and most others'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transform(frames, size, resize):
    """Resize and normalise one clip on its device: uint8 (F, H, W, 3) -> float32 (F, 3, size, size).

    resize: "squash" keeps the whole field of view and gives up the aspect ratio; "crop" is V-JEPA 2's
    published transform (shortest edge to size * 256/224, central crop); "pad" keeps both and fills
    with the mean colour, which is zero after normalisation.
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
    x = x.round().clamp(0, 255) / 255  # the published transform resizes 8-bit images
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
    """Mean and std (3, 1, 1) on a device, made once: a new tensor per clip would wait for all that the GPU still has to do."""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD)]


def _scaled(height, width, target, edge):
    return tuple(max(1, int(target * n / edge)) for n in (height, width))


def quantise(features):
    """Affine int8 per clip and channel: float32 (..., N, E) -> {"features" int8 (..., N, E),
    "scale" and "offset" (..., E)}.

    x = scale * q + offset with offset = (min + max) / 2, so a channel far from zero keeps its detail.
    """
    low, high = features.aminmax(dim=-2)  # (..., E)
    offset, scale = (low + high) / 2, (high - low) / 254
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # a constant channel: q = 0
    q = ((features - offset.unsqueeze(-2)) / scale.unsqueeze(-2)).round().clamp(-127, 127)
    return {"features": q.to(torch.int8), "scale": scale, "offset": offset}


def pool_space(features, grid, pool):
    """Mean over squares of pool x pool tokens, never over time: (B, T*H*W, E) -> (B, N / pool^2, E)."""
    t, h, w = grid
    x = features.unflatten(1, (t, h // pool, pool, w // pool, pool))
    return x.mean((3, 5)).flatten(1, 3)


class VideoEncoder:
    """A frozen V-JEPA 2 with the settings under which its features are kept."""

    def __init__(self, model, settings, device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.settings, self.device = settings, device

    @classmethod
    def from_pretrained(cls, name, device, dtype, num_frames, sampling, resize, pool, store):
        """Load `name` (folder or Hub id). Raises UserError if sizes do not go together."""
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
        """Load the encoder that made a cache; `name` says where it lies now, if elsewhere."""
        settings = manifest.settings
        name = name or manifest.info["encoder"]
        model, fingerprint = _load(name, getattr(torch, settings.compute_dtype))
        if fingerprint != settings.encoder_fingerprint:
            raise UserError(
                f"--encoder {name} has fingerprint {fingerprint}, but the checkpoint was trained on"
                f" features of {manifest.info['encoder']} ({settings.encoder_fingerprint})"
            )
        c, patch = model.config, model.config.patch_size
        side = c.crop_size // (patch if isinstance(patch, int) else patch[0]) // settings.pool
        if settings.grid != (settings.num_frames // c.tubelet_size, side, side):
            raise UserError(f"--encoder {name} does not make a grid of {settings.grid} tokens")
        return cls(model, settings, device)

    @torch.inference_mode()
    def encode(self, clips, together=None):
        """B clips, uint8 arrays (F, H, W, 3) of any size -> features (B, N, E), float32, on the device.

        together: in one batch; by default on a GPU only. On a CPU one by one, though a
        batch is faster: matmul kernels, and so the last bits, may depend on its size.
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
    def launch(self, clips):
        """Start B clips; the function returned waits for them and gives what `stored` gives.

        On a GPU all is queued, the copy back included, so the next batch can be prepared meanwhile.
        """
        x = self.encode(clips)  # (B, N, E)
        batch = quantise(x) if self.settings.store == "int8" else {"features": x.half()}
        finite = batch["features"] if self.settings.store == "fp16" else x
        batch["finite"] = finite.isfinite().flatten(1).all(1)  # (B,)
        batch = {k: v.to("cpu", non_blocking=True) for k, v in batch.items()}  # pinned there
        done = torch.cuda.Event() if devices.on_gpu(self.device) else None
        if done:
            done.record()

        def finish():
            if done:
                done.synchronize()
            fine = batch.pop("finite").tolist()
            # a copy each: a view of the batch would write the whole batch to disk
            return [
                {k: v[i].clone() for k, v in batch.items()} if ok else None
                for i, ok in enumerate(fine)
            ]

        return finish

    def stored(self, clips):
        """B clips -> B dicts in stored form (see `dataset.save_features`), None where not finite."""
        return self.launch(clips)()


def _load(name, dtype):
    folder = hub.find_model(name, "--encoder")
    model = hub.load_model(AutoModel, folder, "--encoder", dtype=dtype)
    if not hasattr(model, "get_vision_features") or model.config.model_type != "vjepa2":
        raise UserError(f"--encoder {name} is a {model.config.model_type} model, not V-JEPA 2")
    return model, hub.fingerprint(folder)
