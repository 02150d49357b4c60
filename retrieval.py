"""Nearest neighbours of unit vectors, and how well they find clips of the same action. numpy only.

Brute force: 220,847 clips of 1536 numbers are 0.7 GB in float16, and a query is one pass over them.
Beyond about 10 million clips an index such as faiss takes over. Shapes: n vectors of size D.
"""

import numpy as np

BLOCK = 512  # queries compared at a time: 512 x 25,000 similarities are 51 MB
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted vote (Wu et al. 2018, arXiv:1805.01978)


def unit(x):
    """float32 (..., D) of length 1; a zero vector stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(query, vectors, count):
    """The `count` vectors (n, D) most like a query (D,): (indices, cosines), best first.

    Blocks of float16 vectors are widened one at a time. Equal ones stay in their order.
    """
    query = unit(query)
    blocks = range(0, len(vectors), 1 << 16)
    cosines = np.concatenate(
        [vectors[i : i + (1 << 16)].astype(np.float32) @ query for i in blocks]
    )
    order = np.argsort(-cosines, kind="stable")[:count]
    return order, cosines[order]


def retrieval(vectors, templates, objects, share_objects=True):
    """Leave-one-out retrieval of clips with the template of the query, of n unit vectors (n, D).

    templates: n names; objects: n sets of what the clips show; share_objects=False leaves clips that
    share an object with the query out of its neighbours, so that motion is what is scored. Queries
    without any clip to find do not count. Returns {"R@1", "R@5", "R@10": the share of queries with a
    right clip among the first k, "mAP", "kNN": accuracy of a vote of the neighbours, "n": queries}.
    """
    _, label = np.unique(np.asarray(templates, str), return_inverse=True)
    classes = int(label.max()) + 1
    names = sorted(set().union(*objects))
    shown = np.zeros((len(vectors), len(names)), bool)
    for n, those in enumerate(objects):
        shown[n, [names.index(o) for o in those]] = True
    sums, count = dict.fromkeys(("R@1", "R@5", "R@10", "mAP", "kNN"), 0.0), 0
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, start + BLOCK)
        cosines = vectors[rows] @ vectors.T
        out = np.arange(len(vectors)) == np.arange(start, start + len(cosines))[:, None]
        if not share_objects:
            out |= shown[rows].astype(np.float32) @ shown.T.astype(np.float32) > 0
        cosines[out] = -np.inf
        for query, barred, mine in zip(cosines, out, label[rows], strict=True):
            if not ((label == mine) & ~barred).any():
                continue
            order = np.argsort(-query, kind="stable")[: len(query) - barred.sum()]
            right = label[order] == mine
            count += 1
            for k in (1, 5, 10):
                sums[f"R@{k}"] += right[:k].any()
            at = np.flatnonzero(right)
            sums["mAP"] += np.mean(np.arange(1, len(at) + 1) / (at + 1))
            near = order[:NEIGHBOURS]
            votes = np.bincount(label[near], np.exp(query[near] / TEMPERATURE), classes)
            sums["kNN"] += votes.argmax() == mine
    return {name: float(value / count) for name, value in sums.items()} | {"n": count}


def clusters(vectors, templates, seed):
    """Normalised mutual information between templates and k-means clusters, as many as templates."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    found = KMeans(len(set(templates)), n_init=4, random_state=seed).fit_predict(vectors)
    return float(normalized_mutual_info_score(templates, found))
