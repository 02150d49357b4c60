"""Read the annotation files of Charades (Sigurdsson et al. 2016, arXiv:1604.01753).

Charades_v1_train.csv, Charades_v1_test.csv   one video per row: id, script, descriptions, actions, length
Charades_v1_classes.txt                       one class per line, such as "c008 Opening a door"
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import existing
from runtime.errors import refuse, refuse_file
from runtime.files import read_text, write_atomic
from runtime.table import read_table

SPLITS = {"train": "Charades_v1_train.csv", "test": "Charades_v1_test.csv"}
CLASSES = "Charades_v1_classes.txt"
NUM_CLASSES = 157


@dataclass(frozen=True)
class Video:
    """A row of Charades' CSV files.

    length: in seconds, or None if the file lacks it, as old copies do. actions: tuples
    (class, start, end), in seconds.
    """

    id: str
    script: str
    descriptions: tuple
    length: float | None
    actions: tuple


def read(folder):
    """Read the folder with Charades' annotations. Returns ({split: list of `Video`}, oddities).

    oddities: a Counter of problems that are not errors. An action that ends after the end of the
    video is cut there; one that starts after it is left out. Raises UserError if a file is missing or
    a row is not valid.
    """
    folder = existing(
        folder, "--charades", f"It must contain {', '.join([*SPLITS.values(), CLASSES])}."
    )
    refuse_file(folder, "--charades")
    for name in (*SPLITS.values(), CLASSES):
        existing(folder / name, "--charades", "It is one of the annotation files of Charades.")
    classes, oddities = read_classes(folder / CLASSES), Counter()
    columns = ("id", "script", "descriptions", "actions"), ("length",)
    splits = {}
    for split, name in SPLITS.items():
        rows = read_table(folder / name, "--charades", *columns)
        bad, videos = [], []
        for where, row in rows:
            try:
                videos.append(parse_row(row, classes, oddities))
            except (ValueError, KeyError) as error:
                bad.append(f"{where}: {error}")
        refuse(bad, f"rows of {folder / name} are not valid")
        splits[split] = videos
    counts = Counter(v.id for videos in splits.values() for v in videos)
    refuse([i for i, n in counts.items() if n > 1], "videos occur more than once")
    return splits, oddities


def read_classes(path):
    """Read the file of classes. Returns {code: class}, such as {"c008": "c008 Opening a door"}."""
    lines = [" ".join(line.split()) for line in read_text(path, "--charades").splitlines()]
    lines = [line for line in lines if line]
    bad = [line for line in lines if not re.fullmatch(r"c\d{3} \S.*", line)]
    refuse(bad, f"lines of {path} are not a class such as 'c008 Opening a door'")
    counts = Counter(line[:4] for line in lines)
    refuse([code for code, n in counts.items() if n > 1], f"classes occur more than once in {path}")
    return {line[:4]: line for line in lines}


def parse_row(row, classes, oddities):
    """Turn a row, {column: text}, into a `Video`, and count its oddities in a Counter.

    Raises ValueError or KeyError if the row is not valid.
    """
    length = None
    if text := (row.get("length") or "").strip():
        length = seconds(text, f"the length {text!r} is not a number of seconds")
    actions = []
    for text in filter(None, map(str.strip, (row.get("actions") or "").split(";"))):
        problem = (
            f"the action {text!r} is not a class, a start and an end, as in 'c092 11.90 21.20'"
        )
        if len(parts := text.split()) != 3:
            raise ValueError(problem)
        name, start, end = parts[0], seconds(parts[1], problem), seconds(parts[2], problem)
        if name not in classes:
            raise ValueError(f"class {name!r} is not in {CLASSES}")
        if end <= start:
            oddities["actions that do not end after they start, left out"] += 1
        elif length is not None and start >= length:
            oddities["actions that start after the end of the video, left out"] += 1
        else:
            if length is not None and end > length:
                oddities["actions that end after the end of the video, cut there"] += 1
                end = length
            actions.append((classes[name], start, end))
    names = [name for name, *_ in actions]
    oddities["actions that occur more than once in a video"] += len(names) - len({*names})
    oddities["videos without actions"] += not actions
    descriptions = tuple(filter(None, map(str.strip, (row.get("descriptions") or "").split(";"))))
    return Video(
        row["id"].strip(), (row.get("script") or "").strip(), descriptions, length, tuple(actions)
    )


def seconds(text, problem):
    """Convert a text to a number of seconds. Raises ValueError(problem) if it is not valid."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ValueError(problem)
    return value


def write_submission(path, scores, classes):
    """Write scores in the format of the Charades challenge: one line per video, its id and scores.

    scores: {file name of a video: scores of the classes}. A class of Charades, such as
    "c008 Opening a door", is written to the column of its number, here 8. There are
    157 columns; those without a class are 0.
    """
    numbers = [re.fullmatch(r"c(\d{3}) .*", name) for name in classes]
    columns = [int(n[1]) for n in numbers] if all(numbers) else list(range(len(classes)))
    width = max(NUM_CLASSES if all(numbers) else 0, max(columns) + 1)

    def line(video, values):
        row = [0.0] * width
        for column, value in zip(columns, values, strict=True):
            row[column] = value
        return f"{Path(video).stem} {' '.join(f'{v:.8g}' for v in row)}\n"

    text = "".join(line(video, values) for video, values in scores.items())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), text.encode())
