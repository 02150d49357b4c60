"""Bootstrap intervals of scores (Efron 1979), and of the difference of two scores on the same clips."""

import numpy as np

RESAMPLES = 1000


def bootstrap(values, seed):
    """Compute a 95 % bootstrap interval of the mean of `values` (n,), one per clip.

    Returns [low, high], percentiles of the means of RESAMPLES samples of the clips.
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def paired_bootstrap(first, second, score, seed):
    """Compare a metric of two systems on the same clips (Koehn 2004, "Statistical significance tests").

    first, second: statistics (n, k) of the n clips, whose sums determine the metric. score: a function from R
    such sums (R, k) to R scores. Each of RESAMPLES samples contains the same clips for both systems. Returns
    (score of first, score of second, [low, high]), with the 95 % interval of the difference second - first.
    """
    n, rng = len(first), np.random.default_rng(seed)
    both = np.hstack([first, second]).astype(np.float64)  # (n, 2k)
    sums = [both.sum(0)]
    for _ in range(RESAMPLES):
        # how often each clip is in the sample
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        sums.append(counts @ both)
    a, b = (score(part) for part in np.split(np.stack(sums), 2, axis=1))  # (1 + RESAMPLES,) each
    low, high = np.percentile(b[1:] - a[1:], [2.5, 97.5])
    return float(a[0]), float(b[0]), [float(low), float(high)]
