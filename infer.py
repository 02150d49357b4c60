"""Caption video files: any container, any length, no dataset needed.

    python infer.py clip.webm other.mp4 folder/ --checkpoint results/ssv2/best.pt
    python infer.py --num-samples 10 --checkpoint results/ssv2/best.pt     (of SSv2's test split)

One line a clip on stdout, `path<TAB>caption`; clips longer than --window seconds are cut into windows,
`path<TAB>start-end<TAB>caption` each. Exit code 3 if some clips failed, 1 if all did.
"""

import json
import shutil
from itertools import groupby, islice
from pathlib import Path

import cli
from cli import DONE, FAILED, PARTIAL, UserError, note
from dataset import STYLES, TEST, by_hash, load_records, stack_stored
from files import write_json


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("clips", nargs="*", help="video files, or folders of them (recursive)")
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", default="results/ssv2/best.pt", help="file or run folder")
    group.add_argument("--encoder", help="where the checkpoint's V-JEPA 2 lies, if elsewhere")
    group.add_argument("--lm", help="where the checkpoint's language model lies, if elsewhere")
    group = parser.add_argument_group("captions")
    group.add_argument("--style", choices=STYLES, default="label", help="kind of caption")
    group.add_argument(
        "--window", type=cli.number(above=0), default=6.0, help="seconds captioned at once"
    )
    group.add_argument(
        "--stride", type=cli.number(above=0), default=6.0, help="seconds between windows' starts"
    )
    group.add_argument("--num-beams", type=cli.whole(1), default=1, help="1 is greedy")
    group.add_argument("--max-new-tokens", type=cli.whole(1), default=50, help="longest caption")
    group.add_argument("--batch-size", type=cli.whole(1), default=8, help="windows at once")
    group.add_argument(
        "--timeout", type=cli.whole(1), default=60, help="seconds to decode a window"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="a JSON object a line instead of text")
    group.add_argument("--output", help="folder for captions.json")
    group = parser.add_argument_group("samples of a dataset")
    group.add_argument("--num-samples", type=cli.whole(1), help="draw N clips of the test split")
    group.add_argument("--videos", default="data/20bn-something-something-v2", help="clips' folder")
    group.add_argument(
        "--annotations", default="data/annotations", help="of prepare_annotations.py"
    )
    cli.add_common(parser, workers=2)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if bool(args.clips) == bool(args.num_samples):
        raise UserError("name the clips to caption, or draw some with --num-samples N (not both)")
    paths = draw_samples(args) if args.num_samples else find_clips(args.clips)
    paths = paths[: args.limit]
    output = args.output or ("results/samples" if args.num_samples else None)
    output = output and cli.output_folder(output, "--output")

    device, dtype = cli.device_and_dtype(args)
    from captioner import from_checkpoint, read_checkpoint
    from encoder import VideoEncoder

    checkpoint = read_checkpoint(Path(args.checkpoint))
    encoder = VideoEncoder.from_manifest(checkpoint["manifest"], device, args.encoder)
    captioner = from_checkpoint(checkpoint, device, dtype, args.lm)

    results = []
    try:
        for result in caption_files(paths, encoder, captioner, args):
            results.append(result)
            if "error" in result:
                note(f"{result['path']}: {result['error']}")
            elif "warning" in result:
                note(f"{result['path']}: {result['warning']}")
            for line in [json.dumps(result)] if args.json else text_lines(result):
                print(line, flush=True)
    finally:  # also of what there is when it is stopped
        if output:
            save_results(output, results, copy_clips=bool(args.num_samples))
    failed = sum("error" in r for r in results)
    if failed:
        note(f"{failed} of {len(results)} clips failed")
    return FAILED if failed == len(results) else PARTIAL if failed else DONE


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


def draw_samples(args):
    """Files of N seeded clips of the test split."""
    records = {r["id"]: r for r in load_records(args.annotations, TEST)}
    videos = cli.existing(args.videos, "--videos", "It is the folder of the dataset's clips.")
    paths = []
    for clip_id in by_hash(records, args.seed):
        names = filter(None, (records[clip_id]["video"], f"{clip_id}.webm", f"{clip_id}.mp4"))
        paths += [videos / name for name in names if (videos / name).is_file()][:1]
        if len(paths) == args.num_samples:
            break
    if len(paths) < args.num_samples:
        raise UserError(
            f"--num-samples {args.num_samples}: only {len(paths)} of the {len(records)} test clips"
            f" are in {videos}"
        )
    return paths


def caption_files(paths, encoder, captioner, args):
    """Caption every window of every file; yields a dict per file, in order.

    {"path", "caption"} or {"path", "windows": [{"start", "end", "caption"}]}, or {"path", "error"};
    "warning" beside a caption of a clip that is cut short.
    """
    import pool
    import video

    crew = pool.Crew(args.timeout) if args.workers else None
    ask = crew.ask if crew else pool.attempt  # a header too may make a decoder hang or die
    spans = {}

    def jobs():
        for n, path in enumerate(paths):
            info = ask(video.probe, path)
            # where there is no length to be had, decoding will say why
            length = args.window if isinstance(info, video.VideoError) else info.duration
            spans[n] = video.windows(length, args.window, args.stride)
            # a short clip is decoded as a whole, as preprocess_ssv2.py did
            yield from ((n, path, *span) for span in (spans[n] if len(spans[n]) > 1 else [()]))

    def windows():
        """How many there are, a file that was not yet opened counted as one."""
        return sum(map(len, spans.values())) + len(paths) - len(spans)

    outcomes = caption_windows(jobs(), windows, crew, encoder, captioner, args)
    for n, group in groupby(outcomes, key=lambda outcome: outcome[0]):
        yield describe(paths[n], spans[n], [outcome for _, *outcome in group])


def caption_windows(jobs, count, crew, encoder, captioner, args):
    """Decode and caption jobs; yields (key, caption or VideoError, whether the file is cut short)."""
    from tqdm import tqdm

    import pool
    from video import VideoError

    clips = pool.decode_many(
        jobs,
        encoder.settings["num_frames"],
        workers=args.workers,
        timeout=args.timeout,
        ahead=args.batch_size + 2 * args.workers,
        crew=crew,
    )
    with tqdm(total=count(), unit="window", delay=1) as bar:
        while batch := list(islice(clips, args.batch_size)):
            bar.total = count()
            decoded = [clip for _, clip in batch if not isinstance(clip, VideoError)]
            stored = encoder.stored([clip.frames for clip in decoded]) if decoded else []
            fine = [s for s in stored if s is not None]
            texts = []
            if fine:
                features = {k: v.to(captioner.device) for k, v in stack_stored(fine).items()}
                texts = captioner.captions(
                    features, args.style, args.max_new_tokens, args.num_beams
                )
            texts, stored = iter(texts), iter(stored)
            for key, clip in batch:
                bar.update()
                if isinstance(clip, VideoError):
                    yield key, clip, False
                elif next(stored) is None:
                    yield key, VideoError("non_finite", "the encoder returned NaN"), False
                else:
                    yield key, next(texts), clip.truncated


def describe(path, spans, outcomes):
    """One file's result from the outcomes of its windows."""
    said = [
        (s, text) for s, (text, _) in zip(spans, outcomes, strict=True) if isinstance(text, str)
    ]
    if not said:
        return {"path": str(path), "error": str(outcomes[0][0])}
    if len(spans) == 1:
        result = {"path": str(path), "caption": said[0][1]}
    else:
        windows = [{"start": start, "end": end, "caption": text} for (start, end), text in said]
        result = {"path": str(path), "windows": windows}
    if len(said) < len(spans):
        result["warning"] = f"{len(spans) - len(said)} of {len(spans)} windows could not be decoded"
    elif any(truncated for _, truncated in outcomes):
        result["warning"] = "the file is cut short; what is there was captioned"
    return result


def text_lines(result):
    """The stdout lines of one file; none for one that failed."""
    path = cli.printable(result["path"], keep="")  # a line stays a line
    if "windows" in result:
        for w in result["windows"]:
            yield f"{path}\t{w['start']:.1f}-{w['end']:.1f}\t{w['caption']}"
    elif "caption" in result:
        yield f"{path}\t{result['caption']}"


def save_results(output, results, copy_clips):
    """Write captions.json, and the clips beside it."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "captions.json", results)
    for path in [Path(r["path"]) for r in results if copy_clips and "error" not in r]:
        copy = output / path.name
        if not (copy.exists() and copy.samefile(path)):
            shutil.copyfile(path, copy)
    note(f"written to {output}")


if __name__ == "__main__":
    cli.run(main)
