"""Kills, signals, damaged files and hostile input. The torture trials run with few repetitions by
default, and with many in `pytest -m torture`, which writes results/reliability.md."""

from runtime.start import ROOT

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import train_flags
from torture import checks, sandbox

import prepare_annotations
import train
from dataset import load_records
from runtime import feature_cache, files, ranks
from runtime.errors import DONE, FAILED, UserError
from runtime.feature_cache import load_manifest


class ShortRuns(sandbox.World):
    """Trains 2 epochs of 10 small steps. Matplotlib alone takes half a second per epoch."""

    def train(self, output, workers=0, **kwargs):
        short = ["--epochs", 2, "--batch-size", 2, *kwargs.pop("flags", ())]
        return super().train(output, workers, flags=short, **kwargs)


@pytest.fixture(scope="module")
def full(world, tmp_path_factory):
    return sandbox.make_world(tmp_path_factory.mktemp("full"), world)


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """A sandbox with fewer clips: 57 intact and 3 damaged ones for training."""
    small = sandbox.make_world(tmp_path_factory.mktemp("small"), world)
    for split, count in (("train", 60), ("validation", 16)):
        path = small.annotations / f"{split}.json"
        records = json.loads(path.read_text())
        damaged = sorted(r["id"] for r in records)[: sandbox.DAMAGED]  # those of make_world
        records.sort(key=lambda r: split == "train" and r["id"] not in damaged)
        path.write_text(json.dumps(records[:count]))
    return ShortRuns(small.folder, small.toy, small.annotations, small.videos)


@pytest.fixture(scope="module")
def measured():
    """{trial: rows} of the long runs. Once every trial is in it, the table is written."""
    rows = {}
    yield rows
    if len(rows) == len(checks.TRIALS):
        table = checks.markdown([row for trial in checks.TRIALS for row in rows[trial]])
        files.write_atomic(ROOT / "results" / "reliability.md", table)


ONLY_LONG = (checks.shards, checks.distributed)  # see test_two_processes_equal_one
RUNS = [("small", trial) for trial in checks.TRIALS if trial not in ONLY_LONG]
RUNS += [pytest.param("full", trial, marks=pytest.mark.torture) for trial in checks.TRIALS]


@pytest.mark.parametrize(("size", "trial"), RUNS)
def test_trial(request, measured, size, trial):
    place, rng = request.getfixturevalue(size), random.Random(trial.__name__)
    rows = list(trial(place, checks.REPETITIONS[size], rng))
    if size == "full":
        measured[trial] = rows
    assert rows and not [row for row in rows if row.problems]


BOTH = """
import contextlib, importlib, json, sys

from runtime import distributed

if __name__ == "__main__":
    with distributed.joined():
        distributed.joined = lambda *_: contextlib.nullcontext()  # torchrun's store allows one process group
        for name, *flags in json.loads(sys.argv[1]):
            code = importlib.import_module(name).main(flags)
    sys.exit(code)
"""


def test_two_processes_equal_one(small, tmp_path, monkeypatch):
    """Two processes give bit-identical features, and parameters equal up to rounding in AdamW. One
    torchrun runs both scripts, since its processes take 12 s to import torch and transformers."""
    (tmp_path / "both.py").write_text(BOTH)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    (features, _), (run, _) = small.cache(), small.trained()
    new = tmp_path / "features", tmp_path / "run"
    with monkeypatch.context() as patch:  # for the command lines only
        patch.setattr(sandbox, "run", lambda name, flags: [name, *map(str, flags)])
        commands = [
            small.preprocess(new[0], flags=["--workers", 0]),
            small.train(new[1], flags=["--features", new[0]]),
        ]
    ended = sandbox.run(tmp_path / "both", [json.dumps(commands)], processes=2)
    sandbox.expect(ended, DONE)
    assert not sandbox.differences(features, new[0])
    assert not checks.distributed_row("2 processes instead of 1", run, new[1]).problems


# ---- hostile input -----------------------------------------------------------------------------


def test_an_archive_is_not_read_as_json(tmp_path):
    with open(tmp_path / "train.json", "w") as file:
        os.truncate(file.fileno(), 40 << 30)  # sparse: takes no space on the disk
    with pytest.raises(UserError, match=r"has 42\.9 GB"):
        load_records(tmp_path, "train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "a \x1b[2J cup"}, r"control character '\\x1b'"),
        ({"paraphrases": ["A\rB."]}, "control character"),
        ({"label": "half \ud83d"}, "control character"),
        ({"video": "../../secret.webm"}, "outside the video folder"),
        ({"video": "/etc/secret.webm"}, "outside the video folder"),
        ({"id": "../../x"}, "is not a valid record"),
    ],
)
def test_hostile_records_are_refused(tmp_path, fields, message):
    """A caption could clear the terminal, and --num-samples could copy any file of the machine."""
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "label": "x"} | fields]))
    with pytest.raises(UserError, match=message):
        load_records(tmp_path, "train")
    with pytest.raises(UserError, match="is not a valid name"):
        load_records(tmp_path, "../train")


def test_control_characters_in_captions_are_not_dropped_silently(tmp_path):
    (tmp_path / "mine.csv").write_text("video,caption\na.mp4,good\nb.mp4,a\x07bell\nc.mp4,good\n")
    flags = ["--captions", str(tmp_path / "mine.csv"), "--output", str(tmp_path)]
    with pytest.raises(UserError, match="clips have unsafe values: b contains"):
        prepare_annotations.main(flags)
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def copied(prepared, tmp_path):
    """Features that a test may corrupt."""
    return shutil.copytree(prepared / "features", tmp_path / "features")


def corrupt(kind, record):
    if kind == "bomb":
        return checks.Bomb("bomb_went_off")
    if kind == "scale of another type":
        return record | {"scale": "large"}
    if kind == "endless offset":  # 4 bytes with a shape of 4 TiB
        return record | {"offset": torch.zeros(1).expand(1 << 40)}
    return record | {"scale": record["scale"] * float("nan")}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bomb", "cannot be read"),
        ("scale of another type", "valid scale and offset"),
        ("endless offset", "a tensor in it is not a plain one"),
        ("NaN", "contain NaN"),
    ],
)
def test_corrupt_features_end_training_with_their_id(
    world, prepared, copied, tmp_path, kind, message
):
    """Features with NaN and a valid checksum reached the loss, and training skipped steps without
    naming the clip."""
    path = sorted((copied / "train").iterdir())[7]
    record = corrupt(kind, files.read_torch(path))
    if kind == "NaN":
        record["crc32"] = feature_cache.checksum(path.stem, record)
    torch.save(record, path)
    with pytest.raises(UserError, match=f"clip {path.stem} .*{message}") as error:
        train.main(train_flags(world, prepared, tmp_path / "run", "--features", copied))
    assert error.value.code == FAILED and not Path("bomb_went_off").exists()


@pytest.mark.parametrize(
    "fields",
    [{"grid": "abc"}, {"grid": [8, 4]}, {"width": -1}, {"store": "zip"}, {"width": 1 << 40}],
)
def test_manifests_of_the_wrong_shape_are_refused(copied, fields):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["settings"] |= fields
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was not written by"):
        load_manifest(copied)


def test_files_left_by_a_kill_are_removed(tmp_path):
    for name in (".7.pt.123.tmp", ".8.pt.9.tmp", ".hidden", "7.pt"):
        (tmp_path / name).touch()
    files.remove_unfinished(tmp_path, lambda name: name == "7.pt")
    assert {p.name for p in tmp_path.iterdir()} == {".8.pt.9.tmp", ".hidden", "7.pt"}


def test_overlapping_shards_exclude_each_other(tmp_path):
    """0/3 and 0/2 have clips in common, but 0/3 and 1/2 do not."""
    (tmp_path / "keep").touch()
    code = """
import sys
from runtime import errors, files
for _ in sys.stdin:
    try:
        with files.lock(sys.argv[1], "locked", 0, 2):
            print("in", flush=True)
    except errors.UserError:
        print("out", flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        for part, parts, inside in ((0, 3, False), (1, 2, True), (2, 3, True), (0, 1, False)):
            with files.lock(tmp_path, "locked", part, parts):
                print(file=other.stdin, flush=True)
                assert other.stdout.readline() == ("in\n" if inside else "out\n")
    ids = [str(i) for i in range(500)]
    of = {(p, n): {i for i in ids if files.in_shard(i, p, n)} for n in (2, 3, 6) for p in range(n)}
    assert of[0, 2] == of[0, 6] | of[1, 6] | of[2, 6] and not of[0, 3] & of[1, 2]


def test_a_process_reads_only_its_share(world, prepared, tokenizer, monkeypatch):
    """Each process reads every third micro-batch, exactly as a single process would compute it."""
    args = train.parse_args(train_flags(world, prepared, "x", "--batch-size", 8, "--grad-accum", 5))
    data, recipe = train.read_data(args), train.Recipe.of(args)

    def read():
        steps = list(train.training_steps(data, recipe, tokenizer, torch.device("cpu"), 1))
        return [(ids, [m["ids"] for m in window]) for _, ids, window in steps]

    whole = read()
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: 3)
        parts.append(read())
    assert len(whole) > 3
    for step, (ids, micro_batches) in enumerate(whole):
        shares = [part[step] for part in parts]
        assert all(part_ids == ids for part_ids, _ in shares)
        assert [share for _, share in shares] == [micro_batches[rank::3] for rank in range(3)]
