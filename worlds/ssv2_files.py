"""Write the files of a data set in Something-Something-V2's layout: labels, paraphrases, clips."""

import os
import shutil
import signal
from pathlib import Path

from dataset import TEST, TRAIN, VALIDATION
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import read_json, write_json
from runtime.names import counted, list_names, visible

RATE = 12  # frames per second, as SSv2


# ---- labels and paraphrases ---------------------------------------------------------------


def fill(template, objects):
    """Return the label as in SSv2: the template in lower case with the objects filled in."""
    text = template.lower()
    for name in objects:
        text = text.replace("[something]", name, 1)
    return text


def write_labels(folder, clips, templates, prefix=""):
    """Write the label files of all splits, labels.json and test-answers.csv.

    clips: dicts with "id", "split", "action" and "objects". templates: {action: template}, of all
    actions. prefix: of the names of the .json files.
    """
    bare = {action: text.replace("[", "").replace("]", "") for action, text in templates.items()}
    for split in dict.fromkeys(c["split"] for c in clips):
        records = [
            {
                "id": c["id"],
                "label": fill(templates[c["action"]], c["objects"]),
                "template": templates[c["action"]],
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


def write_paraphrases(folder, clips, paraphrases_of):
    """Write ten shards for training and one file for validation. paraphrases_of(clip): list of str."""

    def shard(name, clips):
        texts = {c["id"]: paraphrases_of(c) for c in clips}
        write_json(folder / f"ssv2_paraphrase_{name}.json", texts)

    train = [c for c in clips if c["split"] == TRAIN]
    for i in range(10):
        shard(f"train_{i}", train[i::10])
    shard(VALIDATION, [c for c in clips if c["split"] == VALIDATION])


# ---- clips ---------------------------------------------------------------------------------


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


def write_clips(folder, clips, render, seed):
    """Render and encode a few clips, in a worker. Returns their number.

    render: a function of a module, of (clip, seed), that returns uint8 (frames, height, width, 3).
    """
    for clip in clips:
        write_video(Path(folder) / f"{clip['id']}.webm", render(clip, seed))
    return len(clips)


def start_clips(pool, folder, clips, render, seed, bar):
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
        batch = missing[start : start + 20]
        futures.append(pool.submit(write_clips, str(folder), batch, render, seed))
        futures[-1].add_done_callback(count)
    return futures


def ignore_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C


# ---- the output folder ---------------------------------------------------------------------


def mark_started(root, settings, kind="toy"):
    """Mark `root` as a world of this kind with these settings. Raises UserError if it is anything else."""
    done, started = root / f"{kind}.json", root / f".{kind}-started.json"
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file, not a folder")
    marker = next((m for m in (done, started) if m.is_file()), None)
    if marker is None:
        if visible(root):
            raise UserError(f"{root} is not empty and not a {kind} world. Choose another folder.")
        root.mkdir(parents=True, exist_ok=True)
        write_json(started, settings)
        return
    existing = read_json(marker, f"{kind} world")
    existing = existing if isinstance(existing, dict) else {}
    for key in settings:
        if existing.get(key) != settings[key]:
            raise UserError(
                f"{root} has a {kind} world with {key} = {existing.get(key)!r}, not {settings[key]!r}."
                " Use the same flags, delete the folder, or choose another one."
            )


def mark_finished(root, settings, kind="toy"):
    """Record that the world in `root` is complete."""
    write_json(root / f"{kind}.json", settings)
    (root / f".{kind}-started.json").unlink(missing_ok=True)


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
