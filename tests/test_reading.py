"""How training reads features: open files, memory, loader workers and time."""

import errno
import json
import os
import shutil
from contextlib import closing
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import train_flags

import captioner
import dataset
import evaluate
import infer
import preprocess_ssv2
import train
from runtime import cli, errors, feature_cache, files, run_log
from runtime.errors import UserError
from tools import doctor_checks
from worlds import toy_ssv2

CPU = torch.device("cpu")


def training(world, prepared, *flags):
    """Return (data, recipe) of a training run, as in `train.main`."""
    args = train.parse_args(train_flags(world, prepared, "unused", *flags))
    return train.read_data(args), train.Recipe.of(args)


def test_limited_runs_are_scored_as_by_evaluate(world, prepared):
    """With --limit, train.py took the document frequencies of CIDEr from fewer clips than evaluate.py."""
    data, _ = training(world, prepared, "--limit", 20)
    assert len(data.validation) == 20 and not data.missing
    assert len(data.all_validation) == len(dataset.load_records(data.annotations, "validation"))


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="open files cannot be counted here")
def test_a_long_window_keeps_few_files_open(world, prepared, tokenizer):
    """All micro-batches of a step were read before the first was used. The out-of-memory message
    recommends half the --batch-size and twice the --grad-accum, and 256 micro-batches then ended in a
    traceback."""
    flags = ("--batch-size", 1, "--grad-accum", 30, "--epochs", 1, "--limit", 30, "--workers", 1)
    data, recipe = training(world, prepared, *flags)
    before = len(os.listdir("/dev/fd"))
    [(_, ids, window)] = train.training_steps(data, recipe, tokenizer, CPU, 0)
    seen = [(batch["ids"], len(os.listdir("/dev/fd")) - before) for batch in window]
    assert [read for read, _ in seen] == [[i] for i in ids] and len(ids) == 30
    assert max(files for _, files in seen) < 90, "each micro-batch has six files"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "a.pt"),
        OSError("Caught OSError in DataLoader worker process 0.\n[Errno 24] Too many open files"),
        RuntimeError("unable to open file <a.pt>: Too many open files (24)"),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_too_many_open_files_get_one_message(error):
    assert "`ulimit -n 4096`" in errors.explain(error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        # each ended in a traceback; in Python 3.11 Path.exists() raises the first one, too
        (
            PermissionError(errno.EACCES, "Permission denied", "/private/x"),
            "/private/x: permission",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of memory; halve"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            "out of memory; halve",
        ),
    ],
)
def test_errors_that_are_no_bugs_get_one_line(error, message, capsys):
    code = cli.exit_code(Mock(side_effect=error), SimpleNamespace(number=None))
    assert code == (errors.USAGE if isinstance(error, PermissionError) else errors.FAILED)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("where", ["builtins.open", "torch.load"])
def test_too_many_open_files_are_not_reported_as_a_damaged_file(tmp_path, monkeypatch, where):
    """The message was that the features are unreadable and the file should be deleted."""

    def too_many(path, *args, **kwargs):
        kind = OSError if where == "builtins.open" else RuntimeError
        raise kind(f"unable to open file <{path}>: Too many open files (24)")

    settings = feature_cache.Settings(grid=(2, 3, 4), width=5, store="fp16")
    stored = {"features": torch.randn(24, 5).half()}
    feature_cache.save_features(tmp_path / "7.pt", "7", stored, "decord")
    with monkeypatch.context() as patch:
        patch.setattr(where, too_many)
        with pytest.raises((OSError, RuntimeError), match="Too many open files"):
            feature_cache.load_features(tmp_path / "7.pt", "7", settings)


@pytest.mark.parametrize(
    ("given", "processes", "sizes"),
    [
        *[((None, None), n, s) for n, s in {1: (32, 2), 2: (32, 2), 4: (16, 4), 8: (8, 8)}.items()],
        ((None, None), 64, (1, 64)),
        *[((8, None), 1, (8, 8)), ((None, 16), 4, (4, 16)), ((64, None), 1, (64, 1))],
        *[((7, 3), 1, (7, 3)), ((7, 3), 3, (7, 3))],
    ],
)
def test_a_step_has_64_clips_unless_both_flags_are_given(monkeypatch, given, processes, sizes):
    """The default was 8 x 8 clips, with four times the kernel launches of 32 x 2. Both fit the GPU."""
    monkeypatch.setattr("runtime.ranks.world_size", lambda: processes)
    names = ("--batch-size", "--grad-accum")
    flags = [text for n, v in zip(names, given, strict=True) if v for text in (n, str(v))]
    args = train.parse_args(flags)
    assert (args.batch_size, args.grad_accum) == sizes


@pytest.mark.parametrize(
    ("flags", "processes", "complaint"),
    [
        (["--batch-size", "7"], 1, "--batch-size 7 does not divide 64.* also set --grad-accum"),
        (["--grad-accum", "24"], 1, "--grad-accum 24 does not divide 64.* also set --batch-size"),
        ([], 3, "shared equally by 3 processes; set --batch-size and --grad-accum"),
    ],
)
def test_a_step_that_cannot_be_split_is_an_error(monkeypatch, flags, processes, complaint):
    monkeypatch.setattr("runtime.ranks.world_size", lambda: processes)
    with pytest.raises(UserError, match=complaint):
        train.parse_args(flags)


def test_any_number_of_processes_takes_the_same_clips_per_step(
    world, prepared, tokenizer, monkeypatch
):
    """One, two, four and eight processes without flags; each gets the same number of micro-batches."""
    where = train_flags(world, prepared, "unused", "--epochs", 1)
    where = [x for x in where if x not in ("--batch-size", "8", "--grad-accum", "3")]
    runs = {}
    for count in (1, 2, 4, 8):
        monkeypatch.setattr("runtime.ranks.world_size", lambda count=count: count)
        shares = []
        for rank in range(count):
            monkeypatch.setattr("runtime.ranks.rank", lambda rank=rank: rank)
            args = train.parse_args(where)
            data = train.read_data(args)
            steps = train.training_steps(data, train.Recipe.of(args), tokenizer, CPU, 0)
            shares.append([(ids, [batch["ids"] for batch in window]) for _, ids, window in steps])
        for step in zip(*shares, strict=True):
            read = sorted(i for _, micro_batches in step for batch in micro_batches for i in batch)
            assert all(sorted(ids) == read for ids, _ in step)
        assert (
            len({len(micro_batches) for _, micro_batches in next(zip(*shares, strict=True))}) == 1
        )
        runs[count] = [ids for ids, _ in shares[0]]
    assert runs[1] == runs[2] == runs[4] == runs[8] and [*map(len, runs[1])] == [64, 36]


def test_a_run_resumes_with_another_split_of_its_step(
    world, prepared, trained, tmp_path, quick_meteor, capsys
):
    """The out-of-memory message recommends a smaller --batch-size, but --resume refused other flags.
    test_train.py tests that another number of clips per step is refused."""
    run = shutil.copytree(trained, tmp_path / "run")
    os.replace(run / "previous.pt", run / "last.pt")  # left before its last evaluation
    flags = train_flags(world, prepared, run, "--resume", "--batch-size", 4, "--grad-accum", 6)
    assert not train.main(flags)
    note = "a step is now 4 x 6 clips instead of 8 x 3; its clips are the same, but the dropout"
    assert note in capsys.readouterr().err
    last = files.read_torch(run / "last.pt")
    assert (last["step"], last["scored"], last["args"]["batch_size"]) == (10, 10, 4)


@pytest.mark.parametrize(("gigabytes", "state"), [(15.8, "ok"), (12.9, "note")])
def test_doctor_accepts_a_gpu_of_16_gb(monkeypatch, gigabytes, state):
    """doctor.py warned about every GPU below 24 GB, although the defaults need 14."""
    card = {"name": "T", "bytes": gigabytes * 1e9, "count": 1, "bf16": True, "built_for": "13.0"}
    monkeypatch.setattr(
        doctor_checks,
        "in_child",
        lambda f, *_: (card if f is doctor_checks.gpu_properties else [1, 1e6], None),
    )
    finding = doctor_checks.check_gpu("torch")
    assert finding.state == state
    assert finding.fix in (None, "python train.py --batch-size 8 --grad-accum 8")


FULL = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


def test_full_shared_memory_is_reported_with_the_size_needed(
    world, prepared, trained, tmp_path, monkeypatch
):
    """The message did not state how far to lower --workers, nor that validation needs more later.

    A clip has 26,112 bytes: 128 tokens of 192 int8, and 8 bytes per channel."""

    def full(*args):
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{FULL}")

    monkeypatch.setattr(train, "train", full)
    flags = train_flags(world, prepared, tmp_path / "run", "--batch-size", 32, "--workers", 2)
    with pytest.raises(UserError) as error:
        train.main(flags)
    assert str(error.value) == (
        "/dev/shm is too small: --workers 2 needs 4 MB for training and then 8 MB for"
        " validation. Use --workers 0 or increase it (for a container: --shm-size 9m)"
    )
    monkeypatch.setattr(evaluate, "caption", full)
    flags = [
        "--checkpoint",
        str(trained),
        "--features",
        str(prepared / "features"),
        "--workers",
        "2",
    ]
    with pytest.raises(UserError, match=r"needs 8 MB for captioning\. .* --shm-size 9m"):
        evaluate.main([*flags, "--annotations", str(prepared / "annotations")])
    with pytest.raises(ZeroDivisionError), dataset.shared_memory({}, 2):
        1 / 0  # noqa: B018


def test_shared_memory_is_counted_for_all_processes(monkeypatch):
    settings = feature_cache.Settings()
    one = dataset.shared_bytes(settings, 64, 4)
    assert one == 9 * 64 * (4096 * 1024 + 8 * 1024) and dataset.shared_bytes(settings, 64, 0) == 0
    monkeypatch.setattr("runtime.ranks.local_world_size", lambda: 4)
    assert dataset.shared_bytes(settings, 64, 4) == 4 * one


def test_doctor_compares_shared_memory_with_the_loaders_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.cli.cpus", lambda: 4)
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    for free, state in ((2.4e9, "note"), (2.5e9, "ok")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found = {f.what: f for f in doctor_checks.check_machine(tmp_path)}["/dev/shm"]
        assert found.state == state and "up to 2.4 GB on SSv2 with --workers 4" in found.found
    assert found.fix is None


@pytest.mark.parametrize(
    ("cpus", "processes", "default"), [(64, 1, 4), (2, 1, 2), (16, 8, 2), (64, 8, 4), (2, 4, 1)]
)
def test_default_workers_do_not_exceed_the_cpus_per_process(monkeypatch, cpus, processes, default):
    """The default was four workers, even on two cores or for each of eight processes. torch warned."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    if processes > 1:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, str(processes))
    for script in (train, evaluate, preprocess_ssv2):
        assert script.parse_args([]).workers == default
    assert infer.parse_args([]).workers == toy_ssv2.parse_args(["x"]).workers == min(2, default)


def test_more_workers_than_cpus_give_no_warning(recwarn):
    """torch warned when the loader was made, and again when it started to read."""
    dataset.loader([], 8, 500, CPU).check_worker_number_rationality()
    assert not recwarn.list


def test_the_dry_run_measures_the_disk_and_validation(
    world, prepared, tmp_path, monkeypatch, capsys
):
    """--dry-run took the fastest of three steps, whose clips had all been read ahead. It missed a slow
    disk and a validation batch that does not fit in memory.

    On this test's clock, reading a clip takes 1.5 s, and longer in the first two steps. Computing a
    step of two clips takes 1 s, except for one slow step. Captioning a batch takes 7 s."""
    clock, steps, validated = [0.0], [], []
    load, validate = feature_cache.load_features, captioner.VideoCaptioner.validation

    def read(*args):
        clock[0] += 1.5 if len(steps) >= 2 else 60
        return load(*args)

    def compute(model, window):
        steps.append([clip for batch in window for clip in batch["ids"]])
        clock[0] += 30 if len(steps) == 7 else 1

    def validation(model, batch, *rest):
        validated.append(len(batch["ids"]))
        clock[0] += 7
        return validate(model, batch, *rest)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train, "accumulate", compute)
    monkeypatch.setattr(dataset, "load_features", read)
    monkeypatch.setattr(captioner.VideoCaptioner, "validation", validation)
    flags = ("--dry-run", "--batch-size", 2, "--grad-accum", 1, "--eval-clips", 64)
    assert not train.main(train_flags(world, prepared, tmp_path / "run", *flags))
    assert capsys.readouterr().out == (
        "estimated time 7 min: 100 steps of 4.00 s, 75 % of it waiting for data\n"
        "validation     103.0 s per batch of 64 clips\n"
    )
    assert [len(clips) for clips in steps] == [2] * 20 and validated == [64], "not --batch-size"


def test_each_step_logs_how_long_it_waited_for_data(trained, tmp_path):
    """The log did not show whether a run was waiting for the disk or computing."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["data_seconds"] < line["seconds"] for line in lines)

    figures = {}
    reporter = SimpleNamespace(log=lambda step, values: figures.update(values), close=bool)
    with closing(run_log.Log(tmp_path, 0, 2, reporter)) as log:
        log.start_time -= 100
        log.step(1, 0, ["a", "b"], 3.0, 6, {}, 1e-3, 1.0, data_seconds=25.0, memory=0)
        assert log.bar.postfix.endswith("data 25 %")
    assert figures["train/data_seconds"] == 25.0


def test_a_log_file_has_the_bar_once_per_evaluation(tmp_path, capsys):
    """In a log file, the bar was repeated after each of the example captions."""
    samples = [{"id": i, "prediction": "a", "reference": "b"} for i in "123"]
    reporter = SimpleNamespace(log=lambda *_: None, close=bool)
    with closing(run_log.Log(tmp_path, 0, 9, reporter)) as log:
        capsys.readouterr()
        log.evaluation(1, 1, 0.5, {"metrics": {}}, samples)
        printed = capsys.readouterr().err
    assert "1: 'a', reference 'b'" in printed and "2: 'a'" in printed
    assert printed.count("0/9") == 1


def test_shared_memory_errors_of_nccl_are_not_those_of_the_loader():
    settings = feature_cache.Settings(grid=(2, 3, 4), width=5, store="fp16")
    for workers, text in ((4, "NCCL error: creating shared memory segment"), (0, "shared memory")):
        shared = dataset.shared_memory(settings, workers, training=8)
        with pytest.raises(RuntimeError, match="shared memory"), shared:
            raise RuntimeError(text)
