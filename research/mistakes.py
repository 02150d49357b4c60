"""Count what kinds of mistakes captions make, and what they confuse.

    python -m research.mistakes results/ssv2/predictions_validation.json
    python -m research.mistakes results/a/predictions_validation.json results/b/predictions_validation.json \
        --annotations data/a/annotations data/b/annotations --output mistakes.json    (together)

Each caption is compared with the label of its clip: with its template, such as "Moving [something] up", and
with the objects in the brackets. Prints the shares, the templates and objects that are confused most
often, and the words that are in no training label. With --output, everything is written as JSON, too.
"""

import runtime.start

from collections import Counter

from dataset import TRAIN, VALIDATION, load_records
from evaluate import training_facts
from runtime import cli
from runtime.errors import UserError
from runtime.files import write_json
from runtime.predictions import read_predictions
from runtime.provenance import provenance
from runtime.templates import Templates, canonical

KINDS = {
    "exact": "equal to the label",
    "objects": "right template, wrong object or wording",
    "template": "wrong template, only objects of the label",
    "both": "wrong template and wrong object",
    "none": "no template of the training labels",
}
SHOWN = 12  # rows of each list on stdout


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("predictions", nargs="+", metavar="FILE", help="predictions_<split>.json of evaluate.py")
    text = "output of prepare_annotations.py, one folder for all files or one for each"
    add("--annotations", nargs="+", default=[cli.ANNOTATIONS], help=text)
    add("--split", default=VALIDATION, help="split of the predictions")
    add("--output", metavar="FILE", help="JSON file to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folders = args.annotations * (len(args.predictions) if len(args.annotations) == 1 else 1)
    if len(folders) != len(args.predictions):
        raise UserError("give one folder of --annotations, or one for each file of predictions")
    result = {"kinds": Counter(), "templates": Counter(), "objects": Counter(), "words": Counter()}
    for path, folder in zip(args.predictions, folders, strict=True):
        records = [r for r in load_records(folder, args.split) if r["label"] and r["template"]]
        training = [r["label"] for r in load_records(folder, TRAIN)]
        templates, _ = training_facts(folder, "label")
        predictions = read_predictions([path], {r["id"] for r in records})
        found = compare(predictions, records, templates, training)
        if not found["kinds"]:
            raise UserError(f"{path} has no caption of a labelled clip in split {args.split!r}")
        for name, counts in found.items():
            result[name].update(counts)
    print(table(result))
    if args.output:
        ordered = {name: dict(counts.most_common()) for name, counts in result.items()}
        write_json(args.output, provenance() | ordered)


def compare(captions, records, templates, training):
    """Compare captions with the labels of their clips.

    captions: {id: text}. training: the training labels. Returns Counters: "kinds" of KINDS, "templates"
    and "objects" ("right -> written"), and "words" of captions that are in no training label.
    """
    parser, known = Templates(templates), {word for text in training for word in words(text)}
    kinds, confused, objects, new = (Counter() for _ in range(4))
    for record in records:
        if record["id"] not in captions:
            continue
        caption = captions[record["id"]]
        new.update(set(words(caption)) - known)
        wanted = [p.lower() for p in record["placeholders"]]
        template, written = parser.parse(caption) or ("", [])
        if words(caption) == words(record["label"]):
            kinds["exact"] += 1
        elif not template:
            kinds["none"] += 1
        elif canonical(template) == canonical(record["template"]):
            kinds["objects"] += 1
            pairs = zip(wanted, written, strict=False)
            objects.update(f"{a} -> {b}" for a, b in pairs if a != b)
        else:
            kinds["template" if set(written) <= set(wanted) else "both"] += 1
            confused[f"{record['template']} -> {template}"] += 1
    return {"kinds": kinds, "templates": confused, "objects": objects, "words": new}


def words(text):
    return text.lower().rstrip(".").split()


def table(result):
    """Format the counts for the terminal."""
    total = result["kinds"].total()
    lines = [f"{'captions':<44}{total:>7}"]
    for kind, text in KINDS.items():
        count = result["kinds"][kind]
        lines.append(f"  {text:<42}{count:>7}{count / total:>7.1%}")
    titles = {
        "templates": "templates confused most often (right -> written)",
        "objects": "objects confused most often (right -> written)",
        "words": "words in no training label",
    }
    for name, title in titles.items():
        lines += ["", f"{title}: {len(result[name])}"]
        lines += [f"{count:>5}  {text}" for text, count in result[name].most_common(SHOWN)]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
