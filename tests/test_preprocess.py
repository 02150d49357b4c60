"""preprocess_ssv2.py on real files: its output, refused input and reports."""

import json
import shutil

import pytest
from conftest import preprocess

from dataset import load_records
from runtime.errors import DONE, FAILED, PARTIAL, UserError


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
    estimate = int(printed.split("bytes per clip")[1].split()[0].replace(",", ""))
    assert abs(max(sizes) - estimate) < 1500


def test_a_folder_without_the_clips_is_refused(world, few):
    with pytest.raises(UserError, match=r"none of the 12 clips .*looked for \d+\.webm"):
        preprocess(world, few, "--splits", "train", videos=world / "labels")
    with pytest.raises(UserError, match="--videos not found"):
        preprocess(world, few, "--splits", "train", videos=few / "nowhere")
    with pytest.raises(UserError, match="no annotations for split 'test'"):
        preprocess(world, few, "--splits", "test")
