"""Convert captions to the annotation files that the other scripts read: <output>/<split>.json.

Something-Something-V2, with the file names of its first or current release (paraphrases are optional):
    python prepare_annotations.py --labels data/labels --paraphrases data/paraphrases
Your own clips, from a CSV or JSON file with video,caption[,split][,start,end] (a clip may have several
rows; start and end, in seconds, select a part of the video):
    python prepare_annotations.py --captions mine.csv
The same, plus captions that infer.py has written for other clips, to train on both:
    python prepare_annotations.py --captions mine.csv labelled.csv --videos mine/clips
Charades, as whole videos or as windows for recognising actions:
    python prepare_annotations.py --charades data/charades
"""

import runtime.start

import csv
import difflib
import glob
import io
import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from dataset import TEST, TRAIN, VALIDATION, by_hash, is_control, is_span, unsafe_content
from runtime import charades, cli
from runtime.caption_files import has_results, likeliest_captions
from runtime.cli import note
from runtime.errors import UserError, refuse, refuse_file
from runtime.files import read_json, read_text, write_json
from runtime.names import counted, first_few, id_problem, list_files, normal_form, safe_id, visible
from runtime.table import read_table
from runtime.templates import canonical
from video import window_spans

PARAPHRASES = "data/paraphrases"
PREFIX = "something-something-v2-"  # file names of the first release


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("Something-Something-V2").add_argument
    add("--labels", default=cli.LABELS, help="folder with train.json, validation.json, …")
    add(
        "--paraphrases",
        help='file, folder or glob of JSON files {"id": ["sentence", …]}'
        f" (default: {PARAPHRASES}, if it exists)",
    )
    add = parser.add_argument_group("your own clips").add_argument
    add(
        "--captions",
        nargs="+",
        help="CSV with a header, or JSON, with the columns video,caption[,split][,start,end]; files written by"
        " infer.py are added to the training split, without videos that the other files name",
    )
    text = "leave out captions of infer.py with a lower score; needs infer.py --scores or --sample"
    add("--min-score", type=cli.number(), help=text)
    text = "folder that contains the clips; only needed with files of infer.py"
    add("--videos", default=cli.VIDEOS, help=text)
    add(
        "--validation-share",
        type=cli.number(least=0, below=1),
        default=0.1,
        help="fraction of the videos to hold out for validation if there is no split column",
    )
    add = parser.add_argument_group("Charades").add_argument
    add(
        "--charades",
        help="folder with Charades_v1_train.csv, _test.csv and _classes.txt",
    )
    text = "split the videos of Charades into windows of this many seconds"
    add("--window", type=cli.number(above=0), help=text)
    add("--stride", type=cli.number(above=0), help="seconds between windows (default: --window)")
    parser.add_argument("--output", default=cli.ANNOTATIONS, help="folder for <split>.json")
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="random seed for choosing the validation clips"
    )
    args = parser.parse_args(argv)
    if args.captions or args.charades:
        parser.refuse_given(args, ("labels",), "cannot be used with --captions or --charades")
    return args


def main(argv=None):
    args = parse_args(argv)
    output = cli.output_folder(args.output, "--output")
    if args.charades and args.captions:
        raise UserError("--charades and --captions are mutually exclusive")
    if (args.stride and not args.window) or (args.window and not args.charades):
        raise UserError("--window can only be used with --charades, and --stride with --window")
    if args.charades:
        splits = read_charades(args.charades, args.window, args.stride or args.window, args.seed)
    elif args.captions:
        if args.paraphrases:
            raise UserError(
                "--paraphrases can only be used with --labels; in a --captions file, add one row per"
                " caption"
            )
        paths = [
            cli.existing(
                p, "--captions", "It must have the columns video,caption[,split][,start,end]."
            )
            for p in args.captions
        ]
        written = [path for path in paths if has_results(path)]
        if args.min_score is not None and not written:
            raise UserError("--min-score needs a file that infer.py has written, in --captions")
        labelled = labelled_clips(written, args.videos, args.min_score)
        own = [path for path in paths if path not in written]
        splits = read_captions(own, args.validation_share, args.seed, labelled)
    else:
        splits = read_labels(args.labels)
        if args.paraphrases or Path(PARAPHRASES).is_dir():
            add_paraphrases(splits, args.paraphrases or PARAPHRASES)
    problems = [(r["id"], unsafe_content(r)) for records in splits.values() for r in records]
    refuse([f"{i} {why}" for i, why in problems if why], "clips have unsafe values")
    for split in sorted(splits.keys() - {TRAIN, VALIDATION, TEST}):
        note(about_split(split))
    output.mkdir(parents=True, exist_ok=True)
    if stale := sorted({p.stem for p in list_files(output, ".json")} - splits.keys()):
        note(
            f"note: {output} also contains splits of an earlier run: {', '.join(stale)}. Delete their .json"
            " files unless you need them."
        )
    for split, records in splits.items():
        write_json(output / f"{split}.json", records)
    print(describe(splits, output))


def about_split(name):
    """Return a note about a split whose name the other scripts do not use by default."""
    text = f"note: split {name!r} is used only with --split {name}"
    short, usual = name.lower().removesuffix("ing"), (TRAIN, VALIDATION, TEST)
    meant = [VALIDATION] if short in ("dev", "eval", "validate") else []
    meant += [known for known in usual if known.startswith(short)]
    meant += difflib.get_close_matches(short, usual, n=1, cutoff=0.85)  # not "validation_pairs"
    return f"{text}; did you mean {meant[0]!r}?" if meant else text


def describe(splits, output):
    """Return a summary of the splits, one line each, and three sample records."""
    lines = []
    for split, records in splits.items():
        labelled = sum(r["label"] is not None for r in records)
        templates = len({r["template"] for r in records} - {None})
        actions = [r["actions"] for r in records if r.get("actions") is not None]
        counts = [len(r["paraphrases"]) for r in records if r["paraphrases"]]
        text = (
            f"{split:<20} {len(records):>7,} clips  {labelled:>7,} labels  {templates:>4} templates"
        )
        if counts:
            text += (
                f"  {len(counts) / len(records):.1%} with paraphrases"
                f" ({sum(counts) / len(counts):.1f} each)"
            )
        if actions:
            classes = len({name for names in actions for name in names})
            text += f"  {classes} actions, {sum(map(len, actions)) / len(actions):.1f} per clip"
        lines.append(text)
    samples = [r for records in splits.values() for r in records if r["label"]][:3]
    for r in samples:
        lines.append(f"  {r['id']}: {r['label']}")
        lines += [f"    {text}" for text in r["paraphrases"][:1]]
    return "\n".join([*lines, f"written to {output}"])


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
    """Collapse white space and remove invisible characters, except for control characters.

    Control characters are kept, so that `unsafe_content` can report them.
    """
    if not isinstance(text, str):
        return ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or is_control(c))


# ---- Something-Something-V2 ----------------------------------------------------------------


def read_labels(folder):
    """Read an SSv2 labels folder, with old or new file names. Returns {split: records}.

    Other JSON files that are a list of objects with an id are read as splits too. All others are skipped
    with a note. Raises UserError if train or validation is missing or not valid, if two files are the
    same split, or if an id occurs twice.
    """
    folder = cli.existing(
        folder,
        "--labels",
        "This must be the SSv2 folder that contains train.json, validation.json and labels.json.",
    )
    refuse_file(folder, "--labels")
    files = {}
    for path in list_files(folder, ".json"):
        split = path.stem.removeprefix(PREFIX)
        if split in files:
            raise UserError(
                f"--labels {folder} has two files for split {split!r}: {files[split].name} and"
                f" {path.name}. Remove one of them."
            )
        files[split] = path
    files.pop("labels", None)
    if TRAIN not in files or VALIDATION not in files:
        found = first_few([entry.name for entry in visible(folder)], 8) or "nothing"
        raise UserError(
            f"--labels {folder} must contain train.json and validation.json (or {PREFIX}train.json,"
            f" …); found {found}"
        )
    others = sorted(split for split in files.keys() - {TRAIN, VALIDATION} if is_split(files[split]))
    splits = {split: read_split(files[split]) for split in [TRAIN, VALIDATION, *others]}
    owner, twice = {}, []
    for split, records in splits.items():
        for r in records:
            if r["id"] in owner:
                first = owner[r["id"]]
                where = f"twice in {split}" if first == split else f"{first} and {split}"
                twice.append(f"{r['id']} ({where})")
            owner[r["id"]] = split
    refuse(twice, "ids occur more than once")
    answers = [folder / f"{prefix}test-answers.csv" for prefix in ("", PREFIX)]
    answers = [path for path in answers if path.is_file()]
    if len(answers) > 1:
        raise UserError(
            f"--labels {folder} has two files of answers: {answers[0].name} and {answers[1].name}. Remove"
            " one of them."
        )
    if answers and TEST in splits:
        add_answers(splits, *answers)
    return splits


def is_split(path):
    """Return True for test.json and for JSON lists of objects with an id, else False with a note.

    An empty list is not a split.
    """
    if path.stem.removeprefix(PREFIX) == TEST:
        return True
    try:
        entries = read_json(path, "labels")
    except UserError as error:
        note(f"note: skipped a file: {error}")
        return False
    is_list = isinstance(entries, list) and entries
    if is_list and all(isinstance(e, dict) and "id" in e for e in entries):
        return True
    note(f"note: skipped {path}: it is not a list of clips with an id")
    return False


def read_split(path):
    """Read one SSv2 label file and return its records. Clips of the test split only have an id."""
    entries = read_json(path, "labels")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"labels {path} must contain a JSON list of objects with an id")
    if not entries:
        raise UserError(
            f"labels {path} contains an empty list, but a split needs at least one clip"
        )
    ids = [
        normal_form(str(i)) if isinstance(i := e.get("id"), str | int) else None for e in entries
    ]
    bad = [f"{i!r:.60} of entry {n} {why}" for n, i in enumerate(ids, 1) if (why := id_problem(i))]
    refuse(bad, f"ids in {path} are not valid file names")
    clips = list(zip(ids, entries, strict=True))
    empty = [i for i, e in clips if "label" in e and not clean(e["label"])]
    refuse(empty, f"clips in {path} have an empty label")
    types = {"template": str, "placeholders": list}
    bad = [i for i, e in clips if not all(isinstance(e.get(k) or t(), t) for k, t in types.items())]
    refuse(bad, f"clips in {path} have a template or placeholders of the wrong type")
    return [
        record(
            i,
            f"{i}.webm",
            clean(e.get("label")) or None,
            clean(e.get("template")) or None,
            map(clean, e.get("placeholders") or []),
        )
        for i, e in clips
    ]


def add_answers(splits, path):
    """Add the class templates in test-answers.csv to the records of the test split.

    A row of the file is `id;template`, where the template has no brackets.
    """
    known = {r["template"] for records in splits.values() for r in records if r["template"]}
    bracketed = {canonical(template): template for template in known}
    rows = csv.reader(io.StringIO(read_text(path, "answers")), delimiter=";")
    try:
        answers = {normal_form(row[0]): row[1] for row in rows if len(row) == 2}
    except csv.Error as error:
        raise UserError(f"answers {path} is not a valid CSV file: {error}") from None
    for r in splits["test"]:
        r["template"] = bracketed.get(canonical(clean(answers.get(r["id"]))))
    if unknown := sum(r["template"] is None for r in splits["test"]):
        note(f"note: {unknown} of {len(splits['test'])} test clips have no known class in {path}")


def add_paraphrases(splits, pattern):
    """Fill in `paraphrases` from the JSON files given by a file name, folder or glob pattern."""
    path = Path(pattern)
    files = list_files(path, ".json")
    if not path.is_dir():  # a name with [brackets] may be a file or a pattern
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(pattern))))
        files = [p for p in found if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise UserError(
            f"--paraphrases {pattern} does not match a file or a folder that contains .json files"
        )
    records = {r["id"]: r for split in splits.values() for r in split}
    twice, unknown = [], 0
    for file in files:
        table = read_json(file, "paraphrases")
        if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
            raise UserError(
                f'paraphrases {file} must contain a JSON object {{"id": ["sentence", …]}}'
            )
        for clip_id, texts in zip(map(normal_form, table), table.values(), strict=True):
            if clip_id not in records:
                unknown += 1
            elif records[clip_id]["paraphrases"]:
                twice.append(f"{clip_id} ({file.name})")
            else:
                records[clip_id]["paraphrases"] = [*dict.fromkeys(filter(None, map(clean, texts)))]
    refuse(twice, "ids have paraphrases in more than one file")
    if unknown:
        note(
            f"note: skipped the paraphrases of {counted(unknown, 'id that is', 'ids that are')} in no split"
        )
    note(f"read paraphrases from {counted(len(files), 'file')}")


# ---- Charades ------------------------------------------------------------------------------


def read_charades(folder, window, stride, seed):
    """Read Charades. Returns {split: records}, with a tenth of the training videos as validation.

    window, stride: in seconds, or None. Without a window, a record is a whole video, with its script
    as label, its descriptions as paraphrases, and its actions. With a window, a record is a part of a
    video, without captions, and it has all actions that overlap it. Such windows start every `stride`
    seconds.
    """
    videos, oddities = charades.read(folder)
    count = max(2, len(videos[TRAIN]) // 10)  # CIDEr needs at least two clips
    if count >= len(videos[TRAIN]):
        raise UserError(
            f"--charades {folder} has too few training videos to hold out two for validation"
        )
    if window and not any(v.length for of_split in videos.values() for v in of_split):
        raise UserError(
            "--window needs the column length, which old copies of Charades' files lack"
        )
    held_out = set(by_hash((v.id for v in videos[TRAIN]), seed)[:count])
    splits = {TRAIN: [], VALIDATION: [], TEST: []}
    for split, of_split in videos.items():
        for video in of_split:
            records = splits[VALIDATION if split == TRAIN and video.id in held_out else split]
            if not window:
                actions = sorted({name for name, *_ in video.actions})
                records.append(charades_record(video) | {"actions": actions})
                continue
            if video.length is None:
                oddities["videos without a length, left out"] += 1
                continue
            for span in window_spans(video.length, window, stride):
                names = {
                    name for name, start, end in video.actions if start < span[1] and end > span[0]
                }
                part = record(span_id(video.id, span), f"{video.id}.mp4") | span_fields(span)
                records.append(part | {"actions": sorted(names)})
    if window and stride > window:
        note("note: --stride is longer than --window, so parts of the videos are in no window")
    for what, count in oddities.items():
        if count:
            note(f"note: {what}: {count:,}")
    return splits


def charades_record(video):
    texts = [text for text in map(clean, (video.script, *video.descriptions)) if text]
    return record(video.id, f"{video.id}.mp4", next(iter(texts), None), paraphrases=texts[1:])


# ---- your own clips ------------------------------------------------------------------------


def read_captions(paths, validation_share, seed, labelled=()):
    """Read caption files. Returns {split: records}.

    A clip is a video, or the part of it from `start` to `end`. Its first caption becomes its label, the
    others its paraphrases. If there is no split column, all clips of `validation_share` of the videos are
    held out for validation. labelled: the result of `labelled_clips`. Those of videos that are not in the
    files are added to the training split. Raises UserError if a row is not valid.
    """
    if not paths:
        raise UserError(
            "--captions: all files are from infer.py; add a file of captions by people, which validation"
            " needs"
        )
    rows = []
    for path in paths:
        found = read_table(path, "--captions", ("video", "caption"), ("split", "start", "end"))
        check_rows(found, path)
        rows += [(f"{path}, {where}" if len(paths) > 1 else where, row) for where, row in found]
    clips = {}  # (normal form of the video's name, span) -> record, in order of appearance
    split_of, clash = {}, []
    for where, row in rows:
        name, split = row["video"].strip().removeprefix("./"), clean(row.get("split")) or None
        span, caption = span_of(row), clean(row["caption"])
        key = normal_form(name), span
        if key not in clips:
            clips[key], split_of[key] = record(None, name, caption) | span_fields(span), split
        else:
            if caption not in (clips[key]["label"], *clips[key]["paraphrases"]):
                clips[key]["paraphrases"].append(caption)
            clash += [f"{name} ({where})"] if split_of[key] != split else []
    refuse(clash, "clips are in more than one split")
    known = {video for video, _ in clips}
    added = {key: r for key, r in dict(labelled).items() if key[0] not in known}
    name_clips(added, taken=name_clips(clips))
    given = set(split_of.values()) - {None}
    bad = [f"{s!r:.60} {why}" for s in given if (why := id_problem(s))]
    refuse(bad, "split names are not valid")
    if not given:
        split_of = sample_validation(clips, validation_share, seed)
    elif None in split_of.values():
        without = [clips[key]["id"] for key, split in split_of.items() if split is None]
        refuse(without, "clips have no split, but others do")
    splits = {s: [] for s in sorted(set(split_of.values()), key=lambda s: (s != TRAIN, s))}
    for key, r in clips.items():
        splits[split_of[key]].append(r)
    if labelled:
        splits.setdefault(TRAIN, []).extend(added.values())
        known = counted(len(labelled) - len(added), "clip")
        note(
            f"captions of infer.py: {len(added):,} added to train, {known} left out because your own files"
            " name the video"
        )
    return splits


def labelled_clips(paths, videos, min_score=None):
    """Read captions that infer.py has written. Returns {(video, span): record}, with "score" if known.

    videos: the folder that contains the clips. Captions with a score below `min_score` are left out.
    """
    clips, root = {}, Path(os.path.abspath(videos))
    for path in paths:
        if not (rows := likeliest_captions(path)):
            note(f"note: {path} has no captions")
        outside = [
            f"{row['video']} ({where})"
            for where, row in rows
            if not Path(row["video"]).is_relative_to(root)
        ]
        refuse(outside, f"clips in {path} are not in --videos {root}, or were moved")
        for _, row in rows:
            row["video"] = Path(row["video"]).relative_to(root).as_posix()
        check_rows(rows, path)
        scores = [row["score"] for _, row in rows if row["score"] is not None]
        if len(scores) == len(rows) > 0:
            quarters = np.quantile(scores, [0.75, 0.5, 0.25])
            text = "; a quarter, half and three quarters of the scores are at least {:.3f}, {:.3f}, {:.3f}"
            note(f"{path}: {counted(len(rows), 'caption')}{text.format(*quarters)}")
        elif rows and min_score is not None:
            raise UserError(
                f"--min-score: {path} has captions without a score; run infer.py with --scores"
            )
        if rows and min_score is not None:
            low = sum(score < min_score for score in scores)
            note(f"{path}: {counted(low, 'caption')} below --min-score {min_score:g} left out")
        for _, row in rows:
            if min_score is None or row["score"] >= min_score:
                span = span_of(row)
                score = {"score": row["score"]} if row["score"] is not None else {}
                r = record(None, row["video"], clean(row["caption"]))
                clips[normal_form(row["video"]), span] = r | span_fields(span) | score
    if paths and not clips:
        least = "" if min_score is None else f" with --min-score {min_score:g}"
        raise UserError(f"no caption is left of {', '.join(map(str, paths))}{least}")
    return clips


def span_of(row):
    """Return (start, end) of a row in seconds, or None if it has neither. Raises ValueError if not valid."""
    texts = [
        str(row.get(k, "") if row.get(k) is not None else "").strip() for k in ("start", "end")
    ]
    if not any(texts):
        return None
    start, end = map(float, texts)
    if not is_span(start, end):
        raise ValueError(f"{texts[0]} to {texts[1]} is not a span")
    return start, end


def span_fields(span):
    """Return the entries of a record for a span, or none."""
    return dict(zip(("start", "end"), span, strict=True)) if span else {}


def span_id(clip_id, span):
    """Return the id of a part of the video with the id `clip_id`."""
    return f"{clip_id}_{span[0]:.10g}-{span[1]:.10g}" if span else clip_id


def check_rows(rows, path):
    """Raise UserError if a row of a caption file, (where, dict), has no usable video, caption or split."""

    def has_text(row):
        video = clean(row.get("video")) and PurePosixPath(row["video"].strip()).name
        return video and clean(row.get("caption"))

    bad = [where for where, row in rows if not has_text(row)]
    refuse(bad, f"rows of {path} have no text as video or caption")
    bad = [where for where, row in rows if not isinstance(row.get("split") or "", str)]
    refuse(bad, f"rows of {path} have a split that is not a string")
    bad = []
    for where, row in rows:
        try:
            span_of(row)
        except ValueError:
            bad.append(where)
    text = "have no valid start and end, in seconds such as 2.5, with 0 <= start < end"
    refuse(bad, f"rows of {path} {text}; both may be empty")
    names = [(re.split(r"[/\\]", row["video"].strip())[-1], where) for where, row in rows]
    bad = [f"{n!r:.100} ({where})" for n, where in names if n[:1] == "." and n not in (".", "..")]
    refuse(bad, f"rows of {path} name hidden files, which are not videos")


def sample_validation(clips, share, seed):
    """Sample a share of the videos for validation. Returns {(video, span): split}.

    clips: {(video, span): record}. All clips of a video get the same split.
    """
    ids = {video: r["id"].removesuffix(span_id("", span)) for (video, span), r in clips.items()}
    least = 2 if share else 0  # CIDEr needs at least two clips
    count = max(least, round(share * len(ids)))
    if count >= len(ids):
        raise UserError(
            "--captions has too few videos to hold out two for validation; add more videos or a split"
            " column"
        )
    held_out = set(by_hash(ids.values(), seed)[:count])
    note(f"no split column: {count} of {counted(len(ids), 'video')} held out for validation")
    return {key: VALIDATION if ids[key[0]] in held_out else TRAIN for key in clips}


def name_clips(clips, taken=frozenset()):
    """Set the id of each clip to the stem of its file name, or to its path if the stem is not unique.

    taken: ids of other clips, without spans. Returns the ids of these clips, without spans.

    Characters that are not safe in file names are replaced. If that makes two ids equal, a hash of the
    path is added. A part of a video also has its start and end in its id. clips: {(normal form of the video's
    name, span): record}.
    """
    paths = {video: PurePosixPath(video.replace("\\", "/")) for video, _ in clips}
    stems = Counter(path.stem for path in paths.values())
    names = {  # unique, except for videos that differ only in the extension
        video: path.stem
        if stems[path.stem] == 1 and safe_id(path.stem) not in taken
        else "__".join((*path.parent.parts, path.stem))
        for video, path in paths.items()
    }
    ids, found = Counter(map(safe_id, names.values())), set()
    for (video, span), r in clips.items():
        name, clip_id = names[video], safe_id(names[video])
        shared = ids[clip_id] > 1 and clip_id != paths[video].stem
        if shared or clip_id in taken:
            clip_id = safe_id(name, add_hash=True)
        found.add(clip_id)
        r["id"] = span_id(clip_id, span)
    twice = [i for i, n in Counter(r["id"] for r in clips.values()).items() if n > 1]
    refuse(
        twice,
        "videos differ only in the extension, so they are probably the same; keep one, or rename them",
    )
    return found


if __name__ == "__main__":
    cli.run(main)
