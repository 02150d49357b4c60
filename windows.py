"""Any video files -> windows of a few seconds -> features as training saw them -> captions.

Shapes: B windows, F frames, H and W of the picture, N video tokens, E video width.
"""

from dataclasses import dataclass
from itertools import count, groupby, islice
from typing import Any

from tqdm import tqdm

import video
from dataset import stack_stored
from runtime import cli
from runtime.decode_workers import WorkerPool
from runtime.errors import UserError, VideoError

MAX_WINDOWS = 100_000  # per file: 28 hours, a window per second
STEM_BYTES = 100  # of the 255 that a file's name may have


@dataclass
class Window:
    """`start` and `end` in seconds of file number `file`; `alone`: it is the whole file.

    Either `error`, a VideoError, or `frames` uint8 (F, H, W, 3) and `stored`, the features in stored
    form; `truncated`: the file is cut short, and this is what there is.
    """

    file: int
    start: float
    end: float
    alone: bool
    error: Exception | None = None
    truncated: bool = False
    frames: Any = None
    stored: dict | None = None


@dataclass(frozen=True)
class Windowing:
    """How files are cut into windows and decoded: the values of the flags of `add_flags`."""

    window: float = 6.0  # seconds captioned at once
    stride: float = 6.0  # seconds between the starts of windows
    batch_size: int = 8  # windows encoded at once
    timeout: float = 60.0  # seconds to decode a window
    workers: int = 0

    @classmethod
    def of(cls, args):
        return cls(args.window, args.stride, args.batch_size, args.timeout, args.workers)


def add_flags(group):
    """Add the flags of a `Windowing`, but --workers, which `cli.add_common` adds."""
    group.add_argument(
        "--window", type=cli.number(above=0), default=6.0, help="seconds captioned at once"
    )
    group.add_argument(
        "--stride", type=cli.number(above=0), default=6.0, help="seconds between windows' starts"
    )
    group.add_argument("--batch-size", type=cli.whole(1), default=8, help="windows at once")
    group.add_argument(
        "--timeout", type=cli.whole(1), default=60, help="seconds to decode a window"
    )


def read(paths, encoder, how, limit=None):
    """Decode and encode every window of every file; yields lists of at most `how.batch_size` `Window`s.

    In the order of files and of time, at most `limit` windows of a file. how: a `Windowing`. A file that
    fails, hangs or crashes its decoder costs only itself.
    """
    pool = WorkerPool(how.workers, how.timeout)
    num_frames = encoder.settings.num_frames
    spans = {}

    def jobs():
        for n, path in enumerate(paths):
            info = pool.call(video.probe, path)  # a header, too, may make a decoder hang
            # if the length is unknown, decoding will report why
            length = how.window if isinstance(info, VideoError) else info.duration
            if length / how.stride > MAX_WINDOWS:
                raise UserError(
                    f"{path} has {length:.0f} s: at --stride {how.stride:g} that is more than"
                    f" {MAX_WINDOWS:,} windows; use a larger one"
                )
            spans[n] = video.windows(length, how.window, how.stride)
            alone = len(spans[n]) == 1
            spans[n] = spans[n][:limit]
            for span in spans[n]:
                # a short clip is decoded as a whole, as preprocess_ssv2.py did
                yield Window(n, *span, alone), path, num_frames, *(() if alone else span)

    def total():
        """The number of windows, with one for each file that was not yet opened."""
        return sum(map(len, spans.values())) + len(paths) - len(spans)

    clips = pool.map(video.decode, jobs(), ahead=how.batch_size + 2 * how.workers)
    with tqdm(total=total(), unit="window", delay=1) as bar:
        while pairs := list(islice(clips, how.batch_size)):
            bar.total = total()
            for window, clip in pairs:
                if isinstance(clip, VideoError):
                    window.error = clip
                else:
                    window.frames, window.truncated = clip.frames, clip.truncated
            decoded = [window for window, _ in pairs if not window.error]
            stored = encoder.stored([window.frames for window in decoded]) if decoded else []
            for window, features in zip(decoded, stored, strict=True):
                window.stored = features
                if features is None:
                    window.error = VideoError("non_finite", "the encoder returned NaN")
            yield [window for window, _ in pairs]
            bar.update(len(pairs))


def features(batch, device):
    """Stack the stored features of windows without error: {"features" (B, N, E), "scale" (B, E),
    "offset" (B, E)} on the device."""
    return {k: v.to(device) for k, v in stack_stored([w.stored for w in batch]).items()}


def caption_files(paths, encoder, captioner, how, style, max_new_tokens=50, num_beams=1):
    """Caption every window of every file; yields the `description` of each file, in order."""

    def captioned():
        for batch in read(paths, encoder, how):
            decoded = [w for w in batch if not w.error]
            texts = iter(())
            if decoded:
                clips = features(decoded, captioner.device)
                texts = iter(captioner.captions(clips, style, max_new_tokens, num_beams))
            for w in batch:
                w.frames = w.stored = None  # a long film has many windows
                yield w, None if w.error else next(texts)

    for n, group in groupby(captioned(), key=lambda pair: pair[0].file):
        yield description(paths[n], list(group))


def description(path, pairs):
    """One file's result from its [(`Window`, caption or None where it failed)].

    {"path", "caption"} or {"path", "windows": [{"start", "end", "caption"}]}, with "warning" if part of
    the file could not be read, or {"path", "error"}.
    """
    captioned = [(w, text) for w, text in pairs if text is not None]
    if not captioned:
        return {"path": str(path), "error": str(pairs[0][0].error)}
    if len(pairs) == 1:
        result = {"path": str(path), "caption": captioned[0][1]}
    else:
        spans = [{"start": w.start, "end": w.end, "caption": text} for w, text in captioned]
        result = {"path": str(path), "windows": spans}
    if failed := len(pairs) - len(captioned):
        result["warning"] = f"{failed} of {len(pairs)} windows could not be decoded"
    elif any(w.truncated for w, _ in pairs):
        result["warning"] = "the file is cut short; what is there was captioned"
    return result


def output_names(paths):
    """A distinct name for what is written about each file: its own without the ending, numbered if
    another file has it, printable, and short enough for a suffix."""
    names, taken = [], {path.stem for path in paths}
    for path in paths:
        stem = cli.printable(path.stem).encode()[:STEM_BYTES].decode(errors="ignore")
        numbered = (f"{stem}-{n}" for n in count(2))
        name = stem if stem not in names else next(n for n in numbered if n not in taken)
        taken.add(name)
        names.append(name)
    return names
