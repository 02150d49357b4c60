"""research/: vectors of clips, search, scenes of two films, queries as words, and the report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WIDTH
from pages import prose

import windows
from captioner import VideoCaptioner
from checkpoint import load_models, read_checkpoint
from dataset import load_records
from research import embed, embed_report, embed_table, embeddings, retrieval, scenes, words
from runtime.errors import UserError
from runtime.feature_cache import load_features, load_manifest, stack_stored
from runtime.files import read_torch, torch_bytes


@pytest.fixture(scope="module")
def flags(prepared, trained):
    return [
        *["--checkpoint", str(trained), "--features", str(prepared / "features")],
        *["--annotations", str(prepared / "annotations"), "--workers", "0"],
    ]


@pytest.fixture(scope="module")
def written(flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "embeddings.npz"
    embed.main([*flags, "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def models(trained):
    """(encoder, captioner)"""
    return load_models(read_checkpoint(trained), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def captioner(models):
    return models[1]


@pytest.fixture(scope="module")
def clips(prepared):
    """Five validation clips in stored form."""
    settings = load_manifest(prepared / "features").settings
    root = prepared / "features" / "validation"
    ids = sorted(p.stem for p in root.glob("*.pt"))[:5]
    return stack_stored([load_features(root / f"{i}.pt", i, settings) for i in ids])


# ---- one vector per clip -------------------------------------------------------------------


def test_a_vector_does_not_depend_on_its_batch(captioner, clips, monkeypatch):
    monkeypatch.setattr("captioner.READ_CHUNK", 2)  # the Q-Former reads the five in three groups
    together = embeddings.embed(captioner, **clips)
    for n in range(5):
        alone = embeddings.embed(captioner, **{k: v[n : n + 1] for k, v in clips.items()})
        for kind, vectors in together.items():
            assert torch.allclose(alone[kind][0], vectors[n], atol=1e-5), kind
            assert vectors[n].norm() == pytest.approx(1, abs=1e-5)


def test_vectors_match_their_definition(captioner, clips):
    got, qformer, lm = embeddings.embed(captioner, **clips), captioner.qformer, captioner.lm
    x = clips["features"].float() * clips["scale"][:, None] + clips["offset"][:, None]
    prompt = captioner.tokenizer(embeddings.PROMPT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        soft = captioner.soft_prompts(**clips)
        words = lm.get_input_embeddings()(torch.tensor([prompt])).expand(5, -1, -1)
        hidden = lm.base_model(inputs_embeds=torch.cat([soft, words], 1)).last_hidden_state
    expected = {
        "features": ((x - qformer.mean) / qformer.std).mean(1),
        "prompts": soft.mean(1),
        "hidden": hidden[:, soft.shape[1] - 1],
        "prompted": hidden[:, -1],
    }
    for kind, vectors in expected.items():
        assert torch.allclose(got[kind], vectors / vectors.norm(dim=1, keepdim=True), atol=1e-4)


def test_attended_is_the_output_of_the_last_cross_attention(
    make_qformer, lm, tokenizer, make_clips
):
    """Two blocks, computed the textbook way."""
    captioner = VideoCaptioner(make_qformer(num_blocks=2), lm, tokenizer).eval()
    features, scale, offset = make_clips(3)
    qformer = captioner.qformer
    video = (features * scale[:, None] + offset[:, None] - qformer.mean) / qformer.std
    t, h, w = qformer.pos
    pos = (t[:, None, None] + h[None, :, None] + w[None, None, :]).flatten(0, 2)
    x = qformer.queries[None]
    with torch.no_grad():
        for block in qformer.blocks:
            x = x + block.self_attention(block.norm_self(x))
            output = block.cross.textbook(block.norm_cross(x), qformer.project(video) + pos)
            x = x + output
            x = x + block.mlp(block.norm_mlp(x))
    expected = torch.nn.functional.normalize(output.mean(1), dim=-1)
    got = embeddings.embed(captioner, features, scale, offset)["attended"]
    assert torch.allclose(got, expected, atol=1e-5)
    assert not qformer.blocks[-1].cross.out._forward_hooks


def test_the_file_has_every_clip_in_float16(written, prepared, trained):
    checkpoint = read_checkpoint(trained)
    ids, vectors, split = embeddings.read(written, "hidden", checkpoint)
    assert ids == [r["id"] for r in load_records(prepared / "annotations", "validation")]
    assert vectors.dtype == np.float16 and len(vectors) == len(ids) and split == "validation"
    with np.load(written, allow_pickle=False) as file:
        assert set(file) == {"ids", "about", *embeddings.KINDS}


def test_a_failure_leaves_no_file_behind(flags, prepared, tmp_path):
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    last = load_records(prepared / "annotations", "validation")[-1]["id"]
    (features / "validation" / f"{last}.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"features of clip {last}"):
        embed.main(
            [*flags, "--features", str(features), "--output", str(tmp_path / "out" / "e.npz")]
        )
    assert not list((tmp_path / "out").iterdir())


def test_a_clip_finds_itself_first(flags, written, world, capsys):
    clip_id = np.load(written)["ids"][7]
    clip = str(world / "videos" / f"{clip_id}.webm")
    for kind in embeddings.KINDS:
        embed.main([*flags, "--output", str(written), "--query", clip, "--kind", kind, "--json"])
        found = json.loads(capsys.readouterr().out)["found"]
        assert found[0]["id"] == clip_id and found[0]["score"] == pytest.approx(1, abs=2e-3)
        scores = [f["score"] for f in found]
        assert len(found) == 10 and scores == sorted(scores, reverse=True)


def test_text_ranks_clips_by_likelihood(flags, captioner, prepared, capsys):
    records = load_records(prepared / "annotations", "validation")[:12]
    text = records[3]["label"]
    embed.main([*flags, "--text", text, "--limit", "12", "--batch-size", "5", "--count", "12"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {line[2] for line in lines} == {r["id"] for r in records} and lines[0][0] == text
    scores = [float(line[1]) for line in lines]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    settings = load_manifest(prepared / "features").settings
    path = prepared / "features" / "validation" / f"{lines[0][2]}.pt"
    clip = stack_stored([load_features(path, lines[0][2], settings)])
    with torch.no_grad():
        alone = captioner.log_likelihoods(captioner.prefix(**clip), "label", [text])
    assert scores[0] == pytest.approx(alone.item(), abs=1e-3)


def test_queries_are_answered_in_order_and_errors_reported(flags, written, world, tmp_path, capsys):
    ids = np.load(written)["ids"]
    first, second = (str(world / "videos" / f"{i}.webm") for i in ids[[3, 9]])
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nonsense")
    query = [*flags, "--output", str(written), "--batch-size", "2", "--json", "--query"]
    assert embed.main([*query, first, str(bad), second]) == 3
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [(a["path"], a["found"][0]["id"]) for a in answers] == [
        (first, ids[3]),
        (second, ids[9]),
    ]
    assert all(f["label"] for a in answers for f in a["found"]) and str(bad) in printed.err
    assert embed.main([*query, str(bad)]) == 1
    embed.main([*query, first, "--window", "1", "--stride", "1"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) > 1 and (answers[0]["start"], answers[0]["end"]) == (0, 1)


def test_allow_missing(flags, prepared, tmp_path, capsys):
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    last = load_records(prepared / "annotations", "validation")[-1]["id"]
    (features / "validation" / f"{last}.pt").unlink()
    more = ["--features", str(features), "--output", str(tmp_path / "e.npz")]
    with pytest.raises(UserError, match="have no features"):
        embed.main([*flags, *more])
    embed.main([*flags, *more, "--allow-missing", "1", "--json"])
    records = load_records(prepared / "annotations", "validation")
    assert json.loads(capsys.readouterr().out)["clips"] == len(records) - 1


@pytest.mark.parametrize("mode", [[], ["--text", "red cup"]])
def test_another_cache_is_refused_before_a_model_is_loaded(flags, mode, prepared, tmp_path):
    """Qwen2 was loaded before the check, which took a minute."""
    features = shutil.copytree(prepared / "features", tmp_path / "features")
    manifest = json.loads((features / "manifest.json").read_text())
    manifest["settings"]["num_frames"] = 64
    (features / "manifest.json").write_text(json.dumps(manifest))
    more = ["--features", str(features), "--lm", "/nowhere", *mode]
    with pytest.raises(UserError, match="has num_frames = 64"):
        embed.main([*flags, *more])


def test_scores_of_a_split(flags, written, capsys):
    embed.main([*flags, "--output", str(written), "--score"])
    out = capsys.readouterr().out
    assert all(kind in out for kind in (*embeddings.KINDS, "chance", "mAP", "NMI"))
    embed.main([*flags, "--output", str(written), "--score", "--limit", "40"])
    fewer = capsys.readouterr()
    assert fewer.out != out and "40 clips of " in fewer.err


def test_objects_do_not_help_without_shared_objects():
    """Vectors that encode only the object are perfect until neighbours with that object are excluded."""
    assert retrieval.object_words({"placeholders": ["the Red cup", "a box of tea"]}) == {
        *("red", "cup", "box", "tea")
    }
    records = [
        {"template": template, "placeholders": [thing]}
        for thing, template in [("red cup", "a"), ("green box", "b"), ("blue pen", "a")]
        for _ in range(3)
    ]
    things = np.repeat(np.eye(3, 8, dtype=np.float32), 3, 0)
    by_kind = {"objects": things + 0.1 * things[::-1], "chance": retrieval.chance((9, 8), 0)}
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    rows = retrieval.score_kinds(by_kind, records, 0)
    assert rows["objects"]["all"]["R@1"] == 1 and rows["objects"]["all"]["n"] == 9
    # no other object has the green box's template
    assert rows["objects"]["no shared object"]["n"] == 6
    assert rows["chance"] != rows["objects"]
    plain = retrieval.score_kinds(by_kind, [r | {"placeholders": []} for r in records], 0)
    assert plain["objects"]["no shared object"] is None and "nan" in retrieval.format_scores(plain)
    with pytest.raises(UserError, match="do not have two different templates"):
        retrieval.score_kinds(by_kind, [r | {"template": "a"} for r in records], 0)


def test_embeddings_of_another_checkpoint_are_refused(flags, written, world, trained, tmp_path):
    state = read_torch(trained / "best.pt")
    state["qformer"]["gain"] = state["qformer"]["gain"] * 2
    (tmp_path / "best.pt").write_bytes(torch_bytes(state))
    clip = str(next((world / "videos").iterdir()))
    more = ["--checkpoint", str(tmp_path), "--output", str(written), "--query", clip]
    message = rf"was made with another checkpoint \(at step {state['step']}\)"
    with pytest.raises(UserError, match=message):
        embed.main([*flags, *more])


def test_embeddings_of_clips_that_have_changed_are_refused(flags, written, prepared, tmp_path):
    """After films were replaced and encoded again, search still used the vectors of the old ones."""
    lines = (prepared / "features" / "sources.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    ids = [r["id"] for r in load_records(prepared / "annotations", "validation")]
    embeddings.check_current(written, ids, "validation", prepared / "features")
    embeddings.check_current(written, ids, "validation", tmp_path)  # another cache
    for entry in entries:
        if entry["id"] == ids[3]:
            entry["digest"] = "0" * 64
    (tmp_path / "sources.jsonl").write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(UserError, match="was made from other clips"):
        embed.main([*flags, "--features", str(tmp_path), "--output", str(written), "--score"])


def test_invalid_vectors_are_refused(written, trained, tmp_path):
    """--query printed nan as a score. Ids that are not texts ended in a traceback."""
    with np.load(written) as file:
        parts = dict(file)
    parts["hidden"] = np.full_like(parts["hidden"], np.nan)
    parts["prompts"] = parts["prompts"][:, :3]
    np.savez(tmp_path / "e.npz", **parts)
    checkpoint = read_checkpoint(trained)
    with pytest.raises(UserError, match="is damaged: its hidden vectors contain NaN"):
        embeddings.read(tmp_path / "e.npz", "hidden", checkpoint)
    with pytest.raises(UserError, match="has no valid embeddings of kind prompts"):
        embeddings.read(tmp_path / "e.npz", "prompts", checkpoint)
    for change in ({"ids": np.arange(3)}, {"ids": np.ones(())}, {"hidden": np.ones(())}):
        np.savez(tmp_path / "e.npz", **parts | change)
        with pytest.raises(UserError, match="is not a valid file of embeddings"):
            embeddings.read(tmp_path / "e.npz", "hidden", checkpoint)
    for damaged in (b"", b"PK nonsense", written.read_bytes()[:2000]):
        (tmp_path / "e.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="is not a valid file of embeddings"):
            embeddings.read(tmp_path / "e.npz", "hidden", checkpoint)


# ---- search --------------------------------------------------------------------------------


def test_nearest_is_by_cosine_in_order(monkeypatch):
    vectors = retrieval.unit(np.random.default_rng(0).normal(size=(1000, 16))).astype(np.float16)
    monkeypatch.setattr(retrieval, "WIDENED", 300)
    orders, cosines = retrieval.nearest(5 * vectors[[321, 0]].astype(np.float32), vectors, 4)
    assert orders[:, 0].tolist() == [321, 0]
    exact = vectors.astype(np.float32) @ retrieval.unit(vectors[321])
    assert orders[0].tolist() == np.argsort(-exact)[:4].tolist()
    assert cosines[0].tolist() == pytest.approx(np.sort(exact)[::-1][:4].tolist(), abs=1e-5)


def test_retrieval_is_leave_one_out():
    """Of four clips on a line, the query itself is not a neighbour."""
    angles = np.array([0.0, 0.1, 0.3, 0.6])
    vectors = retrieval.unit(np.stack([np.cos(angles), np.sin(angles)], 1))
    templates, objects = ["a", "b", "a", "b"], [{"x"}, {"y"}, {"x", "z"}, {"w"}]
    scores = retrieval.score(vectors, templates)
    assert scores["n"] == 4 and scores["R@1"] == 0 and scores["R@5"] == 1
    # ranks of the other clip with the template: 2nd, 3rd, 2nd, 2nd
    assert scores["mAP"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    apart = retrieval.score(vectors, templates, objects)
    assert apart["n"] == 2  # 0 and 2 share x and have no other clip to find
    with pytest.raises(UserError, match="have the same template and different objects"):
        retrieval.score(vectors, templates, [{"x"}] * 4)
    with pytest.raises(UserError, match=r"no two of the 4 clips have the same template$"):
        retrieval.score(vectors, list("abcd"))


def test_retrieval_in_blocks_gives_the_same_scores(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = retrieval.unit(rng.normal(size=(90, 8)))
    templates = rng.choice(list("abc"), 90).tolist()
    objects = [set(rng.choice(list("uvwxyz"), 2)) for _ in range(90)]
    whole = [retrieval.score(vectors, templates, given) for given in (None, objects)]
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    parts = [retrieval.score(vectors, templates, given) for given in (None, objects)]
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other)


# ---- films ---------------------------------------------------------------------------------


def test_align_matches_brute_force():
    rng = np.random.default_rng(0)
    for trial in range(60):
        excess = rng.normal(-0.3, 1, rng.integers(1, 9, 2))
        shortest, left, expected = trial % 3 + 1, excess.copy(), []
        n, m = excess.shape
        while True:
            sums = {
                (i, j, k): left[range(i, i + k), range(j, j + k)].sum()
                for i in range(n)
                for j in range(m)
                for k in range(1, min(n - i, m - j) + 1)
            }
            i, j, k = max(sums, key=sums.get)
            if sums[i, j, k] <= 0:
                break
            if k < shortest:
                left[range(i, i + k), range(j, j + k)] = -np.inf
                continue
            expected.append((i, j, k))
            left[i : i + k] = left[:, j : j + k] = -np.inf
        assert scenes.align(excess, shortest) == expected


def test_scenes_are_found_in_another_order():
    """Windows 0-3 and 6-8 of a are 5-8 and 1-3 of b."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(10, 32)), rng.normal(size=(9, 32))
    b[5:9], b[1:4] = a[0:4], a[6:9]
    spans = [(float(n), n + 2.0) for n in range(10)]
    found = scenes.find(scenes.compare(a, b), spans, spans[:9])
    assert [(s.start_a, s.end_a, s.start_b, s.end_b) for s in found] == [
        (0, 5, 5, 10),  # the whole window at the end of a film, else its middle
        (6.5, 9.5, 1.5, 4.5),
    ]
    assert min(s.score for s in found) > 0.9


def test_a_still_shot_does_not_hide_other_scenes():
    """It also matches with film b reversed and is longer than the scenes, so that no scene exceeded
    the threshold."""
    rng = np.random.default_rng(0)
    one, two, other = (rng.normal(size=(12, 32)) for _ in range(3))
    still = np.repeat(rng.normal(size=(1, 32)), 40, 0)
    shown = [np.concatenate(parts) for parts in ([one, two, still], [still, two, other, one])]
    a, b = (np.stack([x[n : n + 4].mean(0) for n in range(len(x) - 3)]) for x in shown)
    a, b = (x + 0.05 * rng.normal(size=x.shape) for x in (a, b))
    spans = [[(n / 2, n / 2 + 2) for n in range(len(x))] for x in (a, b)]
    found = scenes.find(scenes.compare(a, b), *spans)
    times = [(round(s.start_a), round(s.start_b)) for s in found]
    assert times == [(0, 32), (6, 20), (12, 0)]


def test_compare_subtracts_the_mean():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 8)), rng.normal(size=(4, 8))
    assert np.allclose(scenes.compare(a + 100, b + 100), scenes.compare(a, b))
    row = retrieval.unit(rng.normal(size=32))  # rounding errors were normalised to a cosine of 1
    same = np.repeat(row[None], 19, 0) + 1e-7 * rng.normal(size=(19, 32))
    assert np.abs(scenes.compare(same, same)).max() < 0.01


def test_windows_that_fail_are_nan_in_every_kind(models, world, tmp_path, capsys):
    """They had the width of the last kind of vector. Widths differ, so this ended in a traceback."""
    film = joined(world, tmp_path / "film.webm", 4)
    cut = tmp_path / "cut.webm"
    cut.write_bytes(film.read_bytes()[: len(film.read_bytes()) * 6 // 10])
    spans, vectors = embeddings.embed_film(cut, *models, windows.Windowing(1, 0.5))
    assert "windows; the first error: " in capsys.readouterr().err
    failed = np.isnan(vectors["features"]).all(1)
    assert 0 < failed.sum() < len(spans)
    assert all((np.isnan(rows).any(1) == failed).all() for rows in vectors.values())


def test_scenes_end_within_the_film():
    """The last window may be shorter. A scene ended 0.2 s after its film."""
    a = [(0.0, 2.0), (0.5, 2.5), (1.0, 3.0), (1.5, 3.2)]
    b = [(0.0, 2.0), (0.5, 2.5), (1.0, 3.0), (1.5, 3.5), (2.0, 4.0)]
    assert scenes.times_of((0, 1, 4), a, b) == pytest.approx((0, 3.2, 0.5, 3.85))
    assert scenes.times_of((1, 1, 2), a, b) == pytest.approx((1.25, 2.25, 1.25, 2.25))
    assert scenes.times_of((0, 0, 1), [(0.0, 1.4)], b) == pytest.approx((0, 1.4, 0.3, 1.7))


def test_unrelated_films_have_few_scenes():
    """Unrelated films had as many scenes as related ones before scenes had to exceed the best run
    with film b reversed."""
    reported, before = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        looks = rng.normal(size=(3, 16))
        films_ = [looks[rng.integers(0, 3, 60)] + 0.3 * rng.normal(size=(60, 16)) for _ in "ab"]
        a, b = (np.stack([x[n : n + 4].mean(0) for n in range(57)]) for x in films_)
        spans, similarity = [(n / 2, n / 2 + 2) for n in range(57)], scenes.compare(a, b)
        reported += len(scenes.find(similarity, spans, spans))
        before += len(scenes.align(similarity - scenes.threshold(similarity), 4))
    assert before > 20 and reported < before / 3


def test_a_window_without_a_vector_ends_a_scene():
    """Such windows were removed, which joined the windows before and after them."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(9, 8))
    b = a.copy()
    b[4] = np.nan
    similarity = scenes.compare(a, b)
    assert np.isnan(similarity[:, 4]).all() and np.isnan(similarity).sum() == 9
    spans = [(float(n), n + 1.0) for n in range(9)]
    assert [(s.start_a, s.end_a) for s in scenes.find(similarity, spans, spans)] == [
        (0, 4),
        (5, 9),
    ]


def test_a_scene_lasts_at_least_a_window():
    """With windows of 2 s every 0.5 s, two of three reported scenes had only three windows."""
    similarity = np.zeros((12, 12))
    similarity[range(2, 5), range(7, 10)] = 0.9
    similarity[range(6, 11), range(1, 6)] = 0.9
    spans = [(n / 2, n / 2 + 2) for n in range(12)]
    [scene] = scenes.find(similarity, spans, spans)
    assert (scene.start_a, scene.start_b) == (3.75, 1.25)
    assert [length for *_, length in scenes.align(similarity - 0.5)] == [5, 3]


def test_match(flags, models, world, tmp_path, capsys):
    """Film b is film a with one more clip at the beginning."""
    ids = sorted(p.stem for p in (world / "videos").glob("*.webm"))[:5]
    a, b, picture = tmp_path / "a.webm", tmp_path / "b.webm", tmp_path / "m.png"
    embed_report.write_film(a, [[i] for i in ids[1:]], world / "videos")
    [(_, later), *_] = embed_report.write_film(b, [[i] for i in ids], world / "videos")
    more = ["--window", "2", "--stride", "0.5", "--output", str(picture), "--json"]
    embed.main([*flags, "--match", str(a), str(b), *more])
    found = json.loads(capsys.readouterr().out)["scenes"]
    longest = max(found, key=lambda s: s["end_a"] - s["start_a"])
    assert longest["start_a"] < 1 and longest["end_a"] > 6
    assert longest["start_b"] - longest["start_a"] == pytest.approx(later, abs=0.5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    spans, vectors = embeddings.embed_film(a, *models, windows.Windowing(2, 1))
    for rows in vectors.values():  # with itself
        [scene] = scenes.find(scenes.compare(rows, rows), spans, spans)
        assert scene.start_a == scene.start_b == 0 and scene.end_a == scene.end_b > 6


def joined(world, path, count):
    """Write a film of `count` clips of the world, one after the other, and return its path."""
    ids = sorted(p.stem for p in (world / "videos").glob("*.webm"))[:count]
    embed_report.write_film(path, [[i] for i in ids], world / "videos")
    return path


def test_films_that_cannot_be_matched(flags, world, tmp_path):
    clip, folder = str(next((world / "videos").iterdir())), str(world / "videos")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for films, sentence in {
        (str(tmp_path / "empty.mp4"), clip): "is an empty file",
        (clip, clip): "both films have only one window of 6 s: use a smaller --window",
        (folder, clip): "takes two films",
    }.items():
        with pytest.raises(UserError, match=sentence):
            embed.main([*flags, "--match", *films, "--output", str(tmp_path / "m.png")])
    with pytest.raises(UserError, match=r"must be a file name that ends in \.png"):
        embed.main([*flags, "--match", clip, clip, "--output", clip])


def test_quality():
    true_a, true_b = [(0, 4), (4, 8)], [(10, 14), (0, 4)]
    right, wrong = scenes.Scene(0, 4, 10, 14, 1.0), scenes.Scene(4, 8, 20, 24, 1.0)
    short, shorter = scenes.Scene(0, 2.2, 10, 14, 1.0), scenes.Scene(0, 1.8, 10, 14, 1.0)
    assert scenes.quality([right], true_a, true_b) == {"recall": 0.5, "precision": 1}
    assert scenes.quality([right, wrong], true_a, true_b) == {"recall": 0.5, "precision": 0.5}
    assert scenes.quality([short], true_a, true_b)["precision"] == 1
    assert scenes.quality([shorter], true_a, true_b)["precision"] == 0
    assert scenes.quality([], true_a, true_b) == {"recall": 0, "precision": 0}


# ---- words ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(make_qformer, lm, tokenizer):
    return VideoCaptioner(make_qformer(), lm, tokenizer).eval()


def test_nearest_tokens(tiny, monkeypatch):
    table = tiny.lm.get_input_embeddings().weight.detach()
    soft = 3 * table[[65, 66, 100]][None] + 0.01 * torch.randn(1, 3, WIDTH)
    for block in (1 << 15, 50):  # also in blocks
        monkeypatch.setattr(words, "VOCABULARY_BLOCK", block)
        ids, cosines = words.nearest_tokens(tiny.lm, soft, 4)
        assert ids[0, :, 0].tolist() == [65, 66, 100] and (cosines[0, :, 0] > 0.99).all()
        assert ids.shape == (1, 3, 4) and (cosines.diff(dim=-1) <= 0).all()


def test_tokens_in_context(tiny):
    corpus = words.Corpus(tiny, ["abc", "abd", "xyz"])
    assert corpus.layer == 1 < tiny.lm.config.num_hidden_layers  # the middle one, not the last
    soft = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        ids, cosines, rows = corpus.nearest(soft, 4)
        states = tiny.lm.base_model(inputs_embeds=soft, output_hidden_states=True).hidden_states
    states = states[corpus.layer]
    states = torch.nn.functional.normalize(states - states.mean(1, keepdim=True), dim=-1)
    exact = states @ corpus.states.T  # (B, Q, M)
    row_tokens = corpus.tokens[corpus.token_of]
    for clip in range(2):
        for query in range(5):
            assert len(set(ids[clip, query].tolist())) == 4
            for token, value, row in zip(
                *(x[clip, query] for x in (ids, cosines, rows)), strict=True
            ):
                best = exact[clip, query][row_tokens == token].max().item()
                assert value == pytest.approx(best, abs=1e-5)
                assert row_tokens[row] == token
    with torch.no_grad():  # the mean over the whole batch was subtracted
        alone = corpus.nearest(soft[1:], 4)[1]
    assert torch.allclose(alone[0], cosines[1], atol=1e-5)


def test_the_corpus_does_not_depend_on_its_batches(tiny):
    """Captions are grouped by length; each state belongs to its own token and caption."""
    texts = ["abc", "a longer text", "abd", "xy", "cab"]
    corpus = words.Corpus(tiny, texts)
    prompt = tiny.tokenizer(embeddings.PROMPT, add_special_tokens=False)["input_ids"]
    exact, tokens, text_of = [], [], []
    for n, text in enumerate(texts):
        ids = tiny.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            out = tiny.lm.base_model(torch.tensor([prompt + ids]), output_hidden_states=True)
        exact.append(out.hidden_states[corpus.layer][0, len(prompt) :])
        tokens, text_of = tokens + ids, text_of + [n] * len(ids)
    exact = torch.cat(exact)
    exact = torch.nn.functional.normalize(exact - exact.mean(0), dim=-1)
    rows = np.argsort(corpus.text_of, kind="stable")  # back in the order of the texts
    assert [corpus.text_of[row] for row in rows] == text_of
    assert corpus.tokens[corpus.token_of[rows]].tolist() == tokens
    assert torch.allclose(corpus.states[rows], exact, atol=1e-5)


def test_match_words():
    found, every = words.match_words(["whi", "Cup", "th", "o", ""], "moving the white cup to a box")
    assert found == {"white", "cup"} and every == {"moving", "the", "white", "cup", "box"}
    assert words.match_words([], "a") == (set(), set())
    found, every = words.match_words(["杯子", "cup"], "把杯子、cups हिन्दी")
    assert found == {"杯", "子", "cups"} and every == {*"把杯子", "cups", "हिन्दी"}


def test_words(flags, world, tmp_path, capsys):
    clip = str(next((world / "videos").iterdir()))
    output = tmp_path / "words.png"
    embed.main([*flags, "--words", clip, "--output", str(output), "--count", "6", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["queries"]) == 4 and result["path"] == clip and result["caption"]
    assert all(len(q[part]) == 6 for q in result["queries"] for part in ("tokens", "context"))
    assert all(token in text for q in result["queries"] for token, _, text in q["context"])
    assert output.read_bytes().startswith(b"\x89PNG")
    embed.main([*flags, "--words", clip, "--output", str(output)])
    assert len(capsys.readouterr().out.splitlines()) == 5  # the clip, then a line per query


def test_sample_labels(prepared, monkeypatch):
    monkeypatch.setattr(words, "CORPUS", 7)
    sampled, other = (words.sample_labels(prepared / "annotations", seed) for seed in (0, 1))
    train = {r["label"] for r in load_records(prepared / "annotations", "train")}
    assert len(sampled) == 7 and set(sampled) <= train and sampled != other


def test_words_of_a_damaged_clip_or_a_folder(flags, world, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nonsense")
    with pytest.raises(UserError) as error:
        embed.main([*flags, "--words", str(tmp_path / "bad.mp4")])
    assert error.value.code == 1
    with pytest.raises(UserError, match="--words takes one clip"):
        embed.main([*flags, "--words", str(world / "videos")])


def test_limit(flags, written, world, trained, tmp_path, capsys):
    checkpoint = shutil.copy(trained / "best.pt", tmp_path)
    clips = [str(p) for p in sorted((world / "videos").iterdir())[:3]]
    embed.main([*flags, "--output", str(written), "--query", *clips, "--limit", "2", "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    embed.main([*flags, "--limit", "3", "--checkpoint", str(checkpoint), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert done["clips"] == 3 and done["output"].endswith("embeddings_validation_first3.npz")


# ---- the report ----------------------------------------------------------------------------


def test_report(prepared, world, trained, tmp_path, monkeypatch):
    """All parts run, on few films and with two tokens."""
    few = {"pairs": 1, "scenes": 1, "apart": 1, "clips_a_scene": 1}
    monkeypatch.setattr(embed_report, "FILMS", embed_report.FILMS | few)
    monkeypatch.setattr(embed_report, "TOPS", (1, 2))
    monkeypatch.setattr(embed_report, "SSV2", (100, 8))
    data = tmp_path / "data"
    data.mkdir()
    for path in (*(prepared / name for name in ("features", "annotations")), world / "videos"):
        (data / path.name).symlink_to(path)
    (data / "features_still").symlink_to(prepared / "features")
    shutil.copytree(trained, tmp_path / "run")
    run = ["--runs", str(tmp_path / "run"), "--data", str(data), "--output", str(tmp_path)]
    embed_report.main(run)
    results = json.loads((tmp_path / "embeddings.json").read_text())
    [found] = results["runs"]
    assert {*embeddings.KINDS, "chance"} < set(found["retrieval"])
    assert found["text"]["likelihood"]["R@10"] > found["text"]["likelihood"]["R@1"] > 0
    assert len(found["words"]["queries"]) == found["queries"] == 4
    assert {p.name for p in (tmp_path / "run" / "films").iterdir()} == {"a0.webm", "b0.webm"}
    assert (tmp_path / "embeddings.md").read_text() == embed_table.markdown(results)


def test_the_report_checks_its_input_first(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json was not written by research\.embed_report"):
        embed_report.main(["--table", str(tmp_path / "other.json")])
    runs = ["--runs", str(tmp_path / "nowhere"), "--output", str(tmp_path / "results")]
    with pytest.raises(UserError, match=r"nowhere/args\.json does not exist: run python -m worlds"):
        embed_report.main(runs)
    assert not (tmp_path / "results").exists()


def test_match_films_scores_known_films(tmp_path, monkeypatch):
    """With vectors that identify the clip, all shared scenes are found, and few if none is shared."""
    monkeypatch.setattr(embed_report, "FILMS", embed_report.FILMS | {"pairs": 3})
    shown, rng = {}, np.random.default_rng(0)
    looks = {str(n): rng.normal(size=64) for n in range(120)}

    def write_film(path, scenes, videos):
        shown[path.name] = [clip for scene in scenes for clip in scene for _ in range(4)]
        return [(6.0 * n, 6.0 * n + 6) for n in range(len(scenes))]  # three clips of 2 s

    def embed_film(path, encoder, captioner, windowing):
        clips = np.stack([looks[clip] for clip in shown[path.name]])  # one every half second
        rows = np.stack([clips[n : n + 4].mean(0) for n in range(len(clips) - 3)])
        kinds = {kind: rows if captioner == "trained" else 0 * rows for kind in embeddings.KINDS}
        return [(n / 2, n / 2 + 2) for n in range(len(rows))], kinds

    monkeypatch.setattr(embed_report, "write_film", write_film)
    monkeypatch.setattr(embeddings, "embed_film", embed_film)
    records = [{"id": i} for i in looks]
    run = embed_report.Run(tmp_path, tmp_path, 0, records, None, "trained", "untrained")
    found = embed_report.match_films(run)
    assert set(found) == {*embeddings.KINDS, "untrained attended", "untrained prompts"}
    assert found["prompts"]["recall"] > 0.9 and found["prompts"]["precision"] > 0.9
    assert found["prompts"]["scenes where none is shared"] < 1
    assert found["untrained prompts"]["recall"] == 0
    a, b = set(shown["a0.webm"]), set(shown["b0.webm"])
    assert len(shown) == 6 and len(a & b) == 18 and not a & set(shown["b1.webm"])
    assert shown["a0.webm"] != shown["b0.webm"]


def test_merge_adjacent():
    in_a, in_b = [(6, 9), (0, 6), (9, 12)], [(3, 6), (9, 15), (6, 9)]
    assert embed_report.merge_adjacent(in_a, in_b) == ([(0, 6), (6, 12)], [(9, 15), (3, 9)])


def test_describe():
    labels = ["a red disc", "a blue disc", "a cup", "lifting"]
    found = embed_report.describe(["red", "green", "cup", "disc"], labels, labels[::-1])
    assert found["colours"] == 0.5 and found["things"] == 0.25 and found["own"] == 0.5
    assert found["another's"] == 0.25 and found["commonest"][0] == ("red", 1)


def test_the_page_in_results_matches_its_figures():
    folder = Path(embed.__file__).parent.parent / "results"
    results = json.loads((folder / "embeddings.json").read_text())
    assert (folder / "embeddings.md").read_text() == embed_table.markdown(results)


def test_the_documentation_matches_the_figures():
    root = Path(embed.__file__).parent.parent
    results = json.loads((root / "results" / "embeddings.json").read_text())
    runs = results["runs"]

    def mean(*keys):
        values = runs
        for key in keys:
            values = [v[key] for v in values]
        return float(np.mean(values))

    found, apart = ("films", "features"), ("no shared object", "mAP")
    assert mean(*found, "recall") == mean(*found, "precision") == 1
    queries = runs[0]["words"]["queries"]
    costliest = max(range(len(queries)), key=lambda q: queries[q]["CIDEr lost"])
    cheap = queries[5]
    text = prose()
    for sentence in (
        f"mAP is {mean('retrieval', 'prompted', *apart):.2f} among clips that share no object",
        f"mean features {mean('retrieval', 'features', *apart):.2f},"
        f" random vectors {mean('retrieval', 'chance', *apart):.2f},",
        f"only the first frame {mean('retrieval', 'prompted, first frame only', *apart):.2f}.",
        f"takes {np.median(results['search']['seconds']):.1f} s on two cores",
        f"it reports {mean(*found, 'scenes where none is shared'):.1f} scenes per pair",
        f"query {costliest} names a colour for {100 * queries[costliest]['colours']:.0f} % of the clips",
        f"costs {queries[costliest]['CIDEr lost']:.1f} CIDEr",
        f"Query 5 names a thing for {100 * cheap['things']:.0f} %, yet replacing it"
        f" costs {cheap['CIDEr lost']:.1f}.",
    ):
        assert sentence in text, sentence


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--query", "/nowhere.mp4"], "clip not found: /nowhere.mp4"),
        (["--text", " "], "--text is empty"),
        (["--text", "red cup " * 200], r"--text has [\d,]+ tokens; at most 200 are allowed"),
        (["--text", "red cup", "--kind", "hidden"], "--kind only applies to --query and --match"),
        (["--score", "--output", "nowhere/e.npz"], "no embeddings: nowhere/e.npz does not exist"),
        (["--output", "best.pt"], "--output best.pt must be a file name that ends in .npz"),
    ],
)
def test_usage_errors(flags, more, sentence):
    with pytest.raises(UserError, match=sentence):
        embed.main([*flags, *more])
