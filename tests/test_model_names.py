"""Paths that one script records and another reads from a different working directory."""

import json
import shutil

import pytest
import torch
from conftest import preprocess, train_flags

import evaluate
import infer
import train
from checkpoint import load_captioner, load_models, read_checkpoint
from runtime import cli, hub
from runtime.errors import UserError
from runtime.feature_cache import load_manifest
from tools import export
from viz import films

CPU = torch.device("cpu"), torch.float32

pytestmark = pytest.mark.usefixtures("quick_meteor")


@pytest.fixture
def no_hub(monkeypatch):
    """Fail if anything is looked up on the Hub."""

    def ask(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *a, **k: download(*a, **k) if k.get("local_files_only") else ask(),
    )


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
    """Return a function that copies the run, with other model names in its best.pt, into a new folder."""
    monkeypatch.chdir(tmp_path)

    def copy(lm, encoder, **marks):
        state = torch.load(trained / "best.pt", weights_only=True)
        state["lm"] = {"name": lm, "fingerprint": state["lm"]["fingerprint"]} | marks
        info = {k: v for k, v in state["manifest"]["info"].items() if k != "hub"}
        state["manifest"]["info"] = info | {"encoder": encoder} | marks
        folder = tmp_path / "project" / "results" / "run"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "best.pt")
        return folder / "best.pt"

    return copy


def test_a_folder_is_recorded_by_its_absolute_path(world, prepared, tmp_path, monkeypatch, no_hub):
    """A relative --lm toy/lm was written into the checkpoint as it was typed. In another folder it was
    looked up on the Hub, where a stranger's model of that name would have been downloaded."""
    shutil.copytree(world / "lm", tmp_path / "here" / "toy" / "lm")
    (tmp_path / "here" / "toy" / "encoder").symlink_to(world / "encoder")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "data").mkdir()
    shutil.copytree(prepared / "annotations", tmp_path / "data" / "annotations")
    flags = ["--encoder", "toy/encoder", "--limit", 2]
    assert preprocess(world, tmp_path / "data", *flags) == 0
    manifest = load_manifest(tmp_path / "data" / "features")
    assert manifest.info["encoder"] == str(tmp_path / "here" / "toy" / "encoder")

    def start(lm):
        args = train.parse_args(train_flags(world, prepared, "unused", "--lm", lm))
        return args, train.read_data(args), train.Recipe.of(args)

    run = tmp_path / "run"
    run.mkdir()
    state = train.build(*start("toy/lm"), *CPU)
    torch.save(state.best(), run / "best.pt")
    torch.save(state.last(), run / "last.pt")
    monkeypatch.chdir(tmp_path)
    found = read_checkpoint(run)
    assert found["lm"]["name"] == str(tmp_path / "here" / "toy" / "lm") and "hub" not in found["lm"]
    assert load_captioner(found, *CPU)
    # another spelling of the same folder does not prevent --resume
    assert train.newest(*start("here/toy/../toy/lm"), run)["step"] == 0


def test_old_checkpoints_with_relative_folders(moved, world, tmp_path, no_hub, monkeypatch):
    """They are found from the folders around the run, and never asked of the Hub."""
    best = moved("toy/lm", "toy/encoder")
    for what, load in (("lm", load_captioner), ("encoder", load_models)):
        with pytest.raises(UserError, match=f"trained with a model in the folder toy/{what}") as e:
            load(read_checkpoint(best), *CPU)
        assert f"pass --{what} FOLDER" in str(e.value)
        # the working directory of the training run
        shutil.copytree(world / what, tmp_path / "project" / "toy" / what)
    assert load_models(read_checkpoint(best), *CPU)
    monkeypatch.chdir(tmp_path / "project")
    (tmp_path / "project" / "results").rename(tmp_path / "elsewhere")
    assert load_models(read_checkpoint(tmp_path / "elsewhere" / "run"), *CPU)


def test_models_that_moved_together_with_their_run(moved, world, tmp_path, no_hub):
    """A folder with a run and its models was moved, and the models were looked for in the old place."""
    best = moved("/old/project/toy/lm", "/old/project/toy/encoder")
    (tmp_path / "project" / "results" / "lm").mkdir()  # another folder of that name
    with pytest.raises(UserError, match="trained with a model in the folder /old/project/toy/lm"):
        load_captioner(read_checkpoint(best), *CPU)
    for what in ("lm", "encoder"):
        shutil.copytree(world / what, tmp_path / "project" / "toy" / what)
    assert read_checkpoint(best)["lm"]["name"] == str(tmp_path / "project" / "toy" / "lm")
    assert load_models(read_checkpoint(best), *CPU)


def test_models_of_the_hub_are_asked_of_the_hub(moved, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda self, name, **_: asked.append(name) or 1 / 0
    )
    for name, marks in (("somebody/lm", {"hub": True}), (cli.LM, {})):
        with pytest.raises(UserError, match="is not in the local cache"):
            load_captioner(read_checkpoint(moved(name, "x", **marks)), *CPU)
    assert asked == ["somebody/lm", cli.LM]
    assert hub.record("name", "somebody/lm") == {"name": "somebody/lm", "hub": True}


def test_an_export_does_not_contain_the_folders_of_this_machine(trained, tmp_path, world, no_hub):
    """config.json contained the language model's and the encoder's path."""
    export.export(trained, tmp_path / "shared")
    texts = [
        path.read_text() for path in tmp_path.glob("shared/*") if path.suffix != ".safetensors"
    ]
    assert len(texts) == 2 and not [t for t in texts if str(world.parent) in t or "/tmp" in t]
    found = read_checkpoint(tmp_path / "shared")
    assert (found["lm"]["name"], found["manifest"].info["encoder"]) == ("lm", "encoder")
    with pytest.raises(UserError, match=r"trained with a model in the folder lm, .* pass --lm"):
        load_captioner(found, *CPU)
    assert load_captioner(found, *CPU, world / "lm")


def test_captions_are_found_from_another_working_directory(
    trained, world, tmp_path, monkeypatch, capsys
):
    """viz.films did not find the clips, because captions.jsonl had their relative paths."""
    monkeypatch.chdir(world)
    clip = min((world / "videos").glob("*.webm")).name
    flags = ["--checkpoint", str(trained), "--workers", "0", "--output", str(tmp_path)]
    assert not infer.main([f"videos/{clip}", *flags])
    assert capsys.readouterr().out.startswith(f"videos/{clip}\t")
    monkeypatch.chdir(tmp_path)
    [result] = films.read_captions(tmp_path / "captions.jsonl")
    assert result["path"] == str(world / "videos" / clip)


def test_a_part_of_a_file_of_predictions(prepared, trained, tmp_path):
    """--limit with the captions of the whole split said that the annotations lacked clips."""
    full = trained / "predictions_validation.json"
    flags = ["--annotations", str(prepared / "annotations"), "--no-meteor"]
    flags += ["--output", str(tmp_path), "--limit", "3", "--predictions"]
    assert not evaluate.main([*flags, str(full)])
    [path] = tmp_path.glob("evaluation_*.json")
    result = json.loads(path.read_text())
    assert result["n"] == 3 and result["checkpoint"] == [str(full)]
    predictions = json.loads(full.read_text())
    (tmp_path / "other.json").write_text(
        json.dumps([*predictions, {"image_id": "unknown", "caption": "x"}])
    )
    with pytest.raises(UserError, match="not in the annotations: unknown"):
        evaluate.main([*flags, str(tmp_path / "other.json")])
