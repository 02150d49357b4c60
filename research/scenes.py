"""Which scenes of one film are in another, in whatever order: windows, similarities, alignment.

numpy only, but for the picture. Shapes: n windows of film a, m of film b.
"""

import heapq
import io
import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

SAME = 0.7  # of the way from what is usual to the same; chosen on the toy world's films
MIRRORED = 0.9  # a shot that stands still is as like backwards: such a run is only its mirror image
STILL = 1e-4  # vectors of length 1 that differ less do not differ


@dataclass(frozen=True)
class Scene:
    """`start_a` to `end_a` seconds of film a are `start_b` to `end_b` of film b; `score`: mean cosine."""

    start_a: float
    end_a: float
    start_b: float
    end_b: float
    score: float


def compare(a, b):
    """Cosines (n, m) of the vectors (n, D) and (m, D) of two films, less what all their windows share.

    NaN for a window without a vector.
    """
    mean = np.nanmean(np.concatenate([a, b]), 0)
    a, b = (x - mean for x in (a, b))
    norms = (np.maximum(np.linalg.norm(x, axis=1, keepdims=True), STILL) for x in (a, b))
    a, b = (x / norm for x, norm in zip((a, b), norms, strict=True))
    return a @ b.T


def clock(seconds):
    """mm:ss.s"""
    return f"{int(seconds // 60):02d}:{seconds % 60:04.1f}"


def threshold(similarity):
    """From what two windows of these films usually have in common most of the way to the same."""
    usual = float(np.nanmedian(similarity))
    return usual + SAME * (1 - usual)


def align(similarity, least=None, shortest=1):
    """Runs of windows that follow each other in both films: [(i, j, length)], the best first.

    similarity: (n, m) cosines; least: what a pair of windows must exceed to speak for a match, by
    default `threshold`; shortest: windows that a run must have. Of all runs along a diagonal the one
    with the largest sum above `least` is taken, then the best that shares no window with it, and so on
    (local alignments without gaps and apart from each other, after Waterman and Eggert 1987): scenes
    may come in any order, and those without a like are left out.
    """
    excess = similarity - (threshold(similarity) if least is None else least)
    n, m = excess.shape
    taken_a, taken_b, found = np.zeros(n, bool), np.zeros(m, bool), []

    def best(offset):
        """(-sum, i, j, length) of the diagonal's best run of windows that are not taken."""
        i, j = max(0, -offset), max(0, offset)
        diagonal = excess.diagonal(offset).copy()
        end = len(diagonal)
        diagonal[taken_a[i : i + end] | taken_b[j : j + end]] = -np.inf
        # a barrier that no run gains by crossing, but finite, for the sake of the sums
        diagonal[np.isneginf(diagonal)] = -1 - diagonal[diagonal > 0].sum()
        sums = np.concatenate([[0.0], diagonal.cumsum()])
        gain = sums - np.minimum.accumulate(sums)
        end = int(gain.argmax())
        length = int(sums[end::-1].argmin())  # back to the last place where the sum was lowest
        return -float(gain[end]), i + end - length, j + end - length, length

    queue = [best(offset) for offset in range(1 - n, m)]
    heapq.heapify(queue)
    while queue and queue[0][0] < 0:
        _, i, j, length = heapq.heappop(queue)
        if not (taken_a[i : i + length].any() or taken_b[j : j + length].any()):
            if length >= shortest:
                found.append((i, j, length))
                taken_a[i : i + length] = taken_b[j : j + length] = True
            else:  # its windows may yet be part of a longer one, on another diagonal
                excess[range(i, i + length), range(j, j + length)] = -np.inf
        heapq.heappush(queue, best(j - i))  # what is left of it; taking windows only lowers sums
    return found


def scenes(similarity, spans_a, spans_b, least=None):
    """`align` in seconds: a list of `Scene` in the order of film a. spans: [(start, end)] of windows.

    similarity: of `compare`. A run must go on for as long as a window: where windows overlap, two that
    look alike by chance do so for a few strides. And it must be better than all that is found with film
    b backwards, which is what films that have nothing in common come to: something always looks alike;
    mirror images of what is found forwards do not count.
    """
    least = threshold(similarity) if least is None else least
    excess, shortest = np.nan_to_num(similarity, nan=-1.0) - least, 1
    n, m = excess.shape
    if min(n, m) > 1:
        (start, end), (following, _) = spans_a[:2]
        shortest = min(math.ceil((end - start) / (following - start)), n, m)
    runs = [(strength(excess, run), run) for run in align(excess, 0.0, shortest)]
    bar = 0.0
    for i, j, length in align(excess[:, ::-1], 0.0, shortest) if min(n, m) > 1 else ():
        mirrored = (i, m - j - length, length)  # its windows, in the order of film b
        total = strength(excess[:, ::-1], (i, j, length))
        if not any(other >= MIRRORED * total and meet(run, mirrored) for other, run in runs):
            bar = max(bar, total)
    found = []
    for total, run in runs:
        if total > bar:
            i, j, length = run
            cosines = similarity[range(i, i + length), range(j, j + length)]
            found.append(Scene(*times_of(run, spans_a, spans_b), float(np.nanmean(cosines))))
    return sorted(found, key=lambda scene: scene.start_a)


def strength(excess, run):
    """The sum of excess (n, m) along a run (i, j, length)."""
    i, j, length = run
    return float(excess[range(i, i + length), range(j, j + length)].sum())


def meet(one, other):
    """Do two runs (i, j, length) have windows in common, of both films?"""
    return all(max(one[k], other[k]) < min(one[k] + one[2], other[k] + other[2]) for k in range(2))


def times_of(run, spans_a, spans_b):
    """start and end in film a, then in film b, of a run (i, j, length) of windows.

    A window is matched if most of it is, so what is matched starts about the middle of the first window
    and ends about that of the last; at the end of either film it is all of that window.
    """
    i, j, length = run
    last_i, last_j = i + length - 1, j + length - 1
    first, last = (spans_a[i], spans_b[j]), (spans_a[last_i], spans_b[last_j])
    part = (spans_a[1][0] - spans_a[0][0]) / 2 if len(spans_a) > 1 else 0.0  # half a stride
    at_start, at_end = 0 in (i, j), last_i + 1 == len(spans_a) or last_j + 1 == len(spans_b)
    before = min(map(half, first)) if at_start else part
    after = min(map(half, last)) if at_end else part
    starts, ends = [middle(s) - before for s in first], [middle(s) + after for s in last]
    return starts[0], ends[0], starts[1], ends[1]


def half(span):
    return (span[1] - span[0]) / 2


def middle(span):
    return sum(span) / 2


def quality(found, true_a, true_b, within):
    """{"recall", "precision", "boundary F1"} of scenes found.

    true_a, true_b: [(start, end)] in seconds; true_a[n] is shown again as true_b[n]. A scene is found if
    what is reported covers half of it in both films (intersection over union). Boundaries are those in
    film a, right if one of the other side is at most `within` seconds away.
    """

    def overlap(a, b):
        both = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        return both / (max(a[1], b[1]) - min(a[0], b[0]))

    def same(scene, n):
        pairs = ((scene.start_a, scene.end_a), true_a[n]), ((scene.start_b, scene.end_b), true_b[n])
        return all(overlap(*pair) >= 0.5 for pair in pairs)

    every = range(len(true_a))
    recall = fmean(any(same(s, n) for s in found) for n in every)
    precision = fmean(any(same(s, n) for n in every) for s in found) if found else 0.0
    edges = [edge for s in found for edge in (s.start_a, s.end_a)]
    truth = [edge for span in true_a for edge in span]

    def near(some, others):
        return fmean(any(abs(a - b) <= within for b in others) for a in some)

    right, reached = (near(edges, truth), near(truth, edges)) if edges else (0.0, 0.0)
    f1 = 2 * right * reached / (right + reached) if right + reached else 0.0
    return {"recall": recall, "precision": precision, "boundary F1": f1}


def draw(similarity, spans_a, spans_b, found, names):
    """The bytes of a PNG: the similarities of all windows and the scenes on them. names: of a and b."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    edges_a, edges_b = (  # a window's cell lies about its middle
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
