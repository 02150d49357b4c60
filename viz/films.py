"""Turn the captions of infer.py into films: each clip with its captions below the picture.

    python infer.py clip.webm folder/ --output results/captioned
    python -m viz.films results/captioned/captions.jsonl           (a GIF per clip)
    python -m viz.films results/captioned/captions.jsonl --video   (an MP4 per clip, with all frames)

Writes <name>_captioned.gif or .mp4 and prints the path of each. If a clip is in --videos and has a label
in --annotations, the label is shown below the caption as the reference. Exit code 3 if some clips failed,
1 if all did. Needs Pillow and matplotlib: pip install -e '.[viz]'.
"""

import runtime.start

from pathlib import Path

from dataset import load_records
from metrics import is_number
from runtime import cli
from runtime.caption_files import read_results
from runtime.cli import note
from runtime.clip_files import file_finder
from runtime.decode_workers import WorkerPool
from runtime.errors import DONE, FAILED, PARTIAL, UserError, VideoError, refuse_file
from runtime.files import write_atomic
from runtime.names import counted, list_files
from viz import draw_text, subtitles
from windows import output_names


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "captions", metavar="CAPTIONS.jsonl", help="captions.jsonl that infer.py --output wrote"
    )
    parser.add_argument(
        "--gif", action="store_true", help="write GIFs (the default, unless --video is set)"
    )
    parser.add_argument("--video", action="store_true", help="write MP4s (H.264)")
    parser.add_argument("--output", help="folder to write to (default: that of CAPTIONS.jsonl)")
    group = parser.add_argument_group("references")
    group.add_argument("--videos", default=cli.VIDEOS, help="folder of labelled clips")
    group.add_argument(
        "--annotations",
        default=cli.ANNOTATIONS,
        help="output of prepare_annotations.py",
    )
    group = parser.add_argument_group("common")
    group.add_argument(
        "--timeout",
        type=cli.whole(1),
        default=600,
        metavar="N",
        help="seconds allowed to make a film",
    )
    cli.add_workers(group, 2)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw_text.require()
    results = read_captions(Path(args.captions))
    refuse_file(args.videos, "--videos")
    output = cli.output_folder(args.output or Path(args.captions).parent, "--output")
    endings = [e for e, asked in (("gif", args.gif), ("mp4", args.video)) if asked] or ["gif"]
    paths = [Path(r["path"]) for r in results]
    films = [
        (output / f"{name}_captioned.{ending}", path, result, ending)
        for name, path, result in zip(output_names(paths), paths, results, strict=True)
        for ending in endings
        if "error" not in result
    ]
    refuse_own_inputs([film for film, *_ in films], paths)
    labels = references(paths, Path(args.videos), args.annotations)
    for _, path, result, _ in films:
        result |= {"reference": labels[path]} if path in labels else {}

    output.mkdir(parents=True, exist_ok=True)
    draw_text.warn_missing(texts(result) for _, _, result, _ in films)

    # draw; a clip that fails is reported once, even if it has two films
    errors = {path: r["error"] for path, r in zip(paths, results, strict=True) if "error" in r}
    for path, error in errors.items():
        note(f"{path} has no caption: {error}")
    jobs = (((film, path), path, result, ending) for film, path, result, ending in films)
    for (film, path), data in WorkerPool(args.workers, args.timeout).map(subtitles.film, jobs):
        if not isinstance(data, VideoError):
            write_atomic(film, data)
            print(cli.printable(film, keep=""), flush=True)
        elif path not in errors:
            errors[path] = str(data)
            note(str(data))
    if errors:
        note(f"{len(errors)} of {counted(len(results), 'clip')} failed")
    return FAILED if len(errors) == len(results) else PARTIAL if errors else DONE


def read_captions(path):
    """Read the `windows.description` results in a captions.jsonl. Raises UserError for other files."""

    def is_span(value):
        return (
            isinstance(value, dict)
            and isinstance(value.get("caption"), str)
            and is_number(value.get("start"))
            and is_number(value.get("end"))
        )

    def is_result(value):
        spans = value.get("windows")
        if spans is None:
            return isinstance(value.get("error"), str)
        return isinstance(spans, list) and bool(spans) and all(map(is_span, spans))

    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(
            f"{path} is a table; films need the captions.jsonl of infer.py --output FOLDER"
        )
    results = read_results(path)
    if not (results and all(map(is_result, results.values()))):
        raise UserError(f"{path} was not written by infer.py --output")
    return [r | {"path": name} for name, r in results.items()]


def texts(result):
    """Join all texts that are drawn below a clip. result: see `subtitles.Subtitles`."""
    return "".join(w["caption"] for w in result["windows"]) + result.get("reference", "")


def refuse_own_inputs(films, clips):
    """Raise UserError if a film would overwrite one of the clips."""
    inputs = {path.resolve() for path in clips}
    for film in films:
        if film.resolve() in inputs:
            raise UserError(f"{film} is one of the clips and would be overwritten; use --output")


def references(paths, videos, annotations):
    """Return {path: label} of the files inside the folder `videos` that have a label in any split."""
    root, labels = videos.resolve(), {}
    inside = {p.resolve(): p for p in paths if root in p.resolve().parents}
    find = file_finder(root)
    for split in list_files(annotations, ".json") if inside else []:
        for r in load_records(annotations, split.stem):
            if r["label"] and (path := find(r)) in inside:
                labels.setdefault(inside[path], r["label"])
    return labels


if __name__ == "__main__":
    cli.run(main)
