"""Metrics of captions: BLEU, METEOR, ROUGE, CIDEr, exact match and named objects, from tokenised texts.

hypotheses: {id: tokens}. references: {id: list of tokens}. Tokens are joined by spaces.
"""

import gzip
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test
from pycocoevalcap.rouge.rouge import Rouge

from runtime.java import JAVA_LIMIT, JavaError, jar, run_java


def bleu(hypotheses, references):
    """Compute corpus BLEU-1..4 (Papineni et al. 2002). Returns {"Bleu_1": float in 0..1, ...}."""
    hypotheses = {i: [text] for i, text in hypotheses.items()}
    scores, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    return {f"Bleu_{n}": float(score) for n, score in enumerate(scores, 1)}


def bleu_statistics(hypotheses, references):
    """Count what corpus BLEU is computed from. Returns (clips, 10).

    Per clip: the tokens of the hypothesis and of its closest reference, then for n = 1..4 the n-grams that
    are in a reference, then all n-grams of the hypothesis.
    """
    scorer = BleuScorer(n=4)
    for i, text in hypotheses.items():
        scorer += (text, references[i])
    rows = []
    for c in scorer.ctest:
        closest = min((abs(length - c["testlen"]), length) for length in c["reflen"])[1]
        rows.append([c["testlen"], closest, *c["correct"], *c["guess"]])
    return np.array(rows, dtype=np.float64)


def bleu_scores(sums):
    """Compute BLEU-1..4 (R, 4) from sums over clips (R, 10) of `bleu_statistics`, as `bleu` does."""
    length, wanted = sums[:, 0], sums[:, 1]
    precision = (sums[:, 2:6] + 1e-15) / (sums[:, 6:] + 1e-9)  # (R, 4)
    penalty = np.exp(np.minimum(0, 1 - (wanted + 1e-9) / (length + 1e-15)))  # (R,)
    return precision.cumprod(1) ** (1 / np.arange(1, 5)) * penalty[:, None]


def rouge_l(hypotheses, references):
    """Compute ROUGE-L (Lin 2004) with beta = 1.2. Returns {id: float in 0..1}."""
    texts = {i: [text] for i, text in hypotheses.items()}
    return dict(zip(texts, Rouge().compute_score(references, texts)[1], strict=True))


def rouge_n(hypotheses, references, n):
    """Compute ROUGE-N as F1 (Lin 2004). Returns {id: float in 0..1}.

    A clip with several references gets the highest of their scores.
    """

    def grams(text):
        words = text.split()
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    def f1(found, wanted):
        total = found.total() + wanted.total()
        return 2 * (found & wanted).total() / total if total else 0.0

    return {
        i: max(f1(grams(text), grams(reference)) for reference in references[i])
        for i, text in hypotheses.items()
    }


def meteor(hypotheses, references):
    """Compute corpus METEOR 1.5 (Denkowski and Lavie 2014), English with -norm, a float in 0..1.

    The jar runs twice, once for the match statistics and once for the final score. Raises JavaError.
    """
    return meteor_scores(meteor_statistics(hypotheses, references))[-1]


def meteor_options():
    options = ["-Xmx2G", "-jar", jar("meteor", "meteor-1.5.jar")]
    return [*options, "-", "-", "-stdio", "-l", "en", "-norm"]


def meteor_statistics(hypotheses, references):
    """Return METEOR's match statistics of each clip, a list of numbers separated by spaces.

    After an error the jar waits forever, so it gets its whole input at once and has a time limit. Raises
    JavaError.
    """
    lines = [
        " ||| ".join(t.replace("|", " ") for t in ("SCORE", *references[i], text))
        for i, text in hypotheses.items()
    ]
    statistics = run_java(meteor_options(), lines, JAVA_LIMIT)
    if len(statistics) != len(lines) or not all(re.fullmatch(r"[\d. ]+", s) for s in statistics):
        raise JavaError(f"METEOR printed {statistics[-1][:100]!r} instead of match statistics")
    return statistics


def meteor_scores(statistics):
    """Compute METEOR from match statistics, a list of str, and from their sum. Raises JavaError.

    The statistics of several clips add up, so an entry may be a sum over clips.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The final score needs no paraphrases, and loading them takes 10 s.
        paraphrases = Path(folder, "none.gz")
        paraphrases.write_bytes(gzip.compress(b""))
        evaluate = [" ||| ".join(["EVAL", *statistics])]
        out = run_java([*meteor_options(), "-a", paraphrases], evaluate, JAVA_LIMIT)
    is_score = re.compile(r"\d\.\d+(E-\d+)?").fullmatch
    if len(out) != len(statistics) + 1 or not all(map(is_score, out)):
        raise JavaError(f"METEOR printed {out[-1][:100]!r} instead of a score")
    return [*map(float, out)]


def meteor_counts(statistics):
    """Convert the result of `meteor_statistics` to numbers (clips, 23), whose sum gives corpus METEOR.

    Like the jar when it adds them up, this does not count the single chunk of a perfect match.
    """
    counts = np.array([[*map(float, line.split())] for line in statistics])
    lengths, (chunks, *matches) = counts[:, :2], counts[:, 20:].T
    counts[(chunks == 1) & (lengths == np.stack(matches, 1)).all(1), 20] = 0
    return counts


def meteor_of_sums(sums):
    """Compute METEOR (R,) from sums (R, 23) of `meteor_counts`. Raises JavaError."""
    return np.array(meteor_scores([" ".join(map("{:.1f}".format, row)) for row in sums])[:-1])


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
