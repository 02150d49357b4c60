"""Write the gallery, an HTML page that shows each clip of a split with its reference, caption and score.

    python -m viz.gallery results/ssv2              (after train.py or evaluate.py)
    python -m viz.gallery results/ssv2 --gifs 50    (50 clips as GIFs in gallery_..._embedded.html, for sharing)
    python -m viz.gallery results/a --versus results/b/predictions_validation.json    (two models)

Reads predictions_<split>.json and evaluation_<split>.json of a run folder. Writes gallery.html, or
gallery_<split>_<style>.html if --split or --style is set; --versus adds _versus to the name. The page works
offline. Without --gifs it links to the clips in --videos. --gifs needs Pillow: pip install -e '.[viz]'.
"""

import runtime.start

import base64
import html
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

import metrics
from dataset import STYLES, VALIDATION, by_hash, load_records
from evaluate import score
from runtime import cli, clip_files, run_folder
from runtime.cli import note
from runtime.decode_workers import WorkerPool
from runtime.errors import UserError, refuse_file
from runtime.files import is_path, read_json, write_atomic
from runtime.names import counted
from runtime.predictions import read_predictions
from viz import draw_text, subtitles

# GIFs in the page: pixels per frame, frames per second, bytes per second
EMBEDDED = (160 * 120, 8, 50_000)
TIMEOUT = 60  # seconds allowed to make a GIF


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of train.py or evaluate.py")
    group = parser.add_argument_group("what to show")
    group.add_argument("--split", default=VALIDATION, help="split to show")
    group.add_argument("--style", choices=STYLES, default="label", help="style of the captions")
    group.add_argument(
        "--predictions",
        nargs="+",
        help="show these predictions, which evaluate.py --predictions must have scored",
    )
    group.add_argument(
        "--versus",
        nargs="+",
        help="also show these files, the captions of another model for the same clips",
    )
    group.add_argument(
        "--annotations",
        help=f"output of prepare_annotations.py (default: that of RUN, else {cli.ANNOTATIONS})",
    )
    group.add_argument("--videos", default=cli.VIDEOS, help="folder of the clips")
    group = parser.add_argument_group("page")
    group.add_argument(
        "--gifs",
        "--embed",
        type=cli.whole(1),
        nargs="?",
        const=100,
        help="show a sample of N clips (100 without a number), as GIFs inside the page",
    )
    group.add_argument("--output", metavar="FILE", help="page to write (default: in RUN)")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of the sample")
    cli.add_workers(group, 4)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run_folder.fill_paths(args, args.run)
    if args.gifs:
        draw_text.require("PIL")
    run = Path(args.run)
    refuse_file(run, "run folder")
    if not run.is_dir():
        raise UserError(
            f"run folder not found: {run}. It is the --output of train.py or evaluate.py"
        )
    name = result_name(run, args.split, args.style, args.predictions)
    page = name + ("_versus" if args.versus else "") + ("_embedded" if args.gifs else "")
    page = "gallery.html" if page == VALIDATION else f"gallery_{page}.html"
    output = Path(args.output) if args.output else run / page
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; pass a file name")
    cli.output_folder(output.parent, "--output")

    # captions, scores and clips, which must be of the same evaluation
    files = args.predictions or [run / f"predictions_{name}.json"]
    for file in files:
        cli.existing(file, "predictions", "evaluate.py writes them.")
    result = read_evaluation(run / f"evaluation_{name}.json", files, args.split, args.style)
    split = load_records(args.annotations, args.split)
    ids = {r["id"] for r in split}
    predictions = read_predictions(files, ids)
    second = read_predictions(args.versus, ids) if args.versus else {}
    if missing := predictions.keys() - second.keys() if args.versus else ():
        clips = counted(len(missing), "clip")
        raise UserError(f"--versus has no caption of {clips}, for example {min(missing)}")
    records = [r for r in split if r["id"] in predictions]
    if not len(records) == len(predictions) == result["n"]:
        raise UserError(
            f"{files[0]} has captions of {counted(len(predictions), 'clip')}; {len(records)} of them are in split"
            f" {args.split!r} of {args.annotations}, and evaluation_{name}.json scores {result['n']}:"
            " pass the --split and --annotations that they were scored with, or run evaluate.py again"
        )
    shown = records
    if args.gifs:
        sample = set(by_hash(predictions, args.seed)[: args.gifs])
        shown = [r for r in records if r["id"] in sample]
    clips, _ = clip_files.find_files(Path(args.videos), {r["id"]: r for r in shown})

    systems = [predictions, {i: second[i] for i in predictions}] if second else [predictions]
    how = records, split, args.annotations, args.style
    scored = [score(captions, *how, with_meteor=False) for captions in systems]
    sources = gifs(clips, args.workers) if args.gifs else links(clips, output.parent)
    references = metrics.references_of(shown, args.style)
    output.parent.mkdir(parents=True, exist_ok=True)
    shown_clips = describe(
        shown, systems, references, [per_clip for _, per_clip in scored], sources
    )
    other = (args.versus, scored[1][0]["metrics"].get("CIDEr")) if second else None
    write_atomic(output, render(result, shown_clips, other))
    if lost := len(shown) - len(sources):
        note(f"{lost} of {counted(len(shown), 'clip')} shown without video")
    print(output)


def result_name(run, split, style, predictions):
    """Return the name of a result within its run: validation, validation_sentence, ...

    predictions: the files of --predictions, or None. Predictions that evaluate.py wrote into the run
    folder keep their name. Scores of other files are named <split>_rescored, as in evaluate.py.
    """
    name = split if style == "label" else f"{split}_{style}"
    if not predictions:
        return name
    file = Path(predictions[0])
    own = file.stem.removeprefix("predictions_")
    is_own = len(predictions) == 1 and file.resolve().parent == run.resolve()
    return own if is_own and (run / f"evaluation_{own}.json").is_file() else f"{name}_rescored"


def read_evaluation(path, predictions, split, style):
    """Read the scores of these predictions. Raises UserError if they are of other predictions."""
    again = "evaluate.py --predictions " + " ".join(map(str, predictions))
    result = read_json(cli.existing(path, "scores", f"Run {again}"), "scores")
    if not is_evaluation(result):
        raise UserError(f"{path} was not written by evaluate.py")
    scored = result["settings"]["split"], result["settings"]["style"]
    if scored != (split, style):
        raise UserError(
            f"{path} was made with --split {scored[0]} --style {scored[1]}: add these flags"
        )
    source = result["checkpoint"]  # or the list of files that were scored
    if isinstance(source, list) and set(map(os.path.realpath, source)) != set(
        map(os.path.realpath, predictions)
    ):
        raise UserError(f"{path} has the scores of {', '.join(source)}. Run {again}")
    return result


def is_evaluation(value):
    """Return True for the content of an evaluation_<split>.json."""
    if not metrics.is_result(value):
        return False
    settings, source = value.get("settings"), value.get("checkpoint")
    files = source if isinstance(source, list) else [source]
    return (
        isinstance(settings, dict)
        and all(isinstance(settings.get(key), str) for key in ("split", "style"))
        and all(map(is_path, files))
    )


# ---- videos --------------------------------------------------------------------------------


def links(clips, folder):
    """Convert {id: path} to {id: URL relative to the folder of the page}."""
    folder = folder.resolve()
    addresses = {i: os.path.relpath(path.resolve(), folder) for i, path in clips.items()}
    return {
        i: quote(Path(name).as_posix(), errors="surrogateescape") for i, name in addresses.items()
    }


def gifs(clips, workers):
    """Convert {id: path} to {id: data: URL of a small GIF}, without clips that cannot be decoded."""
    jobs = ((i, path, None, *EMBEDDED) for i, path in clips.items())
    made = WorkerPool(workers, TIMEOUT).map(subtitles.gif, jobs)
    return {
        i: f"data:image/gif;base64,{base64.b64encode(gif).decode()}"
        for i, gif in tqdm(made, total=len(clips), unit="clip", desc="gallery")
        if isinstance(gif, bytes)
    }


# ---- the page ------------------------------------------------------------------------------


def describe(records, systems, references, scores, sources):
    """Collect the data of each clip on the page.

    systems: one or two {id: caption}. scores: as many {id: {metric: score}}. references, sources: {id: ...}.
    """
    return [
        {
            "id": r["id"],
            "source": sources.get(r["id"]),
            "caption": systems[0][r["id"]],
            "references": references[r["id"]],
            "template": r["template"],
            "correct": scores[0][r["id"]].get("template_accuracy"),
            "cider": scores[0][r["id"]].get("CIDEr"),
        }
        | (
            {"second": systems[1][r["id"]], "secondCider": scores[1][r["id"]].get("CIDEr")}
            if len(systems) > 1
            else {}
        )
        for r in records
    ]


def render(result, clips, other=None):
    """Render the page as HTML.

    result: evaluation_<split>.json. clips: from `describe`. other: the files of the second model and its
    CIDEr, which may be None.
    """
    rows, notes = metrics.table(result)
    if len(clips) < result["n"]:
        notes.append(
            f"this page shows {len(clips)} of the {result['n']} clips, sampled with a fixed seed"
        )
    if other:
        cider = "" if other[1] is None else f", with a CIDEr of {other[1]:.3f}"
        notes.append(
            f"the table is that of the first model; the second is {', '.join(other[0])}{cider}"
        )
    settings, source = result["settings"], result["checkpoint"]
    title = f"{settings['split']}, style {settings['style']}"
    if settings.get("control", "none") != "none":
        title += f", control {settings['control']}"
    source = source if isinstance(source, str) else ", ".join(map(os.path.basename, source))
    parts = {
        "TITLE": html.escape(title),
        "SOURCE": html.escape(cli.printable(source)),
        "SCORES": table(rows),
        "NOTES": "".join(f"<li>{html.escape(line)}</li>" for line in notes),
        "CLIPS": as_script(clips),
    }
    page = Path(__file__).with_name("gallery.template.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)


def table(rows):
    """Format rows of text as rows of an HTML table. The first row and column are headers."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th scope=col>{cell}</th>" for cell in head) + "</tr>"]
    for name, *cells in body:
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th scope=row>{name}</th>{cells}</tr>")
    return "\n".join(lines)


def as_script(value):
    """Encode a value as JSON that is safe inside a script element."""
    script = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
    for character in "<>&":
        script = script.replace(character, f"\\u{ord(character):04x}")
    return script


if __name__ == "__main__":
    cli.run(main)
