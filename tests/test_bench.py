"""The benchmark: equal results of its variants, its groups, and the results quoted in the docs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import captioner
import qformer
import train
from bench import data, equality, inputs, reference, speed, tables, timing
from runtime.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup(tmp_path):
    return timing.Setup(inputs.TINY, CPU, tmp_path, 1e9)


def test_optimised_code_equals_the_reference():
    """Values and gradients in float64: the Q-Former to 1e-10, K captions after one prefix to 1e-6."""
    lines = equality.equalities()
    assert [line["allowed"] for line in lines] == [1e-10, 1e-10, 1e-6, 1e-6]
    assert all(line["found"] <= line["allowed"] for line in lines)


def test_the_reference_is_multi_head_attention(setup):
    """The reference's attention is torch.nn.MultiheadAttention with the Q-Former's weights."""
    cross = inputs.make_qformer(setup.shapes, CPU).blocks[0].cross
    width, heads = setup.shapes.D, setup.shapes.A
    weight = torch.cat([cross.q.weight, cross.k.weight, cross.v.weight]).detach()
    bias = torch.randn(3 * width)
    mha = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    state = {"in_proj_weight": weight, "in_proj_bias": bias}
    mha.load_state_dict(state | {f"out_proj.{k}": v for k, v in cross.out.state_dict().items()})
    x, kv = torch.randn(2, 6, width), torch.randn(2, 40, width)
    found = reference.attention(x, kv, heads, weight, bias, cross.out)
    torch.testing.assert_close(found, mha(x, kv, kv)[0])


@pytest.mark.parametrize("mistake", ["offset", "position", "loss"])
def test_a_variant_with_another_result_ends_the_run(monkeypatch, mistake):
    """A variant whose result differs from the reference is not timed."""
    if mistake == "loss":
        exact = captioner.chunked_cross_entropy
        monkeypatch.setattr(captioner, "chunked_cross_entropy", lambda *a: 1.0001 * exact(*a))
    else:
        exact = qformer.CrossAttention.forward

        def wrong(self, x, video, need_weights=False):
            if mistake == "offset":
                video.offset = video.offset * 0.999
            else:
                video.pos = (*video.pos[:2], 0 * video.pos[2])
            return exact(self, x, video)

        monkeypatch.setattr(qformer.CrossAttention, "forward", wrong)
    with pytest.raises(UserError, match="not equal"):
        equality.equalities()


@pytest.mark.parametrize(
    "group, names",
    [
        ("qformer", {"reference", "absorbed"}),
        ("loss", {"reference", "chunked"}),
        ("evaluate", {"reference", "shared_prefix_8", "shared_prefix_64"}),
        ("features", {"fp16", "int8", "int8_pool2", "int8_read", "loader_2"}),
    ],
)
def test_groups_check_and_measure(setup, group, names):
    rows = list(speed.GROUPS[group](setup))
    assert names <= {row["name"] for row in rows}
    keys = {"name", "unit", "median", "iqr", "factor", "max_abs_diff", "peak_bytes"}
    assert all(keys <= row.keys() for row in rows)
    json.dumps(rows, allow_nan=False)


@pytest.fixture
def bench_gpu(gpu, monkeypatch):
    """An emulated GPU whose memory is measured as on a CPU."""
    monkeypatch.setattr(timing, "devices", SimpleNamespace(on_gpu=lambda device: False))
    gpu.set_device(0)


@pytest.mark.parametrize("emulate_gpu", [False, True])
def test_every_training_row_is_checked(setup, monkeypatch, emulate_gpu, request):
    """On a GPU one more variant runs, and all run under bfloat16. Nothing is timed here."""
    monkeypatch.setattr(timing, "compare", lambda runs, *_, **__: dict.fromkeys(runs, [1.0] * 3))
    if emulate_gpu:
        request.getfixturevalue("bench_gpu")
    rows = {row["name"]: row for row in speed.bench_train(setup)}
    assert {"absorbed", "int8", "chunked", "captions_4", "bfloat16"} < rows.keys()
    assert ("left_out" in rows["bfloat16"]) != emulate_gpu
    measured = {name for name, row in rows.items() if "left_out" not in row}
    assert all(rows[name]["max_abs_diff"] is not None for name in measured - {"reference"})


def test_missing_tokens_are_noticed_in_bfloat16(setup, monkeypatch, bench_gpu):
    """With a tolerance of 0.5, a training step could skip a tenth of the tokens unnoticed."""
    accumulate = train.accumulate

    def lossy(model, micro_batches):
        b = micro_batches[0]
        keep = torch.arange(len(b["targets"])) % 10 > 0
        short = b | {k: b[k][keep].pin_memory() for k in ("positions", "targets", "styles")}
        return accumulate(model, [short])

    monkeypatch.setattr(train, "accumulate", lossy)
    with pytest.raises(UserError, match="not equal: the gradient of captions"):
        list(speed.bench_train(setup))


def test_batched_encoding_equals_one_by_one(setup):
    clips = [torch.randint(0, 256, (16, 90, 120, 3), dtype=torch.uint8).numpy() for _ in range(3)]
    encoder = inputs.make_encoder(setup.shapes, CPU)
    rows = {row["name"]: row for row in data.encode_rows(setup, encoder, clips)}
    assert rows["batched_encode"]["max_abs_diff"] < 1e-5


def test_peak_bytes_count_what_is_allocated_at_the_same_time():
    def run():
        for _ in range(5):
            torch.ones(1000)  # freed at once
        return torch.ones(500) + torch.ones(500)  # three tensors of 2,000 bytes

    assert timing.inspect(run, CPU) == (0, 6000)
    assert timing.inspect(lambda: torch.ones(3, 4) @ torch.ones(4, 5), CPU)[0] == 2 * 3 * 4 * 5


def committed():
    files = sorted((ROOT / "results" / "bench").glob("*/bench.json"))
    assert files
    return {path.parent: json.loads(path.read_text()) for path in files}


def test_the_docs_contain_the_table_of_the_committed_results(capsys):
    results = committed()
    speed.main(["--table", *(str(folder / "bench.json") for folder in results)])
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert capsys.readouterr().out in "".join(page.read_text() for page in pages)


def test_committed_results_are_complete():
    groups = {}  # a second result of a device may have some groups only
    for result in committed().values():
        groups.setdefault(result["device"], set()).update(row["group"] for row in result["rows"])
    assert all(found == set(speed.GROUPS) for found in groups.values())
    for folder, result in committed().items():
        assert all(line["found"] <= line["allowed"] for line in result["equal"])
        assert (folder / "bench.md").read_text() == tables.markdown(result) + "\n"


def test_flops_of_attention_with_fewer_key_heads():
    """They are counted as if the key heads were repeated. On a GPU, transformers leaves grouped heads
    to the kernel, and torch's counter raised an error."""
    op = torch.ops.aten._scaled_dot_product_flash_attention
    q, few, many = (torch.empty(2, heads, 5, 8, device="meta") for heads in (4, 2, 4))
    count = timing.attention_formulas()[op]
    out = op(q, many, many)
    with FlopCounterMode(display=False) as counter:
        op(q, many, many)
    assert count(q, few, few, out_val=out) == count(q, many, many, out_val=out)
    assert count(q, few, few, out_val=out) == counter.get_total_flops() > 0
