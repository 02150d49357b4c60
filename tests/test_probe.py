"""The probe: heads on cached features, their training, scores and checkpoints."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import heads
import probe
from encoder import VideoEncoder, quantise
from runtime import class_scores, published_head
from runtime.errors import Stopped, UserError
from runtime.feature_cache import Manifest, Settings, save_features
from runtime.files import write_json

GRID, WIDTH, CLASSES = (2, 2, 2), 8, 3
SETTINGS = Settings(num_frames=4, size=32, grid=GRID, width=WIDTH, cls=True)


@pytest.fixture
def world(tmp_path):
    """A cache of clips whose class is the place of one large token, which their mean does not show."""
    return make_world(tmp_path)


def make_world(folder, multi=False, clips=90):
    rng = np.random.default_rng(0)
    for name in ("features", "annotations"):
        (folder / name).mkdir()
    write_json(
        folder / "features" / "manifest.json",
        Manifest(SETTINGS, {"encoder": "a/b", "hub": True}).as_dict(),
    )
    for split, count in (("train", clips), ("validation", 30)):
        (folder / "features" / split).mkdir()
        records = []
        for i in range(count):
            label = int(rng.integers(CLASSES))
            x = torch.tensor(rng.normal(size=(1, 8, WIDTH)), dtype=torch.float32)
            x[0, label] += 9
            stored = {k: v[0].clone() for k, v in quantise(x).items()}
            stored["cls"] = torch.zeros(WIDTH).half()
            save_features(
                folder / "features" / split / f"{split}{i}.pt", f"{split}{i}", stored, "pyav"
            )
            record = {"id": f"{split}{i}", "video": f"{split}{i}.webm", "label": "x"}
            if multi:
                record["actions"] = [f"c00{label} Class {label}"] * (i % 9 > 0)
            else:
                record["template"] = f"Class [{label}]"
            records.append(record)
        write_json(folder / "annotations" / f"{split}.json", records)
    return folder


def run(world, *flags, output="probe", code=None):
    args = ["--features", world / "features", "--annotations", world / "annotations"]
    args += ["--output", world / output, "--workers", "0", "--device", "cpu"]
    assert probe.main([*map(str, args), *flags]) == code
    return json.loads((world / output / "evaluation_validation.json").read_text())


TRAINED = ("--num-heads", "2", "--epochs", "12", "--batch-size", "16", "--warmup-steps", "5")
TRAINED += ("--lr", "0.02", "--weight-decay", "0.01", "--dropout", "0")


def test_an_attentive_probe_learns_what_the_mean_does_not_show(world, capsys):
    result = run(world, *TRAINED)
    assert result["metrics"]["top1"] > 0.9
    low, high = result["ci95"]["top1"]
    assert low <= result["metrics"]["top1"] <= high
    controls = result["controls"]
    assert controls["shuffled_labels"]["top1"] < 0.65 and controls["majority"]["top1"] < 0.65
    mean = run(world, *TRAINED, "--epochs", "6", "--head", "linear", output="mean")
    assert mean["metrics"]["top1"] < 0.7
    short = *TRAINED, "--epochs", "1"
    weights = run(world, *short, "--head", "mlp", "--on", "weights", output="weights")
    assert weights["settings"]["chosen"]["epoch"] == 1

    # the checkpoint gives the same scores again
    capsys.readouterr()
    again = run(world, "--evaluate", str(world / "probe"))
    assert again == result  # also with the control of shuffled labels, which only the training has
    assert "probe" in capsys.readouterr().out

    # which of the two is right, clip by clip: here every other caption is
    records = json.loads((world / "annotations" / "validation.json").read_text())
    per_clip = {r["id"]: {"template_accuracy": n % 2} for n, r in enumerate(records)}
    flags = ["--features", world / "features", "--device", "cpu", "--workers", 0]
    found = evaluate.compare_with_probe(
        evaluate.parse_args([*map(str, flags)]),
        heads.read_probe(world / "probe", ""),
        records,
        per_clip,
    )
    assert (found["n"], found["captions"], found["probe"]) == (30, 0.5, result["metrics"]["top1"])
    assert found["both"] + found["only_probe"] == round(30 * found["probe"])
    assert found["both"] + found["only_captions"] == found["only_probe"] + found["neither"] == 15


def test_layers_attend_to_all_tokens(world):
    """A self-attention layer must see positions: without them the tokens are a set."""
    result = run(world, *TRAINED, "--layers", "2")
    assert result["metrics"]["top1"] > 0.9
    result = run(world, *TRAINED, "--no-positions", output="without")
    assert result["metrics"]["top1"] < 0.7


def test_a_resumed_run_is_the_same_run(world, monkeypatch, capsys):
    flags = *TRAINED, "--epochs", "4", "--lr", "0.02", "0.01"
    whole = run(world, *flags, output="whole")
    save = probe.State.save

    def stop_after_two(state, folder):
        save(state, folder)
        if state.epoch == 2:
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(probe.State, "save", stop_after_two)
    with pytest.raises(Stopped):
        run(world, *flags, "--resume")  # as in train.py, it starts a run that does not exist yet
    assert "stopped after epoch 2; use --resume to continue" in capsys.readouterr().err
    monkeypatch.setattr(probe.State, "save", save)
    assert run(world, *flags, "--resume") == whole
    lines = (world / "probe" / "metrics.jsonl").read_text()
    assert lines == (world / "whole" / "metrics.jsonl").read_text()
    recorded = (world / "probe" / "args.json").read_text()
    with pytest.raises(UserError, match="flags, training clips or their classes have changed"):
        run(world, *flags, "--resume", "--seed", "1")
    assert run(world, *flags, "--resume") == whole
    # neither a refused nor a finished run replaces the flags that the run was trained with
    assert (world / "probe" / "args.json").read_text() == recorded
    (world / "probe" / "last.pt").write_bytes(b"damaged")
    assert run(world, *flags, "--resume") == whole  # from previous.pt
    assert "resuming after epoch 3" in capsys.readouterr().err
    assert lines == (world / "probe" / "metrics.jsonl").read_text()
    for name in ("last.pt", "previous.pt"):
        (world / "probe" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"last\.pt cannot be used"):  # best.pt is not replaced
        run(world, *flags, "--resume")


def test_actions_make_a_multi_label_probe(tmp_path):
    world = make_world(tmp_path, multi=True)
    result = run(
        world, *TRAINED, "--epochs", "25", "--submission", str(world / "new" / "submission.txt")
    )
    assert result["metrics"]["mAP"] > 0.9 > result["controls"]["majority"]["mAP"] + 0.2
    assert result["per_class"].keys() == {f"c00{c} Class {c}" for c in range(CLASSES)}

    # the submission, scored by an independent implementation of the official algorithm
    records = json.loads((world / "annotations" / "validation.json").read_text())
    lines = [line.split() for line in (world / "new" / "submission.txt").read_text().splitlines()]
    scores = {name: list(map(float, values)) for name, *values in lines}
    wanted = {
        r["id"]: [f"c00{c} Class {c}" in r["actions"] for c in range(CLASSES)] for r in records
    }
    assert official(scores, wanted) == pytest.approx(result["metrics"]["mAP_official"], abs=1e-6)


def test_an_action_without_training_clips_counts(tmp_path):
    """Its average precision was left out of the mAP, and the later columns of a submission moved by one."""
    world = make_world(tmp_path, multi=True)
    for split, gone in (("train", 1), ("validation", 0)):
        path = world / "annotations" / f"{split}.json"
        records = json.loads(path.read_text())
        for record in records:
            record["actions"] = [a for a in record["actions"] if a[:4] != f"c00{gone}"]
        write_json(path, records)
    result = run(
        world, *TRAINED, "--epochs", "1", "--submission", str(world / "new" / "submission.txt")
    )
    assert result["settings"]["unknown_classes"] == ["c001 Class 1"]
    wanted = {
        r["id"]: [f"c00{c} Class {c}" in r["actions"] for c in range(CLASSES)] for r in records
    }
    lines = map(str.split, (world / "new" / "submission.txt").read_text().splitlines())
    scores = {name: list(map(float, values)) for name, *values in lines}
    assert {values[1] for values in scores.values()} == {0}
    assert official(scores, wanted) == pytest.approx(result["metrics"]["mAP_official"], abs=1e-6)
    assert result["per_class"]["c001 Class 1"] == np.mean([w[1] for w in wanted.values()])
    assert result["per_class"]["c000 Class 0"] is None


def official(scores, wanted):
    """Charades' mean average precision: scores of videos without actions, or without scores, are dropped.

    scores: {video: one score per class}. wanted: {video: one bool per class}. A class without positives
    does not count. Of equal scores, none comes first.
    """
    precisions = []
    for c in range(len(next(iter(wanted.values())))):
        rows = []
        for video, labels in wanted.items():
            known = video in scores and any(labels)
            rows.append((scores[video][c] if known else -np.inf, labels[c]))
        at_least = [[p for s, p in rows if s >= score] for score, positive in rows if positive]
        precisions += [np.mean([np.mean(found) for found in at_least])] if at_least else []
    return np.mean(precisions)


def test_average_precision():
    rng = np.random.default_rng(0)
    scores, wanted = rng.normal(size=(40, 5)), rng.random((40, 5)) < 0.2
    wanted[:, 4] = False  # a class without positives
    wanted[:6] = False  # videos without actions
    found, per_class = class_scores.multi_label_scores(scores, wanted.astype(np.float32))
    by_name = {str(i): row for i, row in enumerate(scores)}
    labels = {str(i): row for i, row in enumerate(wanted)}
    assert found["mAP_official"] == pytest.approx(official(by_name, labels))
    # the quirk of the official algorithm can only help
    assert found["mAP"] < found["mAP_official"] and np.isnan(per_class[4])
    equal = np.round(scores)  # with ties, and with a video without scores
    equal[20] = -np.inf
    found, _ = heads.multi_label_scores(equal, wanted.astype(np.float32))
    by_name = {str(i): row for i, row in enumerate(equal) if i != 20}
    assert found["mAP_official"] == pytest.approx(official(by_name, labels))
    # clips of equal score: the order in which they are listed does not matter
    tied, positive = np.array([1.0, 1, 1, 0]), np.array([True, False, False, True])
    assert class_scores.average_precision(tied, positive) == class_scores.average_precision(
        tied, positive[[1, 0, 2, 3]]
    )
    assert class_scores.average_precision(tied, positive) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_ranks_count_equal_scores_against_the_probe():
    logits = np.array([[0.0, 0, 0], [3, 1, 2], [1, 2, 3]])
    assert class_scores.ranks(logits, np.array([0, 2, -1])).tolist() == [3, 2, 4]
    assert class_scores.ranks(np.full((1, 3), np.nan), np.array([0])).tolist() == [3]


def test_of_equal_scores_the_smaller_loss_decides():
    """The first of several epochs with the same held-out score was kept, although training went on."""
    state = SimpleNamespace(fixed={"classes": ["a", "b"], "multi": False})
    records = [{"id": i, "template": i, "actions": None} for i in "ab"]
    sure, unsure = ({"a": np.array([x, 0.0]), "b": np.array([0.0, x])} for x in (4.0, 1.0))
    wrong = {"a": np.array([4.0, 0.0]), "b": np.array([1.0, 0.0])}
    qualities = [probe.quality(state, records, logits) for logits in (wrong, unsure, sure)]
    assert sorted(qualities) == qualities and qualities[1][0] == qualities[2][0] == 1


def test_heads_that_diverge_are_not_chosen(world):
    """A head whose logits are NaN could be chosen by chance, and its score was NaN in a JSON file."""
    flags = *TRAINED, "--epochs", "1"
    with pytest.raises(UserError, match="all heads has diverged"):
        run(world, *flags, "--lr", "1e30")
    result = run(world, *flags, "--lr", "1e30", "0.01")
    assert result["settings"]["chosen"]["lr"] == 0.01
    (line,) = (world / "probe" / "metrics.jsonl").read_text().splitlines()
    assert [head["held_out"] is None for head in json.loads(line)["heads"]] == [True, False]


def test_flags_of_the_training_are_refused_when_a_probe_is_scored(capsys):
    """`--evaluate results/probe --head mlp` scored the attentive probe, and said nothing."""
    for flags in (["--evaluate", "a", "--head", "mlp"], ["--published", "--lr", "1"]):
        with pytest.raises(SystemExit):
            probe.parse_args(flags)
        assert f"{flags[-2]} cannot be used with" in capsys.readouterr().err


def test_scores_of_some_clips_do_not_replace_those_of_all(world):
    """--evaluate --limit replaced the scores of the split, and ignored --output."""
    whole = run(world, *TRAINED, "--epochs", "1")
    args = ["--features", world / "features", "--annotations", world / "annotations"]
    args += ["--evaluate", world / "probe", "--workers", "0", "--device", "cpu"]
    assert not probe.main([*map(str, args), "--limit", "4"])
    found = json.loads((world / "probe" / "evaluation_validation_first4.json").read_text())
    assert found["n"] == 4
    assert json.loads((world / "probe" / "evaluation_validation.json").read_text()) == whole
    assert not probe.main([*map(str, args), "--output", str(world / "other")])
    assert (world / "other" / "evaluation_validation.json").is_file()


def test_windows_with_one_action_each_are_not_combined():
    """Of the spans of one file only the first one's template counted, for the maximum of all scores."""
    records = [{"id": i, "video": "a", "template": i, "actions": None} for i in "xy"]
    logits = {"x": np.array([2.0, 0]), "y": np.array([0.0, 3])}
    scores, _ = heads.score(records, logits, ["x", "y"], multi=False)
    assert scores["top1"] == 1


def test_windows_of_a_video_are_combined():
    records = [{"id": i, "video": v} for i, v in (("a1", "a"), ("b1", "b"), ("a2", "a"))]
    logits = {"a1": np.array([1.0, 0]), "a2": np.array([0.0, 4]), "b1": np.array([7.0, 7])}
    found = {v: value.tolist() for v, _, value in heads.by_video(records, logits)}
    assert found == {"a": [1, 4], "b": [7, 7]}
    found = {v: value.tolist() for v, _, value in heads.by_video(records, logits, "mean")}
    assert found == {"a": [0.5, 2], "b": [7, 7]}
    train, held_out = probe.hold_out(records, 0)
    assert {r["video"] for r in train}.isdisjoint({r["video"] for r in held_out})


def test_the_published_head_gives_its_own_logits(tmp_path, capsys):
    from transformers import VJEPA2Config, VJEPA2ForVideoClassification

    torch.manual_seed(0)
    names = {0: "Moving something up", 1: "Moving something down", 2: "Folding something"}
    config = VJEPA2Config(
        crop_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_pooler_layers=3,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        id2label=names,
        label2id={v: k for k, v in names.items()},
        initializer_range=0.2,
    )
    model = VJEPA2ForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    encoder = VideoEncoder.from_pretrained(
        str(tmp_path / "model"),
        *(torch.device("cpu"), torch.float32, 4, "bin_centres", "squash", 1, "int8"),
    )
    manifest = Manifest(encoder.settings, {"encoder": str(tmp_path / "model")})
    _, head = published_head.published(str(tmp_path / "model"), manifest, torch.device("cpu"))
    for change in ({"pool": 2}, {"sampling": "still"}):
        other = Manifest(replace(encoder.settings, **change), manifest.info)
        with pytest.raises(UserError, match="without --pool and --still"):
            published_head.published(str(tmp_path / "model"), other, torch.device("cpu"))
    clip = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    x = encoder.encode([clip])["features"]
    pixels = probe_pixels(clip)
    with torch.inference_mode():
        # loaded, because the place of weights in memory can change the last bit of a result
        model = VJEPA2ForVideoClassification.from_pretrained(tmp_path / "model")
        want = model(pixel_values_videos=pixels).logits
        assert torch.equal(head(x, torch.ones(1, 48), torch.zeros(1, 48)), want)
        stored = quantise(x)
        through_int8 = head(stored["features"], stored["scale"], stored["offset"])
    assert (through_int8 - want).abs().max() < 0.02 * want.std()
    (tmp_path / "features" / "validation").mkdir(parents=True)
    write_json(tmp_path / "features" / "manifest.json", manifest.as_dict())
    (record,) = encoder.stored([clip])
    save_features(tmp_path / "features" / "validation" / "a.pt", "a", record, "pyav")
    template = "Folding [something]"
    (tmp_path / "annotations").mkdir()
    write_json(tmp_path / "annotations" / "validation.json", [{"id": "a", "template": template}])
    args = ["--features", tmp_path / "features", "--annotations", tmp_path / "annotations"]
    args += ["--published", tmp_path / "model", "--output", tmp_path / "out", "--workers", "0"]
    probe.main([*map(str, args), "--device", "cpu"])
    result = json.loads((tmp_path / "out" / "evaluation_validation_published.json").read_text())
    assert result["metrics"]["top1"] == float(want.argmax() == 2)
    assert "WARNING" not in capsys.readouterr().err

    # names that differ between the data and the head would only look like a low score
    write_json(tmp_path / "annotations" / "validation.json", [{"id": "a", "template": "Folds"}])
    probe.main([*map(str, args), "--device", "cpu"])
    assert "does not know 1 class of these clips: Folds" in capsys.readouterr().err

    # another encoder's cache is refused, unless its weights are the same tensors
    config.crop_size = 128
    model.vjepa2.save_pretrained(tmp_path / "alone")
    alone = VideoEncoder.from_pretrained(
        str(tmp_path / "alone"),
        *(torch.device("cpu"), torch.float32, 4, "bin_centres", "squash", 1, "int8"),
    )
    manifest = Manifest(alone.settings, {"encoder": str(tmp_path / "alone")})
    published_head.published(str(tmp_path / "model"), manifest, torch.device("cpu"))
    with torch.no_grad():
        model.vjepa2.encoder.layernorm.bias += 1
    model.vjepa2.save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match="made with another encoder"):
        published_head.published(str(tmp_path / "model"), manifest, torch.device("cpu"))


def probe_pixels(clip):
    from encoder import transform

    return transform(torch.as_tensor(clip), 64, "squash")[None]


def test_files_that_are_not_probes_are_refused(world):
    run(world, *TRAINED[:2], "--epochs", "1")
    value = torch.load(world / "probe" / "best.pt", weights_only=True)
    names, weights = value["classes"], dict(value["weights"])
    weights["mean"] = torch.full_like(weights["mean"], float("nan"))
    changes = [{"sizes": {}}, {"classes": ["a"]}, {"probe_version": 2}, {"weights": {}}]
    changes += [{"classes": ["\x1b[2J", *names[1:]]}, {"classes": [names[0]] * len(names)}]
    changes += [{"weights": weights}, {"chosen": {"lr": torch.zeros(1)}}]
    for change in changes:
        torch.save(value | change, world / "other.pt")
        with pytest.raises(UserError, match="not a valid probe"):
            heads.read_probe(world / "other.pt", "--probe")
    with pytest.raises(UserError, match="does not exist: train a probe"):
        heads.read_probe(world / "nothing.pt", "--probe")
