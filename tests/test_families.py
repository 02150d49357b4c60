"""Encoders of each type in `encoder.FAMILIES` through the scripts, from clips to captions of a file."""

import json
import time
from pathlib import Path

import encoders
import pytest
import torch
from conftest import preprocess, train_flags

import evaluate
import heads
import infer
import probe
import train
from checkpoint import load_models, read_checkpoint
from encoder import FAMILIES
from research import embeddings
from runtime.feature_cache import load_features, load_manifest
from runtime.provenance import summary
from viz import app
from windows import Windowing

ROOT = Path(__file__).parent.parent
QUICK = ("videomae", "mobilenet_v2")  # tubelets, a feature map
CLIPS = 10  # of each split
HEAD = """# Encoders of each type

A tiny model of each type with random weights went through preprocess_ssv2.py (with --verify and --still),
train.py, evaluate.py, probe.py and infer.py on the toy world, {clips} training clips. This shows that the scripts
work with it, and nothing about how well an encoder of that type captions. Written by
`python -m pytest -n0 -m slow tests/test_families.py` on a CPU; the seconds are of the whole chain.
{made_with}.

| type | grid (T, H, W) | width | CLS | seconds | result |
|---|---|---|---|---|---|
"""


def chain(kind, world, prepared, folder, capsys):
    """Run all scripts with a tiny encoder of one type. Returns the settings of its cache."""
    encoders.save(kind, folder / "encoder", size=64)
    (folder / "annotations").symlink_to(prepared / "annotations")
    flags = ["--encoder", folder / "encoder", "--num-frames", 8, "--limit", CLIPS]
    assert preprocess(world, folder, *flags) == 0
    assert preprocess(world, folder, *flags, "--verify") == 0
    still = folder / "still"
    only = ["--splits", "validation"]
    assert preprocess(world, folder, *flags, *only, "--still", features=still) == 0
    settings = load_manifest(folder / "features").settings
    assert (settings.family, settings.cls) == (kind, FAMILIES[kind].cls)

    # captions
    run, limit = folder / "run", ["--limit", CLIPS, "--epochs", 1]
    assert not train.main(train_flags(world, folder, run, *limit))
    common = ["--annotations", folder / "annotations", "--workers", 0, "--limit", CLIPS]
    scored = ["--checkpoint", run, *common, "--no-meteor"]
    assert not evaluate.main([*map(str, [*scored, "--features", folder / "features"])])
    flags = ["--features", still, "--control", "still"]
    assert not evaluate.main([*map(str, [*scored, *flags])])
    greedy = json.loads((run / f"predictions_validation_first{CLIPS}.json").read_text())

    # a probe, on the CLS if there is one
    head = ["--head", "linear", "--on", "cls" if settings.cls else "mean", "--epochs", 1]
    flags = ["--features", folder / "features", "--output", folder / "probe", "--lr", "1e-3"]
    assert not probe.main([*map(str, [*common, *head, *flags])])
    flags = ["--features", still, "--evaluate", folder / "probe", "--control", "still"]
    assert not probe.main([*map(str, [*common, *flags])])

    # captions and actions of files are those of the cache
    paths = [world / "videos" / f"{p['image_id']}.webm" for p in greedy[:2]]
    flags = ["--checkpoint", run, "--probe", folder / "probe", "--workers", 0]
    flags += ["--format", "jsonl"]
    capsys.readouterr()
    assert not infer.main([*map(str, [*paths, *flags])])
    lines = capsys.readouterr().out.splitlines()
    found = [window for line in lines for window in json.loads(line)["windows"]]
    assert [f["caption"] for f in found] == [p["caption"] for p in greedy[:2]]
    assert [len(f["actions"]) for f in found] == [5, 5]
    checkpoint = read_checkpoint(run)
    models = load_models(checkpoint, torch.device("cpu"), torch.float32)
    recognise = heads.recogniser(heads.read_probe(folder / "probe", "--probe"), torch.device("cpu"))
    look = app.Look(*models, checkpoint["templates"], Windowing(), 10.0, recognise)
    _, label, _, actions, *_ = look(paths[0])
    assert label == greedy[0]["caption"] and len(actions) == 5
    spans, _ = embeddings.embed_film(paths[0], *models, Windowing())
    assert len(spans) == 1
    for name, sampling in (("features", "bin_centres"), (still, "still")):
        clip = greedy[0]["image_id"]
        cached = load_manifest(folder / name).settings
        stored = load_features(folder / name / "validation" / f"{clip}.pt", clip, cached)
        assert cached.sampling == sampling and ("cls" in stored) == settings.cls
    return settings


@pytest.mark.parametrize("kind", QUICK)
def test_from_clips_to_captions_of_a_file(kind, world, prepared, tmp_path, quick_meteor, capsys):
    """The web demo and research/embed.py failed with a TypeError if the encoder has a CLS."""
    chain(kind, world, prepared, tmp_path, capsys)


@pytest.mark.slow
def test_all_types_from_clips_to_captions(world, prepared, tmp_path, quick_meteor, capsys):
    rows = []
    for kind in encoders.CONFIGS:
        (tmp_path / kind).mkdir()
        began = time.perf_counter()
        s = chain(kind, world, prepared, tmp_path / kind, capsys)
        seconds = time.perf_counter() - began
        grid = " x ".join(map(str, s.grid))
        rows.append(
            f"| {kind} | {grid} | {s.width} | {'yes' if s.cls else 'no'} | {seconds:.1f} | ok |\n"
        )
    receipt = ROOT / "results" / "families.md"
    receipt.write_text(
        HEAD.format(clips=CLIPS, made_with=summary()) + "".join(rows), encoding="utf-8"
    )
