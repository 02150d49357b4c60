"""The ablation: the effect of each change, its runs and the table of results."""

import json
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import prose

import dataset
import evaluate
import train
from bench import ablation, ablation_table
from bench.ablation_changes import CHANGES, any_caption, changed
from captioner import VideoCaptioner
from runtime import feature_cache

RESULTS = Path(__file__).parent.parent / "results"


def double(clips):
    features, scale, offset = clips
    return features, scale.double(), offset.double()


def test_without_positions_a_clip_and_its_mirror_image_give_the_same_prompts(
    make_qformer, make_clips
):
    x, scale, offset = make_clips(1, tokens=24)
    mirrored = x.view(1, 2, 3, 4, 24).flip(3).reshape(1, 24, 24)
    with changed("no_positions"):
        qformer = make_qformer(grid=(2, 3, 4)).double()
        a, b = (qformer(*double((clip, scale, offset))) for clip in (x, mirrored))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        again = make_qformer(grid=(2, 3, 4))
        again.load_state_dict(qformer.state_dict())
        assert not any("pos" in name for name, _ in qformer.named_parameters())
        # they move to the device of the model; on a GPU they stayed behind
        assert all(table.is_meta for table in again.to("meta").pos)
    qformer = make_qformer(grid=(2, 3, 4))
    assert (qformer(x, scale, offset) - qformer(mirrored, scale, offset)).abs().max() > 1e-3


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_positions_on_keys_only_match_a_naive_loop(make_qformer, make_clips, num_blocks):
    """One head, one query and one clip at a time."""
    grid, width, heads = (2, 3, 4), 32, 4
    qformer = make_qformer(grid=grid, num_blocks=num_blocks).double()
    x, scale, offset = double(make_clips(2, tokens=24))

    def plain(cross, queries, clip):
        video = ((x[clip] * scale[clip] + offset[clip]) - qformer.mean) / qformer.std
        tokens = video @ qformer.project.weight.T + qformer.project.bias
        t, h, w = qformer.pos
        keys = [
            cross.k(tokens[(i * grid[1] + j) * grid[2] + k] + t[i] + h[j] + w[k])
            for i in range(grid[0])
            for j in range(grid[1])
            for k in range(grid[2])
        ]
        rows = []
        for query in queries:
            parts = []
            for head in range(heads):
                part = slice(head * width // heads, (head + 1) * width // heads)
                scores = [cross.q(query)[part] @ key[part] / (width / heads) ** 0.5 for key in keys]
                weights = torch.stack(scores).softmax(0)
                parts.append(weights @ cross.v(tokens)[:, part])
            rows.append(cross.out(torch.cat(parts)))
        return torch.stack(rows)

    def by_hand(clip):
        q = qformer.queries
        for block in qformer.blocks:
            q = q + block.self_attention(block.norm_self(q)[None])[0]
            q = q + plain(block.cross, block.norm_cross(q), clip)
            q = q + block.mlp(block.norm_mlp(q))
        return torch.nn.functional.layer_norm(q, q.shape[-1:]) * qformer.gain

    with changed("keys_only"):
        got = qformer(x, scale, offset)
    torch.testing.assert_close(got, torch.stack([by_hand(0), by_hand(1)]), rtol=0, atol=1e-10)
    assert (got - qformer(x, scale, offset)).abs().max() > 1e-3  # positions on values matter


def test_an_end_of_text_token_in_front(lm, tokenizer, make_qformer):
    """Also in a captioner that is loaded, with its settings by position: that failed after training."""
    with changed("eot_in_front"):
        for settings in ((), (None, 9, False)):
            model = VideoCaptioner(make_qformer(), lm, tokenizer, *settings)
            assert model.bos == tokenizer.eos_token_id
        assert model.max_new_tokens == 9


def test_no_standardisation_means_mean_0_and_std_1():
    data = SimpleNamespace(manifest=SimpleNamespace(settings=feature_cache.Settings(width=5)))
    with changed("no_standardisation"):
        mean, std = train.statistics(data, seed=0)
    assert mean.tolist() == [0] * 5 and std.tolist() == [1] * 5


def test_without_the_gain_prompts_have_the_norm_of_a_layer_norm(make_qformer, make_clips):
    with changed("no_gain"):
        out = make_qformer(output_norm=0.9)(*make_clips(2))
    torch.testing.assert_close(out.norm(dim=-1), torch.full((2, 6), 32**0.5), rtol=1e-3, atol=0)


def test_without_style_prompts_both_styles_have_the_same_tokens(tokenizer):
    one = dataset.encode_caption(tokenizer, "label", "x")[1:]
    assert dataset.encode_caption(tokenizer, "sentence", "x")[1:] != one
    with changed("no_style_prompts"):
        assert dataset.encode_caption(tokenizer, "sentence", "x")[1:] == one


def test_captions_are_sampled_uniformly():
    record = {"id": "7", "label": "a", "paraphrases": ["b", "c", "d"]}
    counts = Counter(any_caption(record, 1, 0, epoch)[0] for epoch in range(4000))
    assert set(counts) == {("label", "a"), *(("sentence", t) for t in "bcd")}
    assert all(abs(n - 1000) < 150 for n in counts.values())  # five standard deviations
    assert any_caption(record, 1, 0, 3) == any_caption(record, 1, 0, 3)


def test_the_original_trains_on_padding_and_validates_without_it(prepared, tokenizer):
    """All its changes apply together: one prompt, loss on padding, a constant learning rate."""
    settings = feature_cache.load_manifest(prepared / "features").settings
    texts = {True: [("label", "ab")], False: [("sentence", "abcdef")]}
    records = dataset.load_records(prepared / "annotations", "train")[:2]
    with changed("original"):
        batches = [
            next(iter(module.loader(data, 2, 0, torch.device("cpu"))))
            for module in (train, evaluate)
            for data in [
                dataset.FeatureDataset(
                    *(prepared / "features", "train", records, settings, tokenizer),
                    lambda record: texts[record is records[0]],
                )
            ]
        ]
        prompt = len(dataset.STYLES["label"])
        assert train.lr_at(0, 100, 1e-3, 50) == train.lr_at(99, 100, 1e-3, 50) == 1e-3
        assert train.choose_captions is any_caption
    padded, usual = batches
    assert len(usual["targets"]) == len(" ab") + len(" abcdef") + 2
    assert padded["input_ids"].shape == (2, prompt + len(" abcdef") + 1)
    eos = tokenizer.eos_token_id
    assert padded["targets"].view(2, -1)[0].tolist() == [*map(ord, " ab"), *[eos] * 5]
    assert padded["positions"].view(2, -1)[0].tolist() == list(range(prompt - 1, prompt + 7))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_undone_after_its_run(change):
    styles = dict(dataset.STYLES)
    places = [(o, n) for o, n, _ in CHANGES[change]() if not isinstance(o, dict)]
    originals = [getattr(o, n) for o, n in places]
    with pytest.raises(KeyError), changed(change):
        assert [getattr(o, n) for o, n in places] != originals or change == "no_style_prompts"
        raise KeyError
    assert [getattr(o, n) for o, n in places] == originals and styles == dataset.STYLES


@pytest.fixture
def study(prepared, world, tmp_path, monkeypatch):
    """A small ablation that has all of its data except the features of `base`."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("lm", "toy.json"):
        (data / name).symlink_to(world / name)
    (data / "annotations").symlink_to(prepared / "annotations")
    (data / "features_fp16").symlink_to(prepared / "features")
    monkeypatch.setattr(ablation, "OBJECTS", "validation")  # the only other split with features
    return ablation.make_study(data, tmp_path / "runs", clips=64, seeds=1)


def test_a_run_uses_the_real_scripts_and_is_not_repeated(study, monkeypatch, capsys):
    """The row `original` runs train.py and evaluate.py. `base` then fails because its features are
    missing: its log is reported, and the finished run is not repeated."""
    short = replace(ablation.ROWS["original"], flags="--captions-per-clip 1 --epochs 2 --lr 1e-3")
    monkeypatch.setattr(ablation, "ROWS", {"base": ablation.ROWS["base"], "original": short})
    where = ["--data", str(study.data), "--runs", str(study.runs), "--clips", "64", "--seeds", "1"]
    threads = torch.get_num_threads()
    try:
        assert ablation.main([*where, "--row", "original"]) is None
    finally:
        torch.set_num_threads(threads)
    done = study.folder("original", 0) / "result.json"
    result = json.loads(done.read_text())
    assert result["cider"] >= 0 and result["seconds"] > 0 and len(result["curve"]) == 2
    checkpoint = torch.load(done.parent / "best.pt", weights_only=True)
    assert not any("pos" in name for name in checkpoint["qformer"])
    assert checkpoint["styles"]["sentence"] == checkpoint["styles"]["label"]
    assert checkpoint["qformer"]["std"].eq(1).all()

    stamp = done.stat().st_mtime_ns
    study = ablation.make_study(study.data, study.runs, clips=64, seeds=1)
    assert study.run_all(jobs=2) == ["base, seed 0"]
    assert done.stat().st_mtime_ns == stamp
    assert not (study.runs / "original_seed0.log").exists()
    log = study.runs / "base_seed0.log"
    assert f"base, seed 0: exit code 2, see {log}" in capsys.readouterr().err
    assert "Run python -m bench.ablation." in log.read_text()
    assert result["device"] == "cpu"
    assert replace(study, device="cuda").result("original", 0) == result
    # a row whose change, or whose models, were others kept its result
    for key, value in (("change", "no_positions"), ("models", ["", ""])):
        done.write_text(json.dumps(result | {key: value}))
        assert study.result("original", 0) is None
    done.write_text(json.dumps(result))
    other = ablation.make_study(study.data, study.runs, clips=65, seeds=1)
    assert other.result("original", 0) is None, "a result with other flags is not reused"


def test_versions_are_those_of_a_finished_run(study, monkeypatch):
    """If the first seed of the base fails, the others still make a table."""
    base = ablation.ROWS["base"]
    study = replace(study, rows={"base": replace(base, seeds=2)})
    monkeypatch.setattr(
        type(study), "result", lambda self, name, seed: {"seed": 1} if seed else None
    )
    study.folder("base", 1).mkdir(parents=True)
    (study.folder("base", 1) / "args.json").write_text('{"versions": {}}')
    assert study.args() == {"versions": {}}
    assert list(study.results()) == [("base", study.rows["base"], [{"seed": 1}])]


def test_the_table_matches_the_committed_results():
    results = json.loads((RESULTS / "ablation.json").read_text())
    assert (RESULTS / "ablation.md").read_text() == ablation_table.markdown(results)
    assert list(results["rows"]) == list(ablation.ROWS)
    assert all(len(row["runs"]) == 3 for row in results["rows"].values())


def test_differences_larger_than_the_noise_are_bold():
    """The standard deviation is 0.1 in every row: 0.15 above the base is noise, 0.5 below it is not."""

    def row(text, centre):
        runs = [
            {"seed": s, "seconds": 9.0, "curve": []}
            | dict.fromkeys(ablation_table.SCORES, centre + d)
            for s, d in enumerate((-0.1, 0, 0.1))
        ]
        sizes = {"parameters": 5, "bytes_per_clip": 7}
        return {"text": text, "change": None, **sizes, "runs": runs}

    rows = {"base": row("base", 4), "a": row("tie", 4.15), "b": row("loss", 3.5)}
    facts = {"clips": 10, "processor": "a processor", "versions": {"torch": "2"}}
    text = ablation_table.markdown(facts | {"rows": rows})
    assert "| tie | 4.15 ± 0.10 | +0.15 |" in text
    assert "| loss | 3.50 ± 0.10 | **-0.50** |" in text
    assert "(noise 0.10). Below the base: loss. Above the base: none. Within noise: tie." in text


def test_the_docs_quote_the_committed_results():
    """The ablation's numbers in docs/ and results/README.md are those of results/ablation.json."""
    rows = json.loads((RESULTS / "ablation.json").read_text())["rows"]
    mean = {name: statistics.fmean(r["cider"] for r in row["runs"]) for name, row in rows.items()}
    loss = {name: mean["base"] - value for name, value in mean.items()}
    text = prose()
    assert f"prompts are worth {loss['no_style_prompts']:.1f} CIDEr" in text
    assert f"and positions {loss['no_positions']:.1f}." in text
    assert f"rates tried; the base has {mean['base']:.1f}." in text
    assert mean["original"] < 1 and mean["original_lr"] < 1
    assert f"int8 costs {-loss['fp16']:.2f} CIDEr against fp16" in text
    assert f"pooling 2 x 2 gains {-loss['pool2']:.2f};" in text
    text = " ".join((RESULTS / "README.md").read_text().split())
    right = {n: statistics.fmean(r["right"] for r in row["runs"]) for n, row in rows.items()}
    assert f"prompts ({loss['no_style_prompts']:.1f} CIDEr) and" in text
    assert f"and positions ({loss['no_positions']:.1f}) matter" in text
    assert f"not on values, lose {loss['keys_only']:.1f}." in text
    assert f"K = 4 loses {loss['k4']:.1f}." in text
    assert f"K = 2 gains {mean['k2_passes5'] - mean['k1_passes5']:.1f} over K = 1" in text
    assert f"{100 * right['original']:.0f} % of its captions are" in text
    assert f"against {100 * right['base']:.0f} % for the base" in text
