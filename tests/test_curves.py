"""What a run leaves to look at: curves.png, metrics.csv, and the figures on a dashboard."""

import csv
import json
import shutil
import sys

import pytest
from conftest import train_flags

import curves
import train
from cli import UserError


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_the_table_is_that_of_the_run(run):
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        scores = json.loads((run / f"validation_epoch_{row['epoch']}.json").read_text())
        assert float(row["CIDEr"]) == scores["metrics"]["CIDEr"]
        assert float(row["validation_loss"]) == scores["loss"]
        mine = [s for s in steps if str(s["epoch"]) == row["epoch"]]
        mean = sum(s["loss"] * s["tokens"] for s in mine) / sum(s["tokens"] for s in mine)
        assert abs(float(row["train_loss"]) - mean) < 1e-9 and float(row["lr"]) == mine[-1]["lr"]


def test_the_picture_is_drawn_anew_from_the_files(run, capsys):
    """Byte for byte what training drew: nothing of the run is needed but its folder."""
    drawn = (run / "curves.png").read_bytes()
    for name in ("curves.png", "metrics.csv"):
        (run / name).unlink()
    curves.main([str(run)])
    assert (run / "curves.png").read_bytes() == drawn and drawn.startswith(b"\x89PNG")
    assert capsys.readouterr().out.split() == [str(run / "metrics.csv"), str(run / "curves.png")]


def test_every_curve_reaches_the_picture(run):
    """Another loss, score or rate draws another picture."""
    steps, evaluations = curves.read(run)
    before = curves.draw(steps, evaluations)
    for change in (
        lambda: steps[3].update(loss=9.0),
        lambda: steps[3].update(lr=9.0),
        lambda: evaluations[1].update(loss=9.0),
        lambda: evaluations[1]["metrics"].update(CIDEr=9.0),
    ):
        change()
        after = curves.draw(steps, evaluations)
        assert after != before
        before = after


def test_skipped_steps_and_missing_scores_leave_gaps(run):
    steps, evaluations = curves.read(run)
    steps[2].update(loss=None, grad_norm=None)
    evaluations[0].update(loss=None)
    evaluations[0]["metrics"].pop("CIDEr")
    assert curves.draw(steps, evaluations).startswith(b"\x89PNG")
    row = curves.table(steps, evaluations).splitlines()[1].split(",")
    assert row[curves.COLUMNS.index("validation_loss")] == ""
    assert curves.draw([], []) and curves.table([], []).count("\n") == 1


def test_without_matplotlib_the_rest_goes_on(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curves.say_missing.cache_clear()
    (run / "curves.png").unlink()
    curves.update(run), curves.update(run)
    assert (run / "metrics.csv").is_file() and not (run / "curves.png").exists()
    said = capsys.readouterr().err
    assert said.count("no curves.png: matplotlib is missing, pip install -e '.[viz]'") == 1


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match=r"is no run folder of train\.py"):
        curves.main([str(tmp_path)])


def test_a_resumed_run_goes_on_in_its_curve(world, prepared, tmp_path, quick_meteor):
    """Each step and evaluation is on the dashboard once, though the run was stopped and resumed."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    flags = train_flags(world, prepared, output, "--report-to", "tensorboard", "--save-every", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runfolder.Log.epoch", stop)  # killed in the first evaluation
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    train.main([*flags, "--resume"])
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    told = events.Scalars("train/loss")
    assert [e.step for e in told] == [s["step"] for s in steps] == list(range(1, 11))
    assert [e.value for e in told] == pytest.approx([s["loss"] for s in steps])
    scores = [
        json.loads((output / f"validation_epoch_{n}.json").read_text())["metrics"]["CIDEr"]
        for n in (1, 2)
    ]
    told = events.Scalars("validation/CIDEr")
    assert [e.step for e in told] == [5, 10] and [e.value for e in told] == pytest.approx(scores)


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_dashboard_is_told_before_anything_is_read(name, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=f"--report-to {name} needs its library: pip install {name}"
    ):
        train.main(["--report-to", name, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
