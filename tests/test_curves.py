"""The curves of a run: curves.png, and the figures on a dashboard."""

import importlib.machinery
import json
import shutil
import sys
import types

import pytest
from conftest import train_flags

import train
from runtime import run_log
from runtime.errors import UserError
from viz import curves


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_the_picture_can_be_redrawn_from_the_run_folder(run, capsys):
    """The new picture equals the one that training drew, byte for byte."""
    drawn = (run / "curves.png").read_bytes()
    (run / "curves.png").unlink()
    curves.main([str(run)])
    assert (run / "curves.png").read_bytes() == drawn and drawn.startswith(b"\x89PNG")
    assert capsys.readouterr().out.split() == [str(run / "curves.png")]


def test_every_value_changes_the_picture(run):
    """Another loss, score or learning rate gives another picture."""
    steps, evaluations = curves.read(run)
    before = curves.draw(steps, evaluations)
    for change in (
        lambda: steps[3].update(loss=9.0),
        lambda: steps[3].update(lr=9.0),
        lambda: evaluations[1].update(loss=9.0),
        lambda: evaluations[1]["metrics"].update(CIDEr=9.0),
        lambda: evaluations[1]["controls"]["shuffled"].update(CIDEr=5.0),
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
    assert curves.draw([], [])


def test_training_continues_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curves.report_once.cache_clear()
    (run / "curves.png").unlink()
    curves.update(run), curves.update(run)
    assert not (run / "curves.png").exists()
    why = "matplotlib is not installed: pip install -e '.[viz]'"
    assert capsys.readouterr().err.count(f"no curves.png: {why}") == 1
    with pytest.raises(UserError, match="matplotlib is not installed"):
        curves.main([str(run)])


def test_a_picture_that_fails_does_not_stop_training(run, monkeypatch, capsys):
    """If importing matplotlib failed for another reason, or the user's settings broke it, training
    stopped before best.pt was written, and so did every --resume."""
    monkeypatch.setattr("viz.curves.draw", lambda *_: 1 / 0)
    curves.report_once.cache_clear()
    curves.update(run)
    assert "no curves.png: division by zero" in capsys.readouterr().err


def test_the_users_matplotlib_settings_are_ignored(run):
    import matplotlib

    plain = curves.write(run).read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        assert curves.write(run).read_bytes() == plain


def test_a_line_truncated_by_a_crash_is_ignored(run):
    whole = curves.read(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": 99, "epo')
    assert curves.read(run) == whole
    (run / "validation_epoch_3.json").write_text("{}")
    with pytest.raises(UserError, match=r"validation_epoch_3\.json was not written by train\.py"):
        curves.main([str(run)])


def test_a_run_folder_that_cannot_be_written_is_refused(run, monkeypatch):
    """It ended in a traceback of PermissionError, after the picture was drawn."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="is not writable"):
        curves.main([str(run)])


WRONG = ["null", '"3"', "[]", "1e999", "NaN", f"1{400 * '0'}"]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("key", ["epoch", "step", "loss", "metrics", "controls"])
def test_an_evaluation_with_other_values_is_refused(key, value, run):
    """A value of another type ended in a traceback, in the sort of the epochs or in matplotlib."""
    if (key, value) == ("loss", "null"):  # train.py writes it if a clip has no reference
        return
    path = run / "validation_epoch_1.json"
    text = json.dumps(json.loads(path.read_text()) | {key: "@"})
    path.write_text(text.replace('"@"', value))
    with pytest.raises(UserError, match=r"validation_epoch_1\.json was not written by train\.py"):
        curves.read(run)


@pytest.mark.parametrize("value", [*WRONG[1:], 100_000 * "[" + 100_000 * "]"])
def test_a_step_with_other_values_is_ignored(value, run):
    """A line nested 100,000 times deep ended in a RecursionError, also when a run was resumed."""
    whole, log = curves.read(run), run / "metrics.jsonl"
    before = log.read_text()
    with open(log, "a") as file:
        file.write(f'{{"step": 99, "loss": {value}, "lr": 1}}\n')
    assert curves.read(run) == whole
    if len(value) > 1000:
        run_log.truncate_log(log, 99)
        assert log.read_text() == before


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder of train\.py"):
        curves.main([str(tmp_path)])


def interrupted_and_resumed(world, prepared, output, dashboard):
    """Kill a run after its 8th step, two steps after its last save, resume it and return its logs."""
    flags = train_flags(world, prepared, output, "--report-to", dashboard, "--save-every", "3")
    log = run_log.Log.step

    def killed(self, step, *args):
        log(self, step, *args)
        if step == 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.run_log.Log.step", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    # drawn at the first of two evaluations
    assert (output / "curves.png").is_file()
    train.main([*flags, "--resume"])
    lines = (output / "metrics.jsonl").read_text().splitlines()
    scores = [
        json.loads((output / f"validation_epoch_{n}.json").read_text())["metrics"]["CIDEr"]
        for n in (1, 2)
    ]
    return [json.loads(line) for line in lines], scores


def test_a_resumed_run_continues_its_curve(world, prepared, tmp_path, quick_meteor):
    """Each step and evaluation is on the dashboard once, although steps 7 and 8 were logged twice."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    steps, scores = interrupted_and_resumed(world, prepared, output, "tensorboard")
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    logged = events.Scalars("train/loss")
    assert [e.step for e in logged] == [s["step"] for s in steps] == list(range(1, 11))
    assert [e.value for e in logged] == pytest.approx([s["loss"] for s in steps])
    logged = events.Scalars("validation/CIDEr")
    assert [e.step for e in logged] == [5, 10] and [e.value for e in logged] == pytest.approx(
        scores
    )


def stand_in(name, init, error=RuntimeError):
    """Return a stand-in for a library that needs a server."""
    library = types.ModuleType(name)
    library.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=name)
    library.init, library.errors = init, types.SimpleNamespace(Error=error)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_dashboards_with_a_server(name, world, prepared, tmp_path, quick_meteor, monkeypatch):
    started, logged, ended = [], [], []
    # matplotlib takes longer than the training
    monkeypatch.setattr("viz.curves.draw", lambda *_: b"")

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            ended.append(self)

    def init(*args, **kwargs):
        started.append(kwargs)
        return Run()

    library = stand_in(name, init)
    library.finish = lambda: ended.append(None)
    monkeypatch.setitem(sys.modules, name, library)
    steps, scores = interrupted_and_resumed(world, prepared, tmp_path / "run", name)
    ids = [kwargs["id" if name == "wandb" else "name"] for kwargs in started]
    assert len(ids) == 2 and ids[0] == ids[1] and ids[0].startswith("run-")
    assert len(ended) == 2  # the killed run was finished too
    losses = {step: values["train/loss"] for step, values in logged if "train/loss" in values}
    assert losses == {s["step"]: s["loss"] for s in steps}
    assert [v["validation/CIDEr"] for _, v in logged if "validation/CIDEr" in v] == scores
    short = ("--report-to", name, "--limit", 8, "--epochs", 1)
    train.main(train_flags(world, prepared, tmp_path / "run", "--overwrite", *short))
    assert started[2]["id" if name == "wandb" else "name"] != ids[0]  # a new run gets a new curve


def test_a_dashboard_that_cannot_be_opened_creates_no_folder(
    world, prepared, tmp_path, monkeypatch
):
    """Without a login the run folder was created anyway, and the next attempt was refused."""

    class Error(Exception):
        pass

    def init(**_):
        raise Error("no API key")

    monkeypatch.setitem(sys.modules, "wandb", stand_in("wandb", init, Error))
    for _ in range(2):
        with pytest.raises(UserError, match="--report-to wandb: no API key"):
            train.main(train_flags(world, prepared, tmp_path / "run", "--report-to", "wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_dashboard_is_reported_before_anything_is_read(name, monkeypatch, tmp_path):
    monkeypatch.setattr("runtime.dashboard.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=f"--report-to {name} needs the package: pip install {name}"
    ):
        train.main(["--report-to", name, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
