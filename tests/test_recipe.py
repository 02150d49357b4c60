"""The effect of train.py's flags on its steps. Other tests would pass if a flag were ignored."""

import json

import pytest
import torch
from conftest import train_flags

import captioner
import dataset
import train
from captioner import VideoCaptioner
from dataset import by_hash
from runtime import devices
from runtime.feature_cache import load_features, load_manifest

STEPS, STATISTICS = 5, 20
FLAGS = ["--batch-size", 4, "--grad-accum", 2, "--limit", 40, "--epochs", 1, "--eval-clips", 10]
FLAGS += ["--lr", 1e-3, "--warmup-steps", 2, "--weight-decay", 0.07, "--clip-grad", 0.05]


class Spied(Exception):
    """Ends the run after its first evaluation, since these tests do not need the final scores."""


@pytest.fixture(scope="module")
def spied(world, prepared, tmp_path_factory):
    """(run folder, values seen in each step, the optimizer's groups in each step) of a run with FLAGS."""
    output = tmp_path_factory.mktemp("runs") / "spied"
    steps, groups, accumulate = [], [], train.accumulate

    class Spy(torch.optim.AdamW):
        def step(self):
            rows = [p for group in self.param_groups for p in group["params"]]
            steps[-1]["clipped"] = {id(p): p.grad.clone() for p in rows}
            groups.append(
                [(g["lr"], g["weight_decay"], len(g["params"])) for g in self.param_groups]
            )
            return super().step()

    def spy(model, window, seed):
        window = list(window)
        if not steps:
            # the same micro-batches under two seeds, before the step itself
            losses = [accumulate(model, window, s)[0] for s in (1, 2, 1)]
            model.zero_grad(set_to_none=True)
            q = model.qformer
            at_start = {"losses": losses, "training": model.training, "mean": q.mean.clone()}
            at_start |= {"std": q.std.clone(), "norm": q.gain.norm().item()}
            at_start["embeddings"] = captioner.embedding_table(model.lm).norm(dim=1).mean().item()
        found = accumulate(model, window, seed)
        tokens = sum(len(batch["targets"]) for batch in window)
        grads = {id(p): p.grad.clone() for p in model.qformer.parameters()}
        steps.append(
            {"seed": seed, "tokens": tokens, "summed": grads} | (at_start if not steps else {})
        )
        return found

    def finish(*_, **__):
        raise Spied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        patch.setattr(train, "accumulate", spy)
        patch.setattr(train, "finish", finish)
        patch.setattr(dataset, "STATISTICS_CLIPS", STATISTICS)
        with pytest.raises(Spied):
            train.main(train_flags(world, prepared, output, *FLAGS, "--dropout", 0.5))
    return output, steps, groups


def test_learning_rate_and_weight_decay_follow_the_flags(spied):
    """Linear warm-up to --lr over --warmup-steps, then a cosine. Weight decay on one of two groups."""
    _, _, groups = spied
    rates = [1e-3 * share for share in (0.5, 1, 1, 0.75, 0.25)]
    for rate, ((lr, decay, _), (other_lr, no_decay, _)) in zip(rates, groups, strict=True):
        assert lr == other_lr == pytest.approx(rate)
        assert (decay, no_decay) == (0.07, 0)


def test_the_gradient_is_the_clipped_mean_over_tokens(spied):
    output, steps, _ = spied
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for step, line in zip(steps, lines, strict=True):
        mean = {k: g / step["tokens"] for k, g in step["summed"].items()}
        norm = torch.stack([g.norm() for g in mean.values()]).norm().item()
        assert norm > 0.05 and line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for k, grad in step["clipped"].items():
            torch.testing.assert_close(grad, mean[k] * 0.05 / norm, rtol=1e-3, atol=1e-8)


def test_dropout_is_active_and_differs_between_steps(spied):
    _, steps, _ = spied
    first, other, again = steps[0]["losses"]
    assert steps[0]["training"] and first == again != other
    assert len({step["seed"] for step in steps}) == STEPS


def test_the_model_starts_with_the_features_statistics_and_the_embeddings_norm(spied, prepared):
    _, steps, _ = spied
    settings = load_manifest(prepared / "features").settings
    records = json.loads((prepared / "annotations" / "train.json").read_text())[:40]
    rows = []
    for clip in by_hash((r["id"] for r in records), 0)[:STATISTICS]:
        x = load_features(prepared / "features" / "train" / f"{clip}.pt", clip, settings)
        rows.append(x["features"] * x["scale"] + x["offset"])
    rows = torch.cat(rows)
    torch.testing.assert_close(steps[0]["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps[0]["std"], rows.std(0, correction=0), rtol=1e-4, atol=1e-5)
    assert steps[0]["norm"] == pytest.approx(steps[0]["embeddings"], rel=1e-5) != 1


def test_the_clips_scored_each_epoch_are_a_seeded_sample(spied, prepared):
    output, _, _ = spied
    samples = json.loads((output / "validation_epoch_1.json").read_text())["samples"]
    ids = [r["id"] for r in json.loads((prepared / "annotations" / "validation.json").read_text())]
    chosen = {r["id"] for r in samples}
    assert chosen == set(by_hash(ids[:40], 0)[:10]) != set(ids[:10])


def test_a_gpu_trains_in_bfloat16(gpu, make_qformer, lm, tokenizer, make_clips):
    """float16 overflows at 65,504."""
    model = VideoCaptioner(make_qformer(), lm, tokenizer)
    large = torch.full((1, 1), 300.0)
    with devices.autocast(model.device):
        assert (large @ large).dtype == torch.bfloat16 and (large @ large).isfinite().all()
    gpu.set_device(0)
    with torch.no_grad():
        model.qformer.blocks[0].mlp[0].weight *= 1e4
    assert model.soft_prompts(*make_clips(2)).isfinite().all()
