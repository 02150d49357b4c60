"""Write a tiny data set in Charades' layout, made from the clips of a toy world.

    python -m worlds.toy_ssv2 data/toy
    python -m worlds.toy_charades data/toy data/charades

A video has a left and a right half. Each half shows zero to two clips of the toy world, one after
the other, with pauses, so actions can overlap in time. Videos of the test split are made from
validation clips. The data are synthetic, so scores say nothing about Charades. The defaults take
about 15 s and 6 MB:

    videos/                               <ID>.mp4, VP9, 12 frames/s, 128x64, 1-7 s
    Charades_v1_train.csv, _test.csv      the script and descriptions name all actions; some videos have no
                                          action, some actions end after the video or occur twice
    Charades_v1_classes.txt               c000, c001, … in the order of the toy world's actions
    toy.json                              the flags; "synthetic": true

The same flags always give the same files. A second run keeps finished videos.
"""

import runtime.start

import csv
import io
import random
import string
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import TEST, TRAIN, VALIDATION
from runtime import cli
from runtime.charades import CLASSES, SPLITS
from runtime.cli import existing, parser, whole
from runtime.errors import UserError
from runtime.files import read_json, write_atomic
from runtime.names import list_names
from worlds.shapes import ACTIONS, deck, label_of, plan, sentences_of
from worlds.shapes_video import SIZE, render
from worlds.ssv2_files import RATE, mark_finished, mark_started, write_video

WORLD = 1  # increment when a change to the code changes the files
GREY = 28  # brightness where no clip is shown
NUMBER = {action.keyword: f"c{i:03}" for i, action in enumerate(ACTIONS)}
COLUMNS = ("id", "subject", "scene", "quality", "relevance", "verified", "script", "objects")
COLUMNS += ("descriptions", "actions", "length")


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("toy", help="folder of a toy world, written by worlds.toy_ssv2")
    p.add_argument("output", help="folder for the data set")
    p.add_argument("--videos", type=whole(10), default=400, help="number of training videos")
    p.add_argument("--test-videos", type=whole(2), default=150, help="number of test videos")
    p.add_argument("--seed", type=cli.seed, default=0, help="seed of all random choices")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    hint = "Run python -m worlds.toy_ssv2 first."
    world = read_json(existing(Path(args.toy) / "toy.json", "toy world", hint), "toy world")
    if not isinstance(world, dict) or not {"clips", "seed"} <= world.keys():
        raise UserError(f"{args.toy} is not a toy world of worlds.toy_ssv2")
    root, counts = Path(args.output), {TRAIN: args.videos, TEST: args.test_videos}
    settings = {"world": WORLD, "data": "Charades", "synthetic": True, "clips_of": world}
    mark_started(root, settings | {"videos": counts, "seed": args.seed})
    clips = plan(world["clips"], world["seed"])
    (root / "videos").mkdir(exist_ok=True)
    finished = set(list_names(root / "videos", ".mp4"))
    ids = iter(sample_ids(sum(counts.values()), args.seed))
    with tqdm(total=sum(counts.values()), desc="videos") as bar:
        for split, source in ((TRAIN, TRAIN), (TEST, VALIDATION)):
            rng = random.Random(f"charades:{split}:{args.seed}")
            cards = deck(rng, [c for c in clips if c["split"] == source])
            rows = []
            for _ in range(counts[split]):
                name = next(ids)
                video, shown = join(rng, cards, world["seed"])
                if f"{name}.mp4" not in finished:
                    write_video(root / "videos" / f"{name}.mp4", video)
                rows.append(row_of(rng, name, shown, len(video) / RATE))
                bar.update()
            write_csv(root / SPLITS[split], rows)
    names = [f"{NUMBER[a.keyword]} {plain(a.template)}\n" for a in ACTIONS]
    write_atomic(root / CLASSES, "".join(names).encode())
    mark_finished(root, settings | {"videos": counts, "seed": args.seed})
    print(f"{root}: {', '.join(f'{n} videos {split}' for split, n in counts.items())}")


def sample_ids(count, seed):
    """Sample distinct ids such as 46GP8."""
    rng, found = random.Random(f"charades ids:{seed}"), {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase + string.digits, k=5))] = True
    return list(found)


def join(rng, clips, seed):
    """Join the next zero to four clips into one video. Returns (video, shown).

    video: uint8 (frames, SIZE, 2 * SIZE, 3). shown: [(clip, start, end)] in seconds, in order of start.
    """
    pieces = []  # half, first frame, clip, frames
    ends = [RATE]
    for half in (0, 1):
        first = rng.randint(0, RATE)
        for _ in range(rng.randint(0, 2)):
            clip = next(clips)
            frames = render(clip, seed)
            pieces.append((half, first, clip, frames))
            ends.append(first + len(frames))
            first = ends[-1] + rng.randint(0, RATE)
    video = np.full((max(ends) + rng.randint(0, RATE // 2), SIZE, 2 * SIZE, 3), GREY, np.uint8)
    for half, first, _, frames in pieces:
        video[first : first + len(frames), :, half * SIZE : (half + 1) * SIZE] = frames
    shown = [(clip, first / RATE, (first + len(f)) / RATE) for _, first, clip, f in pieces]
    return video, sorted(shown, key=lambda piece: piece[1])


def row_of(rng, name, shown, length):
    """Return the row of a video.

    In one of eight videos with actions, the last action ends after the end of the video.
    """
    labels = [label_of(clip) for clip, *_ in shown]
    script = f"Someone is {', and '.join(labels)}." if shown else "Nothing happens."
    descriptions = [
        " ".join(rng.choice(sentences_of(clip)) for clip, *_ in shown) or script for _ in range(2)
    ]
    intervals = [(NUMBER[clip["action"]], start, end) for clip, start, end in shown]
    if intervals and rng.random() < 1 / 8:
        action, start, _ = intervals[-1]
        intervals[-1] = action, start, length + rng.uniform(0.1, 2)
    cells = {"id": name, "script": script, "descriptions": ";".join(descriptions)}
    cells |= {"subject": "TOY", "scene": "Grey, flat", "quality": 7, "relevance": 7}
    objects = {thing for clip, *_ in shown for thing in clip["objects"]}
    cells |= {"verified": "Yes", "objects": ";".join(sorted(objects)), "length": f"{length:.2f}"}
    actions = ";".join(f"{action} {start:.2f} {end:.2f}" for action, start, end in intervals)
    return cells | {"actions": actions}


def plain(template):
    return template.replace("[", "").replace("]", "")


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


if __name__ == "__main__":
    cli.run(main)
