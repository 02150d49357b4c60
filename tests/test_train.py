"""train.py on real features: resuming, refused input and the files of a run."""

import json
import os
import shutil
import signal
from contextlib import closing
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from conftest import train_flags
from torture.sandbox import TIMING

import checkpoint
import evaluate
import optim
import train
from dataset import load_records
from runtime import run_folder, run_log
from runtime.errors import SIGNALLED, Stopped, UserError
from runtime.stop_signals import StopSignals

STOP = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

pytestmark = pytest.mark.usefixtures("quick_meteor")


def state(folder):
    return torch.load(str(folder / "last.pt"), weights_only=True)


def same(a, b):
    """Return True if two values are equal bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log(folder):
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in s.items() if k not in TIMING} for s in lines]


def test_a_resumed_run_equals_an_uninterrupted_run(world, prepared, trained, tmp_path, monkeypatch):
    """After SIGTERM at the end of an epoch (torture/checks.py stops anywhere), weights, optimizer, logs
    and predictions are equal bit for bit, with dropout and another number of workers."""
    stop_after, workers = 5, 2
    output, step = tmp_path / "run", run_log.Log.step

    def step_then_stop(self, number, *rest):
        step(self, number, *rest)
        if number == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_log.Log, "step", step_then_stop)
        assert train.main(train_flags(world, prepared, output)) == SIGNALLED + signal.SIGTERM
    assert state(output)["step"] == stop_after
    with open(output / "metrics.jsonl", "a") as file:  # a step that the checkpoint does not have
        file.write(json.dumps({"step": stop_after + 1, "loss": 0}) + '\n{"step": ')
    flags = train_flags(world, prepared, output, "--resume", "--workers", workers)
    assert not train.main(flags)
    one, two = state(trained), state(output)
    assert one.keys() == two.keys()
    assert same(one["optimizer"], two["optimizer"])
    assert same(one["qformer"], two["qformer"]) and one["best"] == two["best"]
    assert log(output) == log(trained)
    name = "predictions_validation.json"
    assert (output / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("best", [True, False])
def test_a_signal_during_an_evaluation_names_resume(
    world, prepared, trained, tmp_path, monkeypatch, capsys, best
):
    """SIGTERM during the evaluation of an epoch, or the last one, printed only "stopped by SIGTERM"."""

    def stop(*_):
        raise Stopped(signal.SIGTERM)

    output = tmp_path / "run"
    flags = train_flags(world, prepared, output)
    if best:
        shutil.copytree(trained, output)
        flags += ["--resume"]
    monkeypatch.setattr(train, "validate", stop)
    with pytest.raises(Stopped):
        train.main(flags)
    assert f"stopped after step {10 if best else 5}; use --resume" in capsys.readouterr().err


def test_the_files_of_a_run(prepared, trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        *(".lock", "args.json", "metrics.jsonl", "curves.png"),
        *("last.pt", "previous.pt", "best.pt"),
        *("validation_epoch_1.json", "validation_epoch_2.json"),
        *("predictions_validation.json", "evaluation_validation.json"),
    }
    assert [s["step"] for s in log(trained)] == list(range(1, 11))
    clips = len(load_records(prepared / "annotations", "validation"))
    predictions = json.loads((trained / "predictions_validation.json").read_text())
    assert len({p["image_id"] for p in predictions}) == clips
    losses = [s["loss"] for s in log(trained)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads((trained / "args.json").read_text())["args"]["num_queries"] == 4


def test_checkpoints_contain_no_frozen_weights(trained, world):
    best = torch.load(str(trained / "best.pt"), weights_only=True)
    trained_bytes = sum(v.numel() * v.element_size() for v in best["qformer"].values())
    assert (trained / "best.pt").stat().st_size < trained_bytes * 1.1 + 30_000
    assert best["templates"] and best["manifest"]["settings"]["num_frames"] == 16


def test_a_run_is_not_overwritten(world, prepared, trained):
    before = (trained / "last.pt").read_bytes()
    with pytest.raises(UserError, match="already contains a run"):
        train.main(train_flags(world, prepared, trained))
    with pytest.raises(UserError, match="mutually exclusive"):
        train.main(train_flags(world, prepared, trained, "--resume", "--overwrite"))
    assert (trained / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "name"),
    [(("--lr", "1e-3"), "--lr"), (("--batch-size", 4), "--batch-size 8 --grad-accum 3, not 4 x 3")],
)
def test_resume_refuses_a_changed_flag_by_name(world, prepared, trained, flags, name):
    with pytest.raises(UserError, match=f"started with {name}"):
        train.main(train_flags(world, prepared, trained, "--resume", *flags))


def test_a_run_that_stored_its_dtype_as_auto_resumes(world, prepared, trained, tmp_path):
    """Earlier runs did not store the resolved --dtype, and none of them could be resumed."""
    folder = shutil.copytree(trained, tmp_path / "run")
    old = state(folder)
    torch.save(old | {"args": old["args"] | {"dtype": "auto"}}, folder / "last.pt")
    assert not train.main(train_flags(world, prepared, folder, "--resume"))


def test_resume_refuses_other_captions(world, prepared, trained, tmp_path):
    other = shutil.copytree(prepared / "annotations", tmp_path / "annotations")
    records = json.loads((other / "train.json").read_text())
    records[0]["label"] = "something else"
    (other / "train.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="captions have changed"):
        train.main(train_flags(world, prepared, trained, "--resume", "--annotations", other))


def test_resume_refuses_other_validation_captions(world, prepared, trained, tmp_path):
    """The best score was compared with scores on other captions."""
    other = shutil.copytree(prepared / "annotations", tmp_path / "annotations")
    records = json.loads((other / "validation.json").read_text())
    records[-1]["label"] = "something else"
    (other / "validation.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="validation clips or their captions have changed"):
        train.main(train_flags(world, prepared, trained, "--resume", "--annotations", other))


def test_resume_notices_features_of_other_films(
    world, prepared, trained, tmp_path, capsys, monkeypatch
):
    """Training resumed without a message after films had been replaced and encoded again."""
    monkeypatch.setattr(train, "time_steps", lambda *_: 0)
    features = tmp_path / "features"
    features.mkdir()
    for name in ("manifest.json", "train", "validation"):
        (features / name).symlink_to(prepared / "features" / name)
    index = (prepared / "features" / "sources.jsonl").read_text()
    flags = train_flags(world, prepared, trained, "--resume", "--dry-run", "--features", features)

    def resume_after_a_change_of(split, clips):
        entries = list(map(json.loads, index.splitlines()))
        for entry in [e for e in entries if e["split"] == split][:clips]:
            entry["digest"] = "f" * 64
        (features / "sources.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
        train.main(flags)

    resume_after_a_change_of("train", 1)
    assert "WARNING: --resume: 1 training clip was encoded from another" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"\d+ validation clips were encoded from another"):
        resume_after_a_change_of("validation", 30)
    (features / "sources.jsonl").unlink()  # as in caches of earlier versions
    train.main(flags)
    assert "encoded from another" not in capsys.readouterr().err

    # the run started on such a cache, and clips were encoded again since, which recorded their sources
    read = checkpoint.read_newest

    def without_sources(*args):
        saved = read(*args)
        return saved | {"sources": {k: torch.zeros_like(v) for k, v in saved["sources"].items()}}

    monkeypatch.setattr(checkpoint, "read_newest", without_sources)
    with pytest.raises(UserError, match=r"\d+ validation clips were encoded from another"):
        resume_after_a_change_of("validation", 30)


@pytest.mark.parametrize("name", ["metrics.jsonl", "args.json", "evaluation_validation.json"])
def test_a_folder_in_place_of_a_file_is_refused(world, prepared, tmp_path, name):
    """It ended in an IsADirectoryError, in the case of the scores after all epochs."""
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, but must be a file"):
        train.main(train_flags(world, prepared, tmp_path, "--resume"))


def test_the_loss_decides_between_equal_scores(world, prepared, tmp_path, monkeypatch, capsys):
    """best.pt stayed that of the first epoch if CIDEr was 0 in all of them, as for equal references."""

    def validation(*args, **kwargs):
        result, predictions, _ = validate(*args, **kwargs)
        assert result["metrics"]["CIDEr"] == 0
        return result, predictions, losses.pop(0)

    annotations = shutil.copytree(prepared / "annotations", tmp_path / "annotations")
    records = json.loads((annotations / "validation.json").read_text())
    for record in records:
        record["label"] = "moving it"
    (annotations / "validation.json").write_text(json.dumps(records))
    validate, losses = train.validate, [3.0, 2.0, 2.5, 2.0]
    monkeypatch.setattr(train, "validate", validation)
    flags = ("--annotations", annotations, "--epochs", 3)
    assert not train.main(train_flags(world, prepared, tmp_path / "run", *flags))
    best = torch.load(str(tmp_path / "run/best.pt"), weights_only=True)
    assert (best["step"], best["best_loss"]) == (10, 2.0)
    printed = capsys.readouterr()
    assert printed.err.count("the validation loss chooses best.pt") == 1
    assert "CIDEr is 0 for every possible caption" in printed.out


def test_a_run_without_sentences_says_so(world, prepared, trained, tmp_path, capsys):
    """Without paraphrases only labels are trained, but --style sentence wrote something all the same."""
    annotations = shutil.copytree(prepared / "annotations", tmp_path / "annotations")
    for split in ("train", "validation"):
        records = json.loads((annotations / f"{split}.json").read_text())
        records = [r | {"paraphrases": []} if split == "train" else r for r in records]
        (annotations / f"{split}.json").write_text(json.dumps(records))
    flags = ("--annotations", annotations, "--epochs", 1, "--limit", 20)
    assert not train.main(train_flags(world, prepared, tmp_path / "run", *flags))
    noted = capsys.readouterr().err
    assert "0 paraphrases, 1 per clip and epoch, so --style sentence is not" in noted
    assert "8 x 3 = up to 24 clips (there are 20)" in noted
    assert all("loss_label" in s and "loss_sentence" not in s for s in log(tmp_path / "run"))
    assert all({"loss_label", "loss_sentence"} < s.keys() for s in log(trained))
    flags = ["--features", prepared / "features", "--annotations", prepared / "annotations"]
    flags += ["--limit", 4, "--workers", 0, "--style", "sentence"]
    for run, warned in ((tmp_path / "run", True), (trained, False)):
        flags[-1:] = ["label"] if run == trained else ["sentence"]
        evaluate.main([*map(str, flags), "--checkpoint", str(run), "--output", str(tmp_path / "e")])
        assert ("no sentence was among the captions" in capsys.readouterr().err) == warned


def test_resume_without_a_checkpoint_starts(world, prepared, tmp_path, capsys):
    flags = train_flags(world, prepared, tmp_path / "new", "--resume", "--epochs", 1, "--limit", 10)
    assert not train.main(flags)
    assert "starting from the first step" in capsys.readouterr().err
    assert state(tmp_path / "new")["step"] == 1


def test_dry_run_writes_nothing(world, prepared, tmp_path, capsys):
    flags = train_flags(world, prepared, tmp_path / "new", "--dry-run", "--limit", 30)
    assert not train.main(flags)
    printed = capsys.readouterr()
    assert "waiting for data" in printed.out and "per batch of 10 clips" in printed.out
    assert "4 steps in 2 epochs" in printed.err
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="/nowhere"):
        train.main([*flags, "--lm", "/nowhere"])
    assert "4 steps in 2 epochs" in capsys.readouterr().err, "the plan needs no model"


def test_missing_features_are_refused_before_a_model_is_loaded(world, prepared, tmp_path):
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    removed = sorted((features / "train").iterdir())[:2]
    for path in removed:
        path.unlink()
    flags = train_flags(world, prepared, tmp_path / "run", "--features", features)
    with pytest.raises(UserError, match=r"2 of 100 clips .* no features"):
        train.main([*flags, "--lm", "/nowhere"])
    assert not (tmp_path / "run").exists()
    assert not train.main([*flags, "--allow-missing", "2", "--epochs", "1"])


def test_clips_that_are_in_both_splits_are_refused(world, prepared, tmp_path):
    """After a new split of the same clips, an old validation.json had clips of train.json in it: the run
    chose its best checkpoint on clips that it was trained on."""
    flags = train_flags(world, prepared, tmp_path / "run")
    annotations = shutil.copytree(flags[flags.index("--annotations") + 1], tmp_path / "annotations")
    records = json.loads((annotations / "train.json").read_text())
    path = annotations / "validation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) + records[:1]))
    clip = records[0]["id"]
    with pytest.raises(UserError, match=f"1 clip is in both .* {annotations}: {clip}. One of"):
        train.main([*flags, "--annotations", str(annotations), "--allow-missing", "1"])
    assert not (tmp_path / "run").exists()


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(
    world, prepared, tmp_path, monkeypatch
):
    flags = train_flags(world, prepared, tmp_path / "run", "--grad-accum", 1, "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "average_and_clip", lambda *_: float("nan"))
        with pytest.raises(UserError, match="not finite in 5 consecutive steps") as error:
            train.main(flags)
        assert error.value.code == 1
        last = state(tmp_path / "run")
        assert (last["step"], last["bad"], last["optimizer"]["state"]) == (4, 4, {})
        # as an uninterrupted run would end
        with pytest.raises(UserError, match="not finite in 5 consecutive steps"):
            train.main([*flags, "--resume"])
    lines = log(tmp_path / "run")
    assert len(lines) == 5 and all(s["grad_norm"] is None and s["skipped"] for s in lines)

    def third_is_bad(qformer, *rest):
        weights.append(qformer.gain.detach().clone())
        return float("nan") if len(weights) == 3 else clip(qformer, *rest)

    weights = []
    clip = train.average_and_clip
    monkeypatch.setattr(train, "average_and_clip", third_is_bad)
    assert not train.main(train_flags(world, prepared, tmp_path / "other", "--epochs", 1))
    equal = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert equal == [False, False, True, False], "a bad step must change no weight"
    assert [bool(s.get("skipped")) for s in log(tmp_path / "other")] == [0, 0, 1, 0, 0]


@pytest.fixture
def handlers(monkeypatch):
    """Restore the handlers of signals, also of those that are ignored in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP}
    monkeypatch.setattr("runtime.start.SIGNALS", STOP)
    monkeypatch.setattr(run_folder, "SIGNALS", STOP)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_only_the_second_signal_ends_the_process_at_once(handlers):
    stop = run_folder.Stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert {signal.getsignal(number) for number in STOP} == {signal.SIG_DFL}


@pytest.mark.parametrize("number", STOP)
def test_a_signal_stops_at_once_if_everything_is_saved(handlers, number):
    """The evaluation after an epoch may take longer than a batch system waits."""
    with pytest.raises(Stopped), StopSignals():
        stop = run_folder.Stop()
        stop.saved = True
        signal.raise_signal(number)


def test_ctrl_c_also_ends_the_reader_of_the_progress(handlers):
    """`train.py 2>&1 | tee log` ended with a BrokenPipeError instead of a checkpoint, because Ctrl-C
    ends `tee` as well."""
    reader, writer = os.pipe()
    before = os.dup(2)
    try:
        os.dup2(writer, 2)
        os.close(writer)
        os.close(reader)
        run_folder.Stop()
        signal.raise_signal(signal.SIGINT)
        assert os.write(2, b"step 1 of 2") == 11
    finally:
        os.dup2(before, 2)
        os.close(before)


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_failure_in_the_first_step_leaves_no_run_behind(world, prepared, tmp_path, monkeypatch):
    """The same command, with a smaller batch, was refused because the folder contained a run."""
    run, monitor = tmp_path / "run", ["--report-to", "tensorboard"]
    flags = train_flags(world, prepared, run)
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate", fail)
        with pytest.raises(torch.OutOfMemoryError):
            train.main(flags if find_spec("tensorboard") is None else flags + monitor)
        assert not run.exists()
        run.mkdir()
        (run / "notes.txt").write_text("mine")
        with pytest.raises(torch.OutOfMemoryError):
            train.main([*flags, "--overwrite"])
    assert {p.name for p in run.iterdir()} == {"notes.txt", ".lock"}


def test_overwrite_keeps_the_old_run_until_the_new_one_is_saved(
    world, prepared, trained, tmp_path, monkeypatch
):
    """If its first step ran out of memory, --overwrite had already deleted the trained model."""
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "tensorboard").mkdir()
    for name in ("report_id.json", "samples_validation_sample4.json", "tensorboard/events.1"):
        (run / name).write_text('"old"')

    def files():
        return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    before = files()
    flags = train_flags(world, prepared, run, "--overwrite", "--epochs", 1, "--save-every", 1)
    accumulate, steps = train.accumulate, []

    def third_fails(*args):
        steps.append(args)
        return fail() if len(steps) == 3 else accumulate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate", fail)
        with pytest.raises(torch.OutOfMemoryError):
            train.main(flags)
        assert files() == before
        patch.setattr(train, "accumulate", third_fails)
        with pytest.raises(torch.OutOfMemoryError):
            train.main(flags)
    names = {"last.pt", "previous.pt", "args.json", "metrics.jsonl", ".lock"}
    assert files().keys() == names and state(run)["step"] == 2


def test_a_run_that_cannot_be_resumed_is_not_restarted(world, prepared, trained, tmp_path, capsys):
    """--resume without last.pt once emptied the logs of a finished run and replaced its best.pt."""
    folder = shutil.copytree(trained, tmp_path / "run")
    flags = train_flags(world, prepared, folder, "--resume")
    os.rename(folder / "last.pt", tmp_path / "last.pt")
    os.rename(folder / "previous.pt", tmp_path / "previous.pt")
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        train.main(flags)
    assert (folder / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    (folder / "last.pt").write_bytes(b"PK")
    os.rename(tmp_path / "previous.pt", folder / "previous.pt")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert not train.main([*flags, "--dry-run"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "a dry run changes nothing"
    (folder / "best.pt").write_bytes(b"")
    assert not train.main(flags)
    printed = capsys.readouterr().err
    assert "last.pt cannot be used" in printed and "writes a new best.pt" in printed
    assert (folder / "damaged.pt").read_bytes() == b"PK" and state(folder)["step"] == 10
    assert torch.load(str(folder / "best.pt"), weights_only=True)["step"] == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s | {"args": []},
        lambda s: {k: v for k, v in s.items() if k != "data"},
        lambda s: s | {"best": "x"},
        lambda s: s | {"sources": {"train": s["sources"]["train"][1:]}},
        lambda s: s | {"step": -7},
        lambda s: s | {"step": 10**30},
        lambda s: s | {"optimizer": {}},
        lambda s: s | {"qformer": {k: v[:1] for k, v in s["qformer"].items()}},
        lambda s: s | {"sizes": s["sizes"] | {"num_blocks": 10**7}},
    ],
)
def test_a_state_of_the_wrong_shape_is_refused(world, prepared, trained, tmp_path, damage):
    (tmp_path / "run").mkdir()
    torch.save(damage(state(trained)), tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"--resume|checkpoint"):
        train.main(train_flags(world, prepared, tmp_path / "run", "--resume"))


def test_learning_rate():
    rates = [optim.lr_at(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.01
    short = [optim.lr_at(step, 10, 1.0, 500) for step in range(10)]
    assert max(short) == 1.0, "a run shorter than its warm-up never reached the full rate"


def test_order_is_a_function_of_seed_and_epoch():
    records = [{"id": str(i)} for i in range(50)]
    order = optim.epoch_order(records, 0, 1)
    assert order == optim.epoch_order(records, 0, 1) != optim.epoch_order(records, 0, 2)
    assert order != optim.epoch_order(records, 1, 1)
    assert sorted(order, key=lambda r: int(r["id"])) == records


def test_decay_is_on_matrices_only(make_qformer):
    qformer = make_qformer(num_blocks=2)
    decayed, rest = optim.parameter_groups(qformer, 0.03)
    names = {id(p): n for n, p in qformer.named_parameters()}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    assert {"queries", "gain", "pos.0"} <= {names[id(p)] for p in rest["params"]}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.03, 0.0)


def test_a_checkpoint_is_a_snapshot(tmp_path, monkeypatch):
    """It is written while training changes the same tensors. Errors while writing are raised."""
    import threading

    go, write = threading.Event(), run_folder.write_atomic
    monkeypatch.setattr(run_folder, "write_atomic", lambda *a, **k: go.wait(60) and write(*a, **k))
    weights = torch.zeros(3)
    with closing(run_folder.Writer()) as disk:
        disk.write(tmp_path / "last.pt", {"weights": weights})
        weights += 1
        go.set()
    assert torch.load(tmp_path / "last.pt")["weights"].tolist() == [0, 0, 0]
    with pytest.raises(FileNotFoundError), closing(run_folder.Writer()) as disk:
        disk.write(tmp_path / "gone" / "last.pt", {})
