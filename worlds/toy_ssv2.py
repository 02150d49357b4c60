"""Write a tiny data set in Something-Something-V2's layout, and the two tiny models to run on it.

    python -m worlds.toy_ssv2 data/toy

With `--encoder data/toy/encoder` and `--lm data/toy/lm` the real scripts run on it unchanged, without
SSv2, pretrained weights or a GPU. Coloured shapes move over a grey background. The action can only be
recognised from their motion, so one frame is not enough. Scores do not carry over to SSv2. The defaults
take about 100 s on two idle cores (est.) and 47 MB:

    videos/       <id>.webm, VP9, 12 frames/s, 64x64, 18-28 frames
    labels/       train, validation, test, labels (.json) and test-answers.csv as SSv2 has them, and
                  validation_pairs    two objects that never occur together in training
                  validation_objects  combinations of colour and shape that training never shows
    paraphrases/  ten shards of whole sentences for training, one file for validation
    encoder/      a V-JEPA 2 with random weights
    lm/           a Qwen2 trained on text alone to turn keywords into captions. Without this training,
                  no prefix could control the frozen model.

The same flags always give the same files. A second run keeps finished files.
"""

import runtime.start

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime import cli
from runtime.cli import add_workers, parser, whole
from runtime.errors import FAILED, UserError
from runtime.names import counted
from worlds.shapes import ACTIONS, COLOURS, SINGLE, paraphrases_of, plan
from worlds.ssv2_files import (
    ignore_interrupt,
    make_folder,
    mark_finished,
    mark_started,
    start_clips,
    write_labels,
    write_paraphrases,
)
from worlds.toy_models import SIZE, write_encoder, write_lm

WORLD = 1  # increment when a change to the code changes the files
FRAMES = (18, 28)  # per clip; more than the encoder's 16, so that sampling matters
OLD_PREFIX = "something-something-v2-"  # of the label files


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("output", help="folder for the toy world")
    group = p.add_argument_group("world")
    group.add_argument("--clips", type=whole(50), default=4000, help="number of training clips")
    group.add_argument("--seed", type=whole(0), default=0, help="seed of all random choices")
    group.add_argument(
        "--old-names",
        action="store_true",
        help="name the label files something-something-v2-train.json and so on",
    )
    group = p.add_argument_group("language model")
    group.add_argument(
        "--lm-steps",
        type=whole(1),
        default=800,
        help="training steps of the language model (32 captions each)",
    )
    group = p.add_argument_group("machine")
    add_workers(group, 2, least=1)
    return p.parse_args(argv)


# ---- clips ---------------------------------------------------------------------------------


def motion(action, frames, rng):
    """Compute the paths of a clip's objects.

    Returns centres (objects, frames, 2) as x, y and radii (objects, frames). All one-object actions share
    one distribution of initial positions, and all two-object actions share another, so that the action
    cannot be inferred from the first frame.
    """
    lead, tail = rng.uniform(0.03, 0.12, 2)
    t = np.clip((np.linspace(0, 1, frames) - lead) / (1 - lead - tail), 0, 1)  # (frames,)
    ease, there_and_back = t * t * (3 - 2 * t), np.sin(np.pi * t)
    still = np.zeros(frames)
    if action in {a.keyword for a in SINGLE}:
        x, y, r = rng.uniform(27, 37), rng.uniform(24, 34), rng.uniform(12, 13.5)
        far, back = rng.uniform(22, 26), rng.uniform(15, 18)
        floor = 63 - r
        fall = np.clip((t - 0.2) / 0.3, 0, 1) ** 2 * (floor - y)
        bounce = np.clip((t - 0.5) / 0.35, 0, 1)
        turn = {"clockwise": 1, "anticlockwise": -1}.get(action, 0) * 2 * np.pi * ease
        start = rng.uniform(-0.3, 0.3) - np.pi / 2  # from the top of the circle
        dx, dy, zoom = {
            "right": (far * ease, still, still),
            "left": (-far * ease, still, still),
            "up": (still, -far * ease, still),
            "down": (still, far * ease, still),
            "drop": (still, fall - 0.7 * (floor - y) * 4 * bounce * (1 - bounce), still),
            "near": (still, still, 0.9 * ease),
            "far": (still, still, -0.6 * ease),
            "sham": (back * there_and_back * rng.choice((-1, 1)), still, still),
            "feint": (still, -back * there_and_back, still),
        }.get(action, (13 * (np.cos(start + turn) - np.cos(start)), None, still))
        if dy is None:
            dy = 13 * (np.sin(start + turn) - np.sin(start))
        return np.stack([x + dx, y + dy], -1)[None], (r * (1 + zoom))[None]
    angle, half = rng.uniform(-0.15, 0.15), rng.uniform(15.5, 16.5)
    axis = np.array([np.cos(angle), np.sin(angle)])  # the object on the left is named first
    middle = rng.uniform((31, 28), (33, 36))
    r = rng.uniform(10, 11, 2)
    gap = 2 * half - r.sum()
    hit, flight = np.clip(t / 0.45, 0, 1), np.clip((t - 0.45) / 0.45, 0, 1)
    a, b = {  # displacement of both along the axis, which points from the first to the second
        "against": (gap * ease, still),
        "leave": (-18 * ease, still),
        "together": ((half - 6) * ease, -(half - 6) * ease),
        "apart": (-12 * ease, 12 * ease),
        "knock": (-22 * flight * (2 - flight), -gap * hit),
        "cover": (2 * half * ease, still),
    }[action]
    centres = np.stack([(a - half)[:, None] * axis, (b + half)[:, None] * axis]) + middle
    return centres, np.repeat(r[:, None], frames, 1)


def signed_distance(shape, x, y):
    """Compute the distance from points (x, y) to the outline of a shape of radius 1. Negative inside."""
    if shape in ("pole", "fence"):
        x, y, shape = y, x, {"pole": "bar", "fence": "ladder"}[shape]
    ax, ay = np.abs(x), np.abs(y)
    if shape == "disc":
        return np.sqrt(x * x + y * y) - 1
    if shape == "bar":
        return np.maximum(ax - 1.1, ay - 0.36)
    if shape == "ladder":  # three rungs
        return np.maximum(ax - 0.95, np.minimum(ay, np.abs(ay - 0.74)) - 0.22)
    u, v = np.abs(x + y) * 0.707, np.abs(x - y) * 0.707
    return np.maximum(np.minimum(u, v) - 0.24, np.maximum(u, v) - 1.1)  # cross


def render(clip, seed):
    """Render one clip, antialiased: uint8 (frames, SIZE, SIZE, 3). Depends only on (seed, id)."""
    rng = np.random.default_rng([seed, int(clip["id"])])
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    centres, radii = motion(clip["action"], frames, rng)

    # a grey background with a gradient and noise
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    slope = rng.uniform(-0.2, 0.2, 2)
    background = rng.uniform(15, 40) + slope[0] * (axis - 32) + slope[1] * (axis - 32)[:, None]
    background = (background + rng.normal(0, 3, (SIZE, SIZE))).astype(np.float32)
    video = np.repeat(background[None], frames, 0)[None].repeat(3, 0)  # (3, frames, SIZE, SIZE)

    # the objects; the first one covers the second
    for name, path, radius in reversed(list(zip(clip["objects"], centres, radii, strict=True))):
        colour, shape = name.split()
        path, radius = path.astype(np.float32), radius.astype(np.float32)[:, None]
        x = ((axis - path[:, :1]) / radius)[:, None, :]
        y = ((axis - path[:, 1:]) / radius)[:, :, None]
        distance = signed_distance(shape, x, y) * radius[..., None]  # (frames, SIZE, SIZE)
        cover = np.clip(0.5 - distance, 0, 1)
        for plane, value in zip(video, COLOURS[colour], strict=True):
            plane += cover * (np.float32(value) - plane)

    # brightness that changes over time
    light = rng.uniform(0.92, 1.06) + rng.uniform(-0.03, 0.03) * np.linspace(-1, 1, frames)
    video *= light.astype(np.float32)[:, None, None]
    return np.clip(video, 0, 255, out=video).astype(np.uint8).transpose(1, 2, 3, 0).copy()


def main(argv=None):
    args = parse_args(argv)
    root = Path(args.output)
    settings = {"world": WORLD, "clips": args.clips, "seed": args.seed}
    settings |= {"old_names": args.old_names, "lm_steps": args.lm_steps}
    mark_started(root, settings)
    clips = plan(args.clips, args.seed)
    templates = {action.keyword: action.template for action in ACTIONS}
    prefix = OLD_PREFIX if args.old_names else ""
    make_folder(root, "labels", lambda folder: write_labels(folder, clips, templates, prefix))
    make_folder(
        root,
        "paraphrases",
        lambda folder: write_paraphrases(folder, clips, lambda c: paraphrases_of(c, args.seed)),
    )
    pool = ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=ignore_interrupt
    )
    with tqdm(total=len(clips), desc="clips", unit=" clips") as bar:
        try:
            futures = start_clips(pool, root / "videos", clips, render, args.seed, bar)
            make_folder(root, "encoder", lambda folder: write_encoder(folder, args.seed))
            report = make_folder(
                root,
                "lm",
                lambda folder: write_lm(folder, args.seed, args.lm_steps, bar.set_postfix_str),
            )
            for future in futures:
                future.result()
        except OSError as error:  # most likely a full disk
            raise UserError(f"cannot write to {root}: {error}", code=FAILED) from None
        finally:
            pool.shutdown(cancel_futures=True)
    if report:
        print(report)
    mark_finished(root, settings)
    counts = Counter(c["split"] for c in clips)
    parts = [f"{counted(n, 'clip')} {split}" for split, n in counts.items()]
    print(f"{root}: {', '.join(parts)}")


if __name__ == "__main__":
    cli.run(main)
