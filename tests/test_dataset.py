"""On-disk formats, the choice of captions and collation."""

import errno
import functools
import os
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import dataset
from encoder import quantise
from runtime import feature_cache, files, names
from runtime.errors import UserError

SETTINGS = feature_cache.Settings(grid=(2, 3, 4), width=5)
RECORD = {"id": "7", "label": "moving it", "paraphrases": ["One.", "Two.", "Three."]}


def write(path, clip_id="7"):
    feature_cache.save_features(path, clip_id, quantise(torch.randn(24, 5)), "decord")
    return path


def test_features_round_trip(tmp_path):
    stored = quantise(torch.randn(24, 5))
    feature_cache.save_features(tmp_path / "7.pt", "7", stored, "decord")
    item = feature_cache.load_features(tmp_path / "7.pt", "7", SETTINGS)
    assert all(torch.equal(item[k], stored[k]) for k in stored)
    raw = torch.load(str(tmp_path / "7.pt"), weights_only=True, mmap=True)
    assert raw.keys() == {"features", "scale", "offset", "crc32", "decoder"}
    half = {"features": torch.randn(24, 5).half()}
    feature_cache.save_features(tmp_path / "8.pt", "8", half, "pyav")
    item = feature_cache.load_features(tmp_path / "8.pt", "8", replace(SETTINGS, store="fp16"))
    assert torch.equal(item["features"], half["features"])
    assert (item["scale"] == 1).all() and (item["offset"] == 0).all()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")
def test_a_feature_file_is_read_ahead_of_its_mmap(tmp_path, monkeypatch):
    """Through an mmap, a file that was not in memory was read in small pieces, which took 1.5 times as
    long. Reading still works if the file system rejects the advice or posix_fadvise is missing."""
    path, calls, load = write(tmp_path / "7.pt"), [], torch.load

    def advise(fd, offset, length, advice):
        assert os.path.samestat(os.fstat(fd), os.stat(path))
        calls.append((offset, length, advice))
        raise OSError(errno.EINVAL, "no advice here")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append("load") or load(*a, **k))
    item = feature_cache.load_features(path, "7", SETTINGS)
    assert calls == [(0, 0, os.POSIX_FADV_WILLNEED), "load"]
    monkeypatch.delattr(os, "posix_fadvise")
    assert torch.equal(
        feature_cache.load_features(path, "7", SETTINGS)["features"], item["features"]
    )


def test_bytes_depend_on_the_content_only(tmp_path):
    """torch.save(path) writes the file's name into the bytes, so equal caches would differ."""
    torch.manual_seed(3)
    a = write(tmp_path / "a.pt").read_bytes()
    torch.manual_seed(3)
    assert write(tmp_path / "b.pt").read_bytes() == a
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "cannot be read"),
        (lambda b: b"", "cannot be read"),
        (lambda b: b"#!/bin/sh", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    path = write(tmp_path / "7.pt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"clip 7 .*{message}"):
        feature_cache.load_features(path, "7", SETTINGS)


def test_flipped_bytes_are_found(tmp_path):
    """torch.load does not detect a flipped byte in a tensor, but the checksum does."""
    path = write(tmp_path / "7.pt")
    whole = path.read_bytes()
    at = whole.index(bytes(feature_cache.load_features(path, "7", SETTINGS)["features"][0].numpy()))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(UserError, match="checksum"):
        feature_cache.load_features(path, "7", SETTINGS)


def test_a_file_of_another_clip_is_refused(tmp_path):
    path = write(tmp_path / "7.pt", clip_id="8")
    with pytest.raises(UserError, match="checksum"):
        feature_cache.load_features(path, "7", SETTINGS)
    with pytest.raises(UserError, match="are missing"):
        feature_cache.load_features(tmp_path / "9.pt", "9", SETTINGS)
    with pytest.raises(UserError, match=r"not \(36, 5\)"):
        feature_cache.load_features(path, "7", replace(SETTINGS, grid=(3, 3, 4)))
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a valid feature file"):
        feature_cache.load_features(path, "7", SETTINGS)


ODD = {
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "on no device": lambda t: t.to("meta"),
    "with a gradient": lambda t: t.requires_grad_(),
    "negated": lambda t: t._neg_view(),
    "a parameter": torch.nn.Parameter,
    "64 GB from one number": lambda t: t[:1].expand(1 << 34),
    "nested lists": lambda t: functools.reduce(lambda value, _: [value], range(60)),
    "a set": lambda t: {1, 2},
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")  # torch calls nested tensors a prototype
def test_only_plain_tensors_and_values_are_read(name, tmp_path):
    """A checkpoint with sparse or nested weights ended in a traceback, and one with expanded weights asked
    for 64 GB."""
    torch.save({"a": [ODD[name](torch.ones(3))]}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"not a plain one|too deeply|a set|weights_only"):
        files.read_torch(tmp_path / "x.pt")
    torch.save({"features": ODD[name](torch.ones(3))}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="features of clip 7 "):
        feature_cache.load_features(tmp_path / "x.pt", "7", SETTINGS)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_caption_choice():
    """The label comes first, then paraphrases without repetition.

    Labels of clips without paraphrases were once computed K times, for the same gradient."""
    for epoch in range(5):
        chosen = dataset.choose_captions(RECORD, 4, seed=0, epoch=epoch)
        assert chosen[0] == ("label", "moving it")
        assert sorted(text for _, text in chosen[1:]) == ["One.", "Three.", "Two."]
        assert {style for style, _ in chosen[1:]} == {"sentence"}
        assert chosen == dataset.choose_captions(RECORD, 4, seed=0, epoch=epoch)
    orders = {tuple(dataset.choose_captions(RECORD, 4, 0, e)) for e in range(20)}
    assert len(orders) > 3
    assert len(set(dataset.choose_captions(RECORD, 6, 0, 0))) == 4
    assert len(dataset.choose_captions(RECORD, 6, 0, 0)) == 4
    twice = RECORD | {"paraphrases": [*RECORD["paraphrases"], *RECORD["paraphrases"]]}
    assert len(dataset.choose_captions(twice, 9, 0, 0)) == 4
    alone = RECORD | {"paraphrases": []}
    for count in (1, 3):
        assert dataset.choose_captions(alone, count, 0, 0) == [("label", "moving it")]


def test_a_single_slot_is_a_label_half_of_the_time():
    styles = Counter(
        dataset.choose_captions(RECORD | {"id": str(i)}, 1, 0, 0)[0][0] for i in range(2000)
    )
    assert 0.45 < styles["label"] / 2000 < 0.55


def test_collate_puts_loss_on_caption_and_eos_only(tokenizer):
    clip = quantise(torch.randn(24, 5))
    items = [
        {"id": "1", **clip, "captions": [dataset.encode_caption(tokenizer, "label", "up")]},
        {"id": "2", **clip, "captions": [dataset.encode_caption(tokenizer, "sentence", "Go up.")]},
    ]
    batch = dataset.collate(items)
    for row, (style, text) in enumerate([("label", "up"), ("sentence", "Go up.")]):
        length = batch["input_ids"].shape[1]
        of_row = batch["positions"] // length == row
        targets = batch["targets"][of_row]
        assert targets.tolist() == [*map(ord, " " + text), tokenizer.eos_token_id]
        after = batch["positions"][of_row] % length + 1  # a token is predicted one place before it
        assert torch.equal(batch["input_ids"][row, after], targets)
        prompt = dataset.STYLES[style]
        assert batch["input_ids"][row, : len(prompt)].tolist() == [*map(ord, prompt)]
        assert after.min() == len(prompt)


def test_ids_must_be_valid_file_names():
    good = ["1", "78687", "a b", "clip.final", "ä"]
    bad = ["", "..", "../../x", "a/b", "a\\b", ".hidden", "a\nb", "c:x", "x" * 300, None, 7]
    assert [i for i in good + bad if not names.id_problem(i)] == good


def test_shards_are_a_partition():
    ids = [str(i) for i in range(300)]
    ids.append("\udcff")  # a file name that is not UTF-8, which infer.py could not divide
    parts = [[i for i in ids if files.in_shard(i, part, 3)] for part in range(3)]
    assert sorted(i for part in parts for i in part) == sorted(ids)
    assert all(60 < len(p) < 140 for p in parts)


def test_missing_features_are_counted_and_named(tmp_path):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "7.pt")
    records = [{"id": i} for i in ("7", "8", "9")]
    with pytest.raises(UserError, match=r"2 of 3 clips .*for example 8, 9.*--split train"):
        feature_cache.require_features(tmp_path, "train", records)
    assert feature_cache.require_features(tmp_path, "train", records, 2) == records[:1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[]",
        "[1]",
        '[{"id": 7}]',
        '[{"id": "../x"}]',
        '[{"id": "1"}, {"id": "1"}]',
        "[" * 9999,
        '[{"id": "1", "label": 3}]',
        '[{"id": "1", "paraphrases": [3]}]',
    ],
)
def test_wrong_annotations_are_refused(tmp_path, content):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "train.json"))):
        dataset.load_records(tmp_path, "train")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {"width": 3}}'])
def test_wrong_manifests_are_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest"):
        feature_cache.load_manifest(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"settings": {"format_version": 9, "new": 1}}')
    with pytest.raises(UserError, match="has format version 9, but this code reads version 1"):
        feature_cache.load_manifest(tmp_path)


def test_io_errors_name_the_clip_and_memory_errors_do_not(tmp_path, monkeypatch):
    def fail(number):
        def read(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(feature_cache, "read_torch", read)

    fail(errno.EIO)
    with pytest.raises(UserError, match=r"features of clip 7 .*cannot be read"):
        feature_cache.load_features(tmp_path / "7.pt", "7", SETTINGS)
    fail(errno.ENOMEM)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        feature_cache.load_features(tmp_path / "7.pt", "7", SETTINGS)


def test_channel_statistics(tmp_path):
    (tmp_path / "train").mkdir()
    clips, ids = [], []
    for i in range(7):
        x = torch.randn(24, 5) * torch.arange(5) + 1000
        stored = quantise(x)
        feature_cache.save_features(tmp_path / "train" / f"{i}.pt", str(i), stored, "decord")
        clips.append(stored["features"].double() * stored["scale"] + stored["offset"])
        ids.append(str(i))
    mean, std = feature_cache.channel_statistics(tmp_path, "train", ids, SETTINGS, workers=2)
    every = torch.cat(clips)
    torch.testing.assert_close(mean, every.mean(0).float())
    torch.testing.assert_close(std[1:], every.std(0, correction=0).float()[1:], rtol=1e-4, atol=0)
    assert std[0] >= 1e-6  # a constant channel must not divide by zero
