"""train.py --init: a run on other clips that starts from the weights of a trained Q-Former."""

from runtime.start import ROOT

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import train_flags

import checkpoint
import train
from bench import warm_start, warm_statistics
from dataset import TRAIN, VALIDATION, load_records
from runtime.errors import UserError
from runtime.files import torch_bytes, write_json

pytestmark = pytest.mark.usefixtures("quick_meteor")
MODEL = ("--num-queries", "--lm")  # flags of `train_flags` that --init makes unnecessary


def flags(world, prepared, output, *more):
    """Return the flags of a short run, without those of the model."""
    given = train_flags(
        world, prepared, output, "--epochs", 1, "--limit", 24, "--dropout", 0, *more
    )
    return [f for n, f in enumerate(given) if not {given[n], given[n - 1]} & {*MODEL}]


def best(folder):
    return torch.load(str(folder / "best.pt"), weights_only=True)


@pytest.fixture
def stopped_at_start(monkeypatch):
    """Stop train.py before its first step. Returns a list to which the `TrainingState` is appended."""
    states = []
    monkeypatch.setattr(train, "train", lambda state, *_: states.append(state))
    monkeypatch.setattr(train, "finish", lambda *_, **__: None)
    return states


def test_a_warm_start_has_the_weights_and_the_loss_of_its_checkpoint(
    world, prepared, trained, tmp_path, stopped_at_start, capsys
):
    """The sizes of the Q-Former and the language model are those of the checkpoint, without flags."""
    more = ["--limit", 10**6]
    train.main(flags(world, prepared, tmp_path / "run", "--init", trained, *more))
    [state], source = stopped_at_start, best(trained)
    found = state.model.qformer.state_dict()
    assert found.keys() == source["qformer"].keys()
    assert all(torch.equal(found[k], v) for k, v in source["qformer"].items())
    assert state.progress.step == 0 and not state.optimizer.state_dict()["state"]
    # the loss on the same clips is that of the run, whose best checkpoint was evaluated on all clips
    args = train.parse_args(flags(world, prepared, tmp_path / "other", *more))
    data = train.read_data(args)
    _, _, loss = train.validate(state.model, data, train.Recipe.of(args), data.validation)
    expected = json.loads((trained / "evaluation_validation.json").read_text())
    assert loss == pytest.approx(expected["settings"]["loss"], rel=1e-5)
    assert "starting from whole, trained for" in capsys.readouterr().err


def test_a_warm_start_is_recorded_and_can_be_resumed(world, prepared, trained, tmp_path):
    """--resume needs neither --init nor the flags of the model, whose defaults would give another size."""
    run, source = tmp_path / "run", best(trained)
    assert not train.main(flags(world, prepared, run, "--init", trained / "best.pt"))
    digest = checkpoint.weights_digest(source["qformer"])
    expected = {"name": f"{trained.name}/best.pt", "digest": digest}
    assert best(run)["init"] == expected and best(run)["sizes"]["num_queries"] == 4
    assert best(run)["step"] == 1 and not torch.equal(
        best(run)["qformer"]["queries"], source["qformer"]["queries"]
    )
    recorded = json.loads((run / "args.json").read_text())["args"]
    assert (recorded["init"], recorded["num_queries"]) == (str(trained / "best.pt"), 4)
    (run / "last.pt").unlink()  # so that the last evaluation is repeated, and last.pt written again
    assert not train.main(flags(world, prepared, run, "--resume"))
    assert torch.load(str(run / "last.pt"), weights_only=True)["init"] == expected
    assert json.loads((run / "args.json").read_text())["args"] == recorded  # no step was left
    # more epochs are another run
    with pytest.raises(UserError, match=r"to train on, start a new run with --init"):
        train.main([*flags(world, prepared, run, "--resume"), "--epochs", "3"])


def test_a_run_that_was_killed_before_its_first_checkpoint_still_starts_warm(
    world, prepared, trained, tmp_path, stopped_at_start
):
    """A kill leaves args.json but no last.pt, and --resume would have started from random weights."""
    recorded = {"init": str(trained), "num_queries": 4, "lm": str(world / "lm")}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "args.json", {"args": recorded})
    train.main(flags(world, prepared, tmp_path / "run", "--resume"))
    [state], source = stopped_at_start, best(trained)
    assert torch.equal(state.model.qformer.queries, source["qformer"]["queries"])


def changed(state, part, **values):
    return state | {part: state[part] | values}


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (None, ["--num-blocks", 2], "--num-blocks 2 does not fit --init .*, which has 1; leave"),
        (None, ["--num-queries", 5], "--num-queries 5 does not fit --init .*, which has 4"),
        # the default, if it is given, is not replaced by the checkpoint's value either
        (None, ["--num-queries", 64], "--num-queries 64 does not fit --init .*, which has 4"),
        ("encoder", [], "trained on other features: the cache .* encoder_fingerprint = "),
        ("lm", [], "--lm .* has fingerprint .*, but the checkpoint was trained with"),
        ("styles", [], "trained with different style prompts"),
        ("kept", ["--resume"], "--init starts a new run and --resume continues one"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    world, prepared, trained, tmp_path, monkeypatch, capsys, change, more, message
):
    """The check comes before the language model is loaded."""
    state, path = best(trained), tmp_path / "init.pt"
    if change == "encoder":
        settings = state["manifest"]["settings"] | {"encoder_fingerprint": "0" * 16}
        state = changed(state, "manifest", settings=settings)
    elif change == "lm":
        state = changed(state, "lm", fingerprint="0" * 16)
    elif change == "styles":
        state = state | {"styles": {"label": "say", "sentence": "write"}}
    path.write_bytes(torch_bytes(state))
    monkeypatch.setattr(train.captioner, "build", lambda *_, **__: pytest.fail("model loaded"))
    with pytest.raises((UserError, SystemExit)) as error:
        train.main(
            [*flags(world, prepared, tmp_path / "run"), "--init", str(path), *map(str, more)]
        )
    text = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    assert re.search(message, text) and error.value.code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("clips", "chosen"), [(train.FEW_CLIPS - 1, 2), (train.FEW_CLIPS, 1)])
def test_with_few_validation_clips_the_loss_chooses(clips, chosen, monkeypatch, tmp_path):
    """The first epoch has the higher CIDEr, the second the lower loss."""
    scores = iter([(6.0, 0.9), (5.0, 0.5), (5.5, 0.7)])

    def validate(*_):
        cider, loss = next(scores)
        return {"metrics": {"CIDEr": cider}}, {}, loss

    class Run:
        folder, best = tmp_path, []
        log = property(lambda self: self)

        def evaluating(self, step):
            return nullcontext()

        def evaluation(self, *_):
            pass

        def save(self, state):
            pass

        def save_best(self, state):
            self.best.append(state)

    state, run = SimpleNamespace(model=None, progress=checkpoint.Progress()), Run()
    state.last, state.best = lambda: None, lambda: (state.progress.step, state.progress.best_score)
    data = SimpleNamespace(train=[{}], subset=[{"id": "x", "label": "y"}] * clips)
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "SAMPLES", 0)
    monkeypatch.setattr(train.curves, "update", lambda folder: None)
    recipe = SimpleNamespace(steps_per_epoch=lambda clips: 1)
    for step in (1, 2, 3):
        state.progress.step = step
        train.end_epoch(state, data, recipe, run)
    assert run.best[-1] == (chosen, {1: 6.0, 2: 5.0}[chosen])


@pytest.mark.parametrize("processes", [1, 2, 16])
def test_short_runs_get_a_note_with_flags_that_parse(processes, monkeypatch, capsys):
    """Six epochs of 50 clips are only 6 steps of up to 64 clips. Under torchrun, train.py refused the flags
    that it had suggested, because they left a process without a micro-batch."""
    monkeypatch.setattr("runtime.ranks.world_size", lambda: processes)
    recipe = train.Recipe.of(train.parse_args(["--epochs", "6"]))
    data = SimpleNamespace(train=[{}] * 50, subset=[{}] * 10)
    train.note_small_data(data, recipe, warm=False)
    text = capsys.readouterr().err
    assert "6 steps may be too few" in text and "only 10 validation clips are scored" in text
    [found] = re.findall(r"use (--.*?), and --init", text)
    better = train.Recipe.of(train.parse_args(found.split()))
    assert better.epochs * better.steps_per_epoch(50) >= train.FEW_STEPS
    assert better.grad_accum >= processes
    train.note_small_data(SimpleNamespace(train=[{}] * 50, subset=[{}] * 50), better, warm=False)
    assert not capsys.readouterr().err


def test_the_comparison_is_fair(world, prepared, tmp_path, monkeypatch):
    """In bench/warm_start.py, the base is never trained on a noun that the own clips add, the scored clips
    are in no training set, and all runs take the same number of steps."""
    monkeypatch.setattr(warm_start, "REPORT", 5)
    warm_start.divide(prepared, tmp_path, [20, 30])
    texts = {
        name: {
            s: load_records(warm_start.annotations(tmp_path, name), s) for s in (TRAIN, VALIDATION)
        }
        for name in ("base", 20, 30, "report")
    }
    nouns = {
        name: {n for r in t[TRAIN] for n in warm_start.nouns_of(r)} for name, t in texts.items()
    }
    ids = {name: {r["id"] for r in t[TRAIN]} for name, t in texts.items()}
    assert len(ids[30]) == 27 and len(texts[30][VALIDATION]) == 3 and ids[20] < ids[30]
    assert len(ids["report"]) == 5 and not ids["report"] & (ids[30] | ids["base"])
    for name in (30, "report"):
        for record in texts[name][TRAIN]:
            assert set(warm_start.nouns_of(record)) - nouns["base"], "no noun of its own"
    assert nouns["base"] and not ids["base"] & ids[30]

    flags = ["--world", "shapes", "--data", prepared, "--models", world, "--runs", tmp_path]
    args = warm_start.parse_args([*map(str, flags), "--clips", "20", "30", "--steps", "40"])
    study = warm_start.make_study(args, prepared, tmp_path)
    assert len(study.rows) == 5 and not any("--init" in row.flags for row in [study.rows["base"]])
    for name, row in study.rows.items():
        run = train.parse_args(study.training(name, 0))
        clips = len(load_records(row.annotations, TRAIN))
        steps = train.Recipe.of(run).steps_per_epoch(clips) * run.epochs
        assert (
            steps == (40 if name != "base" else max(steps, 80)) and run.warmup_steps == steps // 9
        )
        assert bool(run.init) == name.startswith("warm"), name


def test_a_warm_start_gets_the_statistics_of_its_own_clips(
    world, prepared, trained, tmp_path, stopped_at_start
):
    train.main(flags(world, prepared, tmp_path / "run", "--init", trained))
    new, old = stopped_at_start[0].model.qformer.state_dict(), best(trained)["qformer"]
    assert {k for k in new if not torch.equal(new[k], old[k])} == {"mean", "std"}


@pytest.mark.parametrize("module", [warm_start, warm_statistics], ids=lambda m: m.__name__)
def test_the_tables_match_the_committed_results(module):
    path = ROOT / "results" / f"{module.__name__.removeprefix('bench.')}.json"
    if not path.exists():
        pytest.skip(f"python -m {module.__name__} has not been run")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == module.markdown(json.loads(path.read_text(encoding="utf-8")))
