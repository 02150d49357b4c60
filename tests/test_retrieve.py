"""The retriever: loss, ranks, lists, training with micro-batches, exact resume, search and mistakes."""

import json
import math
import re
import shutil
import signal
from copy import deepcopy

import numpy as np
import pytest
import torch
from pages import ROOT
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config, T5Model

import heads
import retrieve
from dataset import choose_captions, load_records
from research import retrieval_report
from runtime import text_vectors
from runtime.errors import UserError
from runtime.files import read_torch, torch_bytes, write_json
from runtime.retrieval_scores import Pairs, rank, ranks, summary

SIZES = {"video_width": 24, "grid": [4, 3, 5], "num_queries": 2, "num_heads": 2, "dropout": 0.0}


# ---- loss and ranks -------------------------------------------------------------------------


def test_the_loss_is_that_of_a_textbook_double_loop():
    """Clips with equal captions are positives of each other, in both directions."""
    rng = torch.Generator().manual_seed(0)
    clips, texts = (
        heads.unit(torch.randn(6, 5, generator=rng, dtype=torch.float64)) for _ in range(2)
    )
    captions, scale = ["a", "b", "a", "c", "a", "b"], 9.0

    def one_way(queries, items):
        total = 0.0
        for i in range(6):
            exponentials = [math.exp(scale * (queries[i] @ items[j]).item()) for j in range(6)]
            logs = [math.log(e / sum(exponentials)) for e in exponentials]
            own = [logs[j] for j in range(6) if captions[j] == captions[i]]
            total -= sum(own) / len(own)
        return total / 6

    right = torch.tensor([[a == b for b in captions] for a in captions])
    found = heads.contrastive_loss(clips, texts, right, scale)
    wanted = (one_way(clips, texts) + one_way(texts, clips)) / 2
    assert found.item() == pytest.approx(wanted, abs=1e-12)
    alone = heads.contrastive_loss(clips, texts, torch.eye(6, dtype=torch.bool), scale)
    logits, own = scale * clips @ texts.T, torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    clip = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    assert alone.item() == pytest.approx(clip.item(), abs=1e-12) != found.item()


def test_equal_scores_count_against_the_query():
    scores = np.array([[3.0, 1, 2, 3], [1, 1, 1, 1], [5, 4, 9, 1], [1, np.nan, 0, 0]])
    right = np.zeros((4, 4), bool)
    right[[0, 1, 2, 3], [0, 3, 1, 0]] = True
    assert rank(scores, right).tolist() == [2, 4, 3, 2]
    right[2, 2] = True  # of several right clips, the best counts and the other is ignored
    assert rank(scores, right)[2] == 1
    assert rank(np.array([[np.nan, 1, 0]]), np.array([[True, False, False]])).tolist() == [3]
    assert summary(np.array([1, 2, 6, 11])) == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75} | {
        "median_rank": 4.0
    }


def test_ranks_are_the_same_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    queries, items = rng.normal(size=(9, 4)), rng.normal(size=(30, 4))
    right = [sorted({n, 2 * n}) for n in range(9)]
    wanted = [
        1 + (items @ q > (items @ q)[r].max()).sum() for q, r in zip(queries, right, strict=True)
    ]
    monkeypatch.setattr("runtime.retrieval_scores.BLOCK", 4)
    assert ranks(queries, items, right).tolist() == wanted


def test_public_lists_are_read(tmp_path):
    """SSv2-label has one clip per caption, SSv2-template several, of which the best rank counts."""
    records = [{"id": str(n), "video": f"{n}.webm", "label": "x"} for n in range(5)]
    path = tmp_path / "ssv2_ret_template_val_small.json"
    entries = [{"image": ["3.webm", "1.webm"], "caption": "Folding [something]"}]
    entries += [
        {"image": "a/0.webm", "caption": "Moving it"},
        {"image": "4", "caption": "Moving it"},
    ]
    write_json(path, entries)
    pairs = Pairs.of_list(path, records)
    assert [r["id"] for r in pairs.records] == ["3", "1", "0", "4"]
    assert pairs.texts == ["Folding something", "Moving it"] and pairs.right == [[0, 1], [2, 3]]
    clips, texts = np.eye(4), np.array([[0.5, 0.9, 0.7, 0], [0, 0.9, 0.8, 0]])
    found = pairs.ranks(clips, texts)
    assert found["text_to_video"].tolist() == [1, 2]
    assert found["video_to_text"].tolist() == [1, 2, 1, 2]  # clip 4 has equal scores

    write_json(path, [*entries, {"image": ["8.webm"], "caption": "x"}])
    with pytest.raises(UserError, match=r"1 clip not in the split, or without features: 8\.webm"):
        Pairs.of_list(path, records)
    for wrong in ({}, [], ["a"], [{"image": "0"}], [{"image": [], "caption": "x"}]):
        write_json(path, wrong)
        with pytest.raises(UserError, match="must be a JSON list of"):
            Pairs.of_list(path, records)


# ---- training -------------------------------------------------------------------------------


def test_micro_batches_do_not_change_the_gradient(make_clips):
    """The loss compares all clips of a batch, whatever the size of the micro-batches."""
    torch.manual_seed(0)
    tower = heads.Retriever(width=8, text_width=6, temperature=0.07, **SIZES).double()
    clips, vectors = make_clips(10), torch.randn(10, 6, dtype=torch.float64)
    right = torch.eye(10, dtype=torch.bool)
    right[2, 7] = right[7, 2] = True
    found = {}
    for size in (10, 4, 3):  # the last micro-batch is smaller
        other = deepcopy(tower)
        state = retrieve.HeadRun([other], torch.optim.SGD(other.parameters(), 0.1), {}, {}, "")
        names = ("features", "scale", "offset")
        parts = zip(*(t.split(size) for t in clips), strict=True)
        batch = [dict(zip(names, (f, s.double(), o.double()), strict=True)) for f, s, o in parts]
        loss = retrieve.step(state, batch, (vectors, right), seed=0)
        found[size] = loss, deepcopy(other.state_dict())
        assert retrieve.step(state, batch, (vectors, right), seed=0) < loss
    for size in (4, 3):
        assert found[size][0] == pytest.approx(found[10][0], abs=1e-12)
        for name, weight in found[10][1].items():
            assert torch.allclose(found[size][1][name], weight, rtol=0, atol=1e-10), name
    changed = [n for n, w in tower.state_dict().items() if not torch.equal(found[10][1][n], w)]
    assert {n.split(".")[0] for n in changed} == {"query", "clip", "text", "log_scale"}


def test_dropout_is_the_same_in_both_passes(make_clips, monkeypatch):
    """Each micro-batch has its own dropout masks, and the second pass repeats those of the first."""
    torch.manual_seed(0)
    tower = heads.Retriever(width=8, text_width=6, temperature=0.07, **SIZES | {"dropout": 0.5})
    parts = zip(*(t.split(4) for t in make_clips(8)), strict=True)
    batch = [dict(zip(("features", "scale", "offset"), p, strict=True)) for p in parts]
    captions, found, seeds = (torch.randn(8, 6), torch.eye(8, dtype=torch.bool)), [], []

    def without(embed, inputs, seed, **_):
        seeds.append(seed)
        return embed(inputs, seed)

    for patched in (retrieve.checkpoint, without):
        monkeypatch.setattr(retrieve, "checkpoint", patched)
        other = deepcopy(tower)
        state = retrieve.HeadRun([other], torch.optim.SGD(other.parameters(), 0.1), {}, {}, "")
        retrieve.step(state, batch, captions, seed=5)
        found.append(other.state_dict())
    assert seeds == [5, 6]
    for name, weight in found[0].items():
        assert torch.allclose(found[1][name], weight, rtol=0, atol=1e-6), name


def test_the_temperature_stays_above_its_minimum():
    tower = heads.Retriever(width=8, text_width=6, temperature=0.07, **SIZES)
    assert math.exp(-tower.log_scale.item()) == pytest.approx(0.07)
    tower.log_scale.data += 9
    tower.clamp_temperature()
    assert math.exp(-tower.log_scale.item()) == pytest.approx(0.01)


def test_captions_of_clips_with_the_same_label_are_right_for_both():
    records = [
        {"id": str(n), "label": label, "paraphrases": texts}
        for n, (label, texts) in enumerate(
            [("a", ["A.", "B."]), ("b", ["C."]), ("a", []), ("c", ["C."])]
        )
    ]
    texts = ["A.", "B.", "C.", "a", "b", "c"]
    captions = retrieve.Captions(texts, np.arange(6, dtype=np.float16)[:, None], paraphrases=True)
    for epoch in range(4):
        vectors, right = captions.sample(records, 0, epoch)
        chosen = [choose_captions(r, 1, 0, epoch)[0][1] for r in records]
        assert vectors[:, 0].tolist() == [texts.index(t) for t in chosen]
        assert right[0].tolist() == [True, False, True, False]
        assert right[1, 3].item() == (chosen[1] == chosen[3] == "C.") == right[3, 1].item()
    captions.paraphrases = False
    assert captions.sample(records, 0, 0)[0][:, 0].tolist() == [3, 4, 3, 5]


@pytest.fixture(scope="module")
def flags(world, prepared):
    cached = ["--features", prepared / "features", "--annotations", prepared / "annotations"]
    return [*map(str, cached), "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def training(world, flags):
    sizes = ["--width", "16", "--num-heads", "2", "--batch-size", "24", "--micro-batch", "8"]
    rates = ["--lr", "3e-3", "--warmup-steps", "2", "--epochs", "2"]
    return [*flags, "--lm", str(world / "lm"), *sizes, *rates]


@pytest.fixture(scope="module")
def run(training, tmp_path_factory):
    """A run folder: 2 epochs of 3 or 4 steps."""
    folder = tmp_path_factory.mktemp("retrieval") / "run"
    assert not retrieve.main([*training, "--output", str(folder)])
    return folder


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_results(run, prepared):
    names = {"args.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt"}
    assert names | {"evaluation_validation.json"} <= {p.name for p in run.iterdir()}
    log = entries(run)
    assert log[0]["loss"] > min(e["loss"] for e in log if "loss" in e)
    result = json.loads((run / "evaluation_validation.json").read_text())
    records = load_records(prepared / "annotations", "validation")
    assert result["n"] == {"clips": len(records), "texts": len({r["label"] for r in records})}
    assert set(result["controls"]) == {"shuffled", "untrained"}
    for way, scores in result["metrics"].items():
        low, high = result["ci95"][way]["R@5"]
        assert low <= scores["R@5"] <= high
    # the epoch is chosen on clips that are neither scored nor trained on
    held_out = [e["held_out"] for e in log if "held_out" in e]
    means = [np.mean([s[k] for s in e.values() for k in ("R@1", "R@5", "R@10")]) for e in held_out]
    assert result["settings"]["chosen"]["held_out"] == pytest.approx(max(means))


def test_a_run_that_is_stopped_in_an_epoch_continues_bit_for_bit(
    run, training, tmp_path, monkeypatch, capsys
):
    """Ctrl-C saves after the current step, in the middle of an epoch or after its last step."""
    before, step = {n: signal.getsignal(n) for n in retrieve.run_folder.SIGNALS}, retrieve.step
    per_epoch = next(n for n, e in enumerate(entries(run)) if "held_out" in e)
    stops = [2, per_epoch]

    def stop_there(state, *args):
        if stops and state.step + 1 == stops[0]:
            stops.pop(0)
            signal.raise_signal(signal.SIGTERM)
        return step(state, *args)

    monkeypatch.setattr(retrieve, "step", stop_there)
    flags = [*training, "--output", str(tmp_path / "run")]
    try:
        for number in (2, per_epoch):
            assert retrieve.main([*flags, "--resume"]) == 128 + signal.SIGTERM
            assert f"stopped after step {number}; use --resume" in capsys.readouterr().err
            for n, handler in before.items():
                signal.signal(n, handler)
        assert not retrieve.main([*flags, "--resume"])
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    for name in ("metrics.jsonl", "evaluation_validation.json"):
        assert (tmp_path / "run" / name).read_text() == (run / name).read_text()
    for name in ("last.pt", "best.pt"):
        assert_same(*(read_torch(folder / name) for folder in (tmp_path / "run", run)))
    recorded = (tmp_path / "run" / "args.json").read_text()
    with pytest.raises(UserError, match="flags, training clips, their captions or --lm have"):
        retrieve.main([*flags, "--resume", "--seed", "1"])
    assert (tmp_path / "run" / "args.json").read_text() == recorded


def assert_same(a, b):
    """Compare the contents of two checkpoints, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict | list | tuple):
        assert len(a) == len(b)
        for x, y in (
            zip(a.items(), b.items(), strict=True)
            if isinstance(a, dict)
            else zip(a, b, strict=True)
        ):
            assert_same(x, y)
    else:
        assert a == b


# ---- scoring and searching ------------------------------------------------------------------


def test_the_checkpoint_gives_the_same_scores_again(run, flags, tmp_path, capsys):
    score = ["--evaluate", "--checkpoint", str(run / "best.pt"), "--output", str(tmp_path)]
    assert not retrieve.main([*flags, *score])
    found = json.loads((tmp_path / "evaluation_validation.json").read_text())
    assert found == json.loads((run / "evaluation_validation.json").read_text())
    assert re.search(r"retriever +0\.\d", capsys.readouterr().out)
    write_json(tmp_path / "all.json", [{"image": "none.webm", "caption": "x"}])
    with pytest.raises(UserError, match="1 clip not in the split"):
        retrieve.main([*flags, *score, "--lists", str(tmp_path / "all.json")])
    with pytest.raises(UserError, match="has sampling = 'bin_centres', but"):
        retrieve.main([*flags, *score, "--control", "still"])


def test_search_finds_the_nearest_clips(run, world, prepared, flags, tmp_path, monkeypatch, capsys):
    """The vectors of the split are computed once, and again if the weights or clips have changed."""
    run = shutil.copytree(run, tmp_path / "run")
    records = load_records(prepared / "annotations", "validation")
    text = records[3]["label"]
    search = [*flags, "--checkpoint", str(run), "--top", "4", "--text", text]
    assert not retrieve.main(search)
    out = capsys.readouterr().out
    rows = [line.split("\t") for line in out.splitlines()]
    with np.load(run / "vectors_validation.npz") as file:
        clips, texts = file["clips"], file["texts"]
    distinct = list(dict.fromkeys(r["label"] for r in records))
    scores = clips @ texts[distinct.index(text)]
    best = np.argsort(-scores)[:4]
    assert [row[1] for row in rows] == [records[n]["id"] for n in best]
    assert [float(row[0]) for row in rows] == pytest.approx(scores[best], abs=2e-3)
    assert [row[2:] for row in rows] == [[records[n]["video"], records[n]["label"]] for n in best]

    with monkeypatch.context() as patch:
        patch.setattr(retrieve, "embed_clips", None)
        assert not retrieve.main(search)
        assert capsys.readouterr().out == out
    (run / "vectors_validation.npz").write_bytes(b"damaged")
    assert not retrieve.main(search)
    printed = capsys.readouterr()
    assert printed.out == out and "cannot be read and is written again" in printed.err

    value = read_torch(run / "best.pt")
    value["weights"]["clip.bias"] += 1
    (run / "best.pt").write_bytes(torch_bytes(value))
    assert not retrieve.main(search)
    printed = capsys.readouterr()
    assert printed.out != out and "is out of date and is written again" in printed.err

    video = world / "videos" / records[3]["video"]
    assert not retrieve.main([*search[:-2], "--query", str(video)])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["caption"] * 4 + ["clip"] * 4
    assert rows[4][2:4] == ["1.000", records[3]["id"]]  # the same file
    cut = run / "cut.webm"
    cut.write_bytes(video.read_bytes()[:-2000])
    assert not retrieve.main([*search[:-2], "--query", str(cut)])
    assert "cut.webm: the file is truncated" in capsys.readouterr().err  # it was not mentioned


def test_user_errors_are_reported_before_any_work(
    run, training, flags, world, prepared, tmp_path, capsys
):
    for wrong, why in (
        (["--evaluate", "--lr", "1"], "--lr can only be used for training"),
        (["--top", "3"], "--top needs --evaluate, --text or --query"),
        (["--text", "a", "--lists", "b"], "--lists needs --evaluate"),
        (["--text", " "], "--text is empty"),
        (["--micro-batch", "100"], "--micro-batch 100 does not divide --batch-size"),
        (["--width", "9"], "--num-heads 4 does not divide --width 9"),
    ):
        with pytest.raises(SystemExit):
            retrieve.parse_args(wrong)
        assert why in capsys.readouterr().err
    search = [*flags, "--text", "a"]
    with pytest.raises(UserError, match="does not exist: train a retriever with"):
        retrieve.main([*search, "--checkpoint", str(tmp_path)])
    value = torch.load(run / "best.pt", weights_only=True)
    weights = value["weights"] | {
        "text_mean": torch.full_like(value["weights"]["text_mean"], math.nan)
    }
    for change in ({"retriever_version": None}, {"sizes": {}}, {"lm": {}}, {"weights": weights}):
        torch.save(value | change, tmp_path / "best.pt")
        with pytest.raises(UserError, match="is not a valid retriever"):
            retrieve.main([*search, "--checkpoint", str(tmp_path)])
    with pytest.raises(UserError, match=r"has fingerprint .* but the retriever was trained with"):
        retrieve.main([*search, "--checkpoint", str(run), "--lm", str(world / "encoder")])
    with pytest.raises(UserError, match="already contains a run"):
        retrieve.main([*training, "--output", str(run)])
    write_json(tmp_path / "train.json", [{"id": "a", "label": None}])
    with pytest.raises(UserError, match=r"have no features|no clip with a caption"):
        retrieve.main([*training, "--annotations", str(tmp_path), "--output", str(tmp_path / "x")])


def test_text_vectors_are_means_over_the_tokens_and_are_kept(world, tmp_path, monkeypatch):
    """Neither padding nor the order of the texts changes a vector."""
    model = text_vectors.TextModel(str(world / "lm"), torch.device("cpu"), torch.float32)
    texts = ["moving red bar over to the left side", "cross", "lowering a cyan pole slowly"]
    vectors = text_vectors.of_texts(texts, model, tmp_path)
    network, tokenizer = model.load()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            states = network(**tokenizer(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(vector, states[0].mean(0).numpy(), atol=2e-2)
    assert not list(tmp_path.glob("[!.]*")), "a visible file would count as a run"
    with monkeypatch.context() as patch:
        patch.setattr(text_vectors, "write", None)
        assert np.array_equal(text_vectors.of_texts(texts, model, tmp_path), vectors)
    assert len(text_vectors.of_texts(texts[:2], model, tmp_path)) == 2
    encoder = text_vectors.TextModel(str(world / "encoder"), torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"cannot be loaded|does not encode text"):
        text_vectors.of_texts(texts, encoder, tmp_path)


def test_sentence_encoders_and_encoder_decoders_are_text_models(world, tmp_path):
    """A BERT saved without its pooler and a T5, whose decoder is ignored."""
    sizes = {"vocab_size": 2000, "num_attention_heads": 2, "num_hidden_layers": 1}
    bert = BertConfig(hidden_size=8, intermediate_size=8, max_position_embeddings=12, **sizes)
    sizes = {"vocab_size": 2000, "num_heads": 2, "num_layers": 1, "pad_token_id": 0}
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, decoder_start_token_id=0, **sizes)
    for name, network in (("bert", BertModel(bert, add_pooling_layer=False)), ("t5", T5Model(t5))):
        folder = tmp_path / name
        network.eval().save_pretrained(folder)
        for path in (world / "lm").glob("tokenizer*"):
            shutil.copy(path, folder)
        model = text_vectors.TextModel(str(folder), torch.device("cpu"), torch.float32)
        texts = ["moving red bar", "moving red bar over to the left side " * 9, "cross"]
        found = dict(zip((2, 0, 1), *[v for _, v in model.vectors(texts)], strict=True))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encode = network if name == "bert" else network.encoder
        for n, text in enumerate(texts):
            ids = tokenizer(text, return_tensors="pt")["input_ids"][
                :, : 12 if name == "bert" else 200
            ]
            with torch.inference_mode():
                wanted = encode(input_ids=ids).last_hidden_state[0].mean(0)
            torch.testing.assert_close(found[n], wanted, atol=1e-5, rtol=0)


def test_the_tables_match_the_committed_results():
    table = retrieval_report.markdown(
        json.loads((ROOT / "results" / "retrieval.json").read_text())["runs"]
    )
    assert (ROOT / "results" / "retrieval.md").read_text() == table
    assert table in (ROOT / "docs" / "retrieval.md").read_text()
