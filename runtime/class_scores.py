"""Scores of predicted classes: accuracies of one class per clip, average precisions of several.

Shapes: n clips, C classes. Higher logits mean more likely classes.
"""

import numpy as np


def ranks(logits, wanted):
    """Return the rank, from 1, of the right class of each clip. Ties count against it.

    logits: (n, C). wanted: (n,); the rank of class -1 is C + 1.
    """
    right = np.take_along_axis(logits, np.maximum(wanted, 0)[:, None], 1)
    found = (logits >= right).sum(1)
    found[~np.isfinite(right[:, 0])] = logits.shape[1]
    return np.where(wanted < 0, logits.shape[1] + 1, found)


def single_label_scores(logits, wanted, classes):
    """Score logits (n, C) against class indices (n,). Returns (scores, worst).

    scores: top-1 and top-5 accuracy, and the mean of the classes' top-1 accuracies. worst: the ten classes
    of lowest accuracy, [{"class", "n", "accuracy", "taken_for": {class: count}}].
    """
    rank, guess = ranks(logits, wanted), logits.argmax(1)
    right = rank == 1
    present = [c for c in range(len(classes)) if (wanted == c).any()]
    accuracy = {c: float(right[wanted == c].mean()) for c in present}
    worst = []
    for c in sorted(present, key=lambda c: (accuracy[c], classes[c]))[:10]:
        wrong, counts = np.unique(guess[(wanted == c) & ~right], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:3]
        taken_for = {classes[wrong[i]]: int(counts[i]) for i in order}
        n = int((wanted == c).sum())
        worst.append({"class": classes[c], "n": n, "accuracy": accuracy[c], "taken_for": taken_for})
    scores = {
        "top1": float(right.mean()),
        "top5": float((rank <= 5).mean()),
        "mean_class": float(np.mean([*accuracy.values()])) if accuracy else 0.0,
    }
    return scores, worst


def average_precision(scores, positive):
    """Return the uninterpolated average precision: the mean of the precision at each positive.

    scores, positive: (n,). Clips of equal score are counted together, so that their order does not matter.
    NaN if there is no positive.
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of the clips with an equal score
    hits, counts = hits[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) * hits / counts).sum() / hits[-1])


def multi_label_scores(scores, wanted):
    """Score (n, C) against 0 or 1, (n, C). Returns (scores, average precision of each class, (C,)).

    The official evaluation of Charades gives a video without any action a score of minus infinity, so that
    it is never a false positive. "mAP_official" and "wAP_official" do that; "mAP" and "wAP" do not. mAP is
    the mean over the classes with a positive, and wAP weights them by their number of positives.
    """
    scores, wanted = np.asarray(scores, np.float64), np.asarray(wanted)
    positives = wanted.sum(0)
    present = positives > 0
    weights = positives[present] / max(1, positives.sum())
    official = np.where(wanted.any(1, keepdims=True), scores, -np.inf)
    found, per_class = {}, []
    for suffix, values in (("", scores), ("_official", official)):
        ap = [average_precision(*c) for c in zip(values.T, wanted.T > 0, strict=True)]
        per_class.append(np.array(ap))
        ap = per_class[-1][present]
        found[f"mAP{suffix}"] = float(ap.mean()) if len(ap) else 0.0
        found[f"wAP{suffix}"] = float(ap @ weights)
    return found, per_class[0]
