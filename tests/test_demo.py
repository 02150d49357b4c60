"""worlds/demo.py on a small toy world."""

import importlib
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import until

from runtime.errors import Stopped, UserError
from worlds import demo


@pytest.fixture
def in_process(monkeypatch, quick_meteor):
    """Run each echoed command in this process, which has already imported torch."""
    commands = []

    def shell(command):
        commands.append(command)
        name, *args = shlex.split(command.removeprefix("-m "))
        assert not importlib.import_module(name.removesuffix(".py")).main(args)

    monkeypatch.setattr(demo, "shell", shell)
    return commands


def test_captions_come_from_the_video(in_process, tmp_path, capsys, monkeypatch):
    """After training on a few clips, captions fit their own clip better than another one: real minus
    shuffled CIDEr is above 1. It is 0 for a model that writes good sentences and ignores the video."""
    world = ["--data", str(tmp_path / "toy"), "--output", str(tmp_path / "run")]
    world += ["--clips", "300", "--lm-steps", "160"]
    more_steps = " --batch-size 16 --warmup-steps 30"  # to compensate for the few clips
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING + more_steps)
    demo.main([*world, "--epochs", "5"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["cider"] - summary["cider_shuffled"] > 1
    assert summary["cider"] > summary["cider_still"] > 0
    assert summary["clips"]["train"] == 300 and summary["trainable_parameters"] > 100_000
    assert set(summary["seconds"]) > {"total", "world", "features", "training", "evaluation"}
    printed = capsys.readouterr()
    assert "validation: clips never seen" in printed.out
    assert "synthetic world and only knows bar, cross, disc, fence, ladder, pole\n" in printed.err
    lines = [line.split() for line in printed.err.splitlines() if line.startswith("    ")]
    [infer] = [words for words in lines if "infer.py" in words]
    [app] = [words for words in lines if "viz.app" in words]
    clips = importlib.import_module("infer").parse_args(infer[2:]).clips
    assert [Path(p).is_dir() for p in clips] == [True] and app[-6:-4] == ["-m", "viz.app"]
    assert {c.split()[0] for c in in_process} == {
        *("-m", "prepare_annotations.py", "preprocess_ssv2.py", "train.py"),
        *("evaluate.py", "infer.py"),
    }

    # a second run into the same folder, up to its training
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING + " --limit 64")
    for phase, command in demo.steps(demo.parse_args([*world, "--epochs", "1"])):
        if phase == "evaluation":
            break
        demo.shell(command)
    assert phase == "evaluation"
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1:]
    assert json.loads(line)["step"] == 4


def test_printed_commands_start_this_python(tmp_path, monkeypatch):
    """`make demo` ended with `python -m viz.app`, but make does not activate .venv."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert demo.python_command() == shlex.quote(sys.executable)
    monkeypatch.chdir(Path(sys.executable).parent.parent)
    assert demo.python_command() == f"bin/{Path(sys.executable).name}"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert demo.python_command() == "python"


def test_a_failing_script_ends_the_demo(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "something").write_text("the user's own file")
    with pytest.raises(UserError, match=r"toy_ssv2 .* ended with exit code 2"):
        demo.main(["--data", str(tmp_path / "toy"), "--output", str(tmp_path / "run")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_lets_its_script_save(number, tmp_path, monkeypatch):
    """It was killed, so that Ctrl-C during the training of `make tabletop` lost up to 500 steps."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    script = f"""
import signal, time
def save(number, frame):
    signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.1)
    open({str(saved)!r}, "w")
    raise SystemExit
signal.signal(signal.{number.name}, save)
open({str(ready)!r}, "w")
time.sleep(60)"""
    wait = subprocess.Popen.wait

    def interrupted(process):
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        until(ready.exists)
        if number == signal.SIGINT:
            process.send_signal(number)  # as a terminal does
        raise Stopped(number)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(Stopped):
        demo.shell(f"-c {shlex.quote(script)}")
    assert saved.exists()
