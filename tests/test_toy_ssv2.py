"""The toy world is deterministic, in SSv2's layout, and its splits are disjoint."""

import hashlib
import json
import shutil
from itertools import combinations
from pathlib import Path

import av
import pytest
from conftest import TOY as FLAGS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from runtime.errors import UserError
from worlds import shapes, shapes_video, ssv2_files, toy_models, toy_ssv2

SPLITS = ("train", "validation", "validation_pairs", "validation_objects")


@pytest.fixture(scope="module")
def world(world, tmp_path_factory):
    """A copy of the world that these tests may damage."""
    return shutil.copytree(world, tmp_path_factory.mktemp("toy") / "world")


def read(path):
    return json.loads(Path(path).read_text())


def digests(root):
    files = (p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pairs_of(clips):
    return {frozenset(c["objects"]) for c in clips if len(c["objects"]) == 2}


def objects_of(clips):
    return {name for c in clips for name in c["objects"]}


def split_of(clips, split):
    return [c for c in clips if c["split"] == split]


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    """Videos, labels and weights are the same, and one worker writes the same as two."""
    assert not toy_ssv2.main([str(tmp_path / "again"), *FLAGS, "--workers", "1"])
    assert digests(tmp_path / "again") == digests(world)


def test_another_seed_gives_another_world():
    assert shapes.plan(100, 0) == shapes.plan(100, 0) != shapes.plan(100, 1)
    assert shapes.divide_objects(0)[1] != shapes.divide_objects(1)[1]


@pytest.mark.parametrize("clips", [100, 6000])
def test_splits_are_disjoint(clips):
    plan = shapes.plan(clips, 0)
    train = split_of(plan, "train")
    assert len(train) == clips and len({c["id"] for c in plan}) == len(plan)
    assert all(c["id"].isdecimal() for c in plan)

    pairs = split_of(plan, "validation_pairs")
    assert all(len(c["objects"]) == 2 for c in pairs)
    assert not pairs_of(pairs) & pairs_of(train)
    assert objects_of(pairs) <= objects_of(train)

    unseen, seen = objects_of(split_of(plan, "validation_objects")), objects_of(train)
    assert not unseen & seen
    for part in (0, 1):  # colour, shape
        assert {n.split()[part] for n in unseen} <= {n.split()[part] for n in seen}


def test_the_language_model_is_not_trained_on_held_out_objects():
    objects, unseen, pairs, unseen_pairs = shapes.divide_objects(0)
    examples = toy_models.sample_examples(3000, 0, objects, pairs)
    assert not objects_of(examples) & set(unseen) and not pairs_of(examples) & unseen_pairs
    assert pairs | unseen_pairs == {frozenset(p) for p in combinations(objects, 2)}


def test_records_look_like_ssv2(world):
    clips = {c["id"]: c for c in shapes.plan(100, 0)}
    names = read(world / "labels" / "labels.json")
    assert all(isinstance(number, str) for number in names.values()) and len(names) >= 12
    seen = set()
    for split in SPLITS:
        records = read(world / "labels" / f"{split}.json")
        assert [r["id"] for r in records] == [c["id"] for c in split_of(clips.values(), split)]
        for r in records:
            assert list(r) == ["id", "label", "template", "placeholders"]
            filled = r["template"].lower()
            for name in r["placeholders"]:
                filled = filled.replace("[something]", name, 1)
            assert r["label"] == filled and "[" not in filled and len(filled.split()) >= 4
            assert r["template"].replace("[", "").replace("]", "") in names
            seen.add(r["template"])
    assert seen == {a.template for a in shapes.ACTIONS}
    test = read(world / "labels" / "test.json")
    rows = (world / "labels" / "test-answers.csv").read_text().splitlines()
    assert [r.split(";")[0] for r in rows] == [r["id"] for r in test]
    assert all(list(r) == ["id"] for r in test) and {r.split(";")[1] for r in rows} <= set(names)


def test_labels_can_have_ssv2s_old_file_names(tmp_path):
    templates = {a.keyword: a.template for a in shapes.ACTIONS}
    ssv2_files.write_labels(tmp_path, shapes.plan(100, 0), templates, toy_ssv2.OLD_PREFIX)
    names = {p.stem for p in tmp_path.glob("*.json")}
    assert names == {f"something-something-v2-{s}" for s in (*SPLITS, "test", "labels")}


def test_paraphrases_cover_training_once_and_are_sentences(world):
    shards = [read(world / "paraphrases" / f"ssv2_paraphrase_train_{i}.json") for i in range(10)]
    ids = [i for shard in shards for i in shard]
    assert sorted(ids) == sorted(r["id"] for r in read(world / "labels" / "train.json"))
    validation = read(world / "paraphrases" / "ssv2_paraphrase_validation.json")
    assert list(validation) == [r["id"] for r in read(world / "labels" / "validation.json")]
    clips = {c["id"]: c for c in shapes.plan(100, 0)}
    for shard in [*shards, validation]:
        for i, texts in shard.items():
            assert 1 <= len(texts) <= 8 and len(set(texts)) == len(texts)
            for text in texts:
                assert text[0].isupper() and text.endswith(".")
                assert all(name in text.lower() for name in clips[i]["objects"])


def test_videos_decode_to_the_rendered_frames(world):
    plan = shapes.plan(100, 0)
    assert {p.stem for p in (world / "videos").iterdir()} == {c["id"] for c in plan}
    for clip in plan[:8]:
        rendered = shapes_video.render(clip, 0)
        with av.open(str(world / "videos" / f"{clip['id']}.webm")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name in ("vp9", "libvpx-vp9") and stream.average_rate == 12
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert 16 < shapes_video.FRAMES[0] <= len(frames) == len(rendered) <= shapes_video.FRAMES[1]
        assert abs(rendered.astype(float) - frames).mean() < 10


def test_models_load_from_their_folders(world):
    assert AutoModel.from_pretrained(world / "encoder").config.model_type == "vjepa2"
    tokenizer = AutoTokenizer.from_pretrained(world / "lm")
    saved = PreTrainedTokenizerFast(tokenizer_file=str(world / "lm" / "tokenizer.json"))
    for clip in shapes.plan(100, 0)[:50]:
        for text in (shapes.label_of(clip), *shapes.sentences_of(clip)):
            ids = tokenizer(" " + text)["input_ids"]
            assert ids == saved(" " + text)["input_ids"] and tokenizer.decode(ids) == " " + text
            assert len(ids) <= len(text.split()) + 1  # a word is a token, and so is the full stop
    lm = AutoModelForCausalLM.from_pretrained(world / "lm")
    assert lm.config.eos_token_id == tokenizer.eos_token_id is not None
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight


def test_second_run_keeps_files_and_adds_missing_ones(world, capsys):
    before, removed = digests(world), sorted((world / "videos").iterdir())[0]
    removed.unlink()
    written = (world / "lm" / "model.safetensors").stat().st_mtime_ns
    toy_ssv2.main([str(world), *FLAGS])
    assert "lm/ exists and is kept" in capsys.readouterr().err
    assert digests(world) == before
    assert (world / "lm" / "model.safetensors").stat().st_mtime_ns == written


def test_other_settings_and_foreign_folders_are_refused(world, tmp_path):
    before = digests(world)
    with pytest.raises(UserError, match="clips = 100, not 101"):
        toy_ssv2.main([str(world), "--clips", "101", *FLAGS[2:]])
    assert digests(world) == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        toy_ssv2.main([str(tmp_path), *FLAGS])
    with pytest.raises(UserError, match="is a file"):
        toy_ssv2.main([str(tmp_path / "mine.txt"), *FLAGS])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
