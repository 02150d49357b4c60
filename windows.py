"""Caption video files of any length: split them into windows, then encode and caption each window.

Windows are decoded and encoded exactly like the training clips.
Shapes: B windows, F frames, H and W height and width, N video tokens, E video width.
"""

from dataclasses import dataclass
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

import video
from runtime import cli
from runtime.decode_workers import WorkerPool
from runtime.errors import VideoError
from runtime.feature_cache import stack_stored
from runtime.names import counted, from_utf8, to_utf8

MAX_WINDOWS = 100_000  # per file; 28 hours with one window per second
STEM_BYTES = 100  # of the 255 bytes of a file name, to leave room for suffixes


@dataclass
class Window:
    """A window of a video file, with its frames and features.

    file: index of the file. start, end: seconds. alone: True if the window is the whole file.
    error: a VideoError if the window could not be decoded or encoded, else None.
    damage: a sentence if the file ends early or is corrupt, so that some of the window may be missing.
    frames: uint8 (F, H, W, 3). stored: the features in the form of `feature_cache.save_features`.
    actions: [{"action", "probability"}], if a probe was applied. samples: [{"caption", "score"}], the
    likeliest first, if captions were sampled.
    """

    file: int
    start: float
    end: float
    alone: bool
    error: Exception | None = None
    damage: str | None = None
    frames: Any = None
    stored: dict | None = None
    actions: list | None = None
    samples: list | None = None


@dataclass(frozen=True)
class Windowing:
    """Settings for splitting files into windows and decoding them, with the flags of `add_flags`."""

    window: float = 6.0  # length of a window in seconds
    stride: float = 6.0  # seconds between the starts of consecutive windows
    batch_size: int = 8  # windows per batch
    timeout: float = 60.0  # seconds allowed to decode a window
    workers: int = 0

    @classmethod
    def of(cls, args):
        return cls(args.window, args.stride, args.batch_size, args.timeout, args.workers)


def add_flags(group):
    """Add the flags of `Windowing`, except --workers, which `cli.add_common` adds."""
    group.add_argument(
        "--window", type=cli.number(least=0.2), default="6", help="length of a window in seconds"
    )
    group.add_argument(
        "--stride",
        type=cli.number(least=0.1),
        default="6",
        help="seconds between the starts of consecutive windows",
    )
    group.add_argument("--batch-size", type=cli.whole(1), default=8, help="windows per batch")
    group.add_argument(
        "--timeout", type=cli.whole(1), default=60, help="seconds allowed to decode a window"
    )


def read(paths, encoder, how, limit=None):
    """Decode and encode all windows of all files. Yields lists of up to `how.batch_size` `Window`s.

    how: a `Windowing`. limit: the maximum number of windows per file, or None for all.
    The windows are ordered by file and time. A file that cannot be decoded, has too many windows, or
    makes the decoder hang or crash, does not affect the other files.
    """
    pool = WorkerPool(how.workers, how.timeout)
    num_frames = encoder.settings.num_frames
    spans = {}

    def jobs():
        for n, path in enumerate(paths):
            info = pool.call(video.probe, path)  # in a worker, because reading a header can hang
            # If the length is unknown, use one window. Decoding it reports the error.
            length = how.window if isinstance(info, VideoError) else info.duration
            if length / how.stride > MAX_WINDOWS:  # or a header that is wrong by hours
                spans[n] = [(0.0, length)]
                yield Window(n, 0.0, length, True, too_long(path, length, how)), path, 1, 0.0, 1e-3
                continue
            spans[n] = video.window_spans(length, how.window, how.stride)
            alone = len(spans[n]) == 1
            spans[n] = spans[n][:limit]
            for span in spans[n]:
                # a clip with one window is decoded as a whole, as in preprocess_ssv2.py
                yield Window(n, *span, alone), path, num_frames, *(() if alone else span)

    def total():
        """Return the number of windows, counting one for each file that is not open yet."""
        return sum(map(len, spans.values())) + len(paths) - len(spans)

    clips = pool.map(video.decode, jobs(), ahead=how.batch_size + 2 * how.workers)
    # read before the bar is made, because the web demo shows the total that the bar was made with
    pairs = list(islice(clips, how.batch_size))
    with tqdm(total=total(), unit="window", delay=1) as bar:
        while pairs:
            bar.total = total()
            for window, clip in pairs:
                if isinstance(clip, VideoError):
                    window.error = window.error or clip
                else:
                    window.frames, window.damage = clip.frames, clip.damage and clip.damage[1]
            decoded = [window for window, _ in pairs if not window.error]
            stored = encoder.stored([window.frames for window in decoded]) if decoded else []
            for window, features in zip(decoded, stored, strict=True):
                window.stored = features
                if features is None:
                    window.error = VideoError("non_finite", "the encoder returned NaN")
            yield [window for window, _ in pairs]
            bar.update(len(pairs))
            pairs = list(islice(clips, how.batch_size))


def note_damage(batch, paths):
    """Warn about files that end early or are corrupt, given a batch of their windows."""
    for n, damage in sorted({(w.file, w.damage) for w in batch if w.damage}):
        cli.note(f"{cli.printable(to_utf8(paths[n]))}: {damage}; using the part that can be read")


def too_long(path, length, how):
    return VideoError(
        "unreadable",
        f"{path} is {length:.0f} s long, which is more than {MAX_WINDOWS:,} windows at --stride"
        f" {how.stride:g}; use a larger --stride",
    )


def features(batch, device):
    """Stack the stored features of windows without errors, on the device.

    Returns {"features" (B, N, E), "scale" (B, E), "offset" (B, E)}, the arguments of
    `VideoCaptioner.prefix`.
    """
    clips = stack_stored([w.stored for w in batch])
    return {k: clips[k].to(device) for k in ("features", "scale", "offset")}


def caption_files(
    paths,
    encoder,
    captioner,
    how,
    style,
    max_new_tokens=None,
    num_beams=1,
    recognise=None,
    sampling=None,
):
    """Caption all windows of all files. Yields the `description` of each file, in order.

    recognise: a function that returns the actions in each of a list of clips, see `heads.recogniser`.
    sampling: a `captioner.Sampling`; the caption of a window is then its likeliest sample.
    """

    def captioned():
        for batch in read(paths, encoder, how):
            decoded = [w for w in batch if not w.error]
            texts = iter(())
            if decoded:
                clips = features(decoded, captioner.device)
                if sampling:
                    names = [f"{Path(paths[w.file]).name} {w.start:.2f}" for w in decoded]
                    found = captioner.samples(clips, names, style, sampling, max_new_tokens)
                    add_samples(decoded, found)
                    texts = iter([w.samples[0]["caption"] for w in decoded])
                else:
                    texts = iter(captioner.captions(clips, style, max_new_tokens, num_beams))
                if recognise:
                    add_actions(decoded, recognise)
            for w in batch:
                w.frames = w.stored = None  # free the memory, because a long film has many windows
                yield w, None if w.error else next(texts)

    for n, group in groupby(captioned(), key=lambda pair: pair[0].file):
        yield description(paths[n], list(group))


def add_samples(decoded, found):
    """Set the samples of windows without errors. found: see `VideoCaptioner.samples`."""
    for w, captions in zip(decoded, found, strict=True):
        w.samples = [{"caption": t, "score": round(score, 4)} for t, score in captions.items()]


def add_actions(decoded, recognise):
    """Set the actions of windows without errors. recognise: see `heads.recogniser`."""
    for w, actions in zip(decoded, recognise([w.stored for w in decoded]), strict=True):
        w.actions = actions


def description(path, pairs):
    """Return the result of one file as a dict.

    pairs: its [(`Window`, caption)], where the caption is None if the window failed.
    The result is {"path", "windows": [{"start", "end", "caption"}]}, and {"path", "error"} if all windows
    failed. It also has a "warning" if part of the file could not be decoded, and "failed", the start and
    end of each window that failed. A window's "actions" and "samples" are beside its "caption".
    """

    def text_of(w, caption):
        found = {"actions": w.actions, "samples": w.samples}
        return {"caption": caption} | {key: value for key, value in found.items() if value}

    captioned = [(w, text) for w, text in pairs if text is not None]
    if not captioned:
        return {"path": str(path), "error": str(pairs[0][0].error)}
    spans = [{"start": w.start, "end": w.end, **text_of(w, text)} for w, text in captioned]
    result = {"path": str(path), "windows": spans}
    damage = dict.fromkeys(w.damage for w, _ in captioned if w.damage)
    problems = [f"{text}; the caption covers the readable part" for text in damage]
    if failed := [{"start": w.start, "end": w.end} for w, text in pairs if text is None]:
        problems.insert(0, f"{len(failed)} of {counted(len(pairs), 'window')} could not be decoded")
        result["failed"] = failed
    return result | ({"warning": "; ".join(problems)} if problems else {})


def output_names(paths):
    """Return a distinct base name for the output of each file.

    This is the name of the file without its extension, made printable and shortened. A number is added
    if another file has the same name.
    """
    names, taken = [], {path.stem for path in paths}
    for path in paths:
        stem = cli.printable(to_utf8(path.stem)).encode()[:STEM_BYTES].decode(errors="ignore")
        stem = from_utf8(stem)
        numbered = (f"{stem}-{n}" for n in count(2))
        name = stem if stem not in names else next(n for n in numbered if n not in taken)
        taken.add(name)
        names.append(name)
    return names
