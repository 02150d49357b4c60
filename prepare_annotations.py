"""Turn captions into the records that every other script reads: <output>/<split>.json.

Something-Something-V2, its labels folder in the old layout or the new, with or without paraphrases:
    python prepare_annotations.py --labels data/labels --paraphrases data/paraphrases
Your own clips, a CSV or JSON-lines file with video,caption[,split]; more rows, more captions:
    python prepare_annotations.py --captions mine.csv
"""

import runtime.start

import csv
import glob
import io
import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from dataset import TRAIN, VALIDATION, by_hash, is_control, unsafe_content
from runtime import cli
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import is_clip_id, read_json, read_text, write_json

PARAPHRASES = "data/paraphrases"
PREFIX = "something-something-v2-"  # file names of the first release


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("Something-Something-V2")
    group.add_argument("--labels", default=cli.LABELS, help="folder with train.json, …")
    group.add_argument(
        "--paraphrases",
        help=f'file, folder or glob of {{"id": ["sentence", …]}} (default: {PARAPHRASES}, if there)',
    )
    group = parser.add_argument_group("your own clips")
    group.add_argument("--captions", help="CSV with a header, or .jsonl: video, caption[, split]")
    group.add_argument(
        "--validation-share",
        type=cli.number(least=0, below=1),
        default=0.1,
        help="share of clips held out for validation when there is no split column",
    )
    parser.add_argument("--output", default=cli.ANNOTATIONS, help="folder for <split>.json")
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="seed of the held-out clips")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output = cli.output_folder(args.output, "--output")
    if args.captions:
        if args.paraphrases:
            raise UserError("--paraphrases belongs to --labels; in --captions, repeat the row")
        splits = read_captions(args.captions, args.validation_share, args.seed)
    else:
        splits = read_labels(args.labels)
        if args.paraphrases or Path(PARAPHRASES).is_dir():
            add_paraphrases(splits, args.paraphrases or PARAPHRASES)
    problems = [(r["id"], unsafe_content(r)) for records in splits.values() for r in records]
    refuse([f"{i} {why}" for i, why in problems if why], "clips are refused")
    output.mkdir(parents=True, exist_ok=True)
    if stale := sorted({p.stem for p in output.glob("*.json")} - splits.keys()):
        note(f"note: {output} also holds splits of an earlier run: {', '.join(stale)}")
    for split, records in splits.items():
        write_json(output / f"{split}.json", records)
    print(describe(splits, output))


def describe(splits, output):
    """What was read, a line per split, and three samples."""
    lines = []
    for split, records in splits.items():
        labelled = sum(r["label"] is not None for r in records)
        templates = len({r["template"] for r in records} - {None})
        counts = [len(r["paraphrases"]) for r in records if r["paraphrases"]]
        text = (
            f"{split:<20} {len(records):>7,} clips  {labelled:>7,} labels  {templates:>4} templates"
        )
        if counts:
            text += (
                f"  {len(counts) / len(records):.1%} with paraphrases"
                f" ({sum(counts) / len(counts):.1f} each)"
            )
        lines.append(text)
    samples = [r for records in splits.values() for r in records if r["label"]][:3]
    for r in samples:
        lines.append(f"  {r['id']}: {r['label']}")
        lines += [f"    {text}" for text in r["paraphrases"][:1]]
    return "\n".join([*lines, f"written to {output}"])


def refuse(problems, what):
    """Raise UserError if there are problems: how many, and the first three."""
    if problems:
        first = "; ".join(str(p)[:160] for p in problems[:3])
        raise UserError(f"{len(problems)} {what}, for example {first}. Nothing was written.")


def record(clip_id, video=None, label=None, template=None, placeholders=(), paraphrases=()):
    return {
        "id": clip_id,
        "video": video,
        "label": label,
        "template": template,
        "placeholders": list(placeholders),
        "paraphrases": list(paraphrases),
    }


def clean(text):
    """One line of text: white space collapsed, invisible characters dropped. Control characters
    stay, and are refused by name in the end."""
    if not isinstance(text, str):
        return ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or is_control(c))


# ---- Something-Something-V2 ----------------------------------------------------------------


def read_labels(folder):
    """{split: records} of an SSv2 labels folder, old names or new. Raises UserError."""
    folder = cli.existing(
        folder, "--labels", "It is the folder of SSv2's train.json, validation.json, labels.json."
    )
    files = {p.stem.removeprefix(PREFIX): p for p in sorted(folder.glob("*.json"))}
    files.pop("labels", None)
    if TRAIN not in files or VALIDATION not in files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"--labels {folder} needs train.json and validation.json (or {PREFIX}train.json, …);"
            f" found {found}"
        )
    order = [TRAIN, VALIDATION, *sorted(files.keys() - {TRAIN, VALIDATION})]
    splits = {split: read_split(files[split]) for split in order}
    owner, twice = {}, []
    for split, records in splits.items():
        for r in records:
            if r["id"] in owner:
                twice.append(f"{r['id']} ({owner[r['id']]} and {split})")
            owner[r["id"]] = split
    refuse(twice, "ids occur twice")
    for name in ("test-answers.csv", f"{PREFIX}test-answers.csv"):
        if (folder / name).is_file() and "test" in splits:
            add_answers(splits, folder / name)
    return splits


def read_split(path):
    """The records of one SSv2 label file; clips of the test split have an id only."""
    entries = read_json(path, "labels")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"labels {path} must hold a JSON list of objects with an id")
    ids = [str(e["id"]) if isinstance(e.get("id"), str | int) else None for e in entries]
    refuse([repr(i) for i in ids if not is_clip_id(i)], f"ids in {path} are no plain file names")
    refuse(
        [i for i, e in zip(ids, entries, strict=True) if "label" in e and not clean(e["label"])],
        f"clips in {path} have an empty label",
    )
    bad = [
        i
        for i, e in zip(ids, entries, strict=True)
        if not isinstance(e.get("template") or "", str)
        or not isinstance(e.get("placeholders") or [], list)
    ]
    refuse(bad, f"clips in {path} have a template or placeholders of the wrong type")
    return [
        record(
            i,
            f"{i}.webm",
            clean(e.get("label")) or None,
            clean(e.get("template")) or None,
            map(clean, e.get("placeholders") or []),
        )
        for i, e in zip(ids, entries, strict=True)
    ]


def without_brackets(template):
    return re.sub(r"[\[\]]", "", template)


def add_answers(splits, path):
    """Give test clips the class template of test-answers.csv, `id;template without brackets`."""
    known = {r["template"] for records in splits.values() for r in records if r["template"]}
    bracketed = {without_brackets(t).lower(): t for t in known}
    rows = csv.reader(io.StringIO(read_text(path, "answers", "utf-8-sig")), delimiter=";")
    try:
        answers = {row[0]: row[1] for row in rows if len(row) == 2}
    except csv.Error as error:
        raise UserError(f"answers {path} are no readable CSV: {error}") from None
    for r in splits["test"]:
        r["template"] = bracketed.get(clean(answers.get(r["id"])).lower())
    if lost := sum(r["template"] is None for r in splits["test"]):
        note(f"note: {lost} of {len(splits['test'])} test clips have no known class in {path}")


def add_paraphrases(splits, pattern):
    """Fill `paraphrases` from every JSON file that a file name, folder or glob stands for."""
    path = Path(pattern)
    files = sorted(path.glob("*.json")) if path.is_dir() else sorted(map(Path, glob.glob(pattern)))
    if not files:
        raise UserError(f"--paraphrases {pattern}: no such file, no .json in such a folder")
    records = {r["id"]: r for split in splits.values() for r in split}
    twice, unknown = [], 0
    for file in files:
        table = read_json(file, "paraphrases")
        if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
            raise UserError(f'paraphrases {file} must hold a JSON object {{"id": ["sentence", …]}}')
        for clip_id, texts in table.items():
            if clip_id not in records:
                unknown += 1
            elif records[clip_id]["paraphrases"]:
                twice.append(f"{clip_id} ({file.name})")
            else:
                records[clip_id]["paraphrases"] = [t for t in map(clean, texts) if t]
    refuse(twice, "ids have paraphrases twice")
    if unknown:
        note(f"note: paraphrases of {unknown} ids that no split has were left out")
    note(f"read paraphrases from {len(files)} files")


# ---- your own clips ------------------------------------------------------------------------


def read_captions(path, validation_share, seed):
    """{split: records} of a caption file. The first caption of a clip is its label. Raises UserError."""
    path = cli.existing(path, "--captions", "It needs the columns video,caption[,split].")
    rows = read_rows(path)
    bad = [
        n
        for n, r in rows
        if not (clean(r.get("video")) and PurePosixPath(r["video"].strip()).name)
        or not clean(r.get("caption"))
    ]
    refuse([f"line {n}" for n in bad], f"rows of {path} lack a video or a caption")
    bad = [n for n, r in rows if None in r or not isinstance(r.get("split") or "", str)]
    refuse(
        [f"line {n}" for n in bad],
        f"rows of {path} have more cells than the header (quote a caption with commas) or a split that"
        " is no text",
    )
    clips = {}  # video -> record, in order of appearance
    split_of, clash = {}, []
    for n, row in rows:
        video, split = row["video"].strip(), clean(row.get("split")) or None
        if video not in clips:
            clips[video], split_of[video] = record(None, video, clean(row["caption"])), split
        else:
            clips[video]["paraphrases"].append(clean(row["caption"]))
            clash += [f"{video} (line {n})"] if split_of[video] != split else []
    refuse(clash, "clips are in two splits")
    name_clips(clips)
    given = {s for s in split_of.values() if s}
    refuse([s for s in given if not is_clip_id(s)], "split names are no plain names")
    if given and None in split_of.values():
        refuse([v for v, s in split_of.items() if s is None], "clips have no split, others do")
    if not given:
        held_out = by_hash((r["id"] for r in clips.values()), seed)
        least = 2 if validation_share else 0  # one clip alone has no CIDEr
        held_out = set(held_out[: max(least, round(validation_share * len(clips)))])
        if len(held_out) == len(clips):
            raise UserError(
                f"--captions {path} has too few clips to hold two out: add a split column"
            )
        for video, r in clips.items():
            split_of[video] = VALIDATION if r["id"] in held_out else TRAIN
        note(f"no split column: {len(held_out)} of {len(clips)} clips held out for validation")
    splits = {s: [] for s in sorted(set(split_of.values()), key=lambda s: (s != TRAIN, s))}
    for video, r in clips.items():
        splits[split_of[video]].append(r)
    return splits


def read_rows(path):
    """[(line number, row)] of a CSV or JSON-lines file."""
    text = read_text(path, "--captions", "utf-8-sig")
    if path.suffix.lower() in (".jsonl", ".json"):
        try:
            rows = [(n, json.loads(t)) for n, t in enumerate(text.split("\n"), 1) if t.strip()]
        except (ValueError, RecursionError) as error:
            raise UserError(f"--captions {path} is not JSON lines: {error}") from None
        refuse(
            [f"line {n}" for n, r in rows if not isinstance(r, dict)],
            f"lines of {path} are no object",
        )
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            names = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise UserError(
                f"--captions {path} is no readable CSV, line {reader.line_num}: {error}"
            ) from None
        if not {"video", "caption"} <= set(names):
            raise UserError(
                f"--captions {path} needs a header with video,caption[,split];"
                f" its first line is {','.join(names or ['empty'])[:100]!r}"
            )
    if not rows:
        raise UserError(f"--captions {path} holds no rows")
    return rows


def name_clips(clips):
    """Give each clip its file's stem as id, or its whole path where two clips share a stem."""
    stems = Counter(PurePosixPath(video).stem for video in clips)
    for video, r in clips.items():
        stem = PurePosixPath(video).stem
        path = "__".join(PurePosixPath(video).with_suffix("").parts).replace("/", "")
        r["id"] = stem if stems[stem] == 1 else path
    refuse(
        [repr(v) for v, r in clips.items() if not is_clip_id(r["id"])], "videos have unusable names"
    )
    twice = [i for i, n in Counter(r["id"] for r in clips.values()).items() if n > 1]
    refuse(twice, "videos differ in their extension only")


if __name__ == "__main__":
    cli.run(main)
