"""The training runs on the tabletop world: worlds/tabletop_demo.py and bench/tabletop.py."""

from runtime.start import ROOT

import importlib
import json
import math
import shlex
import statistics

import encoders
import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import train
from bench import free_prompts, tabletop, tabletop_table
from bench.ablation_changes import changed
from captioner import VideoCaptioner
from encoder import transform
from runtime.errors import UserError
from worlds import tabletop_demo


@pytest.fixture
def commands(monkeypatch):
    """Record the command lines of the demo instead of running them."""
    lines = []
    monkeypatch.setattr(tabletop_demo, "shell", lines.append)
    return lines


def write_result(folder, split, cider=1.0):
    scores = {"CIDEr": cider, "template_accuracy": 0.5, "exact_match": 0.25}
    controls = {"shuffled": {"CIDEr": 0.1}, "most_frequent": {"CIDEr": 0.2}}
    value = {"n": 3, "metrics": scores, "controls": controls}
    (folder / f"evaluation_{split}.json").write_text(json.dumps(value))


def test_each_script_accepts_its_flags_and_finished_parts_are_kept(commands, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "probe").mkdir(parents=True)
    (run / "probe" / "evaluation_validation.json").write_text('{"metrics": {"top1": 0.75}}')
    (run / "args.json").write_text(
        json.dumps({"trainable_parameters": 7, "clips": 9, "args": {"seed": 0}})
    )
    (run / "best.pt").touch()
    for split in (*tabletop_demo.SPLITS, tabletop_demo.STILL):
        write_result(run, split)
    tabletop_demo.main(["--output", str(run), "--data", "a b", "--dtype", "float32"])
    names = [line.split()[0] for line in commands]
    assert "evaluate.py" not in names  # all splits were scored after the training
    for line in commands:
        name, *flags = shlex.split(line.removeprefix("-m "))
        importlib.import_module(name.removesuffix(".py")).parse_args(flags)
        assert ("--resume" in flags) == (name in ("train.py", "probe.py"))
    assert json.loads((run / "summary.json").read_text())["scores"]["validation"]["CIDEr"] == 1
    printed = capsys.readouterr().out
    assert "clips never seen" in printed and printed.split("features")[1].split()[0] == "0.75"

    # an impossible output is noticed before the models are fetched
    commands.clear()
    with pytest.raises(UserError, match="is a file, not a folder"):
        tabletop_demo.main(["--output", str(run / "args.json")])
    assert not commands

    # a new checkpoint is scored again
    (run / "best.pt").unlink()
    (run / "best.pt").touch()
    commands.clear()
    tabletop_demo.main(["--output", str(run), "--dtype", "float32"])
    scored = [shlex.split(line) for line in commands if line.startswith("evaluate.py")]
    assert len(scored) == len(tabletop_demo.SPLITS) + 1
    for _, *flags in scored:
        importlib.import_module("evaluate").parse_args(flags)


def test_the_flags_of_every_row_are_valid(tmp_path):
    study = tabletop.make_study(tmp_path / "data", tmp_path / "models", tmp_path / "runs")
    base = vars(train.parse_args(study.training("base", 0)))
    for name, row in tabletop.ROWS.items():
        flags = vars(train.parse_args(study.training(name, 0)))
        differs = {key for key in base if flags[key] != base[key]} - {"output", "warmup_steps"}
        assert bool(differs) != bool(row.change) or name in ("base", "k2_per_caption"), name


def test_captions_weigh_the_same(monkeypatch):
    """A caption of three tokens and one of a single token have the same sum, and the mean is unchanged."""
    model = VideoCaptioner.__new__(VideoCaptioner)
    nn.Module.__init__(model)
    model.train = lambda mode: None
    text = {"input_ids": torch.zeros(2, 5), "positions": torch.tensor([1, 2, 3, 5])}
    monkeypatch.setattr(VideoCaptioner, "loss", lambda *_: torch.ones(4))
    model.training = True
    with changed("per_caption"):
        weights = model.loss(None, text)
        assert weights[:3].sum() == pytest.approx(2) and weights[3] == 2
        model.training = False
        assert model.loss(None, text).tolist() == [1] * 4


def test_only_the_order_of_the_layers_is_shuffled(tmp_path):
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=6, num_attention_heads=2
    )
    source = tmp_path / "lm"
    torch.manual_seed(1)  # `make_folder` uses 0
    LlamaForCausalLM(config).save_pretrained(source)
    tabletop.make_folder(tmp_path / "shuffled", source, tabletop.shuffled_lm)
    tabletop.make_folder(tmp_path / "random", source, tabletop.random_lm)
    one, other, third = (
        LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("lm", "shuffled", "random")
    )

    def layers(weights):
        return [weights[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(6)]

    def places(weights):
        return [
            next((i for i, w in enumerate(layers(one)) if w.equal(x)), -1) for x in layers(weights)
        ]

    assert sorted(places(other)) == list(range(6)) != places(other)
    assert one["lm_head.weight"].equal(other["lm_head.weight"])
    assert places(third) == [-1] * 6


def test_the_features_of_a_random_encoder_do_not_vanish(tmp_path):
    """With the statistics that a new MobileNetV2 has, those of its last layers were 1e-19."""
    encoders.save("mobilenet_v2", tmp_path)
    frames = list(np.random.default_rng(0).integers(0, 256, (4, 120, 160, 3), dtype=np.uint8))
    model = tabletop.random_encoder(tmp_path, frames)
    pixels = transform(torch.as_tensor(np.stack(frames)), 160, "squash")
    with torch.no_grad():
        maps = model(pixels, output_hidden_states=True).hidden_states
    assert all(0.1 < x.std() < 10 for x in maps)


def test_the_figures_of_a_run_are_those_of_its_last_epoch_and_all_splits(tmp_path):
    for cider, split in enumerate(tabletop_demo.SPLITS, 1):
        write_result(tmp_path, split, cider)
    for epoch in (1, 2, 10):
        value = {"step": 7 * epoch, "loss": 1 / epoch}
        (tmp_path / f"validation_epoch_{epoch}.json").write_text(json.dumps(value))
    (tmp_path / "args.json").write_text('{"trainable_parameters": 7}')
    found = tabletop.figures(tmp_path, 1.5)
    scores = [(s["CIDEr"], s["shuffled"]) for s in found["scores"].values()]
    assert scores == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1)]
    assert found["losses"] == [1, 0.5, 0.1] and found["steps"] == 70


def test_the_table_has_a_row_for_each_kind_of_run():
    scores = dict.fromkeys(("CIDEr", "template_accuracy", "placeholder_match", "exact_match"), 0.5)
    scores = dict.fromkeys(tabletop_demo.SPLITS, scores | {"shuffled": 0.1})
    run = {"seed": 0, "scores": scores, "steps": 315, "losses": [2.0, 1.0], "device": "cpu"}
    rows = {"base": {"text": "the base", "runs": [run, run]}, "a": {"text": "other", "runs": [run]}}
    facts = {"clips": 10, "lr": 1e-3, "versions": {"torch": "2", "transformers": "5"}}
    demos = [
        {
            "scores": dict.fromkeys(
                (*tabletop_demo.SPLITS, tabletop_demo.STILL), dict.fromkeys(tabletop_demo.SCORES, x)
            ),
            "controls": {"shuffled": 0.25, "most_frequent": 0.125},
            "probe": x,
        }
        for x in (0.5, 1.0)
    ]
    free = {"steps": 60, "exact_match": 0.5, "n": 64, "num_queries": 16, "loss": 0.01}
    text = tabletop_table.markdown(facts | {"rows": rows}, demos, free)
    assert "| clips never seen | 0.75 (0.50 – 1.00) |" in text and "writes 50% of 64 labels" in text
    assert (
        "| the base | 0.50 ± 0.00 | 0.500 ± 0.000 |" in text and "| other | 0.50 | 0.500 |" in text
    )
    assert text.count("| 1.000 | 315 | 1 | cpu |") == 1


def test_free_prompts_steer_a_frozen_model(lm, tokenizer, make_qformer):
    model = VideoCaptioner(make_qformer(), lm, tokenizer)
    before = [p.clone() for p in lm.parameters()]
    texts, loss = free_prompts.steer(model, ["ab", "cd e"], 8, 60)
    assert texts == ["ab", "cd e"] and loss < 0.5
    assert all(p.equal(old) for p, old in zip(lm.parameters(), before, strict=True))


def test_the_table_in_the_docs_is_that_of_the_receipt():
    summary = json.loads((ROOT / "results" / "tabletop_seed0.json").read_text())
    text = (ROOT / "docs" / "tabletop.md").read_text()
    assert tabletop_demo.table(summary) in text
    assert f"recognises {summary['probe']:.0%}".replace("%", " %") in text


def test_the_page_of_results_matches_the_committed_results():
    results = ROOT / "results"
    runs = json.loads((results / "tabletop_runs.json").read_text())
    text = tabletop_table.markdown(runs, *tabletop.other_results(results))
    assert (results / "tabletop.md").read_text() == text


def test_the_docs_quote_the_committed_runs():
    """The figures of docs/tabletop.md are those of results/tabletop_runs.json and of the seeds."""
    rows = json.loads((ROOT / "results" / "tabletop_runs.json").read_text())["rows"]
    scores = {
        name: [run["scores"]["validation"]["CIDEr"] for run in row["runs"]]
        for name, row in rows.items()
    }
    mean = {name: statistics.fmean(values) for name, values in scores.items()}
    text = " ".join((ROOT / "docs" / "tabletop.md").read_text().split())
    assert (
        f"CIDEr {mean['base']:.2f} ± {statistics.stdev(scores['base']):.2f} (three seeds)" in text
    )
    for name, quoted in {
        "lm_random": "worthless ({:.2f})",
        "lm_shuffled": "random order, the score is {:.2f}.",
        "encoder_random": "hardly better ({:.2f})",
        "lr_3e-4": "3e-4 ({:.2f})",
        "lr_6e-4": "6e-4 ({:.2f})",
        "lr_2e-3": "2e-3 scores {:.2f}",
        "no_gain": "the norm of a LayerNorm ({:.2f})",
        "k2": "does no measurable harm ({:.2f} with K = 2)",
        "k2_passes3": "three passes of K = 2 score {:.2f}",
        "k4_passes2": "two of K = 4 score {:.2f}",
        "k2_per_caption": "({:.2f} with K = 2 and three passes)",
        "queries8": "and the score {:.2f}",
        "queries64": "64 queries ({:.2f})",
        "blocks2": "a second block ({:.2f})",
        "no_positions": "and the score is {:.2f}.",
        "eot_in_front": "no measurable difference ({:.2f})",
        "no_standardisation": "the features as they are ({:.2f})",
    }.items():
        assert quoted.format(mean[name]) in text, name
    right, wrong = (
        [run["scores"]["validation"]["template_accuracy"] for run in rows[name]["runs"]]
        for name in ("base", "no_positions")
    )
    right = f"{100 * statistics.fmean(right):.0f} ± {100 * statistics.stdev(right):.0f}"
    assert f"{100 * wrong[0]:.0f} % of the templates are right instead of {right} %" in text
    # rows on a CPU were compared with the base on a GPU, which is better by 0.4
    assert {run["device"] for row in rows.values() for run in row["runs"]} == {"cpu"}
    losses = [run["losses"][-1] for run in rows["base"]["runs"]]
    loss = f"{statistics.fmean(losses):.2f} ± {statistics.stdev(losses):.2f}"
    base = f"{mean['base']:.2f} ± {statistics.stdev(scores['base']):.2f}"
    speed = (ROOT / "docs" / "speed.md").read_text()
    assert loss in text and f"{base} on the tabletop world" in speed and loss in speed
    # the 97.5th percentile of the t distribution with two degrees of freedom; one run against three
    apart, apart_loss = (
        4.303 * statistics.stdev(x) * math.sqrt(1 + 1 / 3) for x in (scores["base"], losses)
    )
    assert f"CIDEr is {apart:.1f} higher or lower, or its validation loss {apart_loss:.2f}" in text
    summaries = [
        json.loads((ROOT / "results" / f"tabletop_seed{seed}.json").read_text())
        for seed in range(3)
    ]
    best = sorted(summary["scores"]["validation"]["CIDEr"] for summary in summaries)
    assert f"never seen is {best[0]:.2f} to {best[-1]:.2f}." in text
    exact = statistics.fmean(s["scores"]["validation"]["exact_match"] for s in summaries)
    assert f"{exact:.0%}".replace("%", " % are right word for word") in text
    still = [summary["scores"]["validation_still"] for summary in summaries]
    objects, templates = (
        f"{statistics.fmean(s[key] for s in still):.0%}".replace("%", " %")
        for key in ("placeholder_match", "template_accuracy")
    )
    assert f"name {objects} of the objects, but only {templates} of the templates" in text
    assert f"[{exact:.0%} of all]".replace("%", " %") in (ROOT / "README.md").read_text()
    shapes = json.loads((ROOT / "results" / "shapes_smollm2.json").read_text())["scores"]
    assert f"reach a CIDEr of {shapes['validation']['CIDEr']:.2f}," in text
    assert f"first frame alone, {shapes['validation_still']['CIDEr']:.2f} and" in text
    kinds = json.loads((ROOT / "results" / "tabletop_mistakes.json").read_text())["kinds"]
    shares = {kind: f"- {count / sum(kinds.values()):.0%}" for kind, count in kinds.items()}
    for kind, quoted in {
        "objects": " have the right template",
        "template": " name only objects of the reference",
        "both": " have a wrong template and a wrong object",
        "none": " follow no template",
    }.items():
        assert shares[kind].replace("%", " %") + quoted in text, kind


def test_a_missing_result_of_another_command_is_noticed_before_the_runs(tmp_path):
    """Without a summary of `make tabletop`, the page failed after hours of runs."""
    with pytest.raises(UserError, match=r"bench\.free_prompts"):
        tabletop.other_results(tmp_path)
    (tmp_path / "free_prompts.json").write_text('{"n": 1}')
    with pytest.raises(UserError, match="make tabletop"):
        tabletop.other_results(tmp_path)
    for seed in (1, 0):
        (tmp_path / f"tabletop_seed{seed}.json").write_text(f'{{"seed": {seed}}}')
    assert tabletop.other_results(tmp_path) == ([{"seed": 0}, {"seed": 1}], {"n": 1})


def test_a_single_run_names_the_command_that_makes_its_inputs(tmp_path):
    """`--row lm_random` said that the folder of the random model is no Hub id."""
    for folder in ("annotations", "features", "smollm2"):
        (tmp_path / folder).mkdir()
    flags = ["--data", str(tmp_path), "--pretrained", str(tmp_path), "--row", "lm_random"]
    with pytest.raises(UserError, match=r"smollm2_random. Run python -m bench.tabletop"):
        tabletop.main(flags)
