"""Files of captions and captions beside clips: formats, and continuing after a kill."""

from runtime.start import ROOT

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import av
import pytest
from test_evaluate import caption

from infer import destination, shard_name, write
from runtime.caption_files import (
    CaptionFile,
    Sidecars,
    formatted,
    header,
    likeliest_captions,
    opened,
    read_results,
)
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.predictions import read_predictions
from windows import Window, description

FILM = {
    "path": "/films/a\tb.mp4",
    "windows": [
        {"start": 0.0, "end": 6.04, "caption": "=SUM(1) <b>cup</b> & 杯子 --> x"},
        {"start": 5.96, "end": 7200.06, "caption": "b"},
    ],
}


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_open_in_ffmpeg(tmp_path, form):
    """Times are to a tenth of a second, and a window ends where the next one starts."""
    path = tmp_path / f"film.{form}"
    path.write_text(formatted(FILM, form), encoding="utf-8")
    with av.open(str(path)) as container:
        packets = [p for p in container.demux() if p.size]
    times = [(round(p.pts * p.time_base, 3), round(p.duration * p.time_base, 3)) for p in packets]
    assert [tuple(map(float, t)) for t in times] == [(0.0, 6.0), (6.0, 7194.1)]
    text = bytes(packets[0]).decode()
    escaped = form == "vtt"
    assert ("&lt;b>cup&lt;/b> &amp;" if escaped else "<b>cup</b> &") in text
    assert "杯子 -> x" in text


def test_captions_are_saved_after_the_reader_of_stdout_has_gone(tmp_path, monkeypatch, capsys):
    """`infer.py clips --output a.csv | head` ended with 0 after a few clips, and lost the current one."""

    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    results = [FILM | {"path": f"/{n}.mp4"} for n in range(3)]
    file = CaptionFile(tmp_path / "a.csv", "csv")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert write(results, file, "text", 3, is_saved=True) == 3
        with pytest.raises(BrokenPipeError):
            write(results, file, "text", 3, is_saved=False)
    file.close()
    rows = (tmp_path / "a.csv").read_text()
    assert all(f"/{n}.mp4" in rows for n in range(3))


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_the_first_window_of_a_damaged_film_is_not_the_whole_film(tmp_path, form):
    """If the other windows had failed, its caption became the label of the film."""
    first, second = Window(0, 0.0, 6.0, alone=False), Window(0, 6.0, 11.97, alone=False)
    result = description("/film.mp4", [(first, "a"), (second, None)])
    (path := tmp_path / f"a.{form}").write_text(header(form) + formatted(result, form))
    [(_, row)] = likeliest_captions(path)
    assert (row["caption"], row["start"], row["end"]) == ("a", 0.0, 6.0)
    with pytest.raises(UserError, match=r"1 clip has several windows"):
        read_predictions([path], ["film"])
    assert formatted(result, "text") == "/film.mp4\t0.0-6.0\ta\n"
    if form == "csv":
        assert path.read_text().splitlines()[2] == "/film.mp4,6.0,12.0,,,"


def test_a_table_has_a_row_for_each_window():
    """Spreadsheets compute cells that begin with =, and a tab in a name would be another column."""
    text = header("csv") + formatted(FILM, "csv")
    first, second, third = csv.reader(io.StringIO(text))
    assert first == ["path", "start", "end", "caption", "score", "actions"]
    assert second[:3] == ["/films/a\\tb.mp4", "0.0", "6.0"] and second[3].startswith("'=SUM")
    assert third == ["/films/a\\tb.mp4", "6.0", "7200.1", "b", "", ""]
    tsv = (header("tsv") + formatted(FILM, "tsv")).splitlines()
    assert len(tsv) == 3 and all(line.count("\t") == 5 for line in tsv)
    assert tsv[1].split("\t")[3].startswith("=SUM")
    assert "杯子" in formatted(FILM, "jsonl") and '"end": 6.0,' in formatted(FILM, "jsonl")


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_a_file_is_continued_after_a_kill_in_the_middle_of_a_line(tmp_path, form):
    """In a table, the rows of half a film counted as the whole film."""
    path = tmp_path / f"captions.{form}"
    file, other = CaptionFile(path, form), FILM | {"path": '/"c", d.mp4'}
    file.write(FILM)
    whole = path.read_bytes()
    file.write(other)
    path.write_bytes(path.read_bytes()[:-3])
    file = CaptionFile(path, form)
    assert path.read_bytes() == whole
    assert file.is_finished(FILM["path"]) and not file.is_finished(other["path"])
    file.write(other)
    file.close()
    assert path.read_bytes().startswith(whole)
    assert CaptionFile(path, form).is_finished(other["path"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "path;start;end;caption;score;actions\n/a.mp4;0,0;2,0;cup;;\n"),
        ("a.csv", "video,caption\na.mp4,a cup\nb.mp4,an unfinished li"),
        ("a.tsv", "notes"),
        ("a.jsonl", '[\n {"path": "/a.mp4"}\n]\n'),
    ],
)
def test_a_file_that_infer_did_not_write_is_not_continued(tmp_path, name, text):
    """--skip-done cut off the last line of a user's file and appended captions to it."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match="was not written by"):
        CaptionFile(path, path.suffix[1:])
    assert path.read_text() == text


def test_a_clip_that_failed_is_tried_again(tmp_path):
    file = CaptionFile(tmp_path / "captions.jsonl", "jsonl")
    file.write({"path": "/a.mp4", "error": "is corrupt"})
    assert not CaptionFile(file.path, "jsonl").is_finished("/a.mp4")
    file.write(FILM | {"path": "/a.mp4"})
    file.close()
    [line] = file.path.read_text().splitlines()
    assert "error" not in json.loads(line) and "windows" in json.loads(line)


def test_sidecars(world, trained, tmp_path, capsys):
    """A user's own .txt is left alone. After an interruption, each clip is captioned once.

    The record is in the given folder, although the first clip is in a folder below it.
    """
    clips = tmp_path / "clips"
    (clips / "a-inner").mkdir(parents=True)
    names = "a.webm", "b.webm", "b.mkv", "a-inner/c.webm"
    for name, source in zip(names, sorted((world / "videos").iterdir()), strict=False):
        shutil.copy(source, clips / name)
    (clips / "a.txt").write_text("mine")
    assert caption(trained, clips, "--sidecar", "--limit", "2") == DONE
    assert "left alone: 1 .txt file" in capsys.readouterr().err
    with pytest.raises(UserError, match="--skip-done continues it, --overwrite replaces it"):
        caption(trained, clips, "--sidecar")
    assert caption(trained, clips, "--sidecar", "--skip-done") == DONE
    texts = {p.relative_to(clips).as_posix(): p.read_text() for p in clips.rglob("*.txt")}
    assert texts.keys() == {"a.txt", "b.webm.txt", "b.mkv.txt", "a-inner/c.txt"}
    assert texts["a.txt"] == "mine"
    results = read_results(clips / "captions.jsonl")
    for name, sidecar in (("a-inner/c.webm", "a-inner/c.txt"), ("b.mkv", "b.mkv.txt")):
        assert texts[sidecar] == results[str(clips / name)]["windows"][0]["caption"] + "\n"
    capsys.readouterr()
    assert caption(trained, clips, "--sidecar", "--skip-done") == DONE
    assert "nothing to do: 4 clips given" in capsys.readouterr().err

    # a lost sidecar is written again; one that was edited stays as it is, even with --overwrite
    (clips / "a-inner/c.txt").unlink()
    (clips / "b.mkv.txt").write_text("edited")
    (clips / "b.webm.txt").touch()
    assert caption(trained, clips, "--sidecar", "--skip-done") == DONE
    assert capsys.readouterr().out.count("\n") == 1
    assert (clips / "a-inner/c.txt").read_text() == texts["a-inner/c.txt"]
    (clips / "bad.webm").write_text("no film")
    assert caption(trained, clips, "--sidecar", "--overwrite", "--style", "sentence") == PARTIAL
    assert "left alone: 2 .txt files" in capsys.readouterr().err
    assert (clips / "b.mkv.txt").read_text() == "edited"
    sentence = read_results(clips / "captions.jsonl")[str(clips / "a-inner/c.webm")]
    assert (clips / "a-inner/c.txt").read_text() == sentence["windows"][0]["caption"] + "\n"


def test_a_sidecar_that_cannot_be_written_is_an_error_of_its_clip(tmp_path, capsys):
    """A name that was too long, or a subfolder that was read-only, ended the run for all clips."""
    long = tmp_path / f"{'a' * 246}.mp4"  # a name of 250 letters gets a sidecar
    clips = [long, tmp_path / f"{'b' * 250}.mp4", tmp_path / f"{'b' * 250}.mkv", tmp_path / "c.mp4"]
    record = CaptionFile(tmp_path / "captions.jsonl", "jsonl")
    results = (FILM | {"path": str(clip)} for clip in clips)
    assert write(results, Sidecars(clips, "txt", record), "text", len(clips), True) == 2
    assert capsys.readouterr().err.count("cannot be written: File name too long") == 2
    assert {p.name for p in tmp_path.glob("*.txt")} == {f"{'a' * 246}.txt", "c.txt"}
    errors = ["error" in result for result in read_results(record.path).values()]
    assert errors == [False, True, True, False]


def test_subtitles_are_only_replaced_by_new_ones(trained, tmp_path):
    """--overwrite emptied the file first. If the film then failed, --skip-done took the empty file for done."""
    film, path = tmp_path / "film.webm", tmp_path / "film.srt"
    film.write_text("no film")
    path.write_text("old")
    assert caption(trained, film, "--output", path, "--overwrite") == FAILED
    assert path.read_text() == "old"
    path.write_text("")
    assert caption(trained, film, "--output", path, "--skip-done") == FAILED


def test_what_overwrite_replaces(tmp_path, capsys):
    """It emptied the file, with the captions of clips that were not given, and said nothing. Through a
    symbolic link it replaced the link."""
    (tmp_path / "real.csv").write_text(header("csv"))
    (link := tmp_path / "link.csv").symlink_to("real.csv")
    path, form = destination(str(link), None, None, (0, 1))
    assert path == tmp_path / "real.csv"
    file = CaptionFile(path, form)
    for name in ("/a.mp4", "/b.mp4", "/c.mp4"):
        file.write(FILM | {"path": name})
    CaptionFile(path, form).forget(["/a.mp4", "/d.mp4"])
    assert "real.csv; the captions of 2 other clips in it are deleted" in capsys.readouterr().err
    assert path.read_text() == ""
    CaptionFile(path, form).forget(["/a.mp4"])
    assert not capsys.readouterr().err


def test_existing_subtitles_may_be_those_of_another_film(tmp_path, trained, capsys):
    """With --skip-done, any film counted as done if the file existed."""
    (tmp_path / "film.webm").touch()
    (path := tmp_path / "a.srt").write_text("old")
    with pytest.raises(UserError, match=r"a\.srt exists; --overwrite replaces it"):
        caption(trained, tmp_path / "film.webm", "--output", path)
    assert caption(trained, tmp_path / "film.webm", "--output", path, "--skip-done") == DONE
    assert "it does not say which film it belongs to" in capsys.readouterr().err


def test_sidecars_in_a_folder_that_is_read_only(trained, tmp_path, monkeypatch):
    """Hours later the captions could not be written, and the message was about --output."""
    (clips := tmp_path / "clips").mkdir()
    (clips / "a.mp4").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != clips)
    monkeypatch.setattr("infer.load_models", None)
    with pytest.raises(UserError, match=r"--sidecar .* is not writable"):
        caption(trained, clips, "--sidecar")
    with pytest.raises(UserError, match=r"--sidecar: .* is not writable"):
        caption(trained, clips, "--sidecar", "--output", tmp_path / "record")


def test_shards_write_different_files_with_every_clip_once(world, trained, tmp_path):
    videos = sorted((world / "videos").iterdir())[:6]
    output = tmp_path / "all.csv"
    for part in range(2):
        flags = "--output", output, "--shard", f"{part}/2"
        assert caption(trained, *videos, *flags) == DONE
    rows = [
        row
        for n in range(2)
        for row in csv.DictReader((tmp_path / f"all_part{n}of2.csv").read_text().splitlines())
    ]
    assert sorted(row["path"] for row in rows) == sorted(map(str, videos))


def test_a_second_process_does_not_write_to_the_same_file(tmp_path):
    """Two commands on one folder captioned each clip twice, and one replaced the other's record."""
    path = tmp_path / "captions.jsonl"
    code = (
        "import sys, pathlib; from runtime.caption_files import opened\n"
        "with opened(pathlib.Path(sys.argv[1]), 'jsonl', []): print('in')"
    )
    command = [sys.executable, "-c", code, str(path)]
    with opened(path, "jsonl", []):
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "another process is writing to" in second.stderr and not second.stdout
    assert not [*tmp_path.iterdir()]


def test_shards_do_not_depend_on_where_a_folder_is(tmp_path):
    """Two machines with other mount points captioned some clips twice and others not at all."""
    names = {shard_name(Path(folder, "b", "1.mp4"), [folder]) for folder in ("a", "/x/a", "./a/")}
    assert names == {"b/1.mp4"}
    assert shard_name(Path("a/1.mp4"), ["a/1.mp4"]) == "1.mp4"


def test_digests_of_sidecars_outlive_an_interrupted_overwrite(tmp_path):
    """Killed after --overwrite had emptied the record, the old sidecars counted as the user's own."""
    clip = tmp_path / "a.mp4"
    record = CaptionFile(tmp_path / "captions.jsonl", "jsonl")
    Sidecars([clip], "txt", record).write(FILM | {"path": str(clip)})
    record.forget([clip])
    record = CaptionFile(record.path, "jsonl")
    sidecars = Sidecars([clip], "txt", record)
    assert not sidecars.is_finished(clip)
    sidecars.write(FILM | {"path": str(clip), "windows": FILM["windows"][1:]})
    assert (tmp_path / "a.txt").read_text() == "b\n" and not sidecars.foreign


def test_an_old_sidecar_never_counts_as_that_of_a_new_caption(tmp_path, monkeypatch):
    """Killed between the record and the sidecar, the old text counted as finished, and later as the user's."""
    clip = tmp_path / "a.mp4"
    record = CaptionFile(tmp_path / "captions.jsonl", "jsonl")
    Sidecars([clip], "txt", record).write(FILM | {"path": str(clip)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("runtime.caption_files.write_atomic", Mock(side_effect=KeyboardInterrupt))
        new = FILM | {"path": str(clip), "windows": FILM["windows"][1:]}
        Sidecars([clip], "txt", record).write(new)
    record = CaptionFile(record.path, "jsonl")
    sidecars = Sidecars([clip], "txt", record)
    assert not sidecars.is_finished(clip)
    sidecars.write(new)
    assert (tmp_path / "a.txt").read_text() == "b\n" and not sidecars.foreign


def test_sidecars_in_other_formats_and_of_failed_clips_remain_known(tmp_path):
    """After an error, or a run with another format, the first run's .txt counted as the user's own."""
    clip, record = tmp_path / "a.mp4", CaptionFile(tmp_path / "captions.jsonl", "jsonl")
    (tmp_path / "a.vtt").mkdir()
    fine, bad = FILM | {"path": str(clip)}, {"path": str(clip), "error": "is corrupt"}
    for form, result in (("txt", fine), ("srt", fine), ("txt", bad), ("vtt", fine), ("txt", fine)):
        sidecars = Sidecars([clip], form, record)
        sidecars.write(result)
        assert sidecars.foreign == (form == "vtt")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "a.srt", "a.vtt", "captions.jsonl"}


def test_a_file_that_is_no_probe_is_refused_before_the_models_load(trained, tmp_path, monkeypatch):
    """It was read after the language model, which may have to be downloaded."""
    monkeypatch.setattr("infer.load_models", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match="--probe"):
        caption(trained, tmp_path / "a.mp4", "--probe", trained)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--keep 0.5", "--keep can only be used with --sample"),
        ("--top-p 0.5 --temperature 2", "--top-p, --temperature can only be used with --sample"),
        ("--skip-done", "--skip-done can only be used with --output or --sidecar"),
        ("--output o.txt", "the formats of files are tsv, csv, jsonl, srt, vtt"),
        ("--output o.xlsx", "the formats of files are tsv, csv, jsonl, srt, vtt"),
        ("--output -", "captions are printed to stdout"),
        ("--output /dev/null --format csv --overwrite", "/dev/null is not a file"),
        ("--scores --format srt", "srt cannot hold scores"),
        ("--scores --output o.vtt", "vtt cannot hold scores"),
        ("--output o.csv --format text", "--format text is only printed"),
        ("--output o.csv --skip-done --overwrite", "mutually exclusive"),
        ("--output o.mp4", "is the name of a video"),
        ("--format csv --output o.MP4", "is the name of a video"),
        ("--sidecar --output o.csv", "must be a folder if --sidecar is given"),
        ("--format srt --output o.csv", "are different formats"),
    ],
)
def test_flags_that_would_have_no_effect(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("a.mp4").touch()
    with pytest.raises((SystemExit, UserError)) as error:
        caption("none", "a.mp4", *flags.split())
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_samples_and_their_scores(world, trained, tmp_path, capsys):
    """The likelier half, the best first; the score of greedy search is that of its caption."""
    clips = sorted((world / "videos").iterdir())[:2]
    flags = "--sample", 6, "--temperature", 3, "--top-p", 1, "--format", "jsonl"
    assert caption(trained, *clips, *flags) == DONE
    every = [json.loads(line)["windows"][0] for line in capsys.readouterr().out.splitlines()]
    assert caption(trained, clips[1], *flags, "--keep", "0.5", "--batch-size", "1") == DONE
    [half] = json.loads(capsys.readouterr().out)["windows"]
    scores = [s["score"] for s in half["samples"]]
    assert (
        scores == sorted(scores, reverse=True) and half["caption"] == half["samples"][0]["caption"]
    )
    assert half["samples"] == every[1]["samples"][: len(scores)] and len(scores) == 3
    assert caption(trained, clips[0], "--scores") == DONE
    _, greedy, score = capsys.readouterr().out.rstrip("\n").split("\t")
    assert caption(trained, clips[0]) == DONE
    assert capsys.readouterr().out.rstrip("\n").split("\t")[1] == greedy and float(score) < 0
    with pytest.raises(SystemExit):
        caption(trained, clips[0], "--sample", 2, "--num-beams", 2)
    assert "--num-beams cannot be used with --sample" in capsys.readouterr().err
