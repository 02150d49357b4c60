"""Attention maps: the weights and their pictures."""

import io

import av
import numpy as np
import pytest
import torch

from runtime.feature_cache import Settings
from viz import attention_map

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
GRID = (4, 3, 5)


def test_weights_equal_textbook_attention(make_qformer, make_clips):
    """softmax(q k / sqrt(d)) with explicit keys, for two blocks."""
    qformer, clips = make_qformer(grid=GRID, num_blocks=2).eval(), make_clips(3)
    weights = qformer.attention(*clips)
    assert weights.shape == (3, 2, 4, 6, *GRID)
    assert torch.allclose(weights.sum((-1, -2, -3)), torch.ones(3, 2, 4, 6))
    kv = qformer.stored(*clips).tokens()
    x = qformer.queries[None]
    for n, block in enumerate(qformer.blocks):
        x = x + block.self_attention(block.norm_self(x))
        cross = block.cross
        q, k = cross.heads(cross.q(block.norm_cross(x))), cross.heads(cross.k(kv))
        expected = (q @ k.mT / k.shape[-1] ** 0.5).softmax(-1).expand(3, -1, -1, -1)
        assert torch.allclose(weights[:, n].flatten(-3), expected, atol=1e-5)
        x = x + cross.textbook(block.norm_cross(x), kv)
        x = x + block.mlp(block.norm_mlp(x))


def test_reading_the_weights_changes_nothing(make_qformer, make_clips):
    qformer, clips = make_qformer(grid=GRID, dropout=0.1).eval(), make_clips(2)
    before = qformer(*clips)
    qformer.attention(*clips)
    assert torch.equal(before, qformer(*clips))


def test_the_mass_is_at_the_token_that_matches_the_queries(make_qformer, make_clips):
    """A token in the direction of all queries' keys gets most of the weight, at its own position."""
    qformer = make_qformer(grid=GRID).eval()
    with torch.no_grad():
        for table in qformer.pos:
            table.zero_()
        features, scale, offset = make_clips(1, store="fp16")
        cross = qformer.blocks[0].cross
        cross.q.weight.zero_()
        cross.q.bias.copy_(torch.randn(32))
        key = cross.per_head(cross.k.weight).mT @ cross.q.bias.view(4, -1, 1)  # (A, D, 1)
        direction = (key.sum(0).T @ qformer.project.weight)[0]  # (E,)
        features[0, 37] = (direction * qformer.std * 500 / direction.norm()).half()
    mass = attention_map.mass(qformer, {"features": features, "scale": scale, "offset": offset})
    assert mass.shape == (1, *GRID) and np.isclose(mass.sum(), 1)
    assert np.unravel_index(mass.argmax(), mass.shape)[1:] == np.unravel_index(37, GRID)
    assert mass.max() > 0.5


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_picture_shows_what_the_encoder_saw(resize):
    """A square in the top left corner of a wide frame is visible unless the frame is cropped."""
    frames = np.zeros((8, 60, 120, 3), np.uint8)
    frames[:, :20, :20, 0] = 255
    settings = Settings(size=64, resize=resize)
    seen = attention_map.as_encoded(frames, settings)
    assert seen.shape == (8, 64, 64, 3)
    red = (seen[0, :, :, 0] > 200).any()
    assert red == (resize != "crop")
    picture = Image.open(
        io.BytesIO(attention_map.draw(frames, np.full((4, 2, 2), 1 / 16), settings, "x"))
    )
    assert picture.width > 400 and picture.height > 200


def test_weight_is_drawn_at_its_position():
    """The grid has 2 moments of 3 x 5 positions, and most of the weight is in the last column of the
    first row of the first moment."""
    frames = np.full((4, 64, 64, 3), 250, np.uint8)
    here, there = (np.full((2, 3, 5), 0.001) for _ in range(2))
    here[0, 0, 4] = there[1, 2, 0] = 1 - 0.029
    plain, peaked = drawn(frames, there), drawn(frames, here)
    row = plain[
        len(plain) // 4
    ]  # crosses both frames, which are slightly darker than the background
    columns = np.flatnonzero((row == 250).all(-1))
    columns = columns[: np.argmax(np.diff(columns) > 1) + 1]  # those of the first frame
    above = slice(len(plain) * 2 // 5, len(plain) * 18 // 25)  # the attention panels, not the bars
    changed = np.abs(plain - peaked).sum(-1)[above, columns[0] : columns[-1] + 1] > 60
    y, x = (np.flatnonzero(changed.any(axis)) / changed.shape[1 - axis] for axis in (1, 0))
    assert x.min() > 0.75 and y.max() < 0.5 and changed.mean() > 0.02


def test_each_moment_shows_its_own_frames():
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    frames[2:] = 250  # the second moment
    dark = np.zeros_like(frames)
    even = np.full((2, 4, 4), 1 / 32)
    where = (np.abs(drawn(frames, even) - drawn(dark, even)).sum(-1) > 100).any(0)
    assert np.flatnonzero(where).min() > len(where) * 0.35


def test_a_caption_with_dollar_signs_is_text():
    """matplotlib reads text between dollar signs as mathematics, and this text raised an error."""
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    assert drawn(frames, np.full((2, 4, 4), 1 / 32), r"a $\foo$ b").any()


def drawn(frames, weights, title=""):
    settings = Settings(size=64)
    data = attention_map.draw(frames, weights, settings, title)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)


def test_each_window_gets_a_picture(trained, tmp_path, capsys):
    """A clip of two windows and a broken clip give two pictures and one error message."""
    with av.open(str(tmp_path / "film.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for n in range(48):
            picture = np.full((64, 64, 3), 40 + 4 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "broken.webm").write_bytes(b"no film")
    output = tmp_path / "out"
    flags = ["--checkpoint", str(trained), "--workers", "0", "--output", str(output)]
    flags += ["--window", "2", "--stride", "2"]
    assert attention_map.main([str(tmp_path), *flags]) == 3
    printed = capsys.readouterr()
    names = [f"film_attention_{span}.png" for span in ("0.00-2.00", "2.00-4.00")]
    assert printed.out.split() == [str(output / name) for name in names]
    assert sorted(p.name for p in output.iterdir()) == names
    assert printed.err.endswith("1 of 2 clips failed\n")
    assert attention_map.main([str(tmp_path / "broken.webm"), *flags]) == 1
