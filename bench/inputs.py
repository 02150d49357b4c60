"""Make the random models and synthetic clips of the speed benchmark.

Shapes, in all files: B clips, N = T*H*W video tokens, E video width, Q queries, A heads,
D and V width and vocabulary of the language model, K captions per clip, L text tokens, M text tokens
with a loss.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, VJEPA2Config, VJEPA2Model

from dataset import Caption
from encoder import VideoEncoder
from qformer import QFormer
from runtime import devices
from runtime.feature_cache import Settings
from worlds.ssv2_files import write_video

PROMPT = [5, 6, 7, 8]  # as many tokens as "a video showing:" has in Qwen2


@dataclass(frozen=True)
class Shapes:
    grid: tuple  # T, H, W
    E: int
    Q: int
    A: int
    encoder: tuple  # V-JEPA 2 of width E: layers, heads, pixels, frames
    D: int
    V: int
    layers: int  # of the language model, like mlp and lm_heads
    mlp: int
    lm_heads: int
    B: int
    tokens: int  # maximum length of a caption
    clips: int  # maximum number of clips captioned at once
    videos: int  # number of videos to decode
    seconds: float  # duration of each comparison


# V-JEPA 2 ViT-L and Qwen2-1.5B
REAL = Shapes(
    grid=(16, 16, 16),
    E=1024,
    Q=64,
    A=4,
    encoder=(24, 16, 256, 32),
    D=1536,
    V=151936,
    layers=28,
    mlp=8960,
    lm_heads=12,
    B=32,
    tokens=16,
    clips=256,
    videos=32,
    seconds=12,
)
# A quarter of the widths, queries and clips, half the tokens, a seventh of the layers, a small vocabulary
SMALL = replace(REAL, grid=(8, 16, 16), E=256, Q=16, encoder=(2, 4, 64, 16), D=384, V=8192)
SMALL = replace(SMALL, layers=4, mlp=2240, lm_heads=6, B=8, videos=16, seconds=5)
# For the check in float64 and for tests
TINY = replace(SMALL, grid=(4, 2, 6), E=24, Q=6, D=32, V=130, mlp=64, lm_heads=4)
TINY = replace(TINY, B=3, tokens=8, clips=64, videos=4, seconds=0)


# ---- models --------------------------------------------------------------------------------------


def make_qformer(s, device, dtype=None):
    qformer = QFormer(
        num_queries=s.Q,
        width=s.D,
        video_width=s.E,
        grid=s.grid,
        num_blocks=1,
        num_heads=s.A,
    )
    for norm in (m for m in qformer.modules() if isinstance(m, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.bias, std=0.1)  # zero biases would hide bugs
    return qformer.to(device, dtype)


def make_lm(s, device, dtype):
    config = Qwen2Config(
        vocab_size=s.V,
        hidden_size=s.D,
        intermediate_size=s.mlp,
        num_hidden_layers=s.layers,
        num_attention_heads=s.lm_heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.05,  # logits are less uniform, so there are fewer near ties
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)


def lm_dtype(device):
    """Return the language model's dtype on this device."""
    return torch.bfloat16 if devices.on_gpu(device) else torch.float32


class Words:
    """A stub tokenizer for texts that are already token ids."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False, return_tensors=None):
        return {"input_ids": torch.tensor([PROMPT]) if return_tensors else PROMPT}

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in rows]


def make_encoder(s, device):
    """Make a V-JEPA 2 with random weights. A token covers 16 x 16 pixels of two frames."""
    layers, heads, side, frames = s.encoder
    config = VJEPA2Config(
        crop_size=side,
        frames_per_clip=frames,
        hidden_size=s.E,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        pred_hidden_size=48,  # the predictor is not used
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )
    settings = Settings(size=side, grid=(frames // 2, side // 16, side // 16))
    return VideoEncoder(VJEPA2Model(config).to(lm_dtype(device)), settings, device)


# ---- clips and captions --------------------------------------------------------------------------


def make_clips(s, count):
    """Make clips as stored in int8: {"features" (count, N, E), "scale", "offset" (count, E)}.

    Scales are powers of two and offsets have few bits, so float16 represents the values exactly and the
    float16 and int8 forms of a clip give the same result. Each clip has its own mean, because clips that
    are too similar get the same caption. Some channels are far from zero, as in vision transformers.
    """
    tokens = s.grid[0] * s.grid[1] * s.grid[2]
    x = torch.randn(count, tokens, s.E) + torch.randn(count, 1, s.E)
    scale = 2.0 ** -torch.randint(5, 7, (count, s.E))
    offset = torch.randint(-32, 32, (count, s.E)) / 32
    offset[:, :: max(1, s.E // 8)] += 20
    q = (x / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"features": q, "scale": scale, "offset": offset}


def dequantised(stored, dtype):
    """Convert stored clips to features, float (B, N, E)."""
    x = stored["features"].to(dtype) * stored["scale"][:, None].to(dtype)
    return x + stored["offset"][:, None].to(dtype)


def standardise(qformer, features):
    """Set the Q-Former's channel statistics to those of `features`, float (B, N, E)."""
    x = features.float()
    qformer.standardise(x.mean((0, 1)), x.std((0, 1)))


def make_captions(s, count, per_clip):
    """Make count x per_clip token lists. Each ends in 0, which occurs nowhere else."""
    rng = random.Random(0)

    def one():
        length = rng.randint(s.tokens // 2, s.tokens)
        return [*(rng.randrange(1, s.V) for _ in range(length)), 0]

    return [[one() for _ in range(per_clip)] for _ in range(count)]


def as_items(stored, captions):
    """Combine clips and captions into items like those of a `FeatureDataset`, for `collate`."""
    return [
        {
            "id": str(i),
            **{k: v[i] for k, v in stored.items()},
            "captions": [Caption("label", PROMPT, c) for c in texts],
        }
        for i, texts in enumerate(captions)
    ]


def in_host_memory(batch, device):
    """Return a batch as the loader does: in pinned memory if the device is a GPU."""
    pin = devices.on_gpu(device)
    return {k: v.pin_memory() if pin and k != "ids" else v for k, v in batch.items()}


def write_clip(path, seed):
    """Write a webm like SSv2's (VP9, 428 x 240, 12 frames/s, 2-6 s): a square on moving texture."""
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(24, 73))
    texture = rng.integers(60, 180, (15, 40, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    video = np.stack([np.roll(texture, 2 * i, 1)[:, :428] for i in range(frames)])
    for i, image in enumerate(video):
        left = 20 + 300 * i // frames
        image[80:150, left : left + 70] = 230
    write_video(path, video)
