"""One page to look at a split: every clip with its reference, its caption and its score.

evaluate.py --gallery writes it. The page needs no network and nothing beside it but the clips, or not
even those with --embed. What it does in the browser stands in viz/gallery.template.html.
"""

import base64
import html
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

import metrics
import video
from dataset import by_hash
from runtime import cli
from runtime.decode_workers import WorkerPool
from runtime.errors import UserError
from runtime.files import write_atomic
from viz import films

EMBEDDED = {"area": 160 * 120, "rate": 8, "bytes_a_second": 50_000}  # of a GIF in the page
SECONDS_A_CLIP = 60  # to decode one


def write(path, result, per_clip, predictions, records, clips, style, embed, seed, workers):
    """Write the page.

    result, per_clip: of `metrics.score`; predictions: {id: text}; records: those that were scored;
    clips: {id: path} of their files, as far as there are any; style: of the references; embed: 0, or of
    how many clips (a seeded sample) the page holds a GIF, and shows no others. Returns how many clips
    on it have no film.
    """
    shown = set(by_hash((r["id"] for r in records), seed)[:embed]) if embed else None
    records = [r for r in records if shown is None or r["id"] in shown]
    clips = {r["id"]: clips[r["id"]] for r in records if r["id"] in clips}
    films = gifs(clips, workers) if embed else links(clips, path.parent)
    references = metrics.references_of(records, style)
    data = [
        {
            "id": r["id"],
            "film": films.get(r["id"]),
            "said": predictions[r["id"]],
            "references": references[r["id"]],
            "template": r["template"],
            "right": per_clip[r["id"]].get("template_accuracy"),
            "cider": per_clip[r["id"]].get("CIDEr"),
        }
        for r in records
    ]
    rows, notes = metrics.table(result)
    if shown is not None and len(records) < result["n"]:
        notes.append(f"this page shows {len(records)} of them, drawn by a seed")
    settings, source = result["settings"], result["checkpoint"]
    title = f"{settings['split']}, style {settings['style']}"
    if settings.get("control", "none") != "none":
        title += f", control {settings['control']}"
    page = Path(__file__).with_name("gallery.template.html").read_text()
    parts = {
        "TITLE": html.escape(title),
        "SOURCE": html.escape(
            cli.printable(source if isinstance(source, str) else ", ".join(source))
        ),
        "SCORES": table(rows),
        "NOTES": "".join(f"<li>{html.escape(line)}</li>" for line in notes),
        "CLIPS": as_script(data),
    }
    write_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page))
    return len(records) - len(films)


def table(rows):
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th scope=col>{cell}</th>" for cell in head) + "</tr>"]
    for name, *cells in body:
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th scope=row>{name}</th>{cells}</tr>")
    return "\n".join(lines)


def as_script(value):
    """JSON in which no caption can end the script element that holds it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def links(clips, folder):
    """{id: address of the clip, relative to the folder of the page}."""
    folder = folder.resolve()
    addresses = {i: os.path.relpath(path.resolve(), folder) for i, path in clips.items()}
    return {
        i: quote(Path(name).as_posix(), errors="surrogateescape") for i, name in addresses.items()
    }


def gifs(clips, workers):
    """{id: the clip as a small GIF, a data: address}, without those that cannot be decoded."""
    films = {}
    made = WorkerPool(workers, SECONDS_A_CLIP).map(animate, clips.items())
    for clip_id, gif in tqdm(made, total=len(clips), unit="clip", desc="gallery"):
        if isinstance(gif, bytes):
            films[clip_id] = f"data:image/gif;base64,{base64.b64encode(gif).decode()}"
    return films


def animate(path):
    return films.gif(path, **EMBEDDED)


def find(args, records):
    """{id: path} of the clips' files in --videos. Raises UserError if there are none."""
    found, _ = video.find_files(Path(args.videos), {r["id"]: r for r in records})
    return found


def check(args):
    """Raises UserError for flags of evaluate.py that do not go together with a gallery."""
    if args.embed and not args.gallery:
        raise UserError("--embed is about the page that --gallery writes: add --gallery")
    if args.gallery and args.shard != (0, 1):
        raise UserError("--gallery shows scored clips, and a --shard is not scored: leave one out")
    if args.embed:
        films.require()
