"""Files with one caption per clip: the predictions of evaluate.py (COCO results) and files of infer.py."""

import csv
import io
from collections import Counter
from pathlib import Path

from runtime.caption_files import COLUMNS, read_results, unescaped
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import read_json, read_text, write_json
from runtime.names import counted, first_few, safe_id

SAME_IN_PARTS = ("split", "style", "control", "num_beams", "max_new_tokens", "weights")
TABLES = {".csv": ",", ".tsv": "\t"}


def write_predictions(path, predictions):
    """Write captions in the COCO result format, [{"image_id": id, "caption": text}, …]."""
    write_json(path, [{"image_id": i, "caption": text} for i, text in predictions.items()])


def read_predictions(paths, ids):
    """Read files of captions, or all parts of a sharded run. Returns {id: caption}.

    ids: of the clips in the split. Files written by infer.py (.jsonl, .csv or .tsv) may contain other clips,
    because it captions whole folders. These are left out, with a note. Raises UserError if a file is not
    valid, if a clip occurs more than once, or if parts were made with different settings.
    """
    paths = [str(path) for path in paths]
    if other := [p for p in paths if Path(p).suffix.lower() in (".srt", ".vtt", ".txt")]:
        raise UserError(f"captions {other[0]}: only .json, .jsonl, .csv and .tsv can be scored")
    written = [p for p in paths if Path(p).suffix.lower() in (*TABLES, ".jsonl")]
    entries = [entry for path in paths if path not in written for entry in read_coco(path)]
    check_parts(paths)
    others = 0
    for path in written:
        captions = read_written(path)
        entries += [{"image_id": i, "caption": t} for i, t in captions if i in ids]
        others += sum(i not in ids for i, _ in captions)
    if others:
        clips = counted(others, "clip is", "clips are")
        note(f"{', '.join(written)}: {clips} not in this split and left out")
    return predictions_by_id(entries)


def read_coco(path):
    """Read a file in the COCO result format, see `write_predictions`. Raises UserError if it is not valid."""
    entries = read_json(path, "predictions")
    if not isinstance(entries, list):
        raise UserError(f'predictions {path} must be a list of {{"image_id": id, "caption": text}}')
    for n, entry in enumerate(entries, 1):
        is_caption = isinstance(entry, dict) and isinstance(entry.get("caption"), str)
        if not (is_caption and "image_id" in entry):
            raise UserError(
                f'predictions {path}: entry {n} is not like {{"image_id": id, "caption": text}}'
            )
    return entries


def predictions_by_id(entries):
    """Convert entries of `read_coco` to {id: caption}. Raises UserError if a clip occurs more than once."""
    counts = Counter(str(e["image_id"]) for e in entries)
    if repeated := [i for i, count in counts.items() if count > 1]:
        raise UserError(f"clips predicted more than once: {first_few(repeated)}")
    return {str(e["image_id"]): e["caption"] for e in entries}


def read_written(path):
    """Read captions that infer.py wrote, from .jsonl, .csv or .tsv. Returns [(id, caption)].

    The id is the name of the clip's file without its ending, as in the annotations. Clips that failed are
    left out. Of several samples, the likeliest is used. Raises UserError if the file is not valid or a clip
    has more than one window.
    """
    spans = spans_of_table(path) if Path(path).suffix.lower() in TABLES else spans_of_json(path)
    if long := [clip for clip, captions in spans.items() if len(captions) > 1]:
        clips = counted(len(long), "clip has", "clips have")
        raise UserError(
            f"captions {path}: {clips} several windows, for example {Path(long[0]).name}; to compare captions"
            " with references, caption them with a --window longer than the clips"
        )
    return [(safe_id(Path(clip).stem), *captions.values()) for clip, captions in spans.items()]


def spans_of_json(path):
    """Return {path of a clip: {(start, end): caption}} from a file in JSON lines."""
    spans = {}
    for clip, result in read_results(path).items():
        windows = result.get("windows", [])
        if "error" in result or not isinstance(windows, list):
            continue
        for span in windows:
            if not (isinstance(span, dict) and isinstance(span.get("caption"), str)):
                raise UserError(f"captions {path}: the entry of {clip} was not written by infer.py")
            spans.setdefault(clip, {})[span.get("start"), span.get("end")] = span["caption"]
        if "failed" in result and clip in spans:
            spans[clip]["failed"] = ""  # as in tables, where such windows have a row
    if not spans:
        raise UserError(f"captions {path} has no caption that infer.py wrote")
    return spans


def spans_of_table(path):
    """Return {path of a clip: {(start, end): caption}} from a table with the columns COLUMNS."""
    form = Path(path).suffix.lower()
    lines, spans = io.StringIO(read_text(path, "captions"), newline=""), {}
    quoting = csv.QUOTE_MINIMAL if form == ".csv" else csv.QUOTE_NONE
    header, *rows = [*csv.reader(lines, delimiter=TABLES[form], quoting=quoting)] or [[]]
    if tuple(header) != COLUMNS or not all(len(row) == len(COLUMNS) for row in rows):
        raise UserError(f"captions {path} must have the columns {', '.join(COLUMNS)} of infer.py")
    for row in rows:
        clip, start, end, caption, *_ = map(unescaped, row) if form == ".csv" else row
        spans.setdefault(clip, {}).setdefault((start, end), caption)
    return spans


def check_parts(paths):
    """Raise UserError if the settings recorded beside the parts of a sharded run are not the same."""
    first = None
    for path in map(Path, paths):
        file = path.with_name("settings_" + path.name.removeprefix("predictions_"))
        if not file.is_file() or not path.name.startswith("predictions_"):
            continue
        settings = read_json(file, "settings")
        if not isinstance(settings, dict):
            raise UserError(f"settings {file} must contain a JSON object")
        settings = {name: settings.get(name) for name in SAME_IN_PARTS}
        first = first or (path, settings)
        for name, value in settings.items():
            if value != first[1][name]:
                raise UserError(
                    f"{path} was made with {name} = {value!r}, but {first[0]} with"
                    f" {first[1][name]!r}; parts must be of one checkpoint and have the same settings"
                )
