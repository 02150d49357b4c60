"""Caption video files of any format and length. No dataset is needed.

    python infer.py clip.webm other.mp4 folder/ --checkpoint results/ssv2/best.pt
    python infer.py folder/ --sidecar                        (a .txt beside each clip)
    python infer.py film.mp4 --format srt --output film.srt  (subtitles)
    python infer.py folder/ --output captions.csv            (or .tsv, .jsonl)
    python infer.py --num-samples 10                         (clips of the SSv2 test split)

Prints one line per clip, `path<TAB>caption`. A clip of at least 1.5 x --window seconds is split into
windows, with one line `path<TAB>start-end<TAB>caption` for each. If less than half a window remains at
the end, it is added to the last one. The exit code is 3 if some clips failed and 1 if all failed. With
--output FOLDER, the captions are also written to FOLDER/captions.jsonl, from which python -m viz.films
makes captioned videos.
"""

import runtime.start

import os
import shutil
import time
from pathlib import Path

import heads
from captioner import GREEDY, Sampling
from checkpoint import load_models, read_checkpoint, warn_if_untrained, world_note
from dataset import STYLES, TEST, by_hash, load_records
from runtime import cli, devices, ranks
from runtime.caption_files import (
    FILES,
    FORMATS,
    RECORD,
    SUBTITLES,
    formatted,
    header,
    opened,
)
from runtime.cli import note
from runtime.clip_files import VIDEO_EXTENSIONS, find_clips, find_files
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.files import in_shard
from runtime.names import counted
from windows import Windowing, add_flags, caption_files, output_names

# endings with which --output is meant as a file, not as a folder
OTHER_FORMATS = ("txt", "json", "xlsx", "xls", "ods", "html", "md", "xml", "parquet", "ndjson")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "clips", nargs="*", help="video files, or folders that are searched recursively"
    )
    cli.add_models(parser.add_argument_group("model"))
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--style", choices=STYLES, default="label", help="caption style")
    add_flags(group)
    cli.add_generation(group)
    cli.add_sampling(group, "sample N captions of each clip, or of each window of a long one")
    share = cli.number(above=0, most=1)
    add(
        "--keep",
        type=share,
        default=1.0,
        help="share of the samples to return, the likeliest first",
    )
    text = "also print the mean log-probability of each caption's tokens; --sample always does"
    add("--scores", action="store_true", help=text)
    add = parser.add_argument_group("output").add_argument
    add("--probe", help="checkpoint of a probe (probe.py); also print the five likeliest actions")
    add(
        "--format",
        choices=FORMATS,
        help="format of the captions: of --output if given, else of stdout; srt and vtt are subtitles"
        " (default: the ending of --output, else text)",
    )
    add(
        "--output",
        metavar="PATH",
        help="file to write, or a folder for captions.jsonl (default with --num-samples:"
        " results/samples)",
    )
    add(
        "--sidecar",
        action="store_true",
        help="write <clip>.txt beside each clip, or .srt or .vtt with --format; files that infer.py did not"
        " write are left alone; those it wrote are listed in captions.jsonl, in --output or the first of the"
        " given folders",
    )
    add("--skip-done", action="store_true", help="continue: skip the clips that --output contains")
    add("--overwrite", action="store_true", help="replace --output, with all captions in it")
    add(
        "--shard",
        type=cli.shard,
        default="0/1",
        help="process only part i of n, written i/n, with i from 0 to n - 1; 0/1 means all clips",
    )
    add = parser.add_argument_group("clips of a dataset").add_argument
    add(
        "--num-samples",
        type=cli.whole(1),
        help="caption this many random clips of the test split and copy the clips to --output",
    )
    add("--videos", default=cli.VIDEOS, help="folder that contains the clips")
    add("--annotations", default=cli.ANNOTATIONS, help="folder written by prepare_annotations.py")
    cli.add_common(parser, workers=2)
    args = parser.parse_args(argv)
    if args.sample or args.scores:
        parser.refuse_given(args, ["num_beams"], "cannot be used with --sample or --scores")
    if not args.sample:
        names = ["keep", "top_p", "temperature"]
        parser.refuse_given(args, names, "can only be used with --sample")
    if not (args.output or args.sidecar or args.num_samples):
        parser.refuse_given(
            args, ["skip_done", "overwrite"], "can only be used with --output or --sidecar"
        )
    if args.skip_done and args.overwrite:
        parser.error("--skip-done and --overwrite are mutually exclusive")
    return args


def main(argv=None):
    args = parse_args(argv)
    if bool(args.clips) == bool(args.num_samples):
        raise UserError("give either the clips to caption or --num-samples N, but not both")
    if ranks.world_size() > 1:
        raise UserError(
            "infer.py runs in a single process; start it without torchrun, once per GPU with --shard i/n"
        )
    if args.num_samples:
        given = sample_clips(args.num_samples, args.videos, args.annotations, args.seed)
    else:
        given = find_clips(args.clips)
    clips = given[: args.limit]
    output = args.output or ("results/samples" if args.num_samples else None)
    first = Path(args.clips[0] if args.clips else args.videos)
    folder = (first if first.is_dir() else first.parent) if args.sidecar else None
    path, form = destination(output, args.format, folder, args.shard)
    check_output(args, path, form or args.format, clips)
    checkpoint = read_checkpoint(args.checkpoint)
    sidecars = sidecar_form(args.format) if args.sidecar else None
    with opened(path, form, given, sidecars) as file:
        todo = [clip for clip in clips if in_shard(shard_name(clip, args.clips), *args.shard)]
        if args.skip_done:
            todo = [clip for clip in todo if not file.is_finished(clip)]
        if not todo:
            if form in SUBTITLES and path.exists():
                note(f"nothing to do: {path} exists (it does not say which film it belongs to)")
            else:
                count = counted(len(clips), "clip")
                note(f"nothing to do: {count} given, all done or in other shards")
            return DONE
        check_sidecars({clip.parent for clip in todo} if args.sidecar else ())
        results = captions(args, checkpoint, todo)
        if args.overwrite:
            file.forget(clips)
        if args.num_samples:
            copy_clips(todo, path.parent)
        before = stamp(path)
        try:
            form = "text" if path else args.format or "text"
            captioned = write(results, file, form, len(todo), is_saved=path is not None)
        finally:  # also if the script is stopped
            if stamp(path) != before:
                note(f"written to {path}")
    failed = len(todo) - captioned
    if failed and len(todo) > 1:
        note(f"{failed:,} of {len(todo):,} clips failed")
    return FAILED if failed == len(todo) else PARTIAL if failed else DONE


def stamp(path):
    """Return what changes when the file is written. None if there is no file."""
    if not (path and path.exists()):
        return None
    found = path.stat()
    return found.st_ino, found.st_size


def captions(args, checkpoint, clips):
    """Load the models. Returns an iterator over the clips' results, see `windows.description`."""
    device, dtype = devices.resolve(args.device, args.dtype)
    settings = checkpoint["manifest"].settings
    probe = heads.read_matching_probe(args.probe, "--probe", settings) if args.probe else None
    warn_if_untrained(checkpoint, args.style)
    if text := world_note(checkpoint):
        note(text)
    encoder, captioner = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    recognise = heads.recogniser(probe, device) if probe else None
    sampling = GREEDY if args.scores else None
    if args.sample:
        sampling = Sampling(args.sample, args.top_p, args.temperature, args.keep, args.seed)
    generation = args.style, args.max_new_tokens, args.num_beams, recognise, sampling

    def results():
        yield from caption_files(clips, encoder, captioner, Windowing.of(args), *generation)
        if captioner.cut_captions:
            cut = counted(captioner.cut_captions, "caption")
            limit = args.max_new_tokens or captioner.max_new_tokens
            note(f"{cut} reached the limit of {limit} tokens; --max-new-tokens sets another")

    return results()


def write(results, file, form, total, is_saved):
    """Write the results of clips to a file and print them, then print the speed.

    file: see `caption_files.opened`. form: the format to print. total: the number of clips. is_saved: whether
    `file` keeps the results; if so, the reader of stdout may go away before the end, as in
    `infer.py … --output a.csv | head`. Returns the number of clips that were captioned and written.
    """
    print(header(form), end="")
    began, seconds, captioned = time.monotonic(), 0.0, 0
    for result in results:
        written = file.write(result)
        try:
            print(formatted(result, form), end="", flush=True)
        except BrokenPipeError:
            if not is_saved:
                raise
            cli.drop_closed_streams()
        if problem := written.get("error") or written.get("warning"):
            note(problem if result["path"] in problem else f"{result['path']}: {problem}")
        if "error" not in written:
            seconds += result["windows"][-1]["end"]
            captioned += 1
    rate = total / (time.monotonic() - began)
    note(f"{counted(total, 'clip')}, {seconds:,.0f} s of video, {rate:.1f} clips/s")
    return captioned


def destination(output, form, sidecars, shard):
    """Return (path of the file of captions, its format), or (None, None) if there is none.

    output: a file, a folder or None. form: of --format, or None. sidecars: the folder for their record, or
    None. Raises UserError if they do not fit together.
    """
    if sidecars and form not in (None, "text", *SUBTITLES):
        raise UserError(f"--sidecar writes text, srt or vtt, not {form}")
    if not (output or sidecars):
        return None, None
    path = Path(output or sidecars)
    ending = path.suffix[1:].lower() if not path.is_dir() else ""
    if f".{ending}" in VIDEO_EXTENSIONS:
        raise UserError(
            f"--output {path} is the name of a video; give a folder, or a file such as {path}.csv"
        )
    if path.name == "-":
        raise UserError("--output -: without --output, captions are printed to stdout")
    if ending in OTHER_FORMATS:
        raise UserError(f"--output {path}: the formats of files are {', '.join(FILES)}")
    if output and form == "text" and not sidecars:
        raise UserError(
            "--format text is only printed; leave out --output, or choose another format"
        )
    if sidecars and ending in FILES:
        raise UserError(f"--output {path} must be a folder if --sidecar is given")
    if form in FILES and ending in FILES and form != ending:
        raise UserError(f"--format {form} and --output {path} are different formats; leave one out")
    if sidecars or (form is None and ending not in FILES):
        cli.output_folder(path, "--output" if output else "--sidecar")
        path, form = path / RECORD, "jsonl"
    elif path.is_dir():
        raise UserError(f"--format {form} needs the name of a file, such as --output captions.csv")
    else:
        cli.output_folder(path.parent, "--output")
        form = form or ending
    if shard != (0, 1):
        path = path.with_stem("{}_part{}of{}".format(path.stem, *shard))
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path} is not a file; without --output, captions are printed")
    if path.is_symlink():  # else the link would be replaced
        path = Path(os.path.realpath(path))
    return path, form


def check_output(args, path, form, clips):
    """Raise UserError if the captions of the clips cannot be written in this form to this place."""
    if form in SUBTITLES:
        if len(clips) > 1:
            raise UserError(f"{form} holds a single film; for {len(clips)} clips, use --sidecar")
        if args.scores:
            raise UserError(f"--scores: {form} cannot hold scores; choose csv, tsv or jsonl")
    if path and path.exists() and not (args.skip_done or args.overwrite):
        continued = "" if form in SUBTITLES else "--skip-done continues it, "
        raise UserError(f"{path} exists; {continued}--overwrite replaces it")


def check_sidecars(folders):
    """Raise UserError if sidecars cannot be written to one of the folders."""
    for folder in sorted(folders):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"--sidecar: {folder} is not writable; use --output FILE.csv instead, or change its"
                " permissions"
            )


def shard_name(clip, given):
    """Return the name by which a clip belongs to a shard: its path below one of the given folders.

    The shards of machines that mount the folder at different places must not overlap.
    """
    folders = [folder for folder in given if clip.is_relative_to(folder) and clip != Path(folder)]
    return clip.relative_to(folders[0]).as_posix() if folders else clip.name


def sidecar_form(form):
    return "txt" if form in (None, "text") else form


def sample_clips(count, videos, annotations, seed):
    """Sample `count` clips of the test split and return the paths of their files.

    Raises UserError if fewer clips have a file in `videos`.
    """
    records = {r["id"]: r for r in load_records(annotations, TEST)}
    paths, _ = find_files(Path(videos), records)
    if len(paths) < count:
        raise UserError(
            f"--num-samples {count}: only {len(paths)} of the {len(records)} test clips"
            f" are in {videos}"
        )
    return [paths[clip_id] for clip_id in by_hash(paths, seed)[:count]]


def copy_clips(clips, folder):
    """Copy clips into a folder. Clips of different folders may have the same name."""
    for clip, name in zip(clips, output_names(clips), strict=True):
        copy = folder / (name + clip.suffix)
        if not (copy.exists() and copy.samefile(clip)):
            shutil.copyfile(clip, copy)


if __name__ == "__main__":
    cli.run(main)
