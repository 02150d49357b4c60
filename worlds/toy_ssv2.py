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

import multiprocessing
import os
import shutil
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import TEST, TRAIN, VALIDATION
from runtime.cli import add_workers, note, parser, run, whole
from runtime.errors import FAILED, UserError
from runtime.files import read_json, write_json
from runtime.names import counted, list_names, visible
from worlds.shapes import (
    ACTIONS,
    COLOURS,
    SINGLE,
    action_of,
    label_of,
    paraphrases_of,
    plan,
)
from worlds.toy_models import SIZE, write_encoder, write_lm

WORLD = 1  # increment when a change to the code changes the files
RATE = 12  # frames per second, as SSv2
FRAMES = (18, 28)  # per clip; more than the encoder's 16, so that sampling matters


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


# ---- labels and paraphrases ---------------------------------------------------------------


def write_labels(folder, clips, old_names):
    prefix = "something-something-v2-" if old_names else ""
    bare = {a.keyword: a.template.replace("[", "").replace("]", "") for a in ACTIONS}
    for split in dict.fromkeys(c["split"] for c in clips):
        records = [
            {
                "id": c["id"],
                "label": label_of(c),
                "template": action_of(c).template,
                "placeholders": c["objects"],
            }
            for c in clips
            if c["split"] == split
        ]
        if split == TEST:
            records = [{"id": r["id"]} for r in records]
        write_json(folder / f"{prefix}{split}.json", records)
    ordered = sorted(bare.values(), key=str.lower)
    write_json(folder / f"{prefix}labels.json", {text: str(i) for i, text in enumerate(ordered)})
    rows = [f"{c['id']};{bare[c['action']]}\n" for c in clips if c["split"] == TEST]
    (folder / "test-answers.csv").write_text("".join(rows), encoding="utf-8")


def write_paraphrases(folder, clips, seed):
    def shard(name, clips):
        write_json(
            folder / f"ssv2_paraphrase_{name}.json",
            {c["id"]: paraphrases_of(c, seed) for c in clips},
        )

    train = [c for c in clips if c["split"] == TRAIN]
    for i in range(10):
        shard(f"train_{i}", train[i::10])
    shard(VALIDATION, [c for c in clips if c["split"] == VALIDATION])


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


def write_video(path, video):
    """Encode frames as VP9 in webm or mp4, by the suffix of `path`. The same frames give the same bytes."""
    import av

    temporary = path.with_name(f".{path.name}.tmp")
    speed = {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "threads": "1"}
    exact = {"fflags": "+bitexact"}  # otherwise the container gets a random id
    with av.open(str(temporary), "w", format=path.suffix[1:], options=exact) as container:
        stream = container.add_stream("libvpx-vp9", rate=RATE, options=speed)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(temporary, path)


def write_clips(folder, clips, seed):
    """Render and encode a few clips, in a worker. Returns their number."""
    for clip in clips:
        write_video(Path(folder) / f"{clip['id']}.webm", render(clip, seed))
    return len(clips)


def ignore_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C


# ---- the output folder ---------------------------------------------------------------------


def mark_started(root, settings):
    """Mark `root` as a toy world with these settings. Raises UserError if it is anything else."""
    done, started = root / "toy.json", root / ".toy-started.json"
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file, not a folder")
    marker = next((m for m in (done, started) if m.is_file()), None)
    if marker is None:
        if visible(root):
            raise UserError(f"{root} is not empty and not a toy world. Choose another folder.")
        root.mkdir(parents=True, exist_ok=True)
        write_json(started, settings)
        return
    existing = read_json(marker, "toy world")
    existing = existing if isinstance(existing, dict) else {}
    for key in settings:
        if existing.get(key) != settings[key]:
            raise UserError(
                f"{root} has a toy world with {key} = {existing.get(key)!r}, not {settings[key]!r}."
                " Use the same flags, delete the folder, or choose another one."
            )


def make_folder(root, name, fill):
    """Make `root/name` atomically by `fill(folder)`, or keep an existing one. Returns fill's result."""
    if (root / name).is_dir():
        note(f"{name}/ exists and is kept")
        return None
    temporary = root / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    result = fill(temporary)
    os.replace(temporary, root / name)
    return result


def start_clips(pool, folder, clips, seed, bar):
    """Submit the missing clips to the pool in batches of 20. Returns the futures."""
    folder.mkdir(exist_ok=True)
    existing = set(list_names(folder, ".webm"))
    missing = [c for c in clips if f"{c['id']}.webm" not in existing]
    bar.update(len(clips) - len(missing))
    bar.initial = bar.n  # otherwise existing clips would count towards the speed
    if len(missing) < len(clips):
        note(f"videos/: kept {counted(len(clips) - len(missing), 'existing clip')}")

    def count(future):
        if not future.cancelled() and not future.exception():
            bar.update(future.result())

    futures = []
    for start in range(0, len(missing), 20):
        futures.append(pool.submit(write_clips, str(folder), missing[start : start + 20], seed))
        futures[-1].add_done_callback(count)
    return futures


def main(argv=None):
    args = parse_args(argv)
    root = Path(args.output)
    settings = {"world": WORLD, "clips": args.clips, "seed": args.seed}
    settings |= {"old_names": args.old_names, "lm_steps": args.lm_steps}
    mark_started(root, settings)
    clips = plan(args.clips, args.seed)
    make_folder(root, "labels", lambda folder: write_labels(folder, clips, args.old_names))
    make_folder(root, "paraphrases", lambda folder: write_paraphrases(folder, clips, args.seed))
    interval = 0.2 if os.isatty(2) else 15
    pool = ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=ignore_interrupt
    )
    with tqdm(total=len(clips), desc="clips", unit=" clips", mininterval=interval) as bar:
        try:
            futures = start_clips(pool, root / "videos", clips, args.seed, bar)
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
    write_json(root / "toy.json", settings)
    (root / ".toy-started.json").unlink(missing_ok=True)
    counts = Counter(c["split"] for c in clips)
    parts = [f"{counted(n, 'clip')} {split}" for split, n in counts.items()]
    print(f"{root}: {', '.join(parts)}")


if __name__ == "__main__":
    run(main)
