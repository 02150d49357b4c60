"""The whole chain on a small toy world, through the commands that the demo echoes."""

import importlib
import json
import shlex

import pytest

from worlds import demo


@pytest.fixture
def in_process(monkeypatch, quick_meteor):
    """Run each echoed command in this process, which has imported torch already."""
    commands = []

    def shell(command):
        commands.append(command)
        name, *args = shlex.split(command.removeprefix("-m "))
        assert not importlib.import_module(name.removesuffix(".py")).main(args)

    monkeypatch.setattr(demo, "shell", shell)
    return commands


def test_captions_come_from_the_video(in_process, tmp_path, capsys, monkeypatch):
    """Trained on a few clips the captions already say more of their own clip than of another: real
    minus shuffled CIDEr is over 1. A model that cannot be steered reads well and scores 0."""
    world = ["--data", str(tmp_path / "toy"), "--output", str(tmp_path / "run")]
    world += ["--clips", "300", "--lm-steps", "200"]
    more_steps = " --batch-size 16 --warmup-steps 30"  # to make up for the few clips
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING + more_steps)
    demo.main([*world, "--epochs", "6"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["cider"] - summary["cider_shuffled"] > 1
    assert summary["cider"] > summary["cider_still"] > 0
    assert summary["clips"]["train"] == 300 and summary["trainable_parameters"] > 100_000
    assert set(summary["seconds"]) > {"total", "world", "features", "training", "evaluation"}
    assert "validation: clips never seen" in capsys.readouterr().out
    first = list(in_process)
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING + " --limit 64")
    demo.main([*world, "--epochs", "1"])  # twice in a row works
    assert len(in_process) == 2 * len(first)
    assert {c.split()[0] for c in first} == {
        *("-m", "prepare_annotations.py", "preprocess_ssv2.py", "train.py"),
        *("evaluate.py", "infer.py"),
    }


def test_a_failing_script_ends_the_demo(tmp_path):
    from runtime.errors import UserError

    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "something").write_text("of the user's")
    with pytest.raises(UserError, match=r"toy_ssv2 .* ended with exit code 2"):
        demo.main(["--data", str(tmp_path / "toy"), "--output", str(tmp_path / "run")])
