"""Caption video files of any format and length. No dataset is needed.

    python infer.py clip.webm other.mp4 folder/ --checkpoint results/ssv2/best.pt
    python infer.py --num-samples 10 --checkpoint results/ssv2/best.pt     (clips of the SSv2 test split)

Prints one line per clip, `path<TAB>caption`. Clips of at least 1.5 x --window seconds are split into windows,
with one line `path<TAB>start-end<TAB>caption` for each. The exit code is 3 if some clips failed and 1 if
all failed. With --output FOLDER, the captions are also written to FOLDER/captions.json, from which
python -m viz.films makes captioned videos.
"""

import runtime.start

import json
import os
import shutil
from pathlib import Path

import heads
from checkpoint import load_models, read_checkpoint, warn_if_untrained
from dataset import STYLES, TEST, by_hash, load_records
from runtime import cli, devices
from runtime.cli import note
from runtime.clip_files import find_clips, find_files
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.files import write_json
from runtime.names import counted, to_utf8
from windows import Windowing, add_flags, caption_files, output_names


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
    add = parser.add_argument_group("output").add_argument
    add("--probe", help="checkpoint of a probe (probe.py); also print the five likeliest actions")
    add("--json", action="store_true", help="print one JSON object per file instead of text")
    add(
        "--output",
        help="write captions.json to this folder (default with --num-samples: results/samples)",
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
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if bool(args.clips) == bool(args.num_samples):
        raise UserError("give either the clips to caption or --num-samples N, but not both")
    if args.num_samples:
        paths = sample_clips(args.num_samples, args.videos, args.annotations, args.seed)
    else:
        paths = find_clips(args.clips)
    paths = paths[: args.limit]
    output = args.output or ("results/samples" if args.num_samples else None)
    output = output and cli.output_folder(output, "--output")

    checkpoint = read_checkpoint(args.checkpoint)
    device, dtype = devices.resolve(args.device, args.dtype)
    warn_if_untrained(checkpoint, args.style)
    encoder, captioner = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    settings, recognise = encoder.settings, None
    if args.probe:
        recognise = heads.recogniser(args.probe, "--probe", settings, device)
    generation = args.style, args.max_new_tokens, args.num_beams, recognise
    results = []
    try:
        for result in caption_files(paths, encoder, captioner, Windowing.of(args), *generation):
            results.append(result)
            if problem := result.get("error") or result.get("warning"):
                note(f"{result['path']}: {problem}")
            for line in [json.dumps(as_json(result))] if args.json else text_lines(result):
                print(line, flush=True)
    finally:  # if the script is stopped, write the results so far
        if output:
            save_results(output, results, copy_clips=bool(args.num_samples))
    if captioner.cut_captions:
        captions = counted(captioner.cut_captions, "caption")
        limit = args.max_new_tokens or captioner.max_new_tokens
        note(f"{captions} reached the limit of {limit} tokens; --max-new-tokens sets another")
    failed = sum("error" in r for r in results)
    if failed:
        note(f"{failed} of {counted(len(results), 'clip')} failed")
    return FAILED if failed == len(results) else PARTIAL if failed else DONE


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


def text_lines(result):
    """Yield the stdout lines for one file. There are none if it failed."""
    path = cli.printable(result["path"], keep="")  # escape line breaks in the file name
    if "windows" in result:
        for w in result["windows"]:
            yield f"{path}\t{w['start']:.1f}-{w['end']:.1f}\t{w['caption']}{actions_of(w)}"
    elif "caption" in result:
        yield f"{path}\t{result['caption']}{actions_of(result)}"


def actions_of(result):
    """Return another column with the actions of a clip or window, if a probe was applied."""
    actions = [f"{a['action']} {a['probability']:.0%}" for a in result.get("actions", ())]
    return "\t" + "; ".join(actions) if actions else ""


def as_json(result):
    """Return the result of one file with its path as JSON files have it, in UTF-8."""
    return result | {"path": to_utf8(result["path"])}


def save_results(output, results, copy_clips):
    """Write captions.json and, if `copy_clips`, copy the captioned clips into the same folder."""
    output.mkdir(parents=True, exist_ok=True)
    # absolute paths, so that viz.films finds the clips from every working directory
    absolute = [as_json(r | {"path": os.path.abspath(r["path"])}) for r in results]
    write_json(output / "captions.json", absolute)
    paths = [Path(r["path"]) for r in results if copy_clips and "error" not in r]
    # clips of different folders may have the same name
    for path, name in zip(paths, output_names(paths), strict=True):
        copy = output / (name + path.suffix)
        if not (copy.exists() and copy.samefile(path)):
            shutil.copyfile(path, copy)
    note(f"written to {output}")


if __name__ == "__main__":
    cli.run(main)
