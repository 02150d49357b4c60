"""Find nearest neighbours of unit vectors, and score how well they find clips of the same action.

The search is brute force: 220,847 clips of 1536 numbers are 0.7 GB in float16, read once for all queries. Beyond about
10 million clips, use an index such as faiss. Shapes: n vectors of size D.
"""

import importlib.util
import math
import re
from itertools import chain

import numpy as np
from tqdm import tqdm

from runtime.errors import FAILED, UserError
from runtime.writing_systems import MARKS, is_unspaced

WIDENED = 1 << 14  # vectors converted to float32 at a time: 100 MB at Qwen2's width
BLOCK = 512  # queries compared at a time: 512 x 25,000 similarities are 51 MB
NEIGHBOURS, TEMPERATURE = 20, 0.07  # for the kNN vote (DINO, arXiv:2104.14294)
RECALLS = {"R@1": 1, "R@5": 5, "R@10": 10}


def unit(x):
    """Normalise vectors (..., D) to unit length, in float32. A zero vector stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(queries, vectors, count):
    """Find the `count` unit vectors (n, D) nearest to each query (q, D).

    Returns (indices, cosines), both (q, count), best first. Ties keep their order.
    """
    queries = unit(queries)
    blocks = (vectors[i : i + WIDENED].astype(np.float32) for i in range(0, len(vectors), WIDENED))
    cosines = np.concatenate([queries @ block.T for block in blocks], axis=1)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(cosines, order, 1)


def chance(shape, seed):
    """Sample random vectors, as a control."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def score_kinds(by_kind, records, seed):
    """Score vectors {kind: (n, D)} of n records.

    Scores are computed over all neighbours, and without those that share an object with the query.
    Returns {kind: {"all": `score`, "no shared object": `score` or None without placeholders, "NMI"}}.
    Raises UserError if fewer than two templates occur.
    """
    known = [n for n, r in enumerate(records) if r["template"]]
    templates = [records[n]["template"] for n in known]
    if len(set(templates)) < 2:
        raise UserError("nothing to score: the clips do not have two different templates")
    objects, rows = [object_words(records[n]) for n in known], {}
    for kind, vectors in by_kind.items():
        vectors = unit(vectors[known])
        rows[kind] = {
            "all": score(vectors, templates),
            "no shared object": score(vectors, templates, objects) if any(objects) else None,
            "NMI": mutual_information(vectors, templates, seed),
        }
    return rows


def object_words(record):
    """Return the words of a record's placeholders, such as {"red", "cup"} for "the Red cup"."""
    words = re.findall(rf"[\w{MARKS}]+", " ".join(record["placeholders"]).lower())
    return {word for word in words if len(word) > 2 or is_unspaced(word)} - {"the", "and", "with"}


def score(vectors, templates, objects=None):
    """Leave-one-out retrieval of clips with the same template among n unit vectors (n, D).

    objects: n sets of words, or None. If given, clips that share a word with the query are excluded from
    its neighbours, so that appearance does not help. Queries without a clip to find are skipped.
    Returns {"R@1", "R@5", "R@10": share of queries with a correct clip among the first k, "mAP", "kNN":
    accuracy of a weighted vote of the nearest 20, "n": number of queries}. Raises UserError if no query
    has a clip to find.
    """
    _, label = np.unique(np.asarray(templates, str), return_inverse=True)
    classes = int(label.max()) + 1
    clips_with = {}
    for n, words in enumerate(objects or ()):
        for word in words:
            clips_with.setdefault(word, []).append(n)
    sums, count = dict.fromkeys((*RECALLS, "mAP", "kNN"), 0.0), 0
    blocks = (vectors[start : start + BLOCK] @ vectors.T for start in range(0, len(vectors), BLOCK))
    with tqdm(total=len(vectors), unit="query", desc="score", delay=1, leave=False) as bar:
        for n, cosines in enumerate(chain.from_iterable(blocks)):
            bar.update()
            cosines[n] = -np.inf
            for word in objects[n] if objects else ():
                cosines[clips_with[word]] = -np.inf
            order = np.argsort(-cosines, kind="stable")[: np.isfinite(cosines).sum()]
            correct = label[order] == label[n]
            if not correct.any():
                continue
            count += 1
            for name, k in RECALLS.items():
                sums[name] += correct[:k].any()
            ranks = np.flatnonzero(correct) + 1
            sums["mAP"] += np.mean(np.arange(1, len(ranks) + 1) / ranks)
            near = order[:NEIGHBOURS]
            votes = np.bincount(label[near], np.exp(cosines[near] / TEMPERATURE), classes)
            sums["kNN"] += votes.argmax() == label[n]
    if not count:
        others = " and different objects" if objects else ""
        raise UserError(
            f"nothing to score: no two of the {len(vectors)} clips have the same template{others}"
        )
    return {name: float(value / count) for name, value in sums.items()} | {"n": count}


def require_sklearn():
    """Raise UserError if scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("scores need scikit-learn: pip install -e '.[embed]'", code=FAILED)


def mutual_information(vectors, templates, seed):
    """Compute the NMI between the templates and the same number of k-means clusters."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    found = KMeans(len(set(templates)), n_init=4, random_state=seed).fit_predict(vectors)
    return float(normalized_mutual_info_score(templates, found))


def format_scores(rows):
    """Format the result of `score_kinds` as a plain-text table."""
    names = (*RECALLS, "mAP", "kNN")
    lines = [f"{'vector':<10}{'NMI':>7}" + "".join(f"{n:>7}" for n in names) * 2]
    lines[0] += "   (right half: neighbours that share no object)"
    for kind, row in rows.items():
        halves = [row[part] or {} for part in ("all", "no shared object")]
        cells = [row["NMI"], *(half.get(name, math.nan) for half in halves for name in names)]
        lines.append(f"{kind:<10}" + "".join(f"{cell:>7.3f}" for cell in cells))
    return "\n".join(lines)
