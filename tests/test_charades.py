"""The toy Charades from its files to a probe's mAP and to captions."""

import csv
import json
from itertools import pairwise

import numpy as np
import pytest
import transformers as hf
from conftest import preprocess, train_flags
from test_language_models import GPT2, save
from test_probe import official

import evaluate
import prepare_annotations
import probe
import train
from dataset import load_records
from runtime.errors import UserError
from worlds import toy_charades

SPLITS = ("train", "validation", "test")
WINDOWS = {"whole": [], "apart": ["--window", "2"]}
WINDOWS |= {"overlapping": ["--window", "2", "--stride", "1"]}


@pytest.fixture(scope="module")
def charades(world, tmp_path_factory):
    """A toy Charades with whole videos and windows in one cache. A test video is missing."""
    root = tmp_path_factory.mktemp("charades")
    toy_charades.main([str(world), str(root / "c"), "--videos", "20", "--test-videos", "12"])
    lost = next(row["id"] for row in rows(root, "test") if row["actions"])
    (root / "c" / "videos" / f"{lost}.mp4").rename(root / f"{lost}.mp4")
    for name, flags in WINDOWS.items():
        (root / name).mkdir()
        output = ["--output", str(root / name / "annotations")]
        prepare_annotations.main(["--charades", str(root / "c"), *flags, *output])
        flags = {"videos": root / "c" / "videos", "features": root / "features"}
        preprocess(world, root / name, "--splits", *SPLITS, **flags)
    return root


def rows(root, split):
    with open(root / "c" / f"Charades_v1_{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_probe(root, name, *flags):
    args = ["--features", root / "features", "--annotations", root / name / "annotations"]
    args += ["--output", root / name / "probe", "--workers", 0, "--device", "cpu"]
    args += ["--split", "test", "--allow-missing", 9, *flags]
    assert not probe.main(list(map(str, args)))
    return json.loads((root / name / "probe" / "evaluation_test.json").read_text())


def test_the_same_flags_give_the_same_files(charades, world, tmp_path):
    flags = [str(world), str(tmp_path / "c"), "--videos", "20", "--test-videos", "12"]
    toy_charades.main(flags)
    for path in (tmp_path / "c").rglob("*.*"):
        known = charades / "c" / path.relative_to(tmp_path / "c")
        known = known if known.exists() else charades / path.name  # the missing one
        assert path.read_bytes() == known.read_bytes()
    assert json.loads((tmp_path / "c" / "toy.json").read_text())["synthetic"] is True
    with pytest.raises(UserError, match=r"has a toy world with videos = .*, not "):
        toy_charades.main([*flags, "--test-videos", "13"])
    with pytest.raises(UserError, match=r"toy world not found.* worlds\.toy_ssv2"):
        toy_charades.main([str(tmp_path), *flags[1:]])
    with pytest.raises(UserError, match=r"is not a toy world of worlds\.toy_ssv2"):
        toy_charades.main([str(tmp_path / "c"), *flags[1:]])


def test_it_has_what_charades_has(charades):
    """Overlapping actions, intervals that are too long, videos without actions, quoted commas."""
    overlap, beyond, empty = 0, 0, 0
    for row in rows(charades, "train") + rows(charades, "test"):
        spans = [tuple(map(float, a.split()[1:])) for a in row["actions"].split(";") if a]
        overlap += any(a[1] > b[0] for a, b in pairwise(spans))
        beyond += any(end > float(row["length"]) + 0.01 for _, end in spans)
        empty += not spans
        assert row["script"].count(",") >= len(spans) - 1
    assert overlap > 5 and beyond and empty

    # all windows of a video together have its actions
    for split in SPLITS:
        whole = {
            r["id"]: set(r["actions"]) for r in load_records(charades / "whole/annotations", split)
        }
        for name in ("apart", "overlapping"):
            found = {i: set() for i in whole}
            for r in load_records(charades / name / "annotations", split):
                found[r["video"].removesuffix(".mp4")] |= set(r["actions"])
            assert found == whole


@pytest.mark.parametrize("name", WINDOWS)
def test_a_submission_has_the_reported_map(charades, name):
    """The file, scored against the CSV by another implementation of the official algorithm."""
    flags = [
        "--num-heads",
        2,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--lr",
        1e-2,
        "--weight-decay",
        0.1,
    ]
    path = charades / name / "submission.txt"
    result = run_probe(charades, name, *flags, "--warmup-steps", 1, "--submission", path)
    scores = {v: list(map(float, p)) for v, *p in map(str.split, path.read_text().splitlines())}
    count = len((charades / "c" / "Charades_v1_classes.txt").read_text().splitlines())
    wanted = {}
    for row in rows(charades, "test"):
        numbers = {int(a.split()[0][1:]) for a in row["actions"].split(";") if a}
        wanted[row["id"]] = [c in numbers for c in range(count)]
    assert {len(p) for p in scores.values()} == {157}
    assert not any(sum(p[count:]) for p in scores.values())
    scores = {video: p[:count] for video, p in scores.items()}
    (lost,) = wanted.keys() - scores.keys()
    assert result["n"] == len(scores) == 11 and any(wanted[lost])
    assert not all(np.array(list(wanted.values())).any(0))  # a class without positives
    assert not all(map(any, wanted.values()))  # an empty video
    scored = {video: labels for video, labels in wanted.items() if video != lost}
    assert official(scores, scored) == pytest.approx(result["metrics"]["mAP_official"], abs=1e-6)
    # the official algorithm puts a missing video last, so that it cannot help
    assert official(scores, wanted) < result["metrics"]["mAP_official"]


def test_captions_with_a_frozen_gpt2(charades, world, quick_meteor, tmp_path):
    lm = save(tmp_path / "lm", world, hf.GPT2Config, **GPT2)
    config = json.loads((lm / "config.json").read_text()) | {
        "pad_token_id": None
    }  # as GPT-2 has it
    (lm / "config.json").write_text(json.dumps(config))
    whole, run = charades / "whole", tmp_path / "run"
    weights = (lm / "model.safetensors").read_bytes()
    common = ["--features", str(charades / "features"), "--lm", str(lm), "--no-meteor"]
    assert not train.main(train_flags(world, whole, run, *common, "--grad-accum", "1"))
    flags = ["--checkpoint", str(run), "--annotations", str(whole / "annotations"), *common]
    flags += ["--split", "test", "--allow-missing", "1", "--workers", "0"]
    assert not evaluate.main(flags)
    for name in ("validation", "test_without1"):
        result = json.loads((run / f"evaluation_{name}.json").read_text())
        names = [*(f"Bleu_{n}" for n in range(1, 5)), "ROUGE_1", "ROUGE_2"]
        assert all(0 <= result["metrics"][name] <= 1 for name in names)
    captions = json.loads((run / "predictions_test_without1.json").read_text())
    assert len(captions) == 11 and (lm / "model.safetensors").read_bytes() == weights
