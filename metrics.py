"""Score captions: BLEU, METEOR, ROUGE-L, CIDEr, template accuracy, controls, bootstrap intervals.

`score` computes everything in evaluation_<split>.json. This module needs neither torch nor a GPU.
Without Java, METEOR is skipped and a simple tokenizer is used (see runtime/caption_tokens.py), which the
result records.
Scoring 24,777 captions with METEOR took 71 s of processor time (104 s on two busy cores).
"""

import gzip
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test
from pycocoevalcap.rouge.rouge import Rouge

from runtime.caption_tokens import CHARACTERS, normalise, tokenize
from runtime.errors import UserError
from runtime.java import JAVA_LIMIT, JavaError, jar, java_thread, run_java
from runtime.names import counted, first_few
from runtime.writing_systems import MARKS, NOT_LATIN, UNSPACED

RESAMPLES = 1000
CAPTION_METRICS = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L")
CAPTION_METRICS += ("ROUGE_1", "ROUGE_2")
PER_CLIP = ("CIDEr", "exact_match", "template_accuracy", "placeholder_match")  # means over clips
ENGLISH = 0.01  # METEOR is skipped if a larger share of the clips has references in other scripts
ALL_ZERO = "CIDEr is 0 for every possible caption, because the references contain the same n-grams"


# ---- n-gram metrics ------------------------------------------------------------------------
# hypotheses: {id: tokens}. references: {id: list of tokens}. Tokens are joined by spaces.


def bleu(hypotheses, references):
    """Compute corpus BLEU-1..4 (Papineni et al. 2002). Returns {"Bleu_1": float in 0..1, ...}."""
    hypotheses = {i: [text] for i, text in hypotheses.items()}
    scores, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    return {f"Bleu_{n}": float(score) for n, score in enumerate(scores, 1)}


def rouge_l(hypotheses, references):
    """Compute the mean ROUGE-L over clips (Lin 2004) with beta = 1.2, a float in 0..1."""
    hypotheses = {i: [text] for i, text in hypotheses.items()}
    return float(Rouge().compute_score(references, hypotheses)[0])


def rouge_n(hypotheses, references, n):
    """Compute the mean over clips of ROUGE-N as F1 (Lin 2004), a float in 0..1.

    A clip with several references gets the highest of their scores.
    """

    def grams(text):
        words = text.split()
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    def f1(found, wanted):
        total = found.total() + wanted.total()
        return 2 * (found & wanted).total() / total if total else 0.0

    scores = [
        max(f1(grams(text), grams(reference)) for reference in references[i])
        for i, text in hypotheses.items()
    ]
    return float(np.mean(scores))


def meteor(hypotheses, references):
    """Compute corpus METEOR 1.5 (Denkowski and Lavie 2014), English with -norm, a float in 0..1.

    The jar runs twice, once for the match statistics and once for the final score. After an error it
    waits forever, so each run gets its whole input at once and has a time limit. Raises JavaError.
    """
    options = ["-Xmx2G", "-jar", jar("meteor", "meteor-1.5.jar")]
    options += ["-", "-", "-stdio", "-l", "en", "-norm"]
    lines = [
        " ||| ".join(t.replace("|", " ") for t in ("SCORE", *references[i], text))
        for i, text in hypotheses.items()
    ]
    statistics = run_java(options, lines, JAVA_LIMIT)
    if len(statistics) != len(lines) or not all(re.fullmatch(r"[\d. ]+", s) for s in statistics):
        raise JavaError(f"METEOR printed {statistics[-1][:100]!r} instead of match statistics")
    with tempfile.TemporaryDirectory() as folder:
        # The final score needs no paraphrases, and loading them takes 10 s.
        paraphrases = Path(folder, "none.gz")
        paraphrases.write_bytes(gzip.compress(b""))
        evaluate = [" ||| ".join(["EVAL", *statistics])]
        out = run_java([*options, "-a", paraphrases], evaluate, JAVA_LIMIT)
    if len(out) != len(lines) + 1 or not re.fullmatch(r"\d\.\d+(E-\d+)?", out[-1]):
        raise JavaError(f"METEOR printed {out[-1][:100]!r} instead of a score")
    return float(out[-1])


class Cider:
    """CIDEr-D (Vedantam et al. 2015) of pycocoevalcap with fixed document frequencies.

    references: {id: list of tokens} of the whole split. Document frequencies are counted on all of them,
    so that a clip's score does not depend on which other clips are scored.
    """

    def __init__(self, references):
        self.references = {i: cook_refs(texts) for i, texts in references.items()}
        self.document_frequency = Counter(
            ngram for cooked in self.references.values() for ngram in set().union(*cooked)
        )

    def __call__(self, hypotheses):
        """Score {id: tokens}. Returns {id: float in 0..10}."""
        scorer = CiderScorer()
        scorer.document_frequency = self.document_frequency
        scorer.ctest = [cook_test(text) for text in hypotheses.values()]
        # The scorer takes the number of documents from the length of this list, so it is padded to that of
        # the whole split. The additional entries are not scored.
        scorer.crefs = [self.references[i] for i in hypotheses]
        scorer.crefs += [None] * (len(self.references) - len(hypotheses))
        return dict(zip(hypotheses, map(float, scorer.compute_cider()), strict=True))

    def ceiling(self, references):
        """Score the references of each clip as captions. Returns {id: the highest of these scores}."""
        best = dict.fromkeys(references, 0.0)
        for k in range(max(map(len, references.values()))):
            kth = {i: texts[k] for i, texts in references.items() if k < len(texts)}
            for i, value in self(kth).items():
                best[i] = max(best[i], value)
        return best


def exact_match(hypotheses, references):
    """Return {id: 1.0 if the tokens equal those of one of the clip's references, else 0.0}.

    Texts without tokens, such as "..." and "!", are equal to no other.
    """
    return {i: float(hypotheses[i] in filter(None, texts)) for i, texts in references.items()}


def placeholder_match(hypotheses, records, tokens):
    """Compute the share of each clip's placeholders that occur in its hypothesis.

    tokens: {placeholder: tokens}. Returns {id: float in 0..1} for the clips that have placeholders. The
    tokens of "vicks vaporub bottle" must occur as a contiguous sequence. The order of the placeholders
    and the number of occurrences do not matter.
    """
    placeholders = {r["id"]: [tokens[p] for p in r["placeholders"] if tokens[p]] for r in records}
    return {
        i: sum(f" {words} " in f" {hypotheses[i]} " for words in wanted) / len(wanted)
        for i, wanted in placeholders.items()
        if wanted
    }


# ---- templates: action classification by caption -------------------------------------------


# Spaces mean nothing next to a character of a script without them, unless a word is on the other side.
NO_SPACE = re.compile(
    rf" (?<=[{UNSPACED}{MARKS}\[\]] )(?=[{UNSPACED}])| (?<=[{UNSPACED}{MARKS}] )(?=[\[\]])"
)
FULL_STOPS = ".。．｡।॥۔።။។"


def _plain(text):
    text = " ".join(normalise(text).lower().split())
    return text if text.isascii() else NO_SPACE.sub("", text)


def canonical(template):
    """Return a template in lower case and without brackets, as in labels.json and test-answers.csv."""
    return _plain(re.sub(r"[\[\]]", "", template))


def fill(template, fillers):
    """Fill the brackets of a template in order and return the text in lower case.

    If there are fewer fillers than brackets, the words in the remaining brackets are kept.
    """
    words = iter(fillers)
    return _plain(re.sub(r"\[([^\]]*)\]", lambda slot: next(words, slot[1]), template))


class Templates:
    """Finds the template that a caption was made from.

    A template such as "Holding [something] next to [something]" matches like a regular expression with
    `(.+?)` for each bracket. It must match the whole caption, without regard to case and white space. If
    several templates match, the one with the most literal characters is used, and among equals the first
    in the list.
    """

    def __init__(self, templates):
        parts = [(t, re.split(r"\[[^\]]*\]", _plain(t))) for t in dict.fromkeys(templates)]
        self._parts = sorted(parts, key=lambda p: -sum(map(len, p[1])))

    def parse(self, caption):
        """Return (template, fillers in lower case), or None if no template matches.

        Full stops at the end of the caption are ignored.
        """
        text = _plain(caption).rstrip(FULL_STOPS + " ")
        for template, parts in self._parts:
            fillers = self._fillers(parts, text)
            if fillers is not None:
                return template, fillers
        return None

    @staticmethod
    def _fillers(parts, text):
        """Return the text in each bracket between the literal `parts`, or None if they do not match.

        The result is the same as with the regular expression, but searching for the parts from left to
        right takes linear time. On a repetitive caption, three `(.+?)` would take minutes.
        """
        if len(parts) == 1:
            return [] if text == parts[0] else None
        first, *middle, last = parts
        if not (text.startswith(first) and text.endswith(last)):
            return None
        fillers, start, end = [], len(first), len(text) - len(last)
        for part in middle:
            at = text.find(part, start + 1, end)  # + 1: a filler has at least one character
            if at < 0:
                return None
            fillers.append(text[start:at])
            start = at + len(part)
        return [*fillers, text[start:end]] if start < end else None


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


def bootstrap(values, seed):
    """Compute a 95 % bootstrap interval (Efron 1979) of the mean of `values` (n,), one per clip.

    Returns [low, high], percentiles of the means of RESAMPLES samples of the clips.
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


# ---- everything together -------------------------------------------------------------------


def predictions_by_id(entries):
    """Turn COCO results `[{"image_id": id, "caption": text}]` into {id: text}. Raises UserError."""
    if not all(
        isinstance(e, dict) and "image_id" in e and isinstance(e.get("caption"), str)
        for e in entries
    ):
        raise UserError('predictions must be a list of {"image_id": id, "caption": text}')
    counts = Counter(str(e["image_id"]) for e in entries)
    if repeated := [i for i, count in counts.items() if count > 1]:
        raise UserError(f"clips predicted more than once: {first_few(repeated)}")
    return {str(e["image_id"]): e["caption"] for e in entries}


def references_of(records, style):
    """Return {id: list of non-blank texts}, the label or the paraphrases depending on `style`."""
    assert style in ("label", "sentence"), style
    texts = {r["id"]: [r["label"]] if style == "label" else r["paraphrases"] for r in records}
    return {i: [t for t in texts if t and t.strip()] for i, texts in texts.items()}


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
    greedy: {id: text}, other captions to score beside the predictions.
    samples: {id: list of texts}, from which `oracle` chooses.

    `result` can be written as JSON. Its keys:
        n: the number of clips.
        metrics: CIDEr in 0..10, the others in 0..1.
        controls: `shuffled` gives every clip the prediction of another clip, `most_frequent` gives all
            clips the same caption, `ceiling` is the mean over clips of the highest CIDEr of any of their
            own references, and `oracle` that of the highest score of any sample, for each metric.
        ci95: {metric: [low, high]}.
        counts: {metric: number of clips} for metrics that are defined for some of the clips only.
        parser_on_references: the template accuracy of the labels themselves.
        tokenizer: "ptb" or "simple", followed by "+characters" if some texts were split into characters.
        skipped: {metric, control or tokenizer: reason}.
    `per_clip` is {id: {metric: float}} for the metrics that are means over clips (PER_CLIP).

    Raises UserError if clips and predictions do not match, or if only some clips have references.
    """
    references = references_of(records, style)
    split = references_of(all_records or records, style)
    _check(predictions, references, style)
    if not any(references.values()):
        references, split = {}, {}
    split = {i: texts for i, texts in split.items() if texts}
    # in the order of the records, because the last bit of a mean depends on the order
    systems = _systems({r["id"]: predictions[r["id"]] for r in records}, most_frequent, seed)
    systems |= {"greedy": greedy} if greedy else {}
    samples = {r["id"]: samples[r["id"]] for r in records} if samples else {}
    skipped = _skipped(records, split, style, templates, most_frequent, with_meteor)

    # tokenise all texts in one run of Java
    texts = {text for captions in systems.values() for text in captions.values()}
    texts.update(*split.values(), *samples.values(), *(r["placeholders"] for r in records))
    tokens, tokenizer, reason = tokenize(texts, JAVA_LIMIT)
    skipped |= {"PTBTokenizer": reason} if reason else {}
    split = {i: [tokens[text] for text in texts] for i, texts in split.items()}
    references = {i: split[i] for i in references}

    def tokenised(captions):
        return {i: tokens[text] for i, text in captions.items()}

    hypotheses = {name: tokenised(captions) for name, captions in systems.items()}

    cider, parser = Cider(split), Templates(templates)
    clip_metrics = {
        "CIDEr": lambda captions: cider(tokenised(captions)),
        "exact_match": lambda captions: exact_match(tokenised(captions), references),
        "template_accuracy": lambda captions: template_accuracy(captions, records, parser),
        "placeholder_match": lambda captions: placeholder_match(
            tokenised(captions), records, tokens
        ),
    }

    def clip_scores(captions):  # {metric: {id: float}}
        found = {m: compute(captions) for m, compute in clip_metrics.items() if m not in skipped}
        return {m: v for m, v in found.items() if v}

    values, scores = {}, {}  # {system: {metric: {id: float}}}, {system: {metric: float}}
    with java_thread() as thread:  # METEOR takes as long as all other metrics
        if "METEOR" not in skipped:
            pending = thread.submit(meteor, hypotheses["main"], references)
        for name, captions in systems.items():
            values[name] = clip_scores(captions)
            scores[name] = {m: _mean(v) for m, v in values[name].items()}
            if references:
                scores[name] |= bleu(hypotheses[name], references)
        if references:
            scores["main"]["ROUGE_L"] = rouge_l(hypotheses["main"], references)
            for n in (1, 2):
                scores["main"][f"ROUGE_{n}"] = rouge_n(hypotheses["main"], references, n)
        if "METEOR" not in skipped:
            try:
                scores["main"]["METEOR"] = pending.result()
            except JavaError as error:
                skipped["METEOR"] = str(error)

    main = values["main"]
    controls = {name: _pick(scores[name], (*PER_CLIP, "Bleu_4")) for name in [*systems][1:]}
    if "CIDEr" in main:
        controls["ceiling"] = {"CIDEr": _mean(cider.ceiling(references))}
    if samples:
        kth = (
            {i: t[k % len(t)] for i, t in samples.items()}
            for k in range(max(map(len, samples.values())))
        )
        found = [clip_scores(captions) for captions in kth]
        controls["oracle"] = {
            m: _mean({i: max(f[m][i] for f in found) for i in v}) for m, v in found[0].items()
        }
    result = {
        "n": len(records),
        "metrics": _pick(scores["main"], (*CAPTION_METRICS, *PER_CLIP)),
        "controls": controls,
        "ci95": {metric: bootstrap([*v.values()], seed) for metric, v in main.items()},
        "counts": {metric: len(v) for metric, v in main.items() if len(v) < len(records)},
        "tokenizer": tokenizer,
        "skipped": dict(sorted(skipped.items())),
    }
    if "template_accuracy" in main and references:
        labels = {r["id"]: r["label"] for r in records}
        result["parser_on_references"] = _mean(template_accuracy(labels, records, parser))
    per_clip = {r["id"]: {m: v[r["id"]] for m, v in main.items() if r["id"] in v} for r in records}
    return result, per_clip


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
    scale = "CIDEr is on a 0-10 scale (papers print it x100)"
    lines = [f"{counted(result['n'], 'clip')}, tokenizer {result['tokenizer']}; {scale}"]
    if result["controls"].get("ceiling", {}).get("CIDEr") == 0:
        lines.append(ALL_ZERO)
    if CHARACTERS in result["tokenizer"]:
        lines.append(
            "characters: scripts without spaces between words, and captions of emoji, are scored by"
            " character"
        )
    lines += [f"{name}: mean over {counted(n, 'clip')}" for name, n in result["counts"].items()]
    reasons = defaultdict(list)
    for name, reason in result["skipped"].items():
        reasons[reason].append(name)
    lines += [f"skipped {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return rows, lines


def format_table(result):
    """Format the rows and notes of `table` as text for a terminal."""
    rows, lines = table(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join(aligned + lines)
