"""Comparing two models: evaluate.py --versus, the paired bootstrap, and files written by infer.py."""

import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
import metrics
from dataset import load_records
from runtime.caption_files import CaptionFile
from runtime.errors import UserError
from runtime.intervals import bootstrap, paired_bootstrap
from runtime.predictions import read_predictions, write_predictions


@pytest.fixture(scope="module")
def records(prepared):
    return load_records(prepared / "annotations", "validation")


@pytest.fixture(scope="module")
def captions(records):
    """The labels, except that every fourth clip has the label of the next clip."""
    texts = [r["label"] for r in records]
    return {r["id"]: texts[(n + (n % 4 == 0)) % len(texts)] for n, r in enumerate(records)}


@pytest.fixture
def compare(prepared, tmp_path, monkeypatch, capsys):
    """A function that runs evaluate.py --versus without Java and returns its result and its output."""
    monkeypatch.setenv("PATH", "")

    def run(first, second, *flags):
        flags = [*flags, "--annotations", prepared / "annotations", "--no-meteor"]
        files = ["--predictions", first, "--versus", second]
        evaluate.main([*map(str, [*files, *flags])])
        [path] = Path(first).parent.glob("versus_*.json")
        return json.loads(path.read_text()), capsys.readouterr()

    return run


def written(path, captions, spans=None):
    """Write captions as infer.py does, for clips in a folder. spans: of every clip."""
    file = CaptionFile(path, path.suffix[1:])
    for clip, text in captions.items():
        windows = [{"start": a, "end": b, "caption": text} for a, b in spans or [(0.0, 2.0)]]
        file.write({"path": f"/clips/{clip}.webm", "windows": windows})
    file.close()
    return path


def mean(sums):
    return sums[:, 0] / sums[:, 1]


def with_count(values):
    return np.stack([values, np.ones(len(values))], axis=1)


def test_the_paired_interval_is_narrower_if_scores_are_correlated():
    """If two models fail on the same difficult clips, their separate intervals hide the difference."""
    rng = np.random.default_rng(0)
    first = rng.normal(5, 3, 300)
    second = first + rng.normal(0.2, 0.5, 300)
    a, b, (low, high) = paired_bootstrap(with_count(first), with_count(second), mean, seed=1)
    assert (a, b) == pytest.approx((first.mean(), second.mean())) and 0 < low < b - a < high
    # the same samples of clips as in the interval of a mean
    assert [low, high] == pytest.approx(bootstrap(second - first, seed=1))
    alone = bootstrap(first, seed=1)
    unpaired = 2**0.5 * (alone[1] - alone[0])  # of the difference of two independent means
    assert high - low < unpaired / 5
    assert paired_bootstrap(with_count(first), with_count(first), mean, seed=1)[2] == [0, 0]


def test_bleu_from_the_sums_of_counts_is_corpus_bleu():
    """The brevity penalty needs the closest reference of each clip."""
    references = {"a": ["the cat sat on the mat", "a cat"], "b": ["opening a big door slowly"]}
    for texts in (("the cat sat", "opening a big door"), ("the cat sat on a mat now", "a door")):
        hypotheses = dict(zip("ab", texts, strict=True))
        sums = metrics.bleu_statistics(hypotheses, references).sum(0)
        expected = metrics.bleu(hypotheses, references)
        assert metrics.bleu_scores(sums[None])[0] == pytest.approx([*expected.values()])


def test_a_comparison_has_the_scores_of_both(captions, records, prepared, compare, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_predictions(first, captions)
    write_predictions(second, {r["id"]: r["label"] for r in records})
    result, printed = compare(first, second)
    evaluate.main(
        [
            *map(str, ["--predictions", first, "--annotations", prepared / "annotations"]),
            "--no-meteor",
        ]
    )
    alone = json.loads((tmp_path / "evaluation_validation_rescored.json").read_text())["metrics"]
    found = {name: values["first"] for name, values in result["metrics"].items()}
    assert found == pytest.approx(alone) and list(found) == list(alone)
    assert result["metrics"]["exact_match"]["second"] == 1
    assert {"CIDEr", "Bleu_4", "exact_match"} <= set(result["excludes_zero"])
    assert all(v["ci95"][0] > 0 for v in result["metrics"].values())
    # the clips that differ most
    gains = [clip["CIDEr"][1] - clip["CIDEr"][0] for clip in result["clips"]]
    assert gains == sorted(gains, reverse=True) and len(gains) < len(records) / 3
    assert captions[result["clips"][0]["id"]] == result["clips"][0]["first"]
    assert result["clips"][0]["id"] in printed.out and "difference" in printed.out


def test_identical_captions_have_no_difference(captions, compare, tmp_path):
    first = tmp_path / "a.json"
    write_predictions(first, captions)
    result, printed = compare(first, first)
    assert all(v["ci95"] == [0, 0] for v in result["metrics"].values()) and not result["clips"]
    assert result["excludes_zero"] == [] and "excludes zero for: no metric" in printed.out


def test_clips_that_only_one_file_has_need_a_flag(captions, compare, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    clips = [*captions]
    write_predictions(first, {i: captions[i] for i in clips[:-3]})
    write_predictions(second, {i: captions[i] for i in clips[1:]})
    only = "1 clip is only in --predictions, 3 clips are only in --versus"
    with pytest.raises(UserError, match=only):
        compare(first, second)
    result, printed = compare(first, second, "--common")
    assert result["n"] == len(clips) - 4 and f"left out: {only}" in printed.err
    write_predictions(second, {"no such clip": "x"})
    with pytest.raises(UserError, match="no clip of this split is in both"):
        compare(first, second, "--common")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_files_of_infer_are_matched_by_the_names_of_the_clips(captions, tmp_path, ending, capsys):
    """infer.py captions whole folders, and puts an apostrophe before a caption like `=1` in a table."""
    texts = dict(captions)
    texts[next(iter(texts))] = "=1, a “quoted” word"
    path = written(tmp_path / f"captions.{ending}", texts | {"another clip": "x"})
    assert read_predictions([path], captions.keys()) == texts
    assert "1 clip is not in this split and left out" in capsys.readouterr().err
    long = written(tmp_path / f"long.{ending}", captions, [(0.0, 2.0), (2.0, 4.0)])
    with pytest.raises(UserError, match=f"{len(captions)} clips have several windows"):
        read_predictions([long], captions.keys())
    wrong = tmp_path / f"wrong.{ending}"
    wrong.write_text('{"path": "x", "windows": [1]}\n' if ending == "jsonl" else "video,caption\n")
    with pytest.raises(UserError, match=r"was not written by infer|must have the columns"):
        read_predictions([wrong], captions.keys())
    with pytest.raises(UserError, match=r"film.srt: only .json, .jsonl, .csv and .tsv"):
        read_predictions(["film.srt"], captions.keys())


def test_only_the_likeliest_sample_and_clips_that_did_not_fail_are_read(tmp_path):
    window = {"start": 0, "end": 1, "caption": "b"}
    window["samples"] = [{"caption": "b", "score": -0.1}, {"caption": "a", "score": -0.2}]
    for ending in ("jsonl", "csv"):
        file = CaptionFile(tmp_path / f"samples.{ending}", ending)
        file.write({"path": "/clips/1.webm", "windows": [window]})
        if ending == "jsonl":
            file.write({"path": "/clips/2.webm", "error": "damaged"})
        file.close()
        assert read_predictions([file.path], {"1", "2"}) == {"1": "b"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--versus", "b.json"], "--versus needs --predictions"),
        (["--predictions", "a.json", "--common"], "--common needs --versus"),
        (
            ["--predictions", "a", "--versus", "b", "--probe", "p"],
            "--probe cannot be used with --versus",
        ),
        (
            ["--shard", "0/2", "--probe", "p", "--json"],
            "--probe, --json cannot be used with --shard",
        ),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(flags)
    assert message in capsys.readouterr().err
