"""Score captions: BLEU, METEOR, ROUGE, CIDEr, template accuracy, controls, bootstrap intervals.

`score` computes everything in evaluation_<split>.json, `compare` the differences in versus_*.json. This
module needs neither torch nor a GPU.
Without Java, METEOR is skipped and a simple tokenizer is used (see runtime/caption_tokens.py), which the
result records.
Scoring 24,777 captions with METEOR took 71 s of processor time (104 s on two busy cores).
"""

import random
import sys
from collections import defaultdict
from itertools import chain

import numpy as np

from runtime.caption_metrics import (
    Cider,
    bleu,
    bleu_scores,
    bleu_statistics,
    exact_match,
    meteor,
    meteor_counts,
    meteor_of_sums,
    meteor_statistics,
    placeholder_match,
    rouge_l,
    rouge_n,
)
from runtime.caption_tokens import CHARACTERS, tokenize
from runtime.cli import printable
from runtime.errors import UserError
from runtime.intervals import bootstrap, paired_bootstrap
from runtime.java import JAVA_LIMIT, JavaError, java_thread
from runtime.names import counted, first_few
from runtime.templates import Templates, canonical
from runtime.writing_systems import NOT_LATIN

CAPTION_METRICS = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L")
CAPTION_METRICS += ("ROUGE_1", "ROUGE_2")
CONTROLS = ("shuffled", "most_frequent", "ceiling")
PER_CLIP = ("CIDEr", "exact_match", "template_accuracy", "placeholder_match")  # means over clips
DIFFERENT = 10  # clips that `format_comparison` shows
ENGLISH = 0.01  # METEOR is skipped if a larger share of the clips has references in other scripts
ALL_ZERO = "CIDEr is 0 for every possible caption, because the references contain the same n-grams"
UNRELATED = (
    "CIDEr is not clearly above that of shuffled captions, so captions depend little on the clip"
)


# ---- templates: action classification by caption -------------------------------------------


def template_accuracy(captions, records, parser):
    """Return {id: 1.0 if `parser` finds the clip's own template in its caption, else 0.0}.

    Clips without a template are left out. Templates are compared without their brackets.
    """
    templates = {r["id"]: canonical(r["template"]) for r in records if r["template"]}
    found = {i: parser.parse(captions[i]) or ("", []) for i in templates}  # (template, fillers)
    return {i: float(canonical(found[i][0]) == template) for i, template in templates.items()}


# ---- controls and intervals ----------------------------------------------------------------


def derangement(n, seed):
    """Return a random permutation of range(n), n >= 2, without fixed points (Sattolo 1986)."""
    assert n >= 2, "a derangement needs two items"
    order, rng = list(range(n)), random.Random(f"derangement:{seed}")
    for i in range(n - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


# ---- everything together -------------------------------------------------------------------


def references_of(records, style):
    """Return {id: list of non-blank texts}, the label or the paraphrases depending on `style`."""
    assert style in ("label", "sentence"), style
    texts = {r["id"]: [r["label"]] if style == "label" else r["paraphrases"] for r in records}
    return {i: [t for t in texts if t and t.strip()] for i, texts in texts.items()}


def _references(records, all_records, style):
    """Return {id: references} of the clips to score, and of all clips of the split that have any."""
    references = references_of(records, style)
    split = references_of(all_records or records, style) if any(references.values()) else {}
    return references, {i: texts for i, texts in split.items() if texts}


def _check(predictions, references, style):
    """Raise UserError unless clips and predictions match, and all clips have references or none has."""
    n, without = len(references), [i for i, texts in references.items() if not texts]
    clips = counted(n, "clip has", "clips have")
    problems = {
        f"{clips} no prediction": [i for i in references if i not in predictions],
        f"{len(predictions)} predictions are for clips that are not in the annotations": [
            i for i in predictions if i not in references
        ],
        f"{clips} no {style} caption": without if len(without) < n else [],
    }
    for problem, ids in problems.items():
        if ids:
            raise UserError(f"{len(ids)} of {problem}: {first_few(ids)}")


def _systems(predictions, most_frequent, seed):
    """Return the caption sets to score: {"main": {id: text}}, and one more for each control."""
    systems, ids = {"main": predictions}, sorted(predictions)
    if len(ids) > 1:
        order = derangement(len(ids), seed)
        systems["shuffled"] = {i: predictions[ids[j]] for i, j in zip(ids, order, strict=True)}
    if most_frequent:
        systems["most_frequent"] = dict.fromkeys(ids, most_frequent)
    return systems


def _skipped(records, split, style, templates, most_frequent, with_meteor):
    """Return {name: reason} for the metrics and controls that cannot be computed.

    split: {id: references} of the clips in the split that have any.
    """
    skipped = {} if with_meteor else {"METEOR": "not requested"}
    if not split:
        names = (*CAPTION_METRICS, "exact_match", "placeholder_match")
        skipped |= dict.fromkeys(names, f"the clips have no {style} captions")
    elif len(split) == 1:
        skipped["CIDEr"] = "document frequencies need the references of at least two clips"
    if style != "label":
        reason = "defined for captions of style label only"
        skipped |= {"template_accuracy": reason, "placeholder_match": reason}
    elif not any(r["template"] for r in records):
        skipped["template_accuracy"] = "the clips have no templates"
    elif not templates:
        skipped["template_accuracy"] = "no list of templates"
    if not any(r["placeholders"] for r in records):
        skipped.setdefault("placeholder_match", "the clips have no placeholders")
    others = sum(any(map(NOT_LATIN.search, texts)) for texts in split.values())
    if others > ENGLISH * len(split):
        clips = counted(len(split), "clip has", "clips have")
        reason = f"defined for English; {others} of {clips} references in other scripts"
        skipped.setdefault("METEOR", reason)
    if len(records) == 1:
        skipped["shuffled"] = "there is only one clip"
    if not most_frequent:
        skipped["most_frequent"] = "there are no training captions"
    return skipped


class _Texts:
    """Captions of several systems and the references of a split, tokenised in one run of Java.

    systems: {name: {id: text}}. split: {id: references} of the clips in the split that have any. others:
    further texts to tokenise.
    """

    def __init__(self, systems, records, split, templates, others=()):
        texts = {text for captions in systems.values() for text in captions.values()}
        texts.update(others, *split.values(), *(r["placeholders"] for r in records))
        self.tokens, self.tokenizer, reason = tokenize(texts, JAVA_LIMIT)
        self.problem = {"PTBTokenizer": reason} if reason else {}
        self.systems, self.records = systems, records
        split = {i: [self.tokens[text] for text in texts] for i, texts in split.items()}
        self.references = {r["id"]: split[r["id"]] for r in records if r["id"] in split}
        self.hypotheses = {name: self.tokenised(c) for name, c in systems.items()}
        self.cider, self.parser = Cider(split), Templates(templates)

    def tokenised(self, captions):
        return {i: self.tokens[text] for i, text in captions.items()}

    def per_clip(self, captions, skipped):
        """Compute the metrics PER_CLIP of {id: text}. Returns {metric: {id: float}}, without empty ones."""
        hypotheses = self.tokenised(captions)
        compute = {
            "CIDEr": lambda: self.cider(hypotheses),
            "exact_match": lambda: exact_match(hypotheses, self.references),
            "template_accuracy": lambda: template_accuracy(captions, self.records, self.parser),
            "placeholder_match": lambda: placeholder_match(hypotheses, self.records, self.tokens),
        }
        found = {metric: f() for metric, f in compute.items() if metric not in skipped}
        return {metric: values for metric, values in found.items() if values}


def _oracle(samples, texts, skipped):
    """Return {metric: mean over clips of the highest score of any sample}. samples: {id: list of texts}."""
    kth = (
        {i: drawn[k % len(drawn)] for i, drawn in samples.items()}
        for k in range(max(map(len, samples.values())))
    )
    found = [texts.per_clip(captions, skipped) for captions in kth]
    return {m: _mean({i: max(f[m][i] for f in found) for i in v}) for m, v in found[0].items()}


def score(
    predictions,
    records,
    style="label",
    templates=(),
    all_records=None,
    most_frequent=None,
    seed=0,
    with_meteor=True,
    greedy=None,
    samples=None,
):
    """Score one caption per clip. Returns (result, per_clip).

    predictions: {id: text}.
    records: the clips to score, from `dataset.load_records`, at least one.
    templates: the class templates, with brackets.
    all_records: the whole split. CIDEr counts document frequencies on its references. Default: records.
    most_frequent: the most frequent training caption of this style.
    with_meteor: whether to compute METEOR, which needs 10 s to start, even for a few clips.
    greedy: {id: text}, captions of greedy search to score as a control.
    samples: {id: list of texts}, from which the control `oracle` chooses.

    `result` can be written as JSON. Its keys:
        n: the number of clips.
        empty: the number of empty captions.
        metrics: CIDEr in 0..10, the others in 0..1.
        controls: `shuffled` gives every clip the prediction of another clip, `most_frequent` gives all
            clips the same caption, `ceiling` is the mean over clips of the highest CIDEr of any of their
            own references, `greedy` is the score of greedy search, and `oracle` is, for each metric, the
            mean over clips of the highest score of any sample.
        ci95: {metric: [low, high]}.
        counts: {metric: number of clips} for metrics that are defined for some of the clips only.
        parser_on_references: the template accuracy of the labels themselves.
        tokenizer: "ptb" or "simple", followed by "+characters" if some texts were split into characters.
        skipped: {metric, control or tokenizer: reason}.
    `per_clip` is {id: {metric: float}} for the metrics that are means over clips (PER_CLIP).

    Raises UserError if clips and predictions do not match, or if only some clips have references.
    """
    references, split = _references(records, all_records, style)
    _check(predictions, references, style)
    # in the order of the records, because the last bit of a mean depends on the order
    systems = _systems({r["id"]: predictions[r["id"]] for r in records}, most_frequent, seed)
    systems |= {"greedy": greedy} if greedy else {}
    skipped = _skipped(records, split, style, templates, most_frequent, with_meteor)
    samples = {r["id"]: samples[r["id"]] for r in records} if samples else {}
    texts = _Texts(systems, records, split, templates, chain.from_iterable(samples.values()))
    references, hypotheses, tokenizer = texts.references, texts.hypotheses, texts.tokenizer
    skipped |= texts.problem
    values, scores = {}, {}  # {system: {metric: {id: float}}}, {system: {metric: float}}
    with java_thread() as thread:  # METEOR takes as long as all other metrics
        if "METEOR" not in skipped:
            pending = thread.submit(meteor, hypotheses["main"], references)
        for name, captions in systems.items():
            values[name] = texts.per_clip(captions, skipped)
            scores[name] = {m: _mean(v) for m, v in values[name].items()}
            if references:
                scores[name] |= bleu(hypotheses[name], references)
        if references:
            scores["main"]["ROUGE_L"] = _mean(rouge_l(hypotheses["main"], references))
            for n in (1, 2):
                scores["main"][f"ROUGE_{n}"] = _mean(rouge_n(hypotheses["main"], references, n))
        if "METEOR" not in skipped:
            try:
                scores["main"]["METEOR"] = pending.result()
            except JavaError as error:
                skipped["METEOR"] = str(error)

    main = values["main"]
    controls = {name: _pick(scores[name], (*PER_CLIP, "Bleu_4")) for name in [*systems][1:]}
    if "CIDEr" in main:
        controls["ceiling"] = {"CIDEr": _mean(texts.cider.ceiling(references))}
    if samples:
        controls["oracle"] = _oracle(samples, texts, skipped)
    result = {
        "n": len(records),
        "empty": sum(not text.strip() for text in systems["main"].values()),
        "metrics": _pick(scores["main"], (*CAPTION_METRICS, *PER_CLIP)),
        "controls": controls,
        "ci95": {metric: bootstrap([*v.values()], seed) for metric, v in main.items()},
        "counts": {metric: len(v) for metric, v in main.items() if len(v) < len(records)},
        "tokenizer": tokenizer,
        "skipped": dict(sorted(skipped.items())),
    }
    if "template_accuracy" in main and references:
        labels = {r["id"]: r["label"] for r in records}
        result["parser_on_references"] = _mean(template_accuracy(labels, records, texts.parser))
    per_clip = {r["id"]: {m: v[r["id"]] for m, v in main.items() if r["id"] in v} for r in records}
    return result, per_clip


def compare(
    first,
    second,
    records,
    style="label",
    templates=(),
    all_records=None,
    seed=0,
    with_meteor=True,
):
    """Compare the captions of two systems for the same clips. Returns (result, clips).

    first, second: {id: text}. The other arguments, and the errors, are those of `score`.

    `result` can be written as JSON. Its keys are n, counts, tokenizer and skipped, as in `score`, and
        metrics: {metric: {"first", "second", "difference", "ci95"}}, where the difference is second - first
            and ci95 is its interval by a paired bootstrap over clips.
        excludes_zero: the metrics whose interval does not contain zero.
    `clips` lists the clips whose captions differ, the largest difference of CIDEr first, as
    {"id", "references", "first", "second", "CIDEr": [of first, of second]}. Without CIDEr it is empty.
    """
    references, split = _references(records, all_records, style)
    for captions in (first, second):
        _check(captions, references, style)
    first, second = ({r["id"]: c[r["id"]] for r in records} for c in (first, second))
    systems = {"first": first, "second": second}
    skipped = _skipped(records, split, style, templates, None, with_meteor)
    texts = _Texts(systems, records, split, templates)
    metrics, counts, ciders = {}, {}, ([], [])
    for metric, statistics, scores in _statistics(texts, skipped):
        try:
            a, b, interval = paired_bootstrap(*statistics, scores, seed)
        except JavaError as error:
            skipped[metric] = str(error)
            continue
        metrics[metric] = {"first": a, "second": b, "difference": b - a, "ci95": interval}
        counts[metric] = len(statistics[0])
        if metric == "CIDEr":
            ciders = [part[:, 0].tolist() for part in statistics]
    metrics = _pick(metrics, (*CAPTION_METRICS, *PER_CLIP))
    skipped = {name: why for name, why in skipped.items() if name not in CONTROLS} | texts.problem
    result = {
        "n": len(records),
        "metrics": metrics,
        "excludes_zero": [m for m, v in metrics.items() if not v["ci95"][0] <= 0 <= v["ci95"][1]],
        "counts": {metric: n for metric, n in counts.items() if n < len(records)},
        "tokenizer": texts.tokenizer,
        "skipped": dict(sorted(skipped.items())),
    }
    clips = [
        {"id": i, "references": references[i], "first": first[i], "second": second[i]}
        | {"CIDEr": [a, b]}
        for i, a, b in zip(first, *ciders, strict=False)  # without CIDEr, none
        if first[i] != second[i]
    ]
    return result, sorted(clips, key=lambda c: (-abs(c["CIDEr"][1] - c["CIDEr"][0]), c["id"]))


def _statistics(texts, skipped):
    """Yield (metric, statistics of both systems, score function), see `paired_bootstrap`.

    texts: the `_Texts` of two systems. If METEOR fails, it is added to `skipped`.
    """
    references, hypotheses = texts.references, [*texts.hypotheses.values()]
    per_clip = [texts.per_clip(captions, skipped) for captions in texts.systems.values()]
    if references:
        counts = [bleu_statistics(h, references) for h in hypotheses]
        for n in range(4):
            yield f"Bleu_{n + 1}", counts, lambda sums, n=n: bleu_scores(sums)[:, n]
        for values, h in zip(per_clip, hypotheses, strict=True):
            values["ROUGE_L"] = rouge_l(h, references)
            values |= {f"ROUGE_{n}": rouge_n(h, references, n) for n in (1, 2)}
    for metric in per_clip[0]:
        pairs = [np.array([(x, 1.0) for x in v[metric].values()]) for v in per_clip]  # (n, 2) each
        yield metric, pairs, lambda sums: sums[:, 0] / sums[:, 1]
    if "METEOR" not in skipped:
        both = {(s, i): text for s, h in enumerate(hypotheses) for i, text in h.items()}
        try:  # both in one run, because METEOR takes 10 s to start
            lines = meteor_statistics(both, {(s, i): references[i] for s, i in both})
        except JavaError as error:
            skipped["METEOR"] = str(error)
            return
        yield "METEOR", np.split(meteor_counts(lines), 2), meteor_of_sums


def _mean(values):
    return float(np.mean([*values.values()]))


def is_number(value):
    """Return True for an int or float that is finite as a float. JSON files may contain others."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_result(value):
    """Return True if a JSON value is a result of `score` with the entries that `table` reads."""

    def is_scores(value):
        return isinstance(value, dict) and all(map(is_number, value.values()))

    def is_interval(value):
        return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))

    parts = ("metrics", "controls", "ci95", "counts", "skipped")
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(part), dict) for part in parts)
        and type(value.get("n")) is int
        and isinstance(value.get("tokenizer"), str)
        and is_scores(value["metrics"])
        and all(map(is_scores, value["controls"].values()))
        and all(map(is_interval, value["ci95"].values()))
        and is_scores(value["counts"])
        and all(isinstance(reason, str) for reason in value["skipped"].values())
        and is_number(value.get("parser_on_references", 0))
    )


def _pick(scores, names):
    return {name: scores[name] for name in names if name in scores}


def table(result):
    """Format the result of `score` as rows of text, starting with the header, and a list of notes."""
    controls = {name: dict(scores) for name, scores in result["controls"].items()}
    if "parser_on_references" in result:
        controls.setdefault("ceiling", {})["template_accuracy"] = result["parser_on_references"]

    def cell(value):
        return "" if value is None else f"{value:.3f}"

    rows = [["", "score", "95 % interval", *(name.replace("_", " ") for name in controls)]]
    for name, value in result["metrics"].items():
        interval = " - ".join(cell(x) for x in result["ci95"].get(name, ()))
        rows.append([name, cell(value), interval, *(cell(c.get(name)) for c in controls.values())])
    return rows, notes(result)


def notes(result):
    """Return the lines to print below the scores of `score` or `compare`."""
    scale = "CIDEr is on a 0-10 scale (papers print it x100; see docs/evaluation.md)"
    lines = [f"{counted(result['n'], 'clip')}, tokenizer {result['tokenizer']}; {scale}"]
    if empty := result.get("empty"):
        lines.append(f"empty: {counted(empty, 'caption')}")
    controls, interval = result.get("controls", {}), result.get("ci95", {}).get("CIDEr")
    shuffled = controls.get("shuffled", {}).get("CIDEr")
    if controls.get("ceiling", {}).get("CIDEr") == 0:
        lines.append(ALL_ZERO)
    elif interval and shuffled is not None and interval[0] <= shuffled:
        lines.append(UNRELATED)
    if CHARACTERS in result["tokenizer"]:
        lines.append(
            "characters: scripts without spaces between words, and captions of emoji, are scored by"
            " character"
        )
    lines += [f"{name}: mean over {counted(n, 'clip')}" for name, n in result["counts"].items()]
    reasons = defaultdict(list)
    for name, reason in result["skipped"].items():
        reasons[reason].append(name)
    return lines + [f"skipped {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def format_table(result):
    """Format the rows and notes of `table` as text for a terminal."""
    rows, lines = table(result)
    return "\n".join(aligned(rows) + lines)


def format_markdown(result):
    """Format the rows and notes of `table` as Markdown."""
    (head, *rows), lines = table(result)
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join([f"| {' | '.join(row)} |" for row in rows] + [""] + [f"- {x}" for x in lines])


def aligned(rows):
    """Format rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def format_comparison(result, clips):
    """Format the result of `compare` and the clips that differ most as text for a terminal."""
    rows = [["", "first", "second", "difference", "95 % interval"]]
    for name, m in result["metrics"].items():
        interval = "{:+.3f} to {:+.3f}".format(*m["ci95"])
        scores = f"{m['first']:.3f}", f"{m['second']:.3f}", f"{m['difference']:+.3f}"
        rows.append([name, *scores, interval])
    certain = ", ".join(result["excludes_zero"]) or "no metric"
    lines = [*aligned(rows), f"the interval of the difference excludes zero for: {certain}"]
    lines += notes(result)
    if clips:
        number = counted(len(clips), "clip has", "clips have")
        lines += [f"{number} different captions; the largest differences in CIDEr:"]
    for clip in clips[:DIFFERENT]:
        a, b = clip["CIDEr"]
        first, second = (printable(clip[name], keep="") for name in ("first", "second"))
        lines += ["", clip["id"], *(f"  reference      {text}" for text in clip["references"][:1])]
        lines += [f"  first   {a:6.2f} {first}", f"  second  {b:6.2f} {second}"]
    return "\n".join(lines)
