"""tools/export.py: the round trip of a checkpoint, damaged exports and the model card."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_captioner import SETTINGS, checkpoint_of

import evaluate
import infer
from captioner import VideoCaptioner
from checkpoint import CorruptCheckpoint, load_captioner, read_checkpoint, weights_digest
from runtime import hub
from runtime.errors import UserError
from runtime.files import torch_bytes
from tools import export

SCORES = {
    "n": 7,
    "metrics": {"CIDEr": 1.2345, "exact_match": 0.25},
    "controls": {"shuffled": {"CIDEr": 0.3456}},
    "ci95": {"CIDEr": [1.0111, 1.4999]},
    "counts": {},
    "tokenizer": "ptb",
    "skipped": {"METEOR": "Java not found"},
    "settings": {"split": "validation", "style": "label", "step": 3, "missing": 2},
}


@pytest.fixture
def captioner(make_qformer, lm, tokenizer):
    return VideoCaptioner(make_qformer(), lm, tokenizer).eval()


@pytest.fixture
def state(captioner):
    return checkpoint_of(captioner) | {"step": 3, "best": 0.1, "templates": ["Moving [something]"]}


@pytest.fixture
def run(state, tmp_path):
    """A run folder: best.pt and its scores."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "best.pt").write_bytes(torch_bytes(state))
    weights = {"weights": weights_digest(state["qformer"])}
    scores = SCORES | {"settings": SCORES["settings"] | weights}
    (folder / "evaluation_validation.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def shared(run, tmp_path):
    export.export(run, tmp_path / "shared")
    return tmp_path / "shared"


def on_the_hub(folder, name, cache, monkeypatch):
    """Copy a folder into a Hub cache, as a download would."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(folder, repo / "snapshots" / "abc")


def same(a, b):
    """Return True if two checkpoints are equal bit for bit, tensors included."""
    rest = [{k: v for k, v in c.items() if k != "qformer"} for c in (a, b)]
    weights = [[(k, w.numpy().tobytes()) for k, w in sorted(c["qformer"].items())] for c in (a, b)]
    return rest[0] == rest[1] and weights[0] == weights[1]


# ---- round trip ----------------------------------------------------------------------------


def test_an_export_equals_its_checkpoint(
    state, run, shared, captioner, make_clips, monkeypatch, lm, tokenizer
):
    """All values that scripts read are equal, and so are the captions. A second export is identical."""
    assert same(read_checkpoint(shared), read_checkpoint(run))
    assert read_checkpoint(shared).keys() == state.keys()
    monkeypatch.setattr("checkpoint.load_lm", lambda *_: (lm, tokenizer, "f" * 16))
    again = load_captioner(read_checkpoint(shared), torch.device("cpu"), torch.float32)
    batch = dict(zip(("features", "scale", "offset"), make_clips(3), strict=True))
    assert again.captions(batch, "label", 9) == captioner.captions(batch, "label", 9)
    assert {p.name for p in shared.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert load_file(shared / "model.safetensors").keys() == state["qformer"].keys()
    before = {p.name: p.read_bytes() for p in shared.iterdir()}
    export.export(run, shared)
    assert {p.name: p.read_bytes() for p in shared.iterdir()} == before


def test_a_hub_id_is_read_from_the_hubs_cache(run, shared, tmp_path, monkeypatch):
    on_the_hub(shared, "somebody/captions", tmp_path / "hub", monkeypatch)
    assert same(read_checkpoint("somebody/captions"), read_checkpoint(run))
    with pytest.raises(
        UserError, match="--checkpoint somebody/other is not a folder, is not in the local cache"
    ):
        read_checkpoint("somebody/other")


@pytest.mark.parametrize(
    "name",
    ["results/ssv3", "nowhere/best.pt", "results/a/b", "/results/ssv3", "x", "./x", "a--b/c"],
)
def test_a_mistyped_path_never_reaches_the_network(name, tmp_path, monkeypatch):
    """Such names could be taken for Hub ids, with an error message about the network."""
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "find_model", lambda *_: pytest.fail("the Hub was queried"))
    with pytest.raises(UserError, match=r"does not exist\. .* train one with train\.py"):
        read_checkpoint(name)


def test_evaluate_and_infer_take_runs_exports_and_hub_ids(
    world, prepared, trained, tmp_path, monkeypatch, capsys
):
    """Results of an exported folder or a Hub id are written to results/<name>, not into the export and
    not into a training run of that name."""
    monkeypatch.setattr("metrics.meteor", lambda *_: 0.25)
    monkeypatch.chdir(tmp_path)
    assert not export.main([str(trained), "out/toy"])
    assert capsys.readouterr().out.split() == [f"out/toy/{name}" for name in exported_files()]
    on_the_hub(tmp_path / "out" / "toy", "me/toy", tmp_path / "hub", monkeypatch)
    clips = sorted(map(str, (world / "videos").iterdir()))[:2]
    printed = []
    lm = ["--lm", str(world / "lm")]  # an export does not contain the path of a folder
    clips += ["--workers", "0", "--encoder", str(world / "encoder"), *lm]
    for checkpoint in (str(trained), "out/toy", "me/toy"):
        assert not infer.main([*clips, "--checkpoint", checkpoint])
        printed.append(capsys.readouterr().out)
    assert printed[0] and printed[0] == printed[1] == printed[2]
    flags = ["--features", str(prepared / "features"), "--workers", "0", "--limit", "8"]
    flags += ["--annotations", str(prepared / "annotations"), *lm, "--checkpoint"]
    scores = tmp_path / "results" / "toy" / "evaluation_validation_first8.json"
    for checkpoint in ("out/toy", "me/toy"):
        evaluate.main([*flags, checkpoint])
        scores.unlink()
    assert sorted(p.name for p in (tmp_path / "out" / "toy").iterdir()) == sorted(exported_files())
    (tmp_path / "results" / "toy" / "best.pt").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"results/toy already contains a training run; .* --output"
    ):
        evaluate.main([*flags, "me/toy"])


def exported_files():
    return ("model.safetensors", "README.md", "config.json")


# ---- damage --------------------------------------------------------------------------------


def rewrite(folder, change):
    """Change the tensors of an export and the checksum in its config.json."""
    import hashlib

    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    save_file(change(load_file(path)), path)
    config["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "gain"}, "Missing key.*gain"),
        (lambda w: w | {"more": torch.zeros(1)}, "Unexpected key.*more"),
        (lambda w: w | {"queries": torch.zeros(5, 32)}, "size mismatch for queries"),
        (lambda w: w | {"gain": w["gain"].half()}, "was not written by train.py"),
        (lambda w: w | {"gain": w["gain"] / 0}, "NaN or infinity"),
    ],
)
def test_other_tensors_are_refused(shared, run, state, change, why):
    """In a folder, and in a .pt too, before any language model is loaded."""
    rewrite(shared, change)
    (run / "best.pt").write_bytes(torch_bytes(state | {"qformer": change(state["qformer"])}))
    for checkpoint in (shared, run):
        with pytest.raises(CorruptCheckpoint, match=why):
            read_checkpoint(checkpoint)


def test_every_flipped_byte_of_the_weights_is_noticed(shared):
    path = shared / "model.safetensors"
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is damaged"):
            read_checkpoint(shared)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "was not written by tools.export"),
        ('{"model_type": "qwen2"}', "was not written by tools.export"),
        ('{"checkpoint_version": 1}', "is damaged or does not belong"),
        ({"manifest": {}}, "was not written by train.py"),
        ({"step": "3"}, "was not written by train.py"),
        ({"checkpoint_version": 2}, "has version 2, but this code reads 1"),
        ({"sizes": {"surprise": 1}}, "was not written by train.py"),
        ({"sizes": {"output_norm": 10**400}}, "was not written by train.py"),
    ],
)
def test_an_invalid_config_is_refused(shared, config, why):
    path = shared / "config.json"
    if isinstance(config, dict):
        original = json.loads(path.read_text())
        sizes = original["sizes"] | config.get("sizes", {})
        config = json.dumps(original | config | {"sizes": sizes})
    path.write_text(config)
    with pytest.raises(UserError, match=why):
        read_checkpoint(shared)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_killed_export_is_completed_by_the_same_command(
    run, state, tmp_path, monkeypatch, before, done
):
    """An export is killed after each file, in a new folder or over an earlier export. New weights never
    load with an old config."""
    folder, write, written = tmp_path / "shared", export.write_atomic, []
    if before:
        export.export(run, folder)
        old = read_checkpoint(folder)
        state["qformer"]["gain"] += 1
        (run / "best.pt").write_bytes(torch_bytes(state | {"step": 9}))

    def killed(path, data):
        if len(written) == done:
            path.with_name(f".{path.name}.0123.tmp").write_bytes(b"cut")
            raise KeyboardInterrupt
        written.append(write(path, data))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write_atomic", killed)
        export.export(run, folder)
    if before and not done:
        assert same(read_checkpoint(folder), old)
    else:
        with pytest.raises(UserError, match=r"does not exist|not finished|does not belong"):
            read_checkpoint(folder)
    export.export(run, folder)
    assert same(read_checkpoint(folder), read_checkpoint(run))
    assert {p.name for p in folder.iterdir()} == set(exported_files())


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "config.json", "model.safetensors"])
def test_a_folder_with_other_files_is_refused(run, tmp_path, name):
    """A language model's files have the same names as those of an export."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(UserError, match=rf"folder .*mine contains .*{name}"):
        export.export(run, folder)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(name, "mine")]


def test_a_missing_best_pt_gets_one_message(tmp_path):
    with pytest.raises(UserError, match=r"run .*best\.pt does not exist\. .* train\.py"):
        export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


# ---- the card ------------------------------------------------------------------------------


def test_the_card_contains_the_scores_of_this_checkpoint_only(run, shared, tmp_path):
    card = (shared / "README.md").read_text()
    assert "| CIDEr | 1.234 | 1.011 - 1.500 | 0.346 |" in card.replace("1.235", "1.234")
    assert "7 clips, tokenizer ptb" in card and "Java not found" in card
    assert "2 clips without features" in card and "Not evaluated" not in card
    scores = run / "evaluation_validation.json"
    result = json.loads(scores.read_text())
    # of another checkpoint at the same step
    settings = result["settings"] | {"weights": "0" * 16}
    other = result | {"settings": settings}
    nonsense = result | {"metrics": {"CIDEr": "1.2345"}}
    for text in (json.dumps(other), "{", "[]", json.dumps(SCORES), json.dumps(nonsense)):
        scores.write_text(text)
        export.export(run, shared)
        card = (shared / "README.md").read_text()
        assert "Not evaluated." in card and "CIDEr" not in card
    scores.unlink()
    export.export(run, shared)
    assert "Not evaluated." in (shared / "README.md").read_text()


def test_a_name_cannot_break_the_card(run, state, tmp_path):
    """A newline would end YAML values and table rows, and a pipe a table cell. Paths are left out."""
    nasty = "/private/a|b\n---\n# <b>`x`"
    state["manifest"] = {"settings": SETTINGS, "info": {"encoder": nasty}}
    state["lm"]["name"] = nasty
    (run / "best.pt").write_bytes(torch_bytes(state))
    export.export(run, tmp_path / "pipe|`name")
    card = (tmp_path / "pipe|`name" / "README.md").read_text()
    lines = card.splitlines()
    assert lines.count("---") == 2 and "<b>" not in card and "/private" not in card
    assert [line for line in lines if line.startswith("# ")] == ["# pipe\\|\\`name"]
    rows = [line for line in lines if line.startswith("| encoder") or line.startswith("| language")]
    assert len(rows) == 2 and all(row.replace("\\|", "").count("|") == 3 for row in rows)


def test_only_models_of_the_hub_are_called_base_models(run, state, tmp_path, monkeypatch):
    """A folder's name may have the form of a Hub id, so the Hub's cache decides."""
    on_the_hub(run, "somebody/lm", tmp_path / "hub", monkeypatch)
    (tmp_path / "hub/models--somebody--lm/snapshots/abc/config.json").write_text("{}")
    state["lm"]["name"] = "somebody/lm"
    state["manifest"] = {"settings": SETTINGS, "info": {"encoder": "world/encoder"}}
    (run / "best.pt").write_bytes(torch_bytes(state))
    export.export(run, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert 'base_model: ["somebody/lm"]\n' in card
    assert "--checkpoint shared --encoder ENCODER\n" in card
