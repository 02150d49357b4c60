"""Format the scores of research.embed_report as a Markdown page."""

from statistics import fmean, median

TEXT = """# What the queries encode, on the toy world

Made by the commands at the top of `research/embed_report.py`; the figures are in `embeddings.json`. Runs of
`worlds.demo` with different seeds ({runs}), {clips} validation clips each. Cells are the mean over
the runs and, in brackets, their range. This is a tiny world of moving shapes, a random V-JEPA 2 and a language model
trained to turn keywords into captions. The results do not carry over to SSv2, V-JEPA 2 or Qwen2.

## 1. Search by clip and by text

Each validation clip is a query for the others with the same template. NMI compares k-means clusters with the
templates. "No shared object" leaves out neighbours that share a word of their objects with the query ("red cup",
"red box"), so that appearance does not help.

{same}

Controls: an untrained Q-Former, clips reduced to their first frame, and random vectors. `prompted` has the best R@1,
mAP and NMI on every seed, so `--query` uses it. It is the language model's state just before it writes the caption.
`hidden`, one prompt earlier, is second on every seed. The mean of the features is near chance although the captions
come from the same features: averaging over time and space loses the motion.

Search by text: how often a clip with exactly this label is among the first k, ranked by the likelihood of the text
as the clip's caption (`--text`).

{text}

One brute-force search through {vectors} (float16, as many as SSv2 has clips) takes {searched} s.

## 2. Scenes of two films

Each run has {pairs} pairs of films. The films of a pair share {scenes} scenes of {clips_a_scene} clips, re-encoded and in
another order, and each has {apart} scenes of its own. Windows of {window} s start every {stride} s. A scene counts as
found if its intersection over union is at least 0.5 in both films. Control: scenes reported per pair of films
that share no clip.

{found}

The scenes are the same footage, which appearance identifies best: the mean of the features is best, an untrained
Q-Former is nearly as good, and training makes it worse. `--match` therefore compares features. `--kind prompted` might
find the same action in other footage; that was not measured. The threshold, the rules and the kind were chosen on
films like these, including one pair in four of those scored, so these are not held-out figures. Unrelated films still
yield a scene occasionally, so do not trust a single short one. Real films, which look similar throughout, were not
tested.

## 3. Do the queries look like words?

For the nearest 1, 5 or 20 tokens of every query: how often any of them is a word of the clip's label (of three
letters or more), and what share of the label's words they name. Control: the label of another clip ("shuffled").

{hits}

With one token per query they do: together the queries name {times} times as many words of the clip's own
label as of another label. With 5 tokens the gap is small, and with 20 it nearly vanishes, because {queries} queries then
name most of the toy world's few words. The toy language model was trained with keywords in place of soft prompts, so
it responds to words. A pretrained model was not, and published prefixes do not resemble words. This experiment shows
how to measure it, not what to expect of a real model.

Which queries matter: the table has the CIDEr lost when a query is replaced by its mean over the clips, out of
{cider}. The most important query costs {most}, the median one {middle}, the
least important {least}. The other columns are for the first run: how often a query's nearest token in context is a
colour, a thing, a word of the clip's label, and a word of another label. Some queries name mostly colours or mostly
things, but these are not always the most important ones, because another query may carry the same information. Which
query names what differs from run to run.

{lost}
"""


def mean_and_range(values, digits=3):
    low, high = min(values), max(values)
    text = f"{fmean(values):z.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:z.{digits}f} – {high:z.{digits}f})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown(results):
    """Format the contents of embeddings.json as embeddings.md."""
    runs, films, search = (results[part] for part in ("runs", "films", "search"))
    first = runs[0]

    def of(*keys):
        values = runs
        for key in keys:
            values = [v[key] for v in values]
        return mean_and_range(values)

    columns = {"all, R@1": ("all", "R@1"), "all, mAP": ("all", "mAP")}
    columns |= {f"no shared object, {n}": ("no shared object", n) for n in ("R@1", "mAP")}
    columns |= {"NMI": ("NMI",)}
    same = [
        [kind, *(of("retrieval", kind, *c) for c in columns.values())]
        for kind in first["retrieval"]
    ]
    recalls = ("R@1", "R@5", "R@10")
    text = [[how, *(of("text", how, k) for k in recalls)] for how in first["text"]]
    measures = list(next(iter(first["films"].values())))
    found = [[kind, *(of("films", kind, n) for n in measures)] for kind in first["films"]]
    hits = first["words"]["hits"]
    named = [[n, *(of("words", "hits", n, part) for part in ("any", "share"))] for n in hits]
    ratios = [
        r["words"]["hits"][f"{how}, top 1, own"]["share"]
        / r["words"]["hits"][f"{how}, top 1, shuffled"]["share"]
        for r in runs
        for how in ("embedding", "context")
    ]
    drops = [sorted(q["CIDEr lost"] for q in r["words"]["queries"]) for r in runs]
    queries = sorted(enumerate(first["words"]["queries"]), key=lambda nq: -nq[1]["CIDEr lost"])
    shares = {
        "colours": "colour",
        "things": "thing",
        "own": "own word",
        "another's": "other's word",
    }
    lost = [
        [
            *(number, f"{q['CIDEr lost']:z.2f}", ", ".join(token for token, _ in q["commonest"])),
            *(f"{q[name]:.2f}" for name in shares),
        ]
        for number, q in queries
    ]
    return TEXT.format(
        runs=", ".join(f"`{r['run']}`" for r in runs),
        clips=first["clips"],
        queries=first["queries"],
        same=table(["vector", *columns], same),
        text=table(["by", *recalls], text),
        vectors="{:,} random vectors of {:,} numbers".format(*search["shape"]),
        searched=f"{median(search['seconds']):.2f}",
        **films,
        found=table(["vector", *measures], found),
        hits=table(["nearest tokens", "a word of the label", "share of its words"], named),
        times=mean_and_range(ratios, 1),
        cider=of("words", "CIDEr"),
        most=mean_and_range([d[-1] for d in drops], 2),
        middle=mean_and_range([d[len(d) // 2] for d in drops], 2),
        least=mean_and_range([d[0] for d in drops], 2),
        lost=table(["query", "CIDEr lost", "most often", *shares.values()], lost),
    )
