"""SVT's weights -> a TimeSformer folder for --encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder import VideoEncoder
from runtime.errors import UserError
from tools import convert_svt

WIDTH, FRAMES, PLACES, PATCH = 64, 4, 4, 16  # 2 x 2 patches of 16 pixels; one attention head


def weights():
    """Random tensors with the names and shapes of SVT's checkpoint, for two blocks."""
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + PLACES, WIDTH),
        "time_embed": (1, FRAMES, WIDTH),
        "patch_embed.proj": (WIDTH, 3, PATCH, PATCH),
        "norm": (WIDTH,),
        "head.last_layer.weight": (7, WIDTH),
    }
    for i in range(2):
        for name in ("norm1", "norm2", "temporal_norm1"):
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
        for name in ("attn", "temporal_attn"):
            shapes[f"blocks.{i}.{name}.qkv"] = (3 * WIDTH, WIDTH)
            shapes[f"blocks.{i}.{name}.proj"] = (WIDTH, WIDTH)
        shapes[f"blocks.{i}.temporal_fc"] = (WIDTH, WIDTH)
        shapes[f"blocks.{i}.mlp.fc1"] = (4 * WIDTH, WIDTH)
        shapes[f"blocks.{i}.mlp.fc2"] = (WIDTH, 4 * WIDTH)
    found = {}
    for name, shape in shapes.items():
        if name.endswith(("embed", "token", "weight")):
            found[name] = torch.randn(shape, generator=rng) * 0.3
        else:
            found[f"{name}.weight"] = torch.randn(shape, generator=rng) * 0.1
            found[f"{name}.bias"] = torch.randn(shape[0], generator=rng) * 0.1
    return found


def svt(w, pixels):
    """The forward pass of SVT as its paper defines it: (F, 3, S, S) -> tokens (1 + places*F, E)."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def attend(name, x):
        q, k, v = linear(f"{name}.qkv", x).chunk(3, -1)
        return linear(f"{name}.proj", (q @ k.mT / WIDTH**0.5).softmax(-1) @ v)

    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], PATCH)
    x = x.flatten(2).mT + w["pos_embed"][:, 1:]  # (F, places, E)
    x = x.transpose(0, 1) + w["time_embed"]  # (places, F, E)
    cls = w["cls_token"] + w["pos_embed"][:, :1]  # (1, 1, E)
    for i in range(2):
        b = f"blocks.{i}"
        # attention over time at each place
        y = attend(f"{b}.temporal_attn", norm(f"{b}.temporal_norm1", x))
        x = x + linear(f"{b}.temporal_fc", y)
        # attention over the places of each frame, and a CLS that is averaged over the frames
        frames = torch.cat([cls.expand(FRAMES, 1, WIDTH), x.transpose(0, 1)], 1)
        y = attend(f"{b}.attn", norm(f"{b}.norm1", frames))
        cls, x = cls + y[:, :1].mean(0, keepdim=True), x + y[:, 1:].transpose(0, 1)
        tokens = torch.cat([cls[0], x.flatten(0, 1)])  # (1 + places*F, E)
        y = F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", tokens)))
        tokens = tokens + linear(f"{b}.mlp.fc2", y)
        cls, x = tokens[None, :1], tokens[1:].unflatten(0, (PLACES, FRAMES))
    return norm("norm", tokens)


def test_the_converted_model_computes_what_svt_does(tmp_path):
    w = weights()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in w.items()}}, tmp_path / "svt.pth")
    convert_svt.main([str(tmp_path / "svt.pth"), str(tmp_path / "svt")])
    encoder = VideoEncoder.from_pretrained(
        str(tmp_path / "svt"),
        *(torch.device("cpu"), torch.float32, FRAMES, "bin_centres", "squash", 1, "fp16"),
    )
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 32, 3), dtype=np.uint8)
    pixels = (torch.as_tensor(clip).permute(0, 3, 1, 2) / 255 - 0.45) / 0.225
    want = svt(w, pixels)
    found = encoder.encode([clip])
    by_time = want[1:].unflatten(0, (PLACES, FRAMES)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(found["features"][0], by_time, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["cls"][0], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embed": None}, "does not contain the weights of SVT"),
        ({"blocks.1.attn.qkv.weight": None}, "not those of SVT: .*Missing key"),
        ({"blocks.0.extra": torch.zeros(1)}, "not those of SVT: .*Unexpected key"),
    ],
)
def test_other_weights_are_refused(change, message, tmp_path):
    found = {k: v for k, v in (weights() | change).items() if v is not None}
    torch.save(found, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        convert_svt.main([str(tmp_path / "other.pth"), str(tmp_path / "svt")])
    assert not (tmp_path / "svt").exists()
