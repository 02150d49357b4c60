"""evaluate.py and infer.py on a trained toy model."""

import glob
import json
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import preprocess

import evaluate
import infer
from dataset import load_records
from runtime.caption_files import read_results
from runtime.errors import DONE, FAILED, PARTIAL, UserError

pytestmark = pytest.mark.usefixtures("quick_meteor")


@pytest.fixture
def run(prepared, trained, tmp_path):
    """A function that runs evaluate.py and returns its output folder."""

    def call(*flags, checkpoint=True):
        base = ["--annotations", prepared / "annotations", "--output", tmp_path / "out"]
        base += ["--workers", 0]
        if checkpoint:
            base += ["--checkpoint", trained, "--features", prepared / "features"]
        evaluate.main([*map(str, [*base, *flags])])
        return tmp_path / "out"

    return call


def load(path):
    return json.loads(path.read_text())


def test_every_clip_is_scored_once_under_its_own_id(run, prepared, trained):
    """The original numbered clips idx * len(batch) + i, so ids collided in a short last batch."""
    clips = [r["id"] for r in load_records(prepared / "annotations", "validation")]
    assert len(clips) % 7, "the last batch must be short"
    out = run("--batch-size", 7)
    predictions = load(out / "predictions_validation.json")
    assert [p["image_id"] for p in predictions] == clips
    # training captioned them in other batches, with the same checkpoint
    assert predictions == load(trained / "predictions_validation.json")
    one, two = (load(f / "evaluation_validation.json") for f in (out, trained))
    assert one["n"] == len(clips)
    assert one["metrics"] == two["metrics"] and one["controls"] == two["controls"]
    assert one["settings"]["loss"] == pytest.approx(two["settings"]["loss"], rel=1e-5)


def test_scoring_with_missing_clips_needs_a_flag_and_is_reported(run, prepared, tmp_path, capsys):
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    removed = sorted(p for p in (features / "validation").iterdir())[:2]
    for path in removed:
        path.unlink()
    with pytest.raises(UserError, match=rf"2 of 64 clips .*for example {removed[0].stem}"):
        run("--features", features, "--allow-missing", 1)
    out = run("--features", features, "--allow-missing", 2)
    assert "2 clips have no caption and are left out of the scores" in capsys.readouterr().err
    result = load(out / "evaluation_validation_without2.json")
    assert (result["n"], result["settings"]["missing"]) == (62, 2)
    assert not (out / "evaluation_validation.json").exists()
    # nor are predictions scored if some are missing
    with pytest.raises(UserError, match="2 of 64 clips have no prediction"):
        run("--predictions", out / "predictions_validation_without2.json", checkpoint=False)
    # a file without a caption was scored, as 0 clips
    (empty := tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="64 of 64 clips have no prediction"):
        run("--predictions", empty, "--allow-missing", 64, checkpoint=False)


def test_captions_of_other_clips_are_not_replaced(run, trained, tmp_path):
    """Evaluating on one's own clips replaced the run's scores on its data set."""
    clip = load(trained / "predictions_validation.json")[0]  # of both data sets: an id such as 1
    own = [clip, *({"image_id": f"mine{n}", "caption": "a cat"} for n in range(2))]
    for name in ("predictions_validation", "predictions_validation_without3"):
        (path := tmp_path / f"{name}.json").write_text(json.dumps(own))
        with pytest.raises(
            UserError, match=rf"{name}.json has captions of other clips; .*--output"
        ):
            run("--output", tmp_path)
        assert load(path) == own
        path.unlink()


def test_rescoring_needs_no_model(run, trained, capsys):
    """The parts of a sharded run can also be scored together."""
    whole = load(trained / "evaluation_validation.json")
    out = run("--predictions", trained / "predictions_validation.json", "--json", checkpoint=False)
    # under its own name, since it once replaced the scores of the run
    again = load(out / "evaluation_validation_rescored.json")
    assert again["metrics"] == whole["metrics"] and again["controls"] == whole["controls"]
    assert json.loads(capsys.readouterr().out) == again
    for part in ("0/2", "1/2"):
        run("--shard", part)
    flags = shlex.split(capsys.readouterr().err.splitlines()[-1].partition("evaluate.py ")[2])
    parts = sorted(out.glob("predictions_validation_part*.json"))
    assert sorted(map(Path, glob.glob(flags[1]))) == parts and "--annotations" in flags
    assert len(parts) == 2
    run("--predictions", *parts, "--markdown", checkpoint=False)
    assert load(out / "evaluation_validation_rescored.json")["metrics"] == whole["metrics"]
    assert f"\n| CIDEr | {whole['metrics']['CIDEr']:.3f} | " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"\d+ of \d+ clips have no prediction"):
        run("--predictions", parts[0], "--output", out / "new", checkpoint=False)
    assert not (out / "new").exists()
    with pytest.raises(UserError, match="more than once"):
        run("--predictions", parts[0], *parts, checkpoint=False)
    # a part of an earlier checkpoint was mixed in without a message
    stale = load(out / "settings_validation_part0of2.json") | {"weights": "0"}
    (out / "settings_validation_part0of2.json").write_text(json.dumps(stale))
    with pytest.raises(UserError, match=r"part1of2.* but .*part0of2.* with '0'; parts must be of"):
        run("--predictions", *parts, checkpoint=False)


def test_a_damaged_feature_file_ends_the_run_with_its_name(prepared, trained, tmp_path):
    """With loader workers the error became torch's traceback, and the process hung at exit:
    multiprocessing ends workers with SIGTERM, which they ignored."""
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    damaged = sorted((features / "validation").iterdir())[3]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    done = subprocess.run(
        [
            *[sys.executable, str(Path(evaluate.__file__)), "--checkpoint", str(trained)],
            *["--features", str(features), "--annotations", str(prepared / "annotations")],
            *["--output", str(tmp_path / "out"), "--workers", "2", "--batch-size", "4"],
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and f"clip {damaged.stem} " in done.stderr
    assert "Traceback" not in done.stderr


def test_results_with_other_flags_have_other_names(run):
    run("--style", "sentence", "--limit", 5)
    out = run("--split", "train")
    assert {p.name for p in out.iterdir()} == {
        "evaluation_validation_sentence_first5.json",
        "predictions_validation_sentence_first5.json",
        "evaluation_train.json",
        "predictions_train.json",
    }
    sentence = load(out / "evaluation_validation_sentence_first5.json")
    assert sentence["n"] == 5 and "template_accuracy" in sentence["skipped"]


def test_samples_are_scored_beside_greedy_search(run, trained):
    """The likeliest of N samples is scored."""
    out = run("--sample", 4, "--temperature", 2, "--limit", 6)
    name = "validation_first6_sample4_temperature2"
    predictions = load(out / f"predictions_{name}.json")
    samples, result = load(out / f"samples_{name}.json"), load(out / f"evaluation_{name}.json")
    assert list(samples) == [p["image_id"] for p in predictions] and len(samples) == 6
    assert max(map(len, samples.values())) == 4
    for p in predictions:
        scores = samples[p["image_id"]]
        assert scores[p["caption"]] == max(scores.values())
    greedy = load(run("--limit", 6) / "evaluation_validation_first6.json")["metrics"]
    assert result["controls"]["greedy"]["CIDEr"] == greedy["CIDEr"]
    assert result["controls"]["oracle"]["CIDEr"] >= result["metrics"]["CIDEr"]
    again = run("--sample", 4, "--temperature", 2, "--limit", 6, "--batch-size", 4)
    assert load(again / f"samples_{name}.json").keys() == samples.keys()
    texts = [[*s] for s in load(again / f"samples_{name}.json").values()]
    assert texts == [[*s] for s in samples.values()]


def test_a_split_without_captions_gets_template_accuracy_only(run, world, prepared, tmp_path):
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    preprocess(world, prepared, "--splits", "test", features=features)
    result = load(run("--split", "test", "--features", features) / "evaluation_test.json")
    assert list(result["metrics"]) == ["template_accuracy"]
    assert "CIDEr" in result["skipped"] and "METEOR" in result["skipped"]


def test_clips_without_a_caption_are_not_scored(run, prepared, trained, tmp_path, capsys):
    """train.py left out the clips without a label, but evaluate.py refused the whole split."""
    records = load(prepared / "annotations" / "validation.json")
    for record in records[:2]:
        record["label"] = None
    changed = shutil.copytree(prepared / "annotations", tmp_path / "annotations")
    (changed / "validation.json").write_text(json.dumps(records))
    out = run("--annotations", changed)
    assert "2 clips have no label caption and will not be scored" in capsys.readouterr().err
    assert load(out / "evaluation_validation.json")["n"] == len(records) - 2
    result = load(out / "evaluation_validation.json")
    captions = "--predictions", trained / "predictions_validation.json"  # of all clips
    run(*captions, "--annotations", changed, checkpoint=False)
    assert load(out / "evaluation_validation.json")["metrics"] == result["metrics"]


def test_still_control_needs_a_still_cache(run, world, prepared, tmp_path):
    with pytest.raises(UserError, match="sampling = 'bin_centres', but this command needs 'still'"):
        run("--control", "still")
    still = tmp_path / "still"
    preprocess(world, prepared, "--splits", "validation", "--still", features=still)
    with pytest.raises(UserError, match="sampling = 'still', but this command needs 'bin_centres'"):
        run("--features", still)
    out = run("--features", still, "--control", "still")
    assert (out / "evaluation_validation_still.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "nowhere"), "no annotations for split 'nowhere'"),
        (("--checkpoint", "/nowhere/best.pt"), "does not exist"),
        (("--features", "/nowhere"), "no feature cache"),
        (("--split", "validation_objects", "--style", "sentence"), "has no paraphrases"),
        (("--lm", "/nowhere"), "neither a folder nor a Hub id"),
    ],
)
def test_usage_errors(run, flags, message):
    with pytest.raises(UserError, match=message):
        run(*flags)


# ---- infer.py ------------------------------------------------------------------------------


def caption(trained, *args):
    return infer.main([*map(str, args), "--checkpoint", str(trained), "--workers", "0"])


def test_only_what_was_written_is_reported(world, trained, tmp_path, capsys):
    """After a failure, "written to" named a file with the subtitles of another film."""
    film, empty, output = next((world / "videos").iterdir()), tmp_path / "a.mp4", tmp_path / "a.srt"
    empty.touch()
    assert caption(trained, film, "--output", output) == DONE
    assert f"written to {output}" in capsys.readouterr().err
    assert caption(trained, empty, "--output", output, "--overwrite") == FAILED
    assert "written to" not in capsys.readouterr().err and output.stat().st_size


def test_infer_and_evaluate_write_the_same_captions(world, trained, capsys):
    """A video file gets the same caption as the cached features of its clip."""
    predictions = load(trained / "predictions_validation.json")[:6]
    paths = [world / "videos" / f"{p['image_id']}.webm" for p in predictions]
    assert caption(trained, *paths, "--batch-size", 4) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{path}\t{p['caption']}" for path, p in zip(paths, predictions, strict=True)]


def test_a_clip_that_fails_has_no_caption(world, trained, tmp_path, capsys):
    """The original wrote the error's text in place of the caption."""
    good = sorted((world / "videos").iterdir())[:2]
    folder = tmp_path / "clips" / "inner"
    folder.mkdir(parents=True)
    shutil.copy(good[0], folder / "b.webm")
    (folder / "a.webm").write_text("not a video")
    (folder / "notes.txt").write_text("not meant")
    assert caption(trained, tmp_path / "clips", *("--format", "jsonl")) == PARTIAL
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines())
    assert first["path"].endswith("a.webm") and "windows" not in first and first["error"]
    assert second["path"].endswith("b.webm") and second["windows"][0]["caption"]
    assert "a.webm" in printed.err and "1 of 2 clips failed" in printed.err
    assert caption(trained, folder / "a.webm") == FAILED
    assert capsys.readouterr().out == ""


def test_a_truncated_clip_is_captioned_with_a_warning(world, trained, tmp_path, capsys):
    whole = next(iter(sorted((world / "videos").iterdir()))).read_bytes()
    (tmp_path / "cut.webm").write_bytes(whole[: len(whole) // 2])
    assert caption(trained, tmp_path / "cut.webm", *("--format", "jsonl")) == DONE
    result = json.loads(capsys.readouterr().out)
    assert result["windows"][0]["caption"] and "truncated" in result["warning"]


def test_long_clips_are_captioned_by_windows(world, trained, capsys):
    path = next(iter(sorted((world / "videos").iterdir())))  # 1.5 to 2.4 s
    assert caption(trained, path, "--window", "0.5", "--stride", "0.5") == DONE
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 3 and all(len(line) == 3 for line in lines)
    spans = [tuple(map(float, line[1].split("-"))) for line in lines]
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(spans))
    assert (
        caption(trained, path, "--window", "0.5", "--stride", "0.5", *("--format", "jsonl")) == DONE
    )
    windows = json.loads(capsys.readouterr().out)["windows"]
    assert [w["caption"] for w in windows] == [line[2] for line in lines]


def test_samples_of_the_test_split(world, prepared, trained, tmp_path, capsys):
    flags = ["--num-samples", 3, "--videos", world / "videos"]
    flags += ["--annotations", prepared / "annotations", "--output", tmp_path / "samples"]
    assert caption(trained, *flags) == DONE
    printed = capsys.readouterr().out
    test = {r["id"] for r in load_records(prepared / "annotations", "test")}
    saved = read_results(tmp_path / "samples" / "captions.jsonl")
    assert len(saved) == 3 == len(printed.splitlines())
    assert {p.stem for p in (tmp_path / "samples").glob("*.webm")} <= test
    assert caption(trained, *flags, "--overwrite") == DONE
    assert capsys.readouterr().out == printed, "the same seed, the same clips"


def test_samples_of_the_same_name_are_all_copied(tmp_path):
    """Of two clips with the same name, from different folders, only the last one was in --output."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.webm").write_text(folder)
    (tmp_path / "samples").mkdir()
    infer.copy_clips([tmp_path / f / "1.webm" for f in "ab"], tmp_path / "samples")
    assert [p.read_text() for p in sorted((tmp_path / "samples").glob("*.webm"))] == ["b", "a"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give either the clips"),
        (("a.mp4", "--num-samples", "2"), "not both"),
        (("/nowhere/a.mp4",), "clip not found: /nowhere/a.mp4"),
        (("CLIP", "--sidecar", "--format", "csv"), "--sidecar writes text, srt or vtt"),
        (("CLIP", "--format", "csv", "--output", "."), "needs the name of a file"),
        (("FOLDER", "--format", "srt"), r"srt holds a single film; for \d\d+ clips"),
        (("--num-samples", "2", "--annotations", "/nowhere"), "no annotations for split 'test'"),
    ],
)
def test_infer_usage_errors(world, trained, args, message):
    known = {"CLIP": next((world / "videos").iterdir()), "FOLDER": world / "videos"}
    with pytest.raises(UserError, match=message):
        caption(trained, *(known.get(arg, arg) for arg in args))


def test_an_empty_folder_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="contains no videos"):
        caption(trained, tmp_path)


# ---- the user's own clips ------------------------------------------------------------------


def test_own_clips_end_to_end(world, tmp_path, capsys):
    """A CSV and a folder of clips, through all five scripts."""
    import prepare_annotations
    import train

    clips = sorted((world / "videos").iterdir())[:12]
    rows = ["video,caption", *(f"{p.name},a thing moves {i % 3}" for i, p in enumerate(clips))]
    rows.append(f"{clips[0].name},another caption")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    where = ["--annotations", tmp_path / "annotations"]
    prepare_annotations.main(
        [*map(str, ["--captions", tmp_path / "mine.csv", "--output", tmp_path / "annotations"])]
    )
    assert preprocess(world, tmp_path) == DONE
    where += ["--features", tmp_path / "features", "--workers", 0]
    flags = [*where, "--lm", world / "lm", "--output", tmp_path / "run", "--epochs", 1]
    flags += ["--num-queries", 4, "--grad-accum", 1]
    assert not train.main([*map(str, flags)])
    capsys.readouterr()
    evaluate.main([*map(str, [*where, "--checkpoint", tmp_path / "run"])])
    assert "the clips have no templates" in capsys.readouterr().out
    assert caption(tmp_path / "run", clips[0]) == DONE
    assert capsys.readouterr().out.startswith(str(clips[0]))
