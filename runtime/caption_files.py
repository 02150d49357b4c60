"""The formats of captions, and files of captions that grow clip by clip. Standard library only.

A result is the dict of one clip, see `windows.description`:
{"path", "windows": [{"start", "end", "caption", "samples", "actions"}], "failed": [{"start", "end"}],
"warning"} or {"path", "error"}.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime import cli
from runtime.errors import UserError, explain
from runtime.files import is_path, lock, parse_json_lines, read_text, write_atomic
from runtime.names import counted, from_utf8, to_utf8
from runtime.table import read_table

SUBTITLES = ("srt", "vtt")
FILES = ("tsv", "csv", "jsonl", *SUBTITLES)
FORMATS = ("text", *FILES)
COLUMNS = ("path", "start", "end", "caption", "score", "actions")
# a warning of `windows.description`
SOME_FAILED = re.compile(r"\d+ of \d+ windows? could not be decoded")
RECORD = "captions.jsonl"


# ---- formats -------------------------------------------------------------------------------------


def header(form):
    """Return what a file of this format begins with."""
    return {"tsv": "\t".join(COLUMNS) + "\n", "csv": ",".join(COLUMNS) + "\n"}.get(form, "")


def formatted(result, form):
    """Return the text of one clip in one of FORMATS, "" if there is nothing to write."""
    if form == "jsonl":
        return json.dumps(as_json(result), ensure_ascii=False) + "\n"
    if form in SUBTITLES:
        return subtitles(result, form)
    return "".join(text_lines(result) if form == "text" else table_lines(result, form))


def as_json(result):
    """Return a result as JSON files have it: its path in UTF-8, and times to a tenth of a second."""
    spans = {k: list(map(rounded, result[k])) for k in ("windows", "failed") if k in result}
    return result | spans | {"path": to_utf8(result["path"])}


def rounded(span):
    return span | {key: round(span[key], 1) for key in ("start", "end")}


def text_lines(result):
    """Yield path<TAB>caption for a clip with one window, path<TAB>start-end<TAB>caption for others."""
    path = cli.printable(result["path"], keep="")  # escape line breaks in the file name
    spans = result.get("windows", [])
    is_part = len(spans) > 1 or "failed" in result
    for span in spans:
        time = f"\t{span['start']:.1f}-{span['end']:.1f}" if is_part else ""
        actions = f"\t{actions_of(span)}" if "actions" in span else ""
        for caption, score in captions_of(span):
            score = f"\t{score}" if score else ""
            yield f"{path}{time}\t{caption}{score}{actions}\n"


def table_lines(result, form):
    """Yield a row of COLUMNS for each caption of each window of a clip.

    The caption of a window that failed is empty. Without its row, the only window that worked would look
    like the whole clip.
    """
    path = path_cell(result["path"], form)
    failed = [span | {"caption": ""} for span in result.get("failed", [])]
    for span in sorted(result.get("windows", []) + failed, key=lambda span: span["start"]):
        times = f"{span['start']:.1f}", f"{span['end']:.1f}"
        for caption, score in captions_of(span):
            if form == "tsv":
                yield "\t".join((path, *times, caption, score, actions_of(span))) + "\n"
            else:
                row, cells = (
                    io.StringIO(),
                    (path, *times, harmless(caption), score, actions_of(span)),
                )
                csv.writer(row, lineterminator="\n").writerow(cells)
                yield row.getvalue()


def captions_of(span):
    """Return the captions of a window and their scores as text: of its samples, or one without score."""
    samples = span.get("samples")
    if samples is None:
        return [(span["caption"], "")]
    return [(s["caption"], f"{s['score']:.4f}") for s in samples]


def path_cell(path, form):
    """Return the name of a clip as tables have it, with its control characters escaped."""
    path = cli.printable(path, keep="")
    return harmless(path) if form == "csv" else path


def harmless(cell):
    """Put an apostrophe before what spreadsheets would compute."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def unescaped(cell):
    """Undo `harmless`."""
    return cell[1:] if cell[:1] == "'" and harmless(cell[1:]) == cell else cell


def actions_of(span):
    """Return the actions of a window as text, "" if no probe was applied."""
    actions = span.get("actions", ())
    return "; ".join(f"{a['action']} {a['probability']:.0%}" for a in actions)


def subtitles(result, form):
    """Return the subtitles of a film. A window ends where the next one starts."""
    spans = result.get("windows", [])
    starts = [span["start"] for span in spans[1:]] + [float("inf")]
    parts = ["WEBVTT\n"] if form == "vtt" else []
    for n, (span, following) in enumerate(zip(spans, starts, strict=True), 1):
        times = [clock(t, form) for t in (span["start"], min(span["end"], following))]
        caption = span["caption"].replace("-->", "->")
        if form == "vtt":
            caption = caption.replace("&", "&amp;").replace("<", "&lt;")
        parts.append(f"{n}\n{' --> '.join(times)}\n{caption}\n")
    return "\n".join(parts)


def clock(seconds, form):
    """Format a time, to a tenth of a second, as 00:01:02,300 (SRT) or 00:01:02.300 (VTT)."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    mark = "," if form == "srt" else "."
    return f"{minutes // 60:02}:{minutes % 60:02}:{tenths // 10:02}{mark}{tenths % 10}00"


# ---- files ---------------------------------------------------------------------------------------


def read_results(path):
    """Read a file of results in JSON lines: {path of the clip: its last result}.

    A last line that a kill has truncated is ignored. Raises UserError if the file cannot be read.
    """
    try:
        entries = parse_json_lines(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"captions {path} cannot be read: {error.strerror}") from None
    return {from_utf8(e["path"]): e for e in entries if is_path(e.get("path"))}


def has_results(path):
    """Return True if infer.py has written a file of captions: its columns or keys then include path."""
    head = next(filter(str.strip, read_text(path, "--captions").splitlines()), "").lower()
    if head.lstrip()[:1] in ("[", "{"):
        return '"path"' in head
    return "path" in (cell.strip(' "') for cell in re.split(r"[,;\t]", head))


def likeliest_captions(path):
    """Read the likeliest caption of each window from a file that infer.py has written.

    Returns [(where, row)] like `table.read_table`. A row has video (an absolute path), caption, score (None
    if the file has no scores) and, unless the window is the whole clip, start and end in seconds. Windows
    without a caption, because they failed, are left out. Raises UserError if a row is not valid.
    """
    if read_text(path, "--captions").strip().lower() in (
        header("csv").strip(),
        header("tsv").strip(),
    ):
        return []  # all clips failed
    rows = read_table(path, "--captions", ("path", "caption"), ("start", "end", "score"))
    windows = {}  # (path, start, end) -> (where, row); the likeliest sample comes first
    incomplete = set()  # paths of films with windows that failed; only JSON tells
    try:
        for where, row in rows:
            if SOME_FAILED.match(str(row.get("warning"))):
                incomplete.add(row["path"])
            for caption, score, start, end in captions_in(row):
                key = row["path"], start, end
                found = {
                    "video": unescaped(row["path"]),
                    "caption": unescaped(caption),
                    "score": score,
                }
                windows.setdefault(key, (where, found | {"start": start, "end": end}))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"--captions {path}, {where}: not a line written by infer.py") from None
    counts = Counter(name for name, *_ in windows)
    for (name, start, _), (_, row) in windows.items():
        # a clip that was captioned as a whole, and not a film whose other windows failed
        if counts[name] == 1 and start == 0 and name not in incomplete:
            del row["start"], row["end"]
    return [found for found in windows.values() if found[1]["caption"]]


def captions_in(row):
    """Yield (caption, score or None, start, end) for a row of a table or a result in JSON."""
    spans = row.get("windows", [] if "error" in row else [row])
    for span in spans:
        times = finite(span["start"]), finite(span["end"])
        for caption, score in captions_of(span):
            score = score or span.get("score")
            yield caption, finite(score) if score else None, *times


def finite(cell):
    """Return a cell as a float. Raises ValueError for NaN and infinity."""
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(cell)
    return value


@contextmanager
def opened(path, form, clips, sidecars=None):
    """Open a file of captions for the block, and keep other processes from writing to it.

    path, form: the file and its format, or None to write nothing. clips: the paths of all clips.
    sidecars: "txt", "srt" or "vtt" to also write a file beside each clip. Yields an object with
    `is_finished(clip)`, which is True if nothing is left to do, and `write(result)`, which returns the
    result, or one with an "error" if it could not be written. Raises UserError if another process is writing
    to the file, or if infer.py did not write the file.
    """
    if path is None:
        yield NoFile()
        return
    busy = f"another process is writing to {path}: wait for it, or stop it first"
    with lock(path.with_name(f".{path.name}.lock"), busy):
        file = SubtitleFile(path, form) if form in SUBTITLES else CaptionFile(path, form)
        file = Sidecars(clips, sidecars, file) if sidecars else file
        try:
            yield file
        finally:
            file.close()


def encoded(text):
    """Encode in UTF-8. Lone surrogates, as in invalid file names, become JSON escapes."""
    return text.encode(errors="backslashreplace")


class NoFile:
    """Takes the place of a file if captions are only printed."""

    def is_finished(self, clip):
        return False

    def write(self, result):
        return result


class CaptionFile:
    """A file of captions to which the results of clips are appended, one at a time.

    form: "tsv", "csv" or "jsonl". If the file exists, it is continued. Only JSON has clips that failed.
    """

    def __init__(self, path, form):
        self.path, self.form = path, form
        self.finished = self.read() if path.exists() else set()

    def read(self):
        """Return the names of the finished clips, after removing what a kill has left of a last one.

        In a table these are all rows of the last clip, because a film has a row for each window.
        """
        data = self.path.read_bytes()
        begin = (header(self.form) or '{"path":').encode()
        if not (data.startswith(begin) or begin.startswith(data)):
            raise UserError(
                f"{self.path} was not written by infer.py, or another program has changed it; choose another"
                " --output"
            )
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        names = [] if self.form == "jsonl" else self.names(lines)
        if data and not data.endswith(b"\n"):
            last = {n for n, name in enumerate(names) if name == names[-1]}
            lines = [line for n, line in enumerate(lines) if n not in last]
            names = [name for name in names if name != names[-1]]
            write_atomic(self.path, b"".join(lines))
        if self.form == "jsonl":
            return {path for path, r in read_results(self.path).items() if "error" not in r}
        return set(names[1:])

    def names(self, lines):
        """Return the first cell of each line of a table."""
        texts = [line.decode(errors="replace") for line in lines]
        if self.form == "csv":
            return [row[0] if row else "" for row in csv.reader(texts)]
        return [text.partition("\t")[0] for text in texts]

    def is_finished(self, clip):
        return self.name(clip) in self.finished

    def name(self, clip):
        """Return the name under which the file has a clip."""
        clip = os.path.abspath(clip)
        return clip if self.form == "jsonl" else path_cell(clip, self.form)

    def forget(self, clips):
        """Empty the file, to caption `clips` again. Which sidecars were written remains known.

        Prints how many other clips lose their captions.
        """
        if not self.path.exists():
            return
        if others := len(self.finished - set(map(self.name, clips))):
            lost = counted(others, "other clip")
            cli.note(f"replacing {self.path}; the captions of {lost} in it are deleted")
        results = read_results(self.path) if self.form == "jsonl" else {}
        error = {"error": "not captioned again yet"}
        listed = [
            {"path": name, "sidecars": r["sidecars"]} | error
            for name, r in results.items()
            if "sidecars" in r
        ]
        write_atomic(self.path, encoded("".join(formatted(r, "jsonl") for r in listed)))

    def write(self, result):
        """Append the result of a clip, with its absolute path. Returns the result."""
        text = formatted(result | {"path": os.path.abspath(result["path"])}, self.form)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                # in a single call, so that a kill leaves at most the last clip incomplete
                file.write(encoded(text if size else header(self.form) + text))
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise
        return result

    def close(self):
        """Keep only the last result of a clip that was tried more than once."""
        if self.form == "jsonl" and self.path.exists():
            results = read_results(self.path)
            if len(results) < self.path.read_bytes().count(b"\n"):
                lines = "".join(
                    formatted(r | {"path": path}, "jsonl") for path, r in results.items()
                )
                write_atomic(self.path, encoded(lines))


class SubtitleFile:
    """The subtitles of a single film."""

    def __init__(self, path, form):
        self.path, self.form = path, form

    def is_finished(self, clip):
        """Return True if the file exists. Which film it belongs to is not written in it."""
        return self.path.exists() and self.path.stat().st_size > 0

    def forget(self, clips):
        pass  # it is replaced as a whole, once the new subtitles are complete

    def write(self, result):
        if "error" not in result:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, formatted(result, self.form))
        return result

    def close(self):
        pass


class Sidecars:
    """Files with the caption beside each clip: <clip>.txt, .srt or .vtt.

    Files that are not listed in the record, or were changed since, are left alone and counted in `foreign`.
    clips: all paths. form: "txt", "srt" or "vtt". record: the `CaptionFile` in which each result has
    "sidecars": {name: SHA-256}, the files that were written beside the clip in any format.
    """

    def __init__(self, clips, form, record):
        self.form, self.record, self.foreign = form, record, 0
        stems = Counter(clip.with_suffix("") for clip in clips)
        self.shared = {stem for stem, count in stems.items() if count > 1}
        results = read_results(record.path) if record.path.exists() else {}
        self.listed = {
            path: r["sidecars"]
            for path, r in results.items()
            if isinstance(r.get("sidecars"), dict)
        }

    def path(self, clip):
        """Return the sidecar of a clip. Those of a.mp4 and a.webm are a.mp4.txt and a.webm.txt."""
        stem = clip.name if clip.with_suffix("") in self.shared else clip.stem
        return clip.with_name(f"{stem}.{self.form}")

    def is_finished(self, clip):
        return self.record.is_finished(clip) and os.path.exists(self.path(clip))

    def forget(self, clips):
        self.record.forget(clips)

    def write(self, result):
        """Write the sidecar of a clip, after its result, with the sidecar's digest, to the record.

        An older sidecar is deleted first. In this order, a kill in between is noticed: the sidecar is
        missing. Returns the result, or one with an "error" if the sidecar could not be written.
        """
        clip = Path(result["path"])
        path = self.path(clip)
        listed = self.listed.get(os.path.abspath(clip), {})
        known = {"sidecars": listed} if listed else {}
        if "error" in result:
            return self.record.write(result | known)
        if os.path.exists(path) and listed.get(path.name, "") != digest_of(path):
            self.foreign += 1
            return self.record.write(result | known)
        text = "".join(f"{span['caption']}\n" for span in result["windows"])
        data = (text if self.form == "txt" else formatted(result, self.form)).encode()
        try:
            path.unlink(missing_ok=True)
            self.record.write(result | {"sidecars": listed | {path.name: sha256(data)}})
            write_atomic(path, data)
        except OSError as error:
            # with a full disk, for example, the next clip would fail too
            if explain(error) and not isinstance(error, PermissionError):
                raise
            error = {"error": f"{path.name} cannot be written: {error.strerror}"}
            return self.record.write({"path": result["path"]} | error | known)
        return result

    def close(self):
        self.record.close()
        if self.foreign:
            files = counted(self.foreign, f".{self.form} file")
            cli.note(f"left alone: {files} not listed in {self.record.path}, or changed since")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def digest_of(path):
    """Return the SHA-256 of a file, or None if it cannot be read."""
    try:
        return sha256(path.read_bytes())
    except OSError:
        return None
