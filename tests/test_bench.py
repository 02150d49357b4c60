"""bench.py: ours computes what the reference computes, the groups run, and the docs say what was found."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import pages

import captioner
import qformer
import train
from bench import speed, timing
from runtime.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path):
    return timing.Place(speed.TINY, CPU, tmp_path, 1e9)


def test_ours_is_the_reference():
    """Q-Former to 1e-10 in float64 and 1e-5 in float32, in bfloat16 within 1.5 of the reference's own
    error; K captions behind one prefix to 1e-6 and 1e-5, values and gradients."""
    lines = speed.equalities(CPU)
    assert len(lines) == 10
    assert all(line["found"] <= line["allowed"] for line in lines)


@pytest.mark.parametrize("mistake", ["offset", "position", "loss"])
def test_a_difference_ends_the_run(monkeypatch, mistake):
    """Nothing is timed that computes something else."""
    if mistake == "loss":
        exact = captioner.chunked_cross_entropy
        monkeypatch.setattr(captioner, "chunked_cross_entropy", lambda *a: 1.0001 * exact(*a))
    else:
        exact = qformer.CrossAttention.absorbed

        def wrong(self, x, video, project, pos):
            if mistake == "offset":
                video.offset = video.offset * 0.999
            else:
                pos = [pos[0], pos[1], 0 * pos[2]]
            return exact(self, x, video, project, pos)

        monkeypatch.setattr(qformer.CrossAttention, "absorbed", wrong)
    with pytest.raises(UserError, match="not equal"):
        speed.equalities(CPU)


@pytest.mark.parametrize(
    "group, names",
    [
        ("qformer", {"reference", "absorbed"}),
        ("loss", {"reference", "chunked"}),
        ("evaluate", {"reference", "shared_prefix_8", "shared_prefix_64"}),
        ("features", {"fp16", "int8", "int8_pool2", "int8_read", "loader_2"}),
    ],
)
def test_groups_check_and_measure(place, group, names):
    rows = list(speed.GROUPS[group](place))
    assert names <= {row["name"] for row in rows}
    keys = {"name", "unit", "median", "iqr", "factor", "max_abs_diff", "peak_bytes"}
    assert all(keys <= row.keys() for row in rows)
    json.dumps(rows, allow_nan=False)


@pytest.fixture
def bench_gpu(gpu, monkeypatch):
    """A pretended GPU whose memory is measured as on a CPU."""
    monkeypatch.setattr(timing, "devices", SimpleNamespace(on_gpu=lambda device: False))
    gpu.set_device(0)


@pytest.mark.parametrize("emulate_gpu", [False, True])
def test_every_training_row_is_checked(place, monkeypatch, emulate_gpu, request):
    """On a GPU more variants run, under bfloat16; a CPU can stand in for all but the compiler."""
    if emulate_gpu:
        request.getfixturevalue("bench_gpu")
        largest = speed.largest_batch
        monkeypatch.setattr(speed, "largest_batch", lambda *args: largest(*args, card=1e6))
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    rows = {row["name"]: row for row in speed.bench_train(place)}
    assert {"absorbed", "int8", "chunked", "captions_4", "bfloat16", "compile"} < rows.keys()
    measured = {name for name, row in rows.items() if "left_out" not in row}
    assert measured >= {"bfloat16", "compile"} or not emulate_gpu
    assert all(rows[name]["max_abs_diff"] is not None for name in measured - {"reference"})
    assert rows["captions_4"].get("largest_micro_batch", 0) > 0 or not emulate_gpu


def test_a_tenth_of_the_tokens_is_missed(place, monkeypatch, bench_gpu):
    """Behind a tolerance of 0.5 a tenth of the tokens could be lost without a word."""

    steps = train.accumulate

    def lossy(model, window):
        b = window[0]
        keep = torch.arange(len(b["targets"])) % 10 > 0
        short = b | {k: b[k][keep].pin_memory() for k in ("positions", "targets")}
        return steps(model, [short])

    monkeypatch.setattr(train, "micro_steps", lossy)
    with pytest.raises(UserError, match="not equal: the gradient of captions"):
        list(speed.bench_train(place))


def test_batched_encoding_is_one_by_one(place):
    from bench import data

    clips = [torch.randint(0, 256, (16, 90, 120, 3), dtype=torch.uint8).numpy() for _ in range(3)]
    encoder = data.make_encoder(place)
    rows = {row["name"]: row for row in data.encode_rows(place, encoder, clips)}
    assert rows["batched_encode"]["max_abs_diff"] < 1e-5


def test_the_largest_micro_batch_fits(place):
    """Logits grow with the clips only up to one chunk: a line through two small sizes missed it."""
    weights = torch.nn.Linear(10, 10)  # 110 parameters

    def step(count):  # 4,000 bytes a clip; up to 5 clips 8,000 more
        return torch.ones(count, 1000), torch.ones(min(count, 5), 2000)

    fixed = 5 * 4 * 110  # as language model, and four times as Q-Former: float32
    found = speed.largest_batch(step, weights, weights, CPU, card=fixed + 80_100)
    assert found == {"largest_micro_batch": 10, "bytes_at_8": fixed + 8 * 4000 + 40_000}


def test_peak_bytes_are_those_held_at_once():
    def run():
        for _ in range(5):
            torch.ones(1000)  # let go at once
        return torch.ones(500) + torch.ones(500)  # three of 2,000 bytes

    _, flops, most = timing.inspect(run, CPU)
    assert most == 6000
    assert flops == 0
    assert timing.inspect(lambda: torch.ones(3, 4) @ torch.ones(4, 5), CPU)[1] == 2 * 3 * 4 * 5


def committed():
    files = sorted((ROOT / "results" / "bench").glob("*/bench.json"))
    return [json.loads(path.read_text()) for path in files]


def test_the_pages_say_what_was_measured():
    assert committed()
    assert any(timing.summary(committed()) in text for text in pages().values())


def test_committed_results_are_whole():
    for result in committed():
        assert set(speed.GROUPS) == {row["group"] for row in result["rows"]}
        assert all(line["found"] <= line["allowed"] for line in result["equal"])


def test_attention_with_fewer_key_heads_is_counted_as_if_they_were_repeated():
    """On a GPU transformers leaves grouped heads to the kernel, and torch's counter ended the run."""
    from torch.utils.flop_counter import FlopCounterMode

    op = torch.ops.aten._scaled_dot_product_flash_attention
    q, few, many = (torch.empty(2, heads, 5, 8, device="meta") for heads in (4, 2, 4))
    count = timing.attention_formulas()[op]
    out = op(q, many, many)
    with FlopCounterMode(display=False) as torchs:
        op(q, many, many)
    assert count(q, few, few, out_val=out) == count(q, many, many, out_val=out)
    assert count(q, few, few, out_val=out) == torchs.get_total_flops() > 0
