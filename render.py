"""Draw what was said about clips: a filmstrip each, with reference and caption beneath.

    python render.py --predictions results/demo/predictions_validation.json \\
        --annotations data/toy/annotations --videos data/toy/videos --output strips.png

Needs Pillow: pip install -e '.[viz]'.
"""

from pathlib import Path

import cli
from cli import UserError, note
from dataset import VALIDATION, by_hash, load_records

FRAMES, HEIGHT, MARGIN = 8, 72, 8  # frames a strip; pixels


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--predictions", nargs="+", required=True, help="files of evaluate.py")
    parser.add_argument(
        "--annotations", default="data/annotations", help="of prepare_annotations.py"
    )
    parser.add_argument(
        "--videos", default="data/20bn-something-something-v2", help="clips' folder"
    )
    parser.add_argument("--split", default=VALIDATION, help="split of the predictions")
    parser.add_argument("--num-samples", type=cli.whole(1), default=4, help="clips to draw")
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="seed of the choice")
    parser.add_argument("--output", required=True, help="picture to write, .png")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        from PIL import Image
    except ImportError:
        raise UserError("Pillow is missing: pip install -e '.[viz]'", code=1) from None
    from evaluate import read_predictions
    from preprocess_ssv2 import find_clips

    predictions = read_predictions(args.predictions)
    records = {r["id"]: r for r in load_records(args.annotations, args.split)}
    chosen = by_hash(predictions.keys() & records.keys(), args.seed)[: args.num_samples]
    if not chosen:
        raise UserError(f"no prediction is of a clip of split {args.split!r}")
    paths, _ = find_clips(Path(args.videos), {args.split: [records[i] for i in chosen]})
    strips = [
        strip(paths[key], records[key[1]]["label"], predictions[key[1]])
        for key in ((args.split, i) for i in chosen)
        if key in paths
    ]
    width = max(s.width for s in strips)
    picture = Image.new("RGB", (width, sum(s.height for s in strips)), "white")
    top = 0
    for s in strips:
        picture.paste(s, (0, top))
        top += s.height
    cli.output_folder(Path(args.output).parent, "--output").mkdir(parents=True, exist_ok=True)
    picture.save(args.output, optimize=True)
    note(f"{len(strips)} clips drawn: {args.output}")


def strip(path, reference, caption):
    """One clip: frames from left to right in time, then two lines of text."""
    from PIL import Image, ImageDraw, ImageFont

    import video

    frames = [Image.fromarray(f) for f in video.decode(path, FRAMES).frames]
    frames = [f.resize((round(f.width * HEIGHT / f.height), HEIGHT)) for f in frames]
    font = ImageFont.load_default(size=14)
    lines = [f"reference  {reference}", f"caption     {caption}"]
    text = max(font.getlength(line) for line in lines)
    width = sum(f.width + 2 for f in frames)
    picture = Image.new(
        "RGB", (int(max(width, text)) + 2 * MARGIN, HEIGHT + 40 + 2 * MARGIN), "white"
    )
    left = MARGIN
    for f in frames:
        picture.paste(f, (left, MARGIN))
        left += f.width + 2
    draw = ImageDraw.Draw(picture)
    right = "#136313" if reference == caption else "#a31515"
    for n, (line, colour) in enumerate(zip(lines, ("black", right), strict=True)):
        draw.text((MARGIN, MARGIN + HEIGHT + 2 + 19 * n), line, font=font, fill=colour)
    return picture


if __name__ == "__main__":
    cli.run(main)
