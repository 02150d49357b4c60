"""Score captions: BLEU, METEOR, ROUGE-L, CIDEr, template accuracy, controls, bootstrap intervals.

`score` does it all and returns what goes into evaluation_<split>.json. It needs no GPU and no torch;
without Java it tokenises in Python and leaves METEOR out, with the reason.
24,777 captions took 71 s of processor time (104 s on two busy cores); METEOR runs beside the rest.
"""

import gzip
import random
import re
import tempfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

import ptb
from runtime.errors import UserError

RESAMPLES = 1000
CAPTION_METRICS = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L")
PER_CLIP = ("CIDEr", "exact_match", "template_accuracy", "placeholder_match")  # means over clips


# ---- n-gram metrics ------------------------------------------------------------------------
# hypotheses: {id: tokens}, references: {id: list of tokens}; tokens are joined by spaces.


def bleu(hypotheses, references):
    """Corpus BLEU-1..4 (Papineni et al. 2002): four floats in 0..1."""
    from pycocoevalcap.bleu.bleu import Bleu

    lists = {i: [text] for i, text in hypotheses.items()}
    scores, _ = Bleu(4).compute_score({i: references[i] for i in lists}, lists, verbose=0)
    return [float(score) for score in scores]


def rouge_l(hypotheses, references):
    """Mean ROUGE-L (Lin 2004), beta = 1.2: a float in 0..1."""
    from pycocoevalcap.rouge.rouge import Rouge

    lists = {i: [text] for i, text in hypotheses.items()}
    return float(Rouge().compute_score({i: references[i] for i in lists}, lists)[0])


def meteor(hypotheses, references, time_limit=ptb.JAVA_LIMIT):
    """Corpus METEOR 1.5 (Denkowski and Lavie 2014), English, -norm: a float in 0..1.

    The jar, spoken to through pipes, hangs for ever after any error. So it gets all it will ever
    hear at once and has `time_limit` seconds for it, twice: matching, then adding up.
    Raises ptb.JavaError.
    """

    def one_line(text):
        return ptb.clean(text).replace("|", " ")  # ||| is the jar's separator

    jar = str(ptb.jar("meteor", "meteor-1.5.jar"))
    options = ["-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
    score = [
        " ||| ".join(["SCORE", *map(one_line, references[i]), one_line(text)])
        for i, text in hypotheses.items()
    ]
    matches = ptb.run_java(options, score, time_limit)
    if len(matches) != len(score) or not all(re.fullmatch(r"[\d. ]+", m) for m in matches):
        raise ptb.JavaError(f"METEOR matched {len(matches)} of {len(score)}: {matches[-1][:100]!r}")
    with tempfile.TemporaryDirectory() as folder:
        # Adding up needs no paraphrases, and loading them takes 10 s.
        paraphrases = Path(folder, "none.gz")
        paraphrases.write_bytes(gzip.compress(b""))
        evaluate = " ||| ".join(["EVAL", *matches])
        out = ptb.run_java([*options, "-a", str(paraphrases)], [evaluate], time_limit)
    try:
        scores = [float(line) for line in out]
    except ValueError:
        raise ptb.JavaError(f"METEOR printed {out[-1][:100]!r}") from None
    if len(scores) != len(score) + 1 or not 0 <= scores[-1] <= 1:
        raise ptb.JavaError(f"METEOR gave {len(scores)} scores for {len(score)} captions")
    return scores[-1]


class Cider:
    """CIDEr-D (Vedantam et al. 2015) of pycocoevalcap with frozen document frequencies.

    references: {id: list of tokens} of the whole split. They set the document frequencies and their
    number, so that a clip's score does not depend on which others are scored with it.
    """

    def __init__(self, references):
        from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

        self._scorer, self._cook = CiderScorer, cook_test
        self._cooked = {i: cook_refs(texts) for i, texts in references.items()}
        self._frequency = defaultdict(float)
        for cooked in self._cooked.values():
            for ngram in set().union(*cooked):
                self._frequency[ngram] += 1
        self._known = {}  # (id, tokens) -> score

    def __call__(self, hypotheses):
        """Score {id: tokens}; returns {id: float in 0..10}."""
        new = [(i, text) for i, text in hypotheses.items() if (i, text) not in self._known]
        scorer = self._scorer()
        scorer.document_frequency = self._frequency
        scorer.ctest = [self._cook(text) for _, text in new]
        # The scorer pairs the two lists up to the end of the shorter one and takes the length of
        # this one for the number of documents.
        scorer.crefs = [self._cooked[i] for i, _ in new]
        scorer.crefs += [None] * (len(self._cooked) - len(new))
        self._known.update(zip(new, map(float, scorer.compute_cider()), strict=True))
        return {i: self._known[i, text] for i, text in hypotheses.items()}

    def ceiling(self, references):
        """The best score that any of a clip's own references reaches; returns {id: float}."""
        best = dict.fromkeys(references, 0.0)
        for k in range(max(map(len, references.values()), default=0)):
            kth = {i: texts[k] for i, texts in references.items() if k < len(texts)}
            for i, value in self(kth).items():
                best[i] = max(best[i], value)
        return best


# ---- templates: action classification by caption -------------------------------------------


def _plain(text):
    return " ".join(text.lower().split())


def canonical(template):
    """A template without brackets, lower-case: the form of SSv2's labels.json and test-answers.csv."""
    return _plain(re.sub(r"[\[\]]", "", template))


def fill(template, fillers):
    """A template as a label would have it, its brackets filled in order; those left over keep their words."""
    words = iter(fillers)
    return _plain(re.sub(r"\[([^\]]*)\]", lambda slot: next(words, slot[1]), template))


class Templates:
    """Finds the template that a caption was made from.

    Each template such as "Holding [something] next to [something]" stands for the regular
    expression with `(.+?)` per bracket and its other text taken literally, whatever the case and
    the white space; the whole caption must match. Of several, the one with the most literal
    characters wins, then the first in the list.
    """

    def __init__(self, templates):
        # The literal parts, searched one after the other, find what the regular expression would,
        # in linear time: on a caption that stutters, (.+?) thrice would take minutes.
        parts = [(t, re.split(r"\[[^\]]*\]", _plain(t))) for t in dict.fromkeys(templates)]
        self._parts = sorted(parts, key=lambda p: -sum(map(len, p[1])))
        self._known = {}

    def parse(self, caption):
        """Return (template, fillers in lower case), or None where no template matches.

        A full stop at the end of the caption is ignored.
        """
        text = _plain(caption).rstrip(". ")
        if text not in self._known:
            self._known[text] = None
            for template, parts in self._parts:
                fillers = self._fillers(parts, text) if text.startswith(parts[0]) else None
                if fillers is not None:
                    self._known[text] = template, fillers
                    break
        return self._known[text]

    def finds(self, template, caption):
        """True if `parse` finds this template (brackets or not) in the caption."""
        found = self.parse(caption)
        return found is not None and (
            found[0] == template or canonical(found[0]) == canonical(template)
        )

    @staticmethod
    def _fillers(parts, text):
        first, *middle, last = parts if len(parts) > 1 else (*parts, None)
        if last is None:
            return [] if text == first else None
        if not text.endswith(last):
            return None
        fillers, start, end = [], len(first), len(text) - len(last)
        for part in middle:
            at = text.find(part, start + 1, end)  # + 1: a filler has at least one character
            if at < 0:
                return None
            fillers.append(text[start:at])
            start = at + len(part)
        return [*fillers, text[start:end]] if start < end else None


# ---- controls and intervals ----------------------------------------------------------------


def derangement(n, seed):
    """A seeded permutation of range(n) that leaves nothing in its place (Sattolo 1986); n >= 2."""
    assert n >= 2, "one item cannot change places"
    order, rng = list(range(n)), random.Random(f"derangement:{seed}")
    for i in range(n - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


def bootstrap(values, seed, resamples=RESAMPLES):
    """The 95 % percentile interval (Efron 1979) of the mean of `values` (n,), over clips: [lo, hi]."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, 50):  # 50: indices of 24,777 clips take 10 MB
        shape = (min(50, resamples - start), len(values))
        means.append(values[rng.integers(len(values), size=shape)].mean(axis=1))
    return [float(x) for x in np.percentile(np.concatenate(means), [2.5, 97.5])]


# ---- everything together -------------------------------------------------------------------


def _examples(ids):
    ids = list(map(str, ids))
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def predictions_by_id(entries):
    """Turn COCO results `[{"image_id": id, "caption": text}]` into {id: text}.

    Raises UserError for entries of another shape and for clips that occur twice.
    """
    shape = isinstance(entries, list) and all(
        isinstance(e, dict) and "image_id" in e and isinstance(e.get("caption"), str)
        for e in entries
    )
    if not shape:
        raise UserError('predictions must be a list of {"image_id": id, "caption": text}')
    counts = Counter(str(e["image_id"]) for e in entries)
    twice = [i for i, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} clips are predicted more than once: {_examples(twice)}")
    return {str(e["image_id"]): e["caption"] for e in entries}


def references_of(records, style):
    """{id: list of texts} in the wanted style: the label, or the paraphrases; blank ones left out."""
    assert style in ("label", "sentence"), style
    texts = {r["id"]: [r["label"]] if style == "label" else r["paraphrases"] for r in records}
    return {i: [t for t in texts if t and t.strip()] for i, texts in texts.items()}


def _check(predictions, records, references, style):
    """Every clip has one prediction and is known; all clips have references, or none. UserError."""
    ids = Counter(r["id"] for r in records)
    if not ids:
        raise UserError("there are no clips to score")
    without = [i for i, texts in references.items() if not texts]
    problems = {
        "have no prediction": [i for i in ids if i not in predictions],
        "are predicted but not in the annotations": [i for i in predictions if i not in ids],
        "have a prediction that is no text": [
            i for i, text in predictions.items() if not isinstance(text, str)
        ],
        "are in the annotations more than once": [i for i, count in ids.items() if count > 1],
        f"have no {style} caption": without if len(without) < len(ids) else [],
    }
    problems = [
        f"{len(bad)} clips {what}: {_examples(bad)}" for what, bad in problems.items() if bad
    ]
    if problems:
        raise UserError(f"of {len(ids)} clips, {'; '.join(problems)}")


def _attempt(skipped, name, compute):
    """compute(), or None and the reason in `skipped`: one metric must not take the others with it."""
    try:
        return compute()
    except ptb.JavaError as error:
        skipped[name] = str(error)
    except Exception as error:  # other people's code may trip over anything
        skipped[name] = f"{type(error).__name__}: {error}"
    return None


def _why_missing(records, references, style, templates):
    """{metric: reason} for the metrics that these records do not allow."""
    missing, no_captions = {}, f"the clips have no {style} captions"
    if not references:
        missing |= dict.fromkeys(
            (*CAPTION_METRICS, "exact_match", "placeholder_match"), no_captions
        )
    elif len(references) == 1:
        missing["CIDEr"] = "document frequencies need the references of two clips"
    if style != "label":
        reason = "defined for captions of style label only"
        missing |= {"template_accuracy": reason, "placeholder_match": reason}
    elif not any(r["template"] for r in records):
        missing["template_accuracy"] = "the clips have no templates"
    elif not templates:
        missing["template_accuracy"] = "no list of templates"
    if not any(r["placeholders"] for r in records):
        missing.setdefault("placeholder_match", "the clips have no placeholders")
    return missing


def _per_clip(captions, said, records, references, tokens, cider, parser, skipped):
    """{metric: {id: float}} of `captions` {id: text}, tokens `said`, for what is not skipped."""
    result = {}
    if cider:
        result["CIDEr"] = _attempt(skipped, "CIDEr", lambda: cider(said))
    if references:
        result["exact_match"] = {i: float(said[i] in references[i]) for i in said}
    if parser:
        result["template_accuracy"] = {
            r["id"]: float(parser.finds(r["template"], captions[r["id"]]))
            for r in records
            if r["template"]
        }
    if "placeholder_match" not in skipped:
        wanted = {r["id"]: [tokens[p] for p in r["placeholders"] if tokens[p]] for r in records}
        result["placeholder_match"] = {
            i: sum(f" {p} " in f" {said[i]} " for p in words) / len(words)
            for i, words in wanted.items()
            if words
        }
    return {name: values for name, values in result.items() if values}


def _systems(predictions, most_frequent, seed, skipped):
    """What is scored: {"main": {id: text}} and the controls, by name."""
    systems, ids = {"main": predictions}, sorted(predictions)
    if len(ids) > 1:
        order = derangement(len(ids), seed)
        systems["shuffled"] = {i: predictions[ids[j]] for i, j in zip(ids, order, strict=True)}
    else:
        skipped["shuffled"] = "there is one clip only"
    if most_frequent:
        systems["most_frequent"] = dict.fromkeys(ids, most_frequent)
    else:
        skipped["most_frequent"] = "the commonest training caption is not known"
    return systems


def _whole_set(said, references, skipped, everything):
    """BLEU-1..4, or only BLEU-4, and ROUGE-L: {metric: float}."""
    bleus = _attempt(skipped, "Bleu", lambda: bleu(said, references)) or ()
    result = {f"Bleu_{n}": value for n, value in enumerate(bleus, 1) if everything or n == 4}
    if everything:
        result["ROUGE_L"] = _attempt(skipped, "ROUGE_L", lambda: rouge_l(said, references))
    return {name: value for name, value in result.items() if value is not None}


def score(
    predictions,
    records,
    style="label",
    templates=(),
    all_records=None,
    most_frequent=None,
    seed=0,
    tokenizer=None,
    time_limit=ptb.JAVA_LIMIT,
    with_meteor=True,
):
    """Score one caption per clip. Returns (result, per_clip).

    predictions: {id: text}; records: the clips to score (dataset.load_records); all_records: the
    whole split, whose references set CIDEr's document frequencies (None: records); templates: the
    class templates, with brackets; most_frequent: the commonest training caption of this style;
    tokenizer: see `ptb.tokenize`; time_limit: seconds for each run of Java;
    with_meteor: METEOR loads its paraphrases for 10 s, however few the clips.

    result, ready for JSON: `n`; `metrics` (CIDEr of 10, the others of 1); `controls`: `shuffled`
    (the predictions dealt out anew, so that none stays with its clip), `most_frequent` (one caption
    for all), `ceiling` (per clip the best CIDEr that one of its own references reaches); `ci95`
    {metric: [lo, hi]}; `counts` {metric: clips} where not all clips have what it needs;
    `parser_on_references` (template accuracy of the references); `tokenizer`; `skipped` {what: why}.
    per_clip: {id: {metric: float}} for the metrics that are means over clips:

    - exact_match: the tokens equal those of a reference.
    - template_accuracy: the template that `Templates` finds in the prediction is the clip's.
    - placeholder_match: the share of the clip's placeholders ("vicks vaporub bottle") whose tokens
      occur in the prediction, whole and in a row; then the mean over the clips that have
      placeholders. Their order and how often they occur do not count.

    Raises UserError when clips and predictions are not one to one, or some clips lack references.
    """
    references = references_of(records, style)
    _check(predictions, records, references, style)
    # in the records' order: a sum depends on the order, in its last bit
    predictions = {i: predictions[i] for i in references}
    split = references_of(all_records or records, style)
    assert split.keys() >= references.keys(), "all_records must contain records"
    split = {i: texts for i, texts in split.items() if texts and any(references.values())}
    skipped = _why_missing(records, split, style, templates)
    systems = _systems(predictions, most_frequent, seed, skipped)
    if references and not with_meteor:
        skipped["METEOR"] = "not asked for"

    texts = {text for captions in systems.values() for text in captions.values()}
    texts.update(*split.values(), *(r["placeholders"] for r in records))
    tokens, tokenizer, reason = ptb.tokenize({t: [t] for t in texts}, tokenizer, time_limit)
    tokens = {text: tokenised for text, [tokenised] in tokens.items()}
    skipped |= {"PTBTokenizer": reason} if reason else {}
    split = {i: [tokens[text] for text in texts] for i, texts in split.items()}
    references = {i: split[i] for i in references if i in split}
    cider = None if "CIDEr" in skipped else _attempt(skipped, "CIDEr", lambda: Cider(split))
    parser = None if "template_accuracy" in skipped else Templates(templates)

    said = {name: {i: tokens[c[i]] for i in c} for name, c in systems.items()}
    values, scores, waiting = {}, {}, None
    with ptb.beside() as beside:  # METEOR takes as long as all else
        if references and "METEOR" not in skipped:
            ask = partial(meteor, said["main"], references, time_limit)
            waiting = beside.submit(_attempt, skipped, "METEOR", ask)
        for name, captions in systems.items():
            values[name] = _per_clip(
                captions, said[name], records, references, tokens, cider, parser, skipped
            )
            scores[name] = {m: float(np.mean([*v.values()])) for m, v in values[name].items()}
            if references:
                scores[name] |= _whole_set(said[name], references, skipped, name == "main")
        if waiting and waiting.result() is not None:
            scores["main"]["METEOR"] = waiting.result()
    main = values["main"]
    order = dict.fromkeys((*CAPTION_METRICS, *PER_CLIP))
    result = {
        "n": len(records),
        "metrics": {name: scores["main"][name] for name in order if name in scores["main"]},
        "controls": {name: scores[name] for name in scores if name != "main"},
        "ci95": {name: bootstrap([*v.values()], seed) for name, v in main.items()},
        "counts": {name: len(v) for name, v in main.items() if len(v) < len(records)},
        "tokenizer": tokenizer,
        "skipped": dict(sorted(skipped.items())),
    }
    if "CIDEr" in main:
        best = cider.ceiling(references).values()
        result["controls"]["ceiling"] = {"CIDEr": float(np.mean([*best]))}
    if parser and references:
        right = [parser.finds(r["template"], r["label"]) for r in records if r["template"]]
        result["parser_on_references"] = float(np.mean(right))
    per_clip = {r["id"]: {m: v[r["id"]] for m, v in main.items() if r["id"] in v} for r in records}
    return result, per_clip


def table(result):
    """`result` of `score` as (rows, lines): scores, intervals and controls side by side, as text, and
    what must be said with them.
    """
    controls = {name: dict(scores) for name, scores in result["controls"].items()}
    if "parser_on_references" in result:
        controls.setdefault("ceiling", {})["template_accuracy"] = result["parser_on_references"]

    def cell(value):
        return "" if value is None else f"{value:.3f}"

    rows = [["", "score", "95 % interval", *(name.replace("_", " ") for name in controls)]]
    for name, value in result["metrics"].items():
        interval = " - ".join(cell(x) for x in result["ci95"].get(name, ()))
        rows.append([name, cell(value), interval, *(cell(c.get(name)) for c in controls.values())])
    lines = [f"{result['n']} clips, tokenizer {result['tokenizer']}; CIDEr is of 10"]
    lines += [f"{name}: over {count} clips" for name, count in result["counts"].items()]
    whys = defaultdict(list)
    for name, why in result["skipped"].items():
        whys[why].append(name)
    return rows, lines + [f"skipped {', '.join(names)}: {why}" for why, names in whys.items()]


def format_table(result):
    """`table` as lines for a terminal."""
    rows, lines = table(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join(aligned + lines)
