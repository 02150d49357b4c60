"""Frames -> pixels -> features -> stored form."""

import json
import re
from dataclasses import replace

import encoders
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder import FAMILIES, VideoEncoder, quantisation_error, quantise, transform
from runtime import hub
from runtime.errors import UserError
from runtime.feature_cache import IMAGENET, Manifest, load_features, save_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import VJEPA2Config, VJEPA2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = VJEPA2Config(
        crop_size=64,
        frames_per_clip=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    VJEPA2Model(config).save_pretrained(folder)
    return folder


def make(folder, **settings):
    defaults = {
        "num_frames": 8,
        "sampling": "bin_centres",
        "resize": "squash",
        "pool": 1,
        "store": "int8",
    }
    return VideoEncoder.from_pretrained(
        str(folder), torch.device("cpu"), torch.float32, **defaults | settings
    )


def clips(count, height=40, width=71):
    return [
        np.random.default_rng(i).integers(0, 256, (8, height, width, 3), dtype=np.uint8)
        for i in range(count)
    ]


@pytest.mark.parametrize(("height", "width"), [(240, 427), (300, 200), (256, 256)])
def test_crop_is_the_published_transform(height, width):
    """V-JEPA 2's processor: shortest edge to 292, bilinear with antialias on 8-bit images, central
    crop of 256, 1/255, ImageNet mean and deviation."""
    frames = torch.as_tensor(clips(1, height, width)[0][:2])
    short = 292
    new = (
        (short, int(short * width / height))
        if height <= width
        else (int(short * height / width), short)
    )
    x = F.interpolate(frames.permute(0, 3, 1, 2).float(), new, mode="bilinear", antialias=True)
    x = x.round().clamp(0, 255)
    top, left = round((new[0] - 256) / 2), round((new[1] - 256) / 2)
    x = x[:, :, top : top + 256, left : left + 256] / 255
    want = (x - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
    torch.testing.assert_close(transform(frames, 256, "crop"), want, rtol=0, atol=1e-5)


def test_squash_crop_and_pad():
    """squash keeps the borders that crop cuts off. pad keeps the aspect ratio and fills with the mean.
    The original squashed, enlarged and then cropped a fifth of the picture away."""
    frames = torch.zeros(1, 64, 128, 3, dtype=torch.uint8)
    frames[:, :, :8] = 255  # a white left edge
    white, black = ((v - torch.tensor(IMAGENET[0])) / torch.tensor(IMAGENET[1]) for v in (1, 0))
    squash, crop, pad = (transform(frames, 64, r)[0] for r in ("squash", "crop", "pad"))
    torch.testing.assert_close(squash[:, 30, 0], white)
    torch.testing.assert_close(crop[:, 30, 0], black)
    assert squash.shape == crop.shape == pad.shape == (3, 64, 64)
    assert (pad[:, :16] == 0).all() and (pad[:, 48:] == 0).all()
    torch.testing.assert_close(pad[:, 32, 0], white)


def test_quantise_is_accurate_far_from_zero():
    """Symmetric int8 has an error of 14 % on a channel far from zero, affine int8 of 1 %."""
    x = torch.randn(500, 6) * torch.tensor([1, 0.01, 5, 1, 1, 0]) + torch.tensor(
        [0, 3, 90, -7, 0, 4.5]
    )
    q = quantise(x)
    back = q["features"].float() * q["scale"] + q["offset"]
    assert q["features"].dtype == torch.int8
    assert ((back - x).abs() <= q["scale"] / 2 * 1.001 + 1e-6).all()
    assert (back[:, 5] == 4.5).all()
    spread = x[:, :5] - x[:, :5].mean(0)
    assert ((back - x)[:, :5].norm(dim=0) / spread.norm(dim=0)).max() < 0.011


def test_outlier_tokens_do_not_hide_the_quantisation_error():
    """Ordinary tokens lost 10 % in int8 if a few tokens were 30 times larger, without a message."""
    x = torch.randn(2, 4096, 64) + 5 * torch.randn(64)
    x[1, ::512] += 30 * torch.randn(8, 64)
    error = quantisation_error(x, quantise(x))
    assert error.tolist() == pytest.approx([0.008, 0.1], rel=0.1)


def test_features_do_not_depend_on_the_batch(folder):
    encoder = make(folder)
    together = encoder.stored(clips(5))
    for i, clip in enumerate(clips(5)):
        alone = encoder.stored([clip])[0]
        assert all(torch.equal(alone[k], together[i][k]) for k in alone)
        assert alone["features"].untyped_storage().nbytes() == alone["features"].numel()


def test_features_equal_those_of_the_model(folder):
    from transformers import AutoModel

    encoder = make(folder)
    model = AutoModel.from_pretrained(folder).eval()
    pixels = transform(torch.as_tensor(clips(1)[0]), 64, "squash")[None]
    with torch.no_grad():
        want = model.get_vision_features(pixels)
    torch.testing.assert_close(encoder.encode(clips(1))["features"], want)
    assert want.shape == (1, 4 * 4 * 4, 48)


def test_a_cpu_computes_in_float32_for_a_cache_in_bfloat16(folder):
    """infer.py loaded the encoder in the bfloat16 of the cache, which is four times slower on most CPUs."""
    settings = replace(make(folder).settings, compute_dtype="bfloat16")
    manifest = Manifest(settings, {"encoder": str(folder)})
    encoder = VideoEncoder.from_manifest(manifest, torch.device("cpu"))
    assert torch.equal(
        encoder.encode(clips(1))["features"], make(folder).encode(clips(1))["features"]
    )


def test_pooling_is_over_space_only(folder):
    whole, pooled = (
        make(folder).encode(clips(1))["features"],
        make(folder, pool=2).encode(clips(1))["features"],
    )
    want = whole.view(1, 4, 2, 2, 2, 2, 48).mean((3, 5)).reshape(1, 16, 48)
    torch.testing.assert_close(pooled, want)


def test_still_shows_the_first_frame_only(folder):
    encoder, moving = make(folder, sampling="still"), clips(1)[0]
    repeated = np.repeat(moving[:1], 8, axis=0)
    assert torch.equal(
        encoder.encode([moving])["features"], make(folder).encode([repeated])["features"]
    )


def test_features_that_are_not_finite_are_replaced_by_none(folder):
    encoder = make(folder)
    with torch.no_grad():
        encoder.model.encoder.layernorm.bias[3] = float("nan")
    assert encoder.stored(clips(2)) == [None, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_frames": 7}, "multiple of 2"), ({"pool": 3}, "does not divide")],
)
def test_sizes_that_do_not_fit_are_refused(folder, settings, message):
    with pytest.raises(UserError, match=message):
        make(folder, **settings)


def test_another_model_is_refused(folder, tmp_path):
    from transformers import VJEPA2Model

    manifest = Manifest(make(folder).settings, {"encoder": str(folder)})
    VideoEncoder.from_manifest(manifest, torch.device("cpu"))
    model = VJEPA2Model.from_pretrained(folder)
    model.encoder.layernorm.weight.data += 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="fingerprint"):
        VideoEncoder.from_manifest(manifest, torch.device("cpu"), str(tmp_path))


def test_the_fingerprint_depends_on_the_content_only(folder, tmp_path):
    """A model downloaded into a folder has the fingerprint of the copy in the Hub's cache."""
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("downloaded elsewhere")
    assert hub.fingerprint(copy) == hub.fingerprint(folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert hub.fingerprint(copy) != hub.fingerprint(folder)


def test_the_hubs_cache_is_tried_first(folder, tmp_path, monkeypatch):
    """A cached model needs no network. For a model that is not cached, the error names the flag."""
    import shutil

    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--facebook--tiny-vjepa"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(folder, repo / "snapshots" / "abc")
    found = hub.find_model("facebook/tiny-vjepa", "--encoder")
    assert hub.fingerprint(found) == hub.fingerprint(folder)
    with pytest.raises(
        UserError, match=r"pass its folder: --encoder /path/to/vjepa2-vitl-fpc64-256"
    ):
        hub.find_model("facebook/vjepa2-vitl-fpc64-256", "--encoder")


def test_incomplete_folders_are_refused(folder, tmp_path):
    import shutil

    with pytest.raises(UserError, match=r"config\.json"):
        hub.find_model(str(tmp_path), "--lm")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        hub.find_model(str(tmp_path), "--lm")
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path)


@pytest.mark.parametrize("kind", encoders.CONFIGS)
def test_each_token_is_at_its_place(kind, tmp_path):
    """TimeSformer orders its tokens by row, column and time. With time first, as for the others, the
    Q-Former's position embeddings would belong to other places, and no error would say so."""
    encoders.save(kind, tmp_path)
    encoder = make(tmp_path)
    (t, h, w), size, rng = encoder.settings.grid, encoder.settings.size, np.random.default_rng(0)
    clip = rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    before = encoder.encode([clip])
    for frame, row, column in [(0, 0, w - 1), (5, h - 1, 1), (7, h - 1, w - 1)]:
        changed, dy, dx = clip.copy(), size // h, size // w
        changed[frame, row * dy : (row + 1) * dy, column * dx : (column + 1) * dx] ^= 255
        moved = (encoder.encode([changed])["features"] - before["features"]).norm(dim=-1)[0]  # (N,)
        most = np.unravel_index(moved.argmax().item(), (t, h, w))
        # random convolutions with stride 2 shift a feature map by up to two places of eight
        slack = 2 if FAMILIES[kind].feature_map else 0
        assert np.abs(np.subtract(most, (frame * t // 8, row, column))).max() <= slack
        assert most[0] == frame * t // 8
    assert ("cls" in before) == encoder.settings.cls == FAMILIES[kind].cls

    # stored = encoded
    (stored,) = make(tmp_path, store="fp16").stored([clip])
    assert stored.keys() == before.keys()
    assert all(torch.equal(v, before[k][0].half()) for k, v in stored.items())
    path = tmp_path / "clip.pt"
    save_features(path, "clip", stored, "av")
    settings = replace(encoder.settings, store="fp16")
    loaded = load_features(path, "clip", settings)
    assert all(torch.equal(v, loaded[k]) for k, v in stored.items())
    assert (
        Manifest.parse(json.loads(json.dumps(Manifest(settings, {}).as_dict()))).settings
        == settings
    )


def test_feature_maps_of_several_layers_are_stacked(tmp_path):
    """The last feature map of MobileNetV2 is too coarse for small objects; out_indices adds finer ones."""
    model = encoders.save("mobilenet_v2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def with_layers(indices):
        (tmp_path / "config.json").write_text(json.dumps(config | {"out_indices": indices}))
        return make(tmp_path, num_frames=2)

    clip = clips(1)[0][:2]  # (F, H, W, 3)
    encoder = with_layers([15, 11])
    (t, h, w), e = encoder.settings.grid, encoder.settings.width
    x = encoder.encode([clip])["features"].view(t, h, w, e)
    pixels = transform(torch.as_tensor(clip), 256, "squash", encoder.settings.mean_std)
    with torch.inference_mode():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    coarse, fine = (states[i].permute(0, 2, 3, 1) for i in (15, 11))  # (F, H, W, E)
    assert fine.shape[:3] == (t, h, w) and coarse.shape[:3] == (t, h // 2, w // 2)
    assert e == coarse.shape[3] + fine.shape[3]
    torch.testing.assert_close(x[..., coarse.shape[3] :], fine)
    enlarged = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(x[..., : coarse.shape[3]], enlarged)

    for indices in ([16], 16):  # the second one was a TypeError
        with pytest.raises(
            UserError, match=rf"is {re.escape(str(indices))} in config.* from 0 to 15"
        ):
            with_layers(indices)


@pytest.mark.parametrize(
    ("kind", "preprocessor", "mean_std"),
    [
        # ViViT: p / 127.5 - 1, then mean 0.5 and standard deviation 0.5
        ("vivit", {"rescale_factor": 1 / 127.5, "offset": True}, (0.75, 0.25)),
        ("vivit", {"do_normalize": False}, (0, 1)),
        ("siglip_vision_model", {"do_rescale": False}, (0.5 / 255, 0.5 / 255)),
        ("vjepa2", None, None),
    ],
)
def test_pixels_are_normalised_as_by_the_preprocessor(kind, preprocessor, mean_std, tmp_path):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    file = preprocessor and encoders.PREPROCESSOR | half | preprocessor
    encoders.save(kind, tmp_path, file)
    found = make(tmp_path).settings.mean_std
    wanted = np.repeat(mean_std, 3).reshape(2, 3) if mean_std else IMAGENET
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "message"),
    [
        ("videomae", {}, {"num_frames": 16}, "use --num-frames 8"),
        ("resnet", {}, {"pool": 3}, "does not divide the encoder's 8 x 8 grid"),
        ("dinov2", {"size": 60}, {}, "60 pixels are not a multiple of its patches of 16"),
        ("dinov2", {"size": {"height": 64, "width": 96}}, {}, "64 x 96 pixels are not square"),
        ("dinov2", {"image_std": [0, 1, 1]}, {}, "does not contain a valid size, mean"),
        ("dinov2", None, {}, "has no preprocessor_config.json"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(kind, changes, settings, message, tmp_path):
    encoders.save(kind, tmp_path, changes if changes is None else encoders.PREPROCESSOR | changes)
    with pytest.raises(UserError, match=message):
        make(tmp_path, **settings)


def test_an_unknown_type_is_refused_with_the_list(tmp_path):
    encoders.save("dinov2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "x_clip"}))
    with pytest.raises(
        UserError, match=r"type 'x_clip'. Possible types: vjepa2, videomae, .*convnext"
    ):
        make(tmp_path)


@pytest.mark.filterwarnings(
    "ignore:Model config"
)  # CLIPTextConfig's own defaults, when it is saved
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_vision_half_of_a_two_tower_model_is_loaded(kind, tmp_path):
    """google/siglip-… and openai/clip-… contain a text model as well."""
    import transformers

    name = {"siglip": "Siglip", "clip": "CLIP"}[kind]
    tower = encoders.save(f"{kind}_vision_model", tmp_path)
    text = {k: v for k, v in encoders.ONE.items() if k not in ("image_size", "patch_size")}
    tokens = {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower.config.to_dict(), text_config=text | tokens
    )
    model = getattr(transformers, f"{name}Model")(config)
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(tmp_path)
    both = make(tmp_path).encode(clips(1))["features"]
    encoders.save(f"{kind}_vision_model", tmp_path)
    assert torch.equal(both, make(tmp_path).encode(clips(1))["features"])
