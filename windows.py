"""Any video files -> windows of a few seconds -> stored features, as training saw them.

Shapes: B windows, F frames, H and W of the picture, N video tokens, E video width.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import video
from dataset import stack_stored
from runtime import cli, devices
from runtime.decode_workers import WorkerPool
from runtime.errors import UserError, VideoError

MOST_WINDOWS = 100_000  # of one file: 28 hours, a window a second

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
    frames: object = None
    stored: dict | None = None


def add_model_flags(group):
    """The flags that name a checkpoint and the models it was trained with."""
    group.add_argument("--checkpoint", default=cli.CHECKPOINT, help=cli.CHECKPOINT_KINDS)
    group.add_argument("--encoder", help="where the checkpoint's V-JEPA 2 lies, if elsewhere")
    group.add_argument("--lm", help="where the checkpoint's language model lies, if elsewhere")


def load_captioner(args, checkpoint=None):
    """(checkpoint, `VideoCaptioner`) of --checkpoint, which may have been read. Raises UserError."""
    from captioner import from_checkpoint, read_checkpoint

    device, dtype = devices.resolve(args.device, args.dtype)
    checkpoint = checkpoint or read_checkpoint(args.checkpoint)
    return checkpoint, from_checkpoint(checkpoint, device, dtype, args.lm)


def load_models(args, checkpoint=None):
    """(checkpoint, `VideoEncoder`, `VideoCaptioner`) of --checkpoint, which may have been read. Raises
    UserError."""
    from encoder import VideoEncoder

    checkpoint, captioner = load_captioner(args, checkpoint)
    encoder = VideoEncoder.from_manifest(checkpoint["manifest"], captioner.device, args.encoder)
    return checkpoint, encoder, captioner


def add_flags(group):
    """The flags that say how files become windows."""
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


def find_clips(names):
    """The files meant by names of files and folders. Raises UserError for one that is not there."""
    from video import VIDEO_EXTENSIONS

    paths = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in VIDEO_EXTENSIONS
            )
            if not inside:
                raise UserError(f"folder {path} holds no video ({' '.join(VIDEO_EXTENSIONS)})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"clip not found: {path}")
    return paths


def stem(path):
    """The start of a file's name, fit to be that of another: printable and short."""
    return cli.printable(path.stem).encode()[:STEM_BYTES].decode(errors="ignore")


def read(paths, encoder, args, limit=None):
    """Decode and encode every window of every file; yields lists of at most --batch-size `Window`s.

    In the order of files and of time, the first `limit` windows of a file. args: the flags of
    `add_flags`, and workers. A file that fails, hangs or kills its decoder costs itself only.
    """
    pool = WorkerPool(args.workers, args.timeout)
    num_frames = encoder.settings["num_frames"]
    spans = {}

    def jobs():
        for n, path in enumerate(paths):
            info = pool.call(video.probe, path)  # a header too may make a decoder hang
            # where there is no length to be had, decoding will say why
            length = args.window if isinstance(info, VideoError) else info.duration
            if length / args.stride > MOST_WINDOWS:
                raise UserError(
                    f"{path} has {length:.0f} s: at --stride {args.stride:g} these are more than"
                    f" {MOST_WINDOWS:,} windows; use a larger one"
                )
            spans[n] = video.windows(length, args.window, args.stride)
            alone = len(spans[n]) == 1
            spans[n] = spans[n][:limit]
            for span in spans[n]:
                # a short clip is decoded as a whole, as preprocess_ssv2.py did
                yield Window(n, *span, alone), path, num_frames, *(() if alone else span)

    def total():
        """How many there are, a file that was not yet opened counted as one."""
        return sum(map(len, spans.values())) + len(paths) - len(spans)

    clips = pool.map(video.decode, jobs(), ahead=args.batch_size + 2 * args.workers)
    with tqdm(total=total(), unit="window", delay=1) as bar:
        while pairs := list(islice(clips, args.batch_size)):
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
