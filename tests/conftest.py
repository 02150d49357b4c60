"""Fixtures: tiny models of the real architectures, a toy world, a trained run and a browser."""

import logging
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests must not use the network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist runs one test per core
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # `make test &`: the scripts would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from filelock import FileLock  # torch brings it

import encoder
from runtime import feature_cache
from runtime.cli import cpus

# The slowest test files, by CPU-seconds. They start first, so that no worker of pytest-xdist is
# left idle at the end. The first one does not need `world`, which another worker builds meanwhile.
LONGEST = (
    *("demo", "reliability", "interface", "app", "evaluate", "gpu", "probe", "embed", "train"),
    *("families", "curves", "doctor", "toy_ssv2", "charades", "video", "bench", "gallery"),
    *("ablation", "films", "warm_start"),
)
# worlds/toy_ssv2.py sets it in the worker that builds `world`, and sums depend on it
torch.set_num_threads(1)

WIDTH, VOCABULARY = 32, 130
TOY = ["--clips", "100", "--lm-steps", "30"]  # flags of worlds/toy_ssv2.py for `world`


class CharTokenizer:
    """One token per ASCII character; 0 is the end of text."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False, return_tensors=None):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        ids = [min(ord(c), VOCABULARY - 1) for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(chr(t) for t in row if t) for row in rows]


class AsWarning(logging.Handler):
    """Turns transformers' log warnings into Python warnings, which are errors (see pyproject.toml)."""

    def emit(self, record):
        warnings.warn(record.getMessage(), stacklevel=2)


logging.getLogger("transformers").addHandler(AsWarning(logging.WARNING))


def pytest_xdist_auto_num_workers(config):
    """One more than there are CPUs, because some tests wait for timeouts and for other processes."""
    return cpus() + 1


def pytest_configure(config):
    config.option.loadscopereorder = False  # else pytest-xdist starts files with most tests first


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture
def gpu(monkeypatch):
    """A CPU that behaves like a GPU, see `EmulatedGPU`."""
    from gpu import EmulatedGPU

    # cached before the emulation, so that it fits clips on host and GPU
    encoder.constants(feature_cache.IMAGENET, torch.device("cpu"))
    with monkeypatch.context() as patch, EmulatedGPU(patch) as gpu:
        yield gpu


@pytest.fixture
def tokenizer():
    return CharTokenizer()


@pytest.fixture
def lm():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # far from uniform logits, so that argmax has no near ties
        attention_dropout=0.1,  # must never be active
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture
def make_qformer():
    from qformer import QFormer

    def make(grid=(4, 3, 5), dropout=0.0, num_blocks=1, video_width=24, **kwargs):
        qformer = QFormer(
            num_queries=6,
            width=WIDTH,
            video_width=video_width,
            grid=grid,
            num_blocks=num_blocks,
            num_heads=4,
            dropout=dropout,
            **kwargs,
        )
        qformer.standardise(torch.randn(video_width), torch.rand(video_width) + 0.5)
        return qformer

    return make


@pytest.fixture
def make_clips():
    """B clips in stored form: int8 or float16 features, scale, offset."""

    def make(count, tokens=60, width=24, store="int8"):
        if store == "int8":
            features = torch.randint(-127, 128, (count, tokens, width), dtype=torch.int8)
            return features, torch.rand(count, width) * 0.02, torch.randn(count, width)
        features = torch.randn(count, tokens, width).half()
        return features, torch.ones(count, width), torch.zeros(count, width)

    return make


@pytest.fixture
def make_batch(make_clips, tokenizer):
    """A collated batch of clips with the given captions: [[(style, text), ...], ...]"""
    from dataset import collate, encode_caption

    def make(captions, features=None):
        x, scale, offset = features or make_clips(len(captions))
        items = [
            {
                "id": str(i),
                "features": x[i],
                "scale": scale[i],
                "offset": offset[i],
                "captions": [encode_caption(tokenizer, *c) for c in texts],
            }
            for i, texts in enumerate(captions)
        ]
        return collate(items)

    return make


def built_once(tmp_path_factory, name, build):
    """Return a folder filled by `build(folder)`. One pytest-xdist worker builds it, the others wait."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder is inside a shared one
        root = root.parent
    folder = root / name
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.done").exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker whose build failed
            build(folder)
            Path(f"{folder}.done").touch()
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world, written by worlds/toy_ssv2.py. Tests must not write into it."""
    from worlds import toy_ssv2

    def build(folder):
        toy_ssv2.main([str(folder), *TOY])

    return built_once(tmp_path_factory, "world", build)


@pytest.fixture(scope="session")
def prepared(world, tmp_path_factory):
    """Annotations and features of the world. Each worker has a copy, since scripts lock the cache."""
    import prepare_annotations

    def build(folder):
        flags = ["--labels", world / "labels", "--paraphrases", world / "paraphrases"]
        prepare_annotations.main([*map(str, flags), "--output", str(folder / "annotations")])
        assert preprocess(world, folder) == 0

    built = built_once(tmp_path_factory, "prepared", build)
    return shutil.copytree(built, tmp_path_factory.mktemp("prepared") / "data")


def preprocess(world, folder, *flags, videos=None, features=None):
    """Run preprocess_ssv2.py on the world and return its exit code."""
    import preprocess_ssv2

    return (
        preprocess_ssv2.main(
            [
                *["--videos", str(videos or world / "videos")],
                *["--annotations", str(folder / "annotations")],
                *["--features", str(features or folder / "features")],
                *["--encoder", str(world / "encoder"), "--num-frames", "16", "--workers", "0"],
                *map(str, flags),
            ]
        )
        or 0
    )


def train_flags(world, prepared, output, *flags):
    """Return the flags of a training run that takes a few seconds."""
    return [
        *["--features", str(prepared / "features"), "--output", str(output)],
        *["--annotations", str(prepared / "annotations"), "--lm", str(world / "lm")],
        *["--num-queries", "4", "--batch-size", "8", "--grad-accum", "3", "--epochs", "2"],
        *["--lr", "2e-3", "--warmup-steps", "2", "--workers", "0", "--eval-clips", "10"],
        *map(str, flags),
    ]


@pytest.fixture(scope="session")
def trained(world, prepared, tmp_path_factory):
    """A run folder of train.py: 2 epochs of 5 steps. The last step of each has 4 clips."""
    import train

    def build(output):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("metrics.meteor", lambda *_: 0.25)  # see quick_meteor
            assert not train.main(train_flags(world, prepared, output))

    built = built_once(tmp_path_factory, "trained", build)
    return shutil.copytree(built, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def quick_meteor(monkeypatch):
    """Replace METEOR, which takes 10 s to load its paraphrases. test_metrics.py tests it."""
    monkeypatch.setattr("metrics.meteor", lambda *_: 0.25)


@pytest.fixture
def browser(chromium):
    """A headless Chromium. It shows an empty page after each test, since playing clips use CPU time."""
    yield chromium
    chromium.get("about:blank")


@pytest.fixture(scope="module")  # not session: even an empty page may use CPU time
def chromium():
    """Chromium and its driver, Debian's packages chromium and chromium-driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield page
    page.quit()


def until(condition, seconds=60):
    """Wait until `condition()` returns a true value, and return that value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"still false after {seconds} s"
        time.sleep(0.1)
    return value
