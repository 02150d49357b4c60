"""The page of embed_report.py, from what it measured. Standard library only."""

import statistics

TEXT = """# What the queries know, on the toy world

The commands are in the first lines of `embed_report.py`, the figures in `embeddings.json`. Runs of `demo.py`
with their own worlds and seeds: {runs}; {clips} validation clips each.
Mean over the runs, in brackets their range. A tiny world of moving shapes, a random V-JEPA 2 and a language
model that has learned to turn keywords into captions: nothing here is a claim about SSv2, V-JEPA 2 or Qwen2.

## 1. One vector a clip

Clips of the same template among all validation clips, each asked in turn (R@k: one of the first k is right;
mAP; kNN: vote of the nearest 20; NMI: k-means clusters, as many as templates, on all clips). "No object
shared": neighbours that share a word of their objects with the query ("red cup", "red box") are left out, so
that motion is what is scored. `untrained` is `prompted` of a Q-Former with random weights, `chance` are random
vectors.

{same}

The further behind the language model a vector is taken, the more it says of the action: the state behind the
label prompt, about to write the caption, knows most, the mean of the features next to nothing. That the
features know so little is the toy encoder's doing, whose weights are random; V-JEPA 2's own features may well
do better, and only a run on them can say.

Text to clip: how often a clip with this very label is among the first, by the likelihood of the label as the
clip's caption, or by the state behind the label itself as a prefix. `--text` uses the likelihood.

{text}

Embedding takes {ratio} times a pass for the validation loss, without generation, over the
same clips (median of five in turn). Memory, of a process that embeds in batches of 32:

{memory}

One search through {vectors} (float16, as many as SSv2 has clips) takes {searched} s.

## 2. Two films, scene by scene

{pairs} pairs of films a run: {scenes} scenes of {clips_a_scene} clips each are in both, in another order and
encoded anew, beside {apart} in each that are not in the other. A scene is found when what is reported covers
half of it in both films (intersection over union); boundaries are right within {within} s. Windows of {window} s
start every {stride} s.

{found}

Scenes are the same footage, so how a clip looks is as good a sign as what happens in it. What the Q-Former
hands over does best: `prompts` and `attended` cannot be told apart here, `--match` uses the simpler `prompts`.
The caption's state is alike for two clips of one action, and matches what is not the same scene; if that is
what is looked for, `--kind prompted` looks for it. How the threshold fares on films that share a look, as real
ones do, these cannot say.

## 3. Do the queries look like words?

The nearest 1, 5 or 20 tokens of each query, over all queries, against the words of the clip's label (three
letters or more), and of another clip's label: how often any word is there, and what share of the words.

{hits}

At one token a query they do: three to four times as many words of the clip's own label as of another's. At 5
and 20 the other's words are there nearly as often, since {queries} queries then name most of the toy's few
words: only the first rows say anything. And the toy language model was trained with keywords in the place of
the soft prompts, so words are what steers it. A pretrained language model has not been, and the literature
finds prefixes that are no words; this says how to look, not what one would see.

What is lost when one query is replaced by its mean over the clips, of a CIDEr of {cider}, sorted in each run:

{lost}
"""


def mean_and_range(values, digits=3):
    low, high = min(values), max(values)
    text = f"{statistics.fmean(values):z.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:z.{digits}f} – {high:z.{digits}f})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown(results):
    """embeddings.md: means over the runs, and in brackets their range."""
    runs, films, search = (results[part] for part in ("runs", "films", "search"))

    def of(*keys):
        values = runs
        for key in keys:
            values = [v[key] for v in values]
        return mean_and_range(values)

    first = runs[0]
    names = ("R@1", "R@5", "R@10", "mAP", "kNN")
    parts = {"all": "all clips", "no shared object": "no object shared"}
    same = [
        [kind, what, of("retrieval", kind, "NMI"), *(of("retrieval", kind, part, n) for n in names)]
        for kind in first["retrieval"]
        for part, what in parts.items()
    ]
    text = [[how, *(of("text", how, k) for k in ("R@1", "R@5", "R@10"))] for how in first["text"]]
    scenes = [
        [kind, *(of("films", kind, n) for n in ("recall", "precision", "boundary F1"))]
        for kind in first["films"]
    ]
    hits = [
        [name, of("words", "hits", name, "any"), of("words", "hits", name, "share")]
        for name in first["words"]["hits"]
    ]
    ratios = [
        statistics.median(r["cost"]["seconds"]["embed"])
        / statistics.median(r["cost"]["seconds"]["loss"])
        for r in runs
    ]
    memory = [
        [n, mean_and_range([r["cost"]["peak_bytes"][n] / 1e6 for r in runs], 0)]
        for n in first["cost"]["peak_bytes"]
    ]
    drops = [sorted(r["words"]["drops"], reverse=True) for r in runs]
    lost = [
        [f"query number {n + 1} in importance", mean_and_range([d[n] for d in drops], 2)]
        for n in range(len(drops[0]))
    ]
    return TEXT.format(
        runs=", ".join(f"`{r['run']}`" for r in runs),
        clips=first["clips"],
        queries=first["queries"],
        same=table(["vector", "neighbours", "NMI", *names], same),
        text=table(["by", "R@1", "R@5", "R@10"], text),
        ratio=mean_and_range(ratios, 2),
        memory=table(["clips embedded", "peak, MB"], memory),
        **films,
        within=films["window"] / 2,
        vectors="{:,} random vectors of {:,} numbers".format(*search["shape"]),
        searched=f"{statistics.median(search['seconds']):.2f}",
        found=table(["vector", "recall", "precision", "boundary F1"], scenes),
        hits=table(["nearest tokens", "a word of the label", "share of its words"], hits),
        cider=of("words", "CIDEr"),
        lost=table(["replaced by its mean", "CIDEr lost"], lost),
    )
