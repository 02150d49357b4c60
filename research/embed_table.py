"""The page of research/embed_report.py, from what it measured. Standard library only."""

import statistics

TEXT = """# What the queries know, on the toy world

The commands are in the first lines of `research/embed_report.py`, the figures in `embeddings.json`. Runs of `worlds/demo.py`
with their own worlds and seeds: {runs}; {clips} validation clips each.
Mean over the runs, in brackets their range. A tiny world of moving shapes, a random V-JEPA 2 and a language
model that has learned to turn keywords into captions: nothing here is a claim about SSv2, V-JEPA 2 or Qwen2.

## 1. One vector a clip

Clips of the same template among all validation clips, each asked in turn (R@k: one of the first k is right;
mAP; kNN: vote of the nearest 20; NMI: k-means clusters, as many as templates, on all clips). "No object
shared": neighbours that share a word of their objects with the query ("red cup", "red box") are left out, so
that what is seen to move does not help.

{same}

Controls: a Q-Former before its first step; the trained one, shown only the first frame of each clip again and
again, which says how far one gets without motion (that a template has one object or two is seen in a frame);
random vectors. `prompted`, the state behind the label prompt, about to write the caption, has the best mAP, R@1
and NMI on every seed, and `--query` uses it: it knows what will be said. `hidden`, one prompt earlier, varies from run to run. The
mean of the features is near chance, while the Q-Former reads the caption from the same features: it is the mean over
time and place that loses the motion. Of the vectors pooled by attention, the mean over the queries of what the
last cross-attention brings in (`attended`) is better than the features weighted by its attention. What V-JEPA 2's
own features would give, only a run on them can say.

Text to clip: how often a clip with this very label is among the first, by the likelihood of the label as the
clip's caption, or by the state behind the label itself as a prefix. `--text` uses the likelihood. (The toy's
language model was trained with keywords as its prefix, never with whole labels: the comparison is not fair to
the second.)

{text}

Embedding {timed} training clips from the cache into a file takes {ratio} times a pass for their
loss, without generation (median of three in turn). 25,000 clips were not at hand; both grow with the clips.
Memory, of a process that embeds in batches of 32:

{memory}

One search through {vectors} (float16, as many as SSv2 has clips) takes {searched} s.

## 2. Two films, scene by scene

{pairs} pairs of films a run: {scenes} scenes of {clips_a_scene} clips each are in both, in another order and
encoded anew, beside {apart} in each that are not in the other. A scene is found when what is reported covers
half of it in both films (intersection over union); boundaries, of the first film, are right within {within} s. Windows
of {window} s start every {stride} s. Controls: the same answers against the truth of another pair of films, whose
boundaries lie so close together that an F1 of a half is luck; and how many scenes are reported, a pair, of films
that have no clip in common.

{found}

The scenes are the same footage, and that is found by how it looks: the mean of the features does best, an untrained
Q-Former nearly as well, and training takes away from it. So `--match` compares features, and what the queries know
is no help here. The caption's state (`--kind prompted`) may find the same action in other footage, as it does among
clips above; that was not measured on films. The rule (most of the way from the median to the same, longer than a
window, better than what is found with one film run backwards) and the kind were chosen on such films of the same
worlds, and one pair in four was among those: these are not held-out figures. Of films that have nothing in common a
scene is still reported now and then, so a single short one says little. How it fares on films that share a look
throughout, as real ones do, these cannot say.

## 3. Do the queries look like words?

The nearest 1, 5 or 20 tokens of each query, over all queries, against the words of the clip's label (three
letters or more), and of another clip's label: how often any word is there, and what share of the words.

{hits}

At one token a query they do: {times} times as many words of the clip's own label as of
another's. At 5 the gap is small and at 20 next to nothing, since {queries} queries then name most of the toy's few
words. And the toy language model was trained with keywords in the
place of the soft prompts, so words are what steers it. A pretrained language model has not been, and the
literature finds prefixes that are no words; this says how to look, not what one would see.

Which queries matter: the CIDEr that is lost when one is replaced by its mean over the clips, of {cider}.
The most important one costs {most}, the one in the middle {middle}, the least {least}.
Of the first run, what each query's nearest token in context is over the clips: how often a colour, a thing, a
word of the clip's label, and of another's. Some queries name colours alone, or things, but those that do are not
always those that matter: what one says another may say too.

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
    measures = list(next(iter(first["films"].values())))
    found = [[kind, *(of("films", kind, n) for n in measures)] for kind in first["films"]]
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
        [f"{int(n):,}", mean_and_range([r["cost"]["peak_bytes"][n] / 1e6 for r in runs], 0)]
        for n in first["cost"]["peak_bytes"]
    ]
    more = [
        r["words"]["hits"][f"{how}, top 1, own"]["share"]
        / r["words"]["hits"][f"{how}, top 1, shuffled"]["share"]
        for r in runs
        for how in ("embedding", "context")
    ]
    drops = [sorted(q["CIDEr lost"] for q in r["words"]["queries"]) for r in runs]
    queries = sorted(enumerate(first["words"]["queries"]), key=lambda nq: -nq[1]["CIDEr lost"])
    lost = [
        [
            number,
            f"{q['CIDEr lost']:z.2f}",
            ", ".join(token for token, _ in q["commonest"]),
            *(f"{q[n]:.2f}" for n in ("colours", "things", "own", "another's")),
        ]
        for number, q in queries
    ]
    return TEXT.format(
        runs=", ".join(f"`{r['run']}`" for r in runs),
        clips=first["clips"],
        queries=first["queries"],
        same=table(["vector", "neighbours", "NMI", *names], same),
        text=table(["by", "R@1", "R@5", "R@10"], text),
        timed=f"{first['cost']['clips']:,}",
        ratio=mean_and_range(ratios, 2),
        memory=table(["clips embedded", "peak, MB"], memory),
        **films,
        within=films["window"] / 2,
        vectors="{:,} random vectors of {:,} numbers".format(*search["shape"]),
        searched=f"{statistics.median(search['seconds']):.2f}",
        found=table(["vector", *measures], found),
        hits=table(["nearest tokens", "a word of the label", "share of its words"], hits),
        times=mean_and_range(more, 1),
        cider=of("words", "CIDEr"),
        most=mean_and_range([d[-1] for d in drops], 2),
        middle=mean_and_range([d[len(d) // 2] for d in drops], 2),
        least=mean_and_range([d[0] for d in drops], 2),
        lost=table(
            ["query", "CIDEr lost", "mostly", "colour", "thing", "own word", "another's word"], lost
        ),
    )
