"""Draw clips as strips of frames, each with its reference and its caption below.

    python -m viz.strips --predictions results/demo/predictions_validation.json \\
        --annotations data/toy/annotations --videos data/toy/videos --output strips.png

The clips are sampled with a fixed seed. Captions that equal the reference are green, others red.
Needs Pillow and matplotlib: pip install -e '.[viz]'.
"""

import runtime.start

import io
from pathlib import Path

import video
from dataset import VALIDATION, by_hash, load_records
from runtime import cli, clip_files
from runtime.cli import note
from runtime.errors import FAILED, UserError, VideoError
from runtime.files import write_atomic
from runtime.names import counted
from runtime.predictions import read_predictions
from viz import draw_text
from viz.draw_text import BLACK, GREEN, MARGIN, RED

FRAMES, HEIGHT, GAP = 8, 72, 2  # frames per strip; pixels
LETTERS, NARROWEST = 14, 480  # pixels: font size and minimum width


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--predictions",
        nargs="+",
        required=True,
        help="predictions written by evaluate.py",
    )
    parser.add_argument(
        "--annotations",
        default=cli.ANNOTATIONS,
        help="output of prepare_annotations.py",
    )
    parser.add_argument("--videos", default=cli.VIDEOS, help="folder of the clips")
    parser.add_argument("--split", default=VALIDATION, help="split of the predictions")
    parser.add_argument("--num-samples", type=cli.whole(1), default=4, help="clips to draw")
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the sample")
    parser.add_argument("--output", required=True, metavar="FILE", help="PNG file to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw_text.require()
    output = Path(args.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output {output} must be the name of a .png file")
    cli.output_folder(output.parent, "--output")

    # sample clips that have a prediction and a file
    records = {r["id"]: r for r in load_records(args.annotations, args.split)}
    predictions = read_predictions(args.predictions, records.keys())
    sample = by_hash(predictions.keys() & records.keys(), args.seed)[: args.num_samples]
    if not sample:
        raise UserError(f"no prediction is for a clip in split {args.split!r}")
    paths, missing = clip_files.find_files(Path(args.videos), {i: records[i] for i in sample})
    if missing:
        note(f"not in {args.videos}: {len(missing)} of {counted(len(sample), 'clip')}")

    draw_text.warn_missing(predictions[i] + (records[i]["label"] or "") for i in paths)

    strips = []
    for clip_id, path in paths.items():
        try:
            strips.append(strip(path, records[clip_id]["label"], predictions[clip_id]))
        except VideoError as error:
            note(str(error))
    if not strips:
        raise UserError("none of the clips could be drawn", code=FAILED)
    data = io.BytesIO()
    draw_text.stacked(strips).save(data, "PNG", optimize=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, data.getvalue())
    print(output)


def strip(path, reference, caption):
    """Draw one clip as a PIL image: frames from left to right, with the texts below them."""
    from PIL import Image

    frames = [Image.fromarray(f) for f in video.decode(path, FRAMES).frames]
    frames = [f.resize((round(f.width * HEIGHT / f.height), HEIGHT)) for f in frames]
    colour = GREEN if reference == caption else RED
    lines = [(f"reference: {reference}", BLACK), (f"caption: {caption}", colour)]
    width = max(NARROWEST, sum(f.width + GAP for f in frames)) + 2 * MARGIN
    row, left = Image.new("RGB", (width, MARGIN + HEIGHT), "white"), MARGIN
    for f in frames:
        row.paste(f, (left, MARGIN))
        left += f.width + GAP
    return draw_text.stacked([row, draw_text.panel(lines, width, LETTERS)])


if __name__ == "__main__":
    cli.run(main)
