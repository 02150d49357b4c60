"""Find the scenes that two films share, in any order.

Films are cut into windows, and runs of consecutive windows that are similar in both films are matched.
Uses only numpy, except for the picture. Shapes: n windows of film a, m of film b. A run (i, j, length) is windows i to
i + length - 1 of a matched with windows j to j + length - 1 of b.
"""

import heapq
import io
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Two windows match if their cosine is above median + THRESHOLD * (1 - median). Chosen on films made from
# the toy world.
THRESHOLD = 0.7
STILL = 1e-4  # unit vectors that differ by less are treated as equal

# A still shot looks the same backwards, so the reversed film contains a mirror image of its run. A reversed
# run is ignored if the run it mirrors reaches this share of its sum.
MIRRORED = 0.9


@dataclass(frozen=True)
class Scene:
    """Seconds `start_a` to `end_a` of film a match `start_b` to `end_b` of b. `score` is a mean cosine."""

    start_a: float
    end_a: float
    start_b: float
    end_b: float
    score: float


def compare(a, b):
    """Compute the cosines (n, m) between the vectors (n, D) and (m, D) of two films.

    The mean over all windows of both is subtracted first. Windows without a vector give NaN.
    """
    mean = np.nanmean(np.concatenate([a, b]), 0)
    a, b = (x - mean for x in (a, b))
    norms = (np.maximum(np.linalg.norm(x, axis=1, keepdims=True), STILL) for x in (a, b))
    a, b = (x / norm for x, norm in zip((a, b), norms, strict=True))
    return a @ b.T


def threshold(similarity):
    """Compute the cosine above which two windows of these films match."""
    median = float(np.nanmedian(similarity))
    return median + THRESHOLD * (1 - median)


def align(excess, shortest=1):
    """Find runs of windows that match in both films. Returns [(i, j, length)], best first.

    excess: (n, m), cosine minus threshold. Takes the run with the largest sum on any diagonal, then the
    best that shares no window with it, and so on: local alignments without gaps (Waterman and Eggert
    1987). Runs of fewer than `shortest` windows are discarded.
    """
    excess = excess.copy()
    n, m = excess.shape
    taken_a, taken_b, runs = np.zeros(n, bool), np.zeros(m, bool), []

    def best(offset):
        """Return (-sum, i, j, length) of the best run on a diagonal, without windows already taken."""
        i, j = max(0, -offset), max(0, offset)
        diagonal = excess.diagonal(offset).copy()
        end = len(diagonal)
        diagonal[taken_a[i : i + end] | taken_b[j : j + end]] = -np.inf
        # a value so low that no run crosses it, but finite so that the cumulative sum is too
        diagonal[np.isneginf(diagonal)] = -1 - diagonal[diagonal > 0].sum()
        sums = np.concatenate([[0.0], diagonal.cumsum()])
        gain = sums - np.minimum.accumulate(sums)
        end = int(gain.argmax())
        length = int(sums[end::-1].argmin())  # back to where the sum was lowest
        return -float(gain[end]), i + end - length, j + end - length, length

    # a queue of diagonals, because searching the whole matrix per run took minutes for hour-long films
    queue = [best(offset) for offset in range(1 - n, m)]
    heapq.heapify(queue)
    while queue and queue[0][0] < 0:
        _, i, j, length = heapq.heappop(queue)
        if not (taken_a[i : i + length].any() or taken_b[j : j + length].any()):
            if length >= shortest:
                runs.append((i, j, length))
                taken_a[i : i + length] = taken_b[j : j + length] = True
            else:  # its windows may still be part of a longer run on another diagonal
                excess[range(i, i + length), range(j, j + length)] = -np.inf
        heapq.heappush(queue, best(j - i))  # the rest of the diagonal, whose sum cannot be higher
    return runs


def find(similarity, spans_a, spans_b):
    """Match two films. Returns a list of `Scene`, ordered by time in film a.

    similarity: from `compare`. spans_a, spans_b: (start, end) of each window in seconds. Any two films
    have some similar windows, so a run must last at least as long as a window, and its sum must exceed
    that of the best run found with film b reversed, except for mirror images.
    """
    excess, shortest = np.nan_to_num(similarity, nan=-1.0) - threshold(similarity), 1
    n, m = excess.shape
    if min(n, m) > 1:
        (start, end), (following, _) = spans_a[:2]
        shortest = min(math.ceil((end - start) / (following - start)), n, m)
    runs = [(_sum_along(excess, run), run) for run in align(excess, shortest)]
    bar, backwards = 0.0, excess[:, ::-1]
    for i, j, length in align(backwards, shortest) if min(n, m) > 1 else ():
        total, mirrored = _sum_along(backwards, (i, j, length)), (i, m - j - length, length)
        if not any(other >= MIRRORED * total and _overlap(run, mirrored) for other, run in runs):
            bar = max(bar, total)
    found = []
    for total, (i, j, length) in runs:
        if total > bar:
            cosines = similarity[range(i, i + length), range(j, j + length)]
            times = times_of((i, j, length), spans_a, spans_b)
            found.append(Scene(*times, float(np.nanmean(cosines))))
    return sorted(found, key=lambda scene: scene.start_a)


def _sum_along(excess, run):
    i, j, length = run
    return float(excess[range(i, i + length), range(j, j + length)].sum())


def _overlap(one, other):
    """Return True if two runs share windows of both films."""
    return all(max(one[k], other[k]) < min(one[k] + one[2], other[k] + other[2]) for k in range(2))


def times_of(run, spans_a, spans_b):
    """Compute (start_a, end_a, start_b, end_b) of a run, in seconds.

    A window matches if most of it does. A scene therefore starts half a stride before the middle of its
    first window and ends half a stride after the middle of its last. The first and last window of a film
    are used in full.
    """
    i, j, length = run
    last_i, last_j = i + length - 1, j + length - 1
    first, last = (spans_a[i], spans_b[j]), (spans_a[last_i], spans_b[last_j])
    before = after = (spans_a[1][0] - spans_a[0][0]) / 2 if len(spans_a) > 1 else 0.0
    if 0 in (i, j):
        before = min((end - start) / 2 for start, end in first)
    if last_i + 1 == len(spans_a) or last_j + 1 == len(spans_b):
        after = min((end - start) / 2 for start, end in last)
    starts, ends = [middle(s) - before for s in first], [middle(s) + after for s in last]
    return starts[0], ends[0], starts[1], ends[1]


def middle(span):
    return sum(span) / 2


def quality(found, true_a, true_b):
    """Compute {"recall", "precision"} of `found`, given the true (start, end) in both films.

    A scene counts as found if its intersection over union is at least a half in both films.
    """

    def iou(start, end, true):
        both = max(0.0, min(end, true[1]) - max(start, true[0]))
        return both / (max(end, true[1]) - min(start, true[0]))

    same = np.array(
        [
            [min(iou(s.start_a, s.end_a, a), iou(s.start_b, s.end_b, b)) >= 0.5 for s in found]
            for a, b in zip(true_a, true_b, strict=True)
        ]
    )  # (true scenes, found)
    precision = float(same.any(0).mean()) if found else 0.0
    return {"recall": float(same.any(1).mean()), "precision": precision}


def draw(similarity, spans_a, spans_b, found, names):
    """Draw the cosines of all pairs of windows and mark the scenes. Returns PNG bytes.

    names: the names of films a and b.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    panel = figure.subplots()
    edges_a, edges_b = (  # cells are centred on the middle of a window
        [spans[0][0], *((middle(s) + middle(t)) / 2 for s, t in pairwise(spans)), spans[-1][1]]
        for spans in (spans_a, spans_b)
    )
    mesh = panel.pcolormesh(edges_b, edges_a, similarity, cmap="viridis")
    for n, scene in enumerate(found):
        label = "matched" if n == 0 else None
        a, b = (scene.start_a, scene.end_a), (scene.start_b, scene.end_b)
        panel.plot(b, a, color="#d55e00", linewidth=1.5, marker="o", markersize=4, label=label)
    panel.invert_yaxis()
    panel.set(xlabel=f"{names[1]}, seconds", ylabel=f"{names[0]}, seconds")
    figure.colorbar(mesh, label="cosine similarity")
    if found:
        panel.legend(loc="upper right")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
