"""Nearest neighbours of unit vectors, and how well they find clips of the same action.

Brute force: 220,847 clips of 1536 numbers are 0.7 GB in float16, and some queries are one pass over them.
Beyond about 10 million clips an index such as faiss takes over. Shapes: n vectors of size D.
"""

from itertools import chain

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError

WIDENED = 1 << 14  # vectors widened at a time: 100 MB of Qwen2's width
BLOCK = 512  # queries compared at a time: 512 x 25,000 similarities are 51 MB
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the vote (DINO, arXiv:2104.14294)


def unit(x):
    """float32 (..., D) of length 1; a zero vector stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(queries, vectors, count):
    """The `count` unit vectors (n, D) most like each of q queries (q, D): (indices, cosines), both
    (q, count), best first.

    float16 vectors are widened a block at a time, which takes longer than comparing them: once for all
    queries. Equal ones stay in their order.
    """
    queries = unit(queries)
    blocks = (vectors[i : i + WIDENED].astype(np.float32) for i in range(0, len(vectors), WIDENED))
    cosines = np.concatenate([queries @ block.T for block in blocks], axis=1)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(cosines, order, 1)


def retrieval(vectors, templates, objects, share_objects=True):
    """Leave-one-out retrieval of clips with the template of the query, of n unit vectors (n, D).

    templates: n names; objects: n sets of what the clips show; share_objects=False leaves clips that
    share any of it with the query out of its neighbours, so that motion is what is scored. Queries
    without any clip to find do not count. Returns {"R@1", "R@5", "R@10": the share of queries with a
    right clip among the first k, "mAP", "kNN": accuracy of a vote of the neighbours, "n": queries}.
    Raises UserError if there is nothing to find at all.
    """
    _, label = np.unique(np.asarray(templates, str), return_inverse=True)
    classes = int(label.max()) + 1
    clips_with = {}
    for n, those in enumerate(objects):
        for o in those:
            clips_with.setdefault(o, []).append(n)
    sums, count = dict.fromkeys(("R@1", "R@5", "R@10", "mAP", "kNN"), 0.0), 0
    blocks = (vectors[start : start + BLOCK] @ vectors.T for start in range(0, len(vectors), BLOCK))
    with tqdm(total=len(vectors), unit="query", desc="score", delay=1, leave=False) as bar:
        for n, query in enumerate(chain.from_iterable(blocks)):  # cosines to all clips
            bar.update()
            query[n] = -np.inf
            for o in () if share_objects else objects[n]:
                query[clips_with[o]] = -np.inf
            order = np.argsort(-query, kind="stable")[: np.isfinite(query).sum()]
            right = label[order] == label[n]
            if not right.any():
                continue
            count += 1
            for k in (1, 5, 10):
                sums[f"R@{k}"] += right[:k].any()
            at = np.flatnonzero(right)
            sums["mAP"] += np.mean(np.arange(1, len(at) + 1) / (at + 1))
            near = order[:NEIGHBOURS]
            votes = np.bincount(label[near], np.exp(query[near] / TEMPERATURE), classes)
            sums["kNN"] += votes.argmax() == label[n]
    if not count:
        less = "" if share_objects else " and show other objects"
        raise UserError(
            f"nothing to score: no two of the {len(vectors)} clips have one template{less}"
        )
    return {name: float(value / count) for name, value in sums.items()} | {"n": count}


def clusters(vectors, templates, seed):
    """Normalised mutual information between templates and k-means clusters, as many as templates."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    found = KMeans(len(set(templates)), n_init=4, random_state=seed).fit_predict(vectors)
    return float(normalized_mutual_info_score(templates, found))
