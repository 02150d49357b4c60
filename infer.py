"""Caption video files: any container, any length, no data set needed.

    python infer.py clip.webm other.mp4 folder/ --checkpoint results/ssv2/best.pt
    python infer.py --num-samples 10 --checkpoint results/ssv2/best.pt     (of SSv2's test split)

One line per clip on stdout, `path<TAB>caption`; clips longer than --window seconds are cut into windows,
`path<TAB>start-end<TAB>caption` each. Exit code 3 if some clips failed, 1 if all did. With --output
FOLDER also FOLDER/captions.json, which python -m viz.films turns into films with captions.
"""

import runtime.start

import json
import shutil
from pathlib import Path

from checkpoint import load_models, read_checkpoint
from dataset import STYLES, TEST, by_hash, load_records
from runtime import cli, devices
from runtime.cli import note
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.files import write_json
from video import file_names, find_clips
from windows import Windowing, add_flags, caption_files


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("clips", nargs="*", help="video files, or folders of them (recursive)")
    cli.add_models(parser.add_argument_group("model"))
    group = parser.add_argument_group("captions")
    group.add_argument("--style", choices=STYLES, default="label", help="kind of caption")
    add_flags(group)
    group.add_argument("--num-beams", type=cli.whole(1), default=1, help="1 is greedy")
    group.add_argument("--max-new-tokens", type=cli.whole(1), default=50, help="longest caption")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="a JSON object per line instead of text")
    group.add_argument(
        "--output", help="folder for captions.json (default with --num-samples: results/samples)"
    )
    group = parser.add_argument_group("clips of a data set")
    group.add_argument(
        "--num-samples", type=cli.whole(1), help="sample N clips of the test split, and copy them"
    )
    group.add_argument("--videos", default=cli.VIDEOS, help="folder of the clips")
    group.add_argument("--annotations", default=cli.ANNOTATIONS, help="of prepare_annotations.py")
    cli.add_common(parser, workers=2)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if bool(args.clips) == bool(args.num_samples):
        raise UserError("name the clips to caption, or sample some with --num-samples N (not both)")
    if args.num_samples:
        paths = sample_clips(args.num_samples, args.videos, args.annotations, args.seed)
    else:
        paths = find_clips(args.clips)
    paths = paths[: args.limit]
    output = args.output or ("results/samples" if args.num_samples else None)
    output = output and cli.output_folder(output, "--output")

    checkpoint = read_checkpoint(args.checkpoint)
    device, dtype = devices.resolve(args.device, args.dtype)
    encoder, captioner = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    how = args.style, args.max_new_tokens, args.num_beams
    results = []
    try:
        for result in caption_files(paths, encoder, captioner, Windowing.of(args), *how):
            results.append(result)
            if problem := result.get("error") or result.get("warning"):
                note(f"{result['path']}: {problem}")
            for line in [json.dumps(result)] if args.json else text_lines(result):
                print(line, flush=True)
    finally:  # also what there is when it is stopped
        if output:
            save_results(output, results, copy_clips=bool(args.num_samples))
    failed = sum("error" in r for r in results)
    if failed:
        note(f"{failed} of {len(results)} clips failed")
    return FAILED if failed == len(results) else PARTIAL if failed else DONE


def sample_clips(count, videos, annotations, seed):
    """Files of `count` clips of the test split, sampled with a seed. Raises UserError."""
    records = {r["id"]: r for r in load_records(annotations, TEST)}
    videos = cli.existing(videos, "--videos", "It is the folder of the dataset's clips.")
    paths = []
    for clip_id in by_hash(records, seed):
        files = (videos / name for name in file_names(records[clip_id]))
        paths += [path for path in files if path.is_file()][:1]
        if len(paths) == count:
            break
    if len(paths) < count:
        raise UserError(
            f"--num-samples {count}: only {len(paths)} of the {len(records)} test clips"
            f" are in {videos}"
        )
    return paths


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
