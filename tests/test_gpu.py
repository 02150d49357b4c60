"""The whole chain on an emulated GPU (see gpu.py), to test the branches that a CPU does not run."""

import json
import re
import signal

import pytest
import torch
from conftest import preprocess, train_flags

import evaluate
import heads
import infer
import probe
import retrieve
import train
import windows
from captioner import VideoCaptioner, check_lm
from checkpoint import load_models, read_checkpoint
from encoder import VideoEncoder
from research import embeddings, words
from runtime import devices
from runtime.errors import SIGNALLED
from runtime.feature_cache import load_features, load_manifest
from viz import app


def test_the_whole_chain(gpu, world, prepared, tmp_path, monkeypatch, capsys):
    """Every script failed at its first CUDA call, which no test ran."""
    monkeypatch.setattr("metrics.meteor", lambda *_: 0.25)
    features = tmp_path / "features"
    (tmp_path / "annotations").symlink_to(prepared / "annotations")
    flags = ["--batch-size", 4, "--limit", 20]
    assert preprocess(world, tmp_path, *flags) == 0
    assert gpu.most_in_flight == 2  # a batch is encoded while the one before it is saved
    assert preprocess(world, tmp_path, *flags, "--verify") == 0
    settings = load_manifest(features).settings
    assert settings.compute_dtype == "bfloat16"

    # trained, evaluated, stopped and resumed
    run = tmp_path / "run"
    flags = ["--batch-size", 4, "--grad-accum", 2, "--limit", 20, "--epochs", 2]
    flags = train_flags(world, tmp_path, run, *flags)
    assert not train.main([*flags, "--dry-run"])
    assert re.search(r"GPU memory +\d\S* \w+ peak, ", capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.run_log.Log.step", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert train.main(flags) == SIGNALLED + signal.SIGTERM
    assert not train.main([*flags, "--resume"])
    args = json.loads((run / "args.json").read_text())
    assert (args["device"], args["args"]["dtype"]) == ("emulated GPU 0", "bfloat16")
    steps = (run / "metrics.jsonl").read_text().splitlines()
    assert steps and all("gpu_gb" in json.loads(step) for step in steps)

    # captions from the cache, from files and in the web demo
    common = ["--checkpoint", str(run), "--limit", "4", "--workers", "0"]
    cached = ["--features", str(features), "--annotations", str(tmp_path / "annotations")]
    assert not evaluate.main([*common, *cached, "--num-beams", "2", "--output", str(tmp_path)])
    beams = json.loads((tmp_path / "predictions_validation_first4_beams2.json").read_text())
    assert len(beams) == 4 and all(p["caption"] for p in beams)
    assert not evaluate.main([*common, *cached, "--output", str(tmp_path)])
    greedy = json.loads((tmp_path / "predictions_validation_first4.json").read_text())
    paths = [str(world / "videos" / f"{p['image_id']}.webm") for p in greedy]
    capsys.readouterr()
    assert not infer.main([*paths, *common, "--batch-size", "4"])
    printed = capsys.readouterr()
    captions = [line.split("\t")[1] for line in printed.out.splitlines()]
    assert captions == [p["caption"] for p in greedy]
    assert printed.err.startswith("device       cpu:0 (emulated GPU 0), bfloat16")

    # a probe, trained, stopped and resumed
    flags = [
        "--workers",
        "0",
        "--limit",
        "20",
        "--epochs",
        "2",
        "--num-heads",
        "4",
        "--layers",
        "2",
    ]
    flags += [*cached, "--lr", "1e-3", "--output", str(tmp_path / "probe")]
    save = probe.State.save
    with monkeypatch.context() as patch:
        patch.setattr(probe.State, "save", lambda *args: save(*args) or stop(args[0].epoch == 1))
        with pytest.raises(KeyboardInterrupt):
            probe.main(flags)
    assert not probe.main([*flags, "--resume"])
    path = tmp_path / "probe" / "evaluation_validation_first20.json"
    scores = json.loads(path.read_text())["metrics"]
    flags = ["--evaluate", str(tmp_path / "probe"), "--workers", "0", "--limit", "20"]
    assert not probe.main([*cached, *flags])
    assert json.loads(path.read_text())["metrics"] == scores

    # a retriever, with micro-batches, and a search
    flags = ["--width", "16", "--batch-size", "16", "--micro-batch", "8", "--epochs", "1"]
    flags += ["--lm", str(world / "lm"), "--limit", "20", "--workers", "0", "--no-paraphrases"]
    assert not retrieve.main([*cached, *flags, "--output", str(tmp_path / "retrieval")])
    flags = ["--checkpoint", str(tmp_path / "retrieval"), "--workers", "0", "--limit", "20"]
    assert not retrieve.main([*cached, *flags, "--text", "moving"])

    flags = ["--checkpoint", str(run), "--workers", "0", "--probe", str(tmp_path / "probe")]
    args = app.parse_args(flags)
    checkpoint = read_checkpoint(args.checkpoint)
    models = load_models(checkpoint, *devices.resolve(args.device, args.dtype))
    recognise = heads.recogniser(heads.read_probe(args.probe, "--probe"), models[1].device)
    how = windows.Windowing.of(args)
    look = app.Look(*models, checkpoint["templates"], how, 10.0, recognise)
    _, label, _, actions, *_ = look(paths[0])
    assert label == greedy[0]["caption"] and len(actions) == 5


def stop(now):
    if now:
        raise KeyboardInterrupt


def test_gpu_and_cpu_store_the_same_features(gpu, world, prepared, tmp_path, monkeypatch):
    """A GPU encodes in batches, and its copies to the host are read only when complete."""
    (tmp_path / "annotations").symlink_to(prepared / "annotations")
    flags = ["--batch-size", 3, "--limit", 7, "--splits", "train", "--dtype", "float32"]
    sizes, tokens = [], VideoEncoder._tokens
    monkeypatch.setattr(
        VideoEncoder, "_tokens", lambda self, x: sizes.append(len(x)) or tokens(self, x)
    )
    assert preprocess(world, tmp_path, *flags) == 0
    assert sizes == [3, 3, 1]  # one call per batch
    settings = load_manifest(prepared / "features").settings
    for path in sorted((tmp_path / "features" / "train").iterdir()):
        clip = path.stem
        on_gpu, on_cpu = (
            load_features(folder / "features" / "train" / path.name, clip, settings)
            for folder in (tmp_path, prepared)
        )
        assert (on_gpu["features"].int() - on_cpu["features"].int()).abs().max() <= 1
        torch.testing.assert_close(on_gpu["scale"], on_cpu["scale"])
        torch.testing.assert_close(on_gpu["offset"], on_cpu["offset"], rtol=1e-3, atol=1e-5)


def test_bos_and_words_are_on_the_models_device(gpu, lm, make_qformer, make_clips, tokenizer):
    """test_the_whole_chain covers neither: its model has no bos, and it does not use --words."""
    device, _ = devices.resolve("auto", "float32")
    model = VideoCaptioner(make_qformer().to(device), lm.to(device), tokenizer, bos=2).eval()
    stored = [tensor.to(device) for tensor in make_clips(2)]
    check_lm(model, "tiny")
    assert len(model.generate(model.prefix(*stored), "label", 3)) == 2
    assert embeddings.embed(model, *stored)["prompted"].shape[0] == 2
    soft = model.soft_prompts(*(tensor[:1] for tensor in stored))
    assert len(words.Corpus(model, ["abc"]).table(soft, 3)) == 6


def test_the_emulated_gpu_raises_where_a_gpu_raises(gpu):
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="before set_device"):
        torch.ones(2).to(torch.device("cpu", 0), non_blocking=True)
    torch.cuda.set_device(torch.device("cpu", 0))
    with pytest.raises(RuntimeError, match="not pinned"):
        torch.ones(2).to(torch.device("cpu", 0), non_blocking=True)
    host, early, late = (
        torch.ones(2).to("cpu", non_blocking=True),
        *(torch.cuda.Event() for _ in "ab"),
    )
    early.record(torch.cuda.current_stream(torch.device("cpu", 0)))
    other = torch.ones(2).to("cpu", non_blocking=True)
    late.record(torch.cuda.current_stream(torch.device("cpu", 0)))
    assert host.isnan().all()
    early.synchronize()
    assert host.tolist() == [1, 1] and other.isnan().all()
    late.synchronize()
    assert other.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="enable_timing"):
        early.elapsed_time(late)
    there = torch.zeros(3, device=torch.device("cpu", 0))
    assert (there + torch.tensor(1.0)).sum() == 3  # a tensor without dimensions may be on the host
    for far in (torch.arange(3), torch.nn.Linear(3, 3).bias, there.cpu()):
        with pytest.raises(RuntimeError, match="same device"):
            there + far
    assert torch.nn.Linear(3, 3).to(torch.device("cpu", 0))(there).shape == (3,)
