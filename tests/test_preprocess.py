"""preprocess_ssv2.py on real files: its output, refused input and reports."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import preprocess
from torture.odd_clips import write

import preprocess_ssv2
import video
from dataset import load_records
from encoder import VideoEncoder
from runtime import cli, feature_cache, sources
from runtime.errors import DONE, FAILED, PARTIAL, USAGE, Stopped, UserError
from runtime.stop_signals import StopSignals


def files(folder):
    """Return {relative name: bytes} of a cache's feature files."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*.pt"))
        if p.is_file()
    }


@pytest.fixture
def few(world, prepared, tmp_path):
    """A folder with the annotations of 12 training clips and none of their features."""
    records = load_records(prepared / "annotations", "train")[:12]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(records))
    return tmp_path


def test_folders_have_the_names_that_training_reads(prepared):
    """The original wrote `ssv2_train` and read `train`."""
    for split in ("train", "validation"):
        ids = {r["id"] for r in load_records(prepared / "annotations", split)}
        assert {p.stem for p in (prepared / "features" / split).iterdir()} == ids


@pytest.mark.parametrize("flags", [("--workers", 2), ("--batch-size", 5)])
def test_bytes_do_not_depend_on_workers_batch_or_restarts(world, prepared, few, flags):
    preprocess(world, few, "--splits", "train", *flags)
    got = files(few / "features")
    assert got == {k: v for k, v in files(prepared / "features").items() if k in got}
    assert len(got) == 12
    for name in list(got)[::3]:
        (few / "features" / name).unlink()
    assert preprocess(world, few, "--splits", "train") == DONE
    assert files(few / "features") == got


def test_two_shards_equal_the_whole(world, prepared, few):
    preprocess(world, few, "--splits", "train", "--shard", "0/2")
    half = len(files(few / "features"))
    assert 0 < half < 12
    assert preprocess(world, few, "--splits", "train", "--shard", "1/2") == DONE
    got = files(few / "features")
    assert got == {k: v for k, v in files(prepared / "features").items() if k in got}
    assert len(got) == 12


def test_damaged_and_missing_clips_are_counted_and_named(world, prepared, few, capsys):
    """ok + failed + missing is the number of clips, and a repaired clip is processed again."""
    ids = [r["id"] for r in load_records(few / "annotations", "train")]
    videos = few / "videos"
    videos.mkdir()
    for i in ids[:10]:
        shutil.copy(world / "videos" / f"{i}.webm", videos)
    whole = (videos / f"{ids[0]}.webm").read_bytes()
    (videos / f"{ids[0]}.webm").write_bytes(whole[: len(whole) // 2])
    (videos / f"{ids[1]}.webm").write_text("not a video")
    (videos / f"{ids[2]}.webm").write_bytes(b"")
    assert preprocess(world, few, "--splits", "train", videos=videos) == PARTIAL
    assert "7 ok, 3 failed" in capsys.readouterr().out
    lines = [json.loads(s) for s in (few / "features" / "failures.jsonl").read_text().splitlines()]
    assert {s["id"]: s["reason"] for s in lines} == {
        ids[0]: "truncated",
        ids[1]: "unreadable",
        ids[2]: "empty",
    }
    assert len(files(few / "features")) == 7
    (videos / f"{ids[0]}.webm").write_bytes(whole)
    assert preprocess(world, few, "--splits", "train", videos=videos) == PARTIAL
    assert "8 ok, 2 failed" in capsys.readouterr().out
    assert f'"{ids[0]}"' not in (few / "features" / "failures.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--num-frames", 8), "num_frames"),
        (("--resize", "crop"), "resize"),
        (("--store", "fp16"), "store"),
        (("--pool", 2), "pool"),
        (("--still",), "sampling"),
        (("--dtype", "bfloat16"), "compute_dtype"),
    ],
)
def test_another_setting_is_refused_by_name(world, prepared, flags, field):
    """This also holds for a finished cache, where --still once reported success."""
    with pytest.raises(UserError, match=f"has {field} = "):
        preprocess(world, prepared, *flags)


def test_shards_of_different_sizes_equal_the_whole(world, prepared, few, capsys):
    """The last of three parts is processed as two smaller ones. All failures end up in one file."""
    ids = [r["id"] for r in load_records(few / "annotations", "train")]
    videos = few / "videos"
    videos.mkdir()
    for i in ids:
        shutil.copy(world / "videos" / f"{i}.webm", videos)
    for i in ids[::4]:
        (videos / f"{i}.webm").write_bytes(b"")
    for part in ("0/3", "1/3", "4/6", "5/6"):
        preprocess(world, few, "--splits", "train", "--shard", part, videos=videos)
    got, folder = files(few / "features"), few / "features"
    assert got == {k: v for k, v in files(prepared / "features").items() if k in got}
    assert len(got) == 9 and not (folder / "failures.jsonl").exists()
    assert preprocess(world, few, "--splits", "train", videos=videos) == PARTIAL
    lines = [json.loads(s) for s in (folder / "failures.jsonl").read_text().splitlines()]
    assert [s["id"] for s in lines] == sorted(ids[::4])
    assert not list(folder.glob("failures_part*"))


def test_verify(world, prepared, few, capsys):
    preprocess(world, few, "--splits", "train")
    assert preprocess(world, few, "--splits", "train", "--verify") == DONE
    damaged = sorted((few / "features" / "train").iterdir())[3]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    sorted((few / "features" / "train").iterdir())[5].unlink()
    capsys.readouterr()
    assert preprocess(world, few, "--splits", "train", "--verify") == FAILED
    printed = capsys.readouterr()
    assert "10 intact, 1 damaged, 1 missing" in printed.out
    assert damaged.stem in printed.err


def test_dry_run_writes_nothing(world, few, capsys):
    assert preprocess(world, few, "--splits", "train", "--dry-run") == DONE
    printed = capsys.readouterr().out
    assert "for 12 clips" in printed and "estimated time" in printed
    assert not (few / "features").exists()
    preprocess(world, few, "--splits", "train")
    sizes = {p.stat().st_size for p in (few / "features" / "train").iterdir()}
    estimate = float(re.search(r"disk per clip +(\d+\.?\d*) KB", printed)[1])
    assert abs(max(sizes) - 1000 * estimate) < 1500


def test_a_folder_without_the_clips_is_refused(world, few):
    with pytest.raises(UserError, match=r"none of the 12 clips .*looked for \d+\.webm"):
        preprocess(world, few, "--splits", "train", videos=world / "labels")
    with pytest.raises(UserError, match="--videos not found"):
        preprocess(world, few, "--splits", "train", videos=few / "nowhere")
    with pytest.raises(UserError, match="no annotations for split 'test'"):
        preprocess(world, few, "--splits", "test")


# ---- files that have changed -----------------------------------------------------------------


@pytest.fixture
def films(world, few):
    """Folders a and b: 4 clips each, of the same names. Returns a function that encodes a folder."""
    ids = [r["id"] for r in load_records(few / "annotations", "train")]
    for folder, names in (("a", ids[:4]), ("b", ids[4:8])):
        (few / folder).mkdir()
        for new, old in zip(ids, names, strict=False):
            shutil.copy(world / "videos" / f"{old}.webm", few / folder / f"{new}.webm")

    def encode(name, *flags, features="features"):
        flags = ["--splits", "train", "--limit", 4, *flags]
        return preprocess(world, few, *flags, videos=few / name, features=few / features)

    return encode


def sources_of(features):
    lines = (features / "sources.jsonl").read_text().splitlines()
    return {entry["id"]: entry for entry in map(json.loads, lines)}


def test_other_films_of_the_same_names_are_encoded(films, few, capsys):
    """With another --videos, "4 already encoded" was printed and training used the old pictures."""
    assert films("a") == DONE and films("b", features="expected") == DONE
    capsys.readouterr()
    old = files(few / "features")
    assert films("b", "--dry-run") == DONE
    assert "4 clips have changed" in capsys.readouterr().err and files(few / "features") == old
    with pytest.raises(UserError, match="has pool = 1"):
        films("b", "--pool", 2)
    assert "clips" not in capsys.readouterr().err, "it was refused after notes on changed clips"
    assert films("b") == DONE
    assert "0 already encoded\n4 clips have changed" in capsys.readouterr().err
    assert files(few / "features") == files(few / "expected")
    assert sources_of(few / "features") == sources_of(few / "expected")
    assert films("b", "--shard", "1/2") == films("b") == DONE
    assert "changed" not in capsys.readouterr().err


def test_verify_compares_clips_with_the_files_that_were_encoded(films, few, capsys):
    """A cache made from other files of the same names was "4 intact"."""
    films("a")
    assert films("a", "--verify") == DONE
    assert "4 intact, 0 damaged, 0 missing, 0 changed" in capsys.readouterr().out
    path = sorted((few / "b").iterdir())[1]
    (few / "a" / path.name).write_bytes(path.read_bytes())
    assert films("a", "--verify") == FAILED
    printed = capsys.readouterr()
    assert "3 intact, 0 damaged, 0 missing, 1 changed" in printed.out
    assert f"{few / 'a' / path.name} has changed" in printed.err
    flags = ["--annotations", str(few / "annotations"), "--features", str(few / "features")]
    flags += ["--splits", "train", "--limit", "4", "--verify"]
    assert preprocess_ssv2.main(flags) == DONE  # without --videos, only the features are checked
    assert capsys.readouterr().out == "4 intact, 0 damaged, 0 missing\n"


def test_verify_names_clips_without_a_file(films, few, capsys):
    """Folder b lacked a clip, so its features stayed those of folder a, and --verify --videos b passed."""
    films("a")
    path = sorted((few / "b").iterdir())[1]
    path.unlink()
    capsys.readouterr()
    assert films("b") == PARTIAL
    assert "1 missing clip has features of an earlier run" in capsys.readouterr().err
    assert films("b", "--verify") == FAILED
    printed = capsys.readouterr()
    assert "3 intact, 0 damaged, 0 missing, 0 changed, 1 without a file" in printed.out
    assert f"clip {path.stem}: it has features, but its file is not in --videos" in printed.err


def test_a_filled_hole_is_noticed(tmp_path):
    """A film whose middle was missing has the size and both ends of the whole film."""
    data = bytearray(os.urandom(2_500_000))
    (tmp_path / "a").write_bytes(data)
    whole = sources.identify(tmp_path / "a")
    data[1_000_000:1_200_000] = bytes(200_000)
    (tmp_path / "a").write_bytes(data)
    assert sources.identify(tmp_path / "a").digest != whole.digest


def test_unchanged_files_are_not_opened(films, few, monkeypatch):
    """Opening the clips of SSv2 at each start would take minutes. Another date alone is no change."""
    films("a")
    made = sources_of(few / "features")
    monkeypatch.setattr("video.decode_source", None)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.sources.identify", None)
        assert films("a") == DONE
    for path in (few / "a").iterdir():
        os.utime(path, (1, 1))
    assert films("a") == DONE
    found = sources_of(few / "features")
    assert {i: s["digest"] for i, s in found.items()} == {i: s["digest"] for i, s in made.items()}
    assert {s["mtime_ns"] for s in found.values()} == {10**9}


def test_features_of_a_film_that_was_replaced_by_a_damaged_one_are_deleted(films, few):
    """They are of another film. Until the new file has been tried they stay, in case of a typing error."""
    films("a")
    path = sorted((few / "b").iterdir())[0]
    path.write_bytes(b"no film")
    assert films("b") == PARTIAL
    assert f"train/{path.stem}.pt" not in files(few / "features")
    assert len(files(few / "features")) == 3


def test_features_never_stand_beside_the_source_of_others(films, few, monkeypatch):
    """A run on other films that is stopped between two writes must not leave features of one film that
    count as those of another, whichever folder is encoded next."""
    films("a")
    whole, save, seen = files(few / "features"), feature_cache.save_features, []

    def stop(path, *args):
        seen.append(path.exists())
        save(path, *args)
        if len(seen) > 2:
            raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("preprocess_ssv2.save_features", stop)
        with pytest.raises(Stopped):
            films("b", "--batch-size", 1)
    assert len(seen) >= 3 and not any(seen)
    assert films("a") == DONE
    assert files(few / "features") == whole


def test_sources_of_shards_are_merged(films, few, capsys):
    """The newest entry counts, in whichever file it is. One shard is of b, then everything is."""
    films("a")
    films("b", "--shard", "0/2")
    half = files(few / "features")
    capsys.readouterr()
    assert films("b", "--shard", "0/2") == films("b") == DONE
    changed = [line for line in capsys.readouterr().err.splitlines() if "changed" in line]
    assert len(changed) == 1 and 0 < int(changed[0].split()[0]) < 4
    assert films("b", features="expected") == DONE
    assert files(few / "features") == files(few / "expected") != half
    assert sources_of(few / "features") == sources_of(few / "expected")
    assert not list((few / "features").glob("sources_part*"))


def test_a_cache_without_sources_is_kept(films, few, capsys):
    """A cache of an earlier version is not computed again, and a later change is noticed."""
    films("a")
    old = files(few / "features")
    (few / "features" / "sources.jsonl").unlink()
    capsys.readouterr()
    assert films("a") == DONE
    assert "4 clips have features but no valid line in sources.jsonl" in capsys.readouterr().err
    assert films("a") == films("a", "--verify") == DONE and files(few / "features") == old
    assert "no valid line" not in capsys.readouterr().err
    path = sorted((few / "b").iterdir())[0]
    (few / "a" / path.name).write_bytes(path.read_bytes())
    assert films("a", "--verify") == FAILED and films("a") == DONE
    assert "1 clip has changed since it was encoded" in capsys.readouterr().err
    assert films("a", "--verify") == DONE


def test_damaged_lines_of_the_index_are_counted(films, few, capsys):
    """A damaged sources.jsonl counted without a word as that of an old cache."""
    films("a")
    path = few / "features" / "sources.jsonl"
    first, second, *rest = path.read_text().splitlines()
    wrong = json.dumps(json.loads(second) | {"digest": "x"})
    path.write_text(
        "\n".join(["\0" + first, wrong, *rest, first[:20]])
    )  # a kill leaves the last line
    capsys.readouterr()
    assert films("a", "--verify") == DONE
    printed = capsys.readouterr().err
    assert f"skipped 1 damaged line in {path}" in printed
    assert "2 clips were not compared with the files" in printed
    assert films("a") == DONE
    printed = capsys.readouterr().err
    assert "skipped 1 damaged line" in printed
    assert "2 clips have features but no valid line in sources.jsonl" in printed
    assert films("a") == DONE and "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sources.jsonl", "failures.jsonl", "manifest.json", "train"])
def test_a_folder_in_place_of_a_file_is_named(films, few, name, capsys):
    """It ended in an IsADirectoryError, or a manifest.json that is a folder did "not exist"."""
    path = few / "features" / name
    if name == "train":
        path.parent.mkdir()
        path.touch()
    else:
        path.mkdir(parents=True)
    assert cli.exit_code(lambda: films("a"), StopSignals()) == USAGE
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in last and "does not exist" not in last


# ---- precision -------------------------------------------------------------------------------


def test_a_high_quantisation_error_is_reported(films, few, capsys, monkeypatch):
    """A few tokens of large norm cost all others 10 % of their precision in int8, without a message."""
    (black, *_) = sorted((few / "a").iterdir())
    write(black, 12, frame=lambda i: np.zeros((64, 64, 3), np.uint8))
    films("a", "--dry-run")  # a clip of one colour has a large relative error, but no large token
    printed = capsys.readouterr().err
    assert "int8 storage: relative error" in printed and "WARNING" not in printed
    films("a", "--store", "fp16", "--dry-run")
    assert "relative error" not in capsys.readouterr().err
    encode = VideoEncoder.encode

    def with_outliers(self, clips):
        x = encode(self, clips)
        x["features"][:, ::64] *= 100
        return x

    monkeypatch.setattr(VideoEncoder, "encode", with_outliers)
    films("a", "--dry-run")
    printed = capsys.readouterr().err
    assert "WARNING: int8 storage: relative error" in printed and "--store fp16" in printed


def test_clips_that_are_parts_of_a_file(world, few, capsys):
    """Windows of one film share its file, so only their spans tell them apart. When the spans of a cache were
    changed, its features must not be kept as those of the same, unchanged file."""
    (record, *_) = load_records(few / "annotations", "train")
    path = world / "videos" / f"{record['id']}.webm"
    parts = [
        record | {"id": f"part{i}", "video": path.name, "start": start, "end": end}
        for i, (start, end) in enumerate([(0, 0.5), (0.5, 1), (0.5, 99)])
    ]
    (few / "annotations" / "train.json").write_text(json.dumps(parts))
    flags = ("--splits", "train")
    assert preprocess(world, few, *flags) == DONE
    assert "1 clip ends after the end of the video" in capsys.readouterr().err
    manifest = feature_cache.load_manifest(few / "features")
    encoder = VideoEncoder.from_manifest(manifest, torch.device("cpu"))
    for part in parts:
        clip = video.decode(path, manifest.settings.num_frames, part["start"], part["end"])
        (want,) = encoder.stored([clip.frames])
        file = few / "features" / "train" / f"{part['id']}.pt"
        got = feature_cache.load_features(file, part["id"], manifest.settings)
        assert torch.equal(got["features"], want["features"])

    parts[0]["end"] = 0.75
    (few / "annotations" / "train.json").write_text(json.dumps(parts))
    assert preprocess(world, few, *flags, "--verify") == FAILED
    assert "part0: its start and end have changed" in capsys.readouterr().err
    before = files(few / "features")
    assert preprocess(world, few, *flags) == DONE
    assert "1 clip has changed" in capsys.readouterr().err
    after = files(few / "features")
    assert {k for k in after if after[k] != before[k]} == {"train/part0.pt"}
    assert preprocess(world, few, *flags, "--verify") == DONE
