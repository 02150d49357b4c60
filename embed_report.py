"""Score what embed.py does on the toy world, beside controls: results/embeddings.json and .md.

    python embed_report.py --runs results/demo results/demo1 results/demo2 --data data/toy data/toy1 data/toy2

The runs are those of demo.py with --seed 0, 1 and 2. About 10 minutes on two cores.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import cli
import embed
import embeddings
import films
import windows
from cli import UserError, note
from dataset import VALIDATION, load_records
from files import read_json, write_atomic, write_json

SCENES, APART, CLIPS_A_SCENE = 6, 3, 3  # in both films, in one only, and how long each is
FILMS = 4  # pairs a seed
WINDOW, STRIDE = 2.0, 0.5  # seconds; the toy world's clips have about two
TOPS = (1, 5, 20)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--runs", nargs="+", default=["results/demo"], help="run folders of demo.py"
    )
    parser.add_argument("--data", nargs="+", default=["data/toy"], help="their toy worlds")
    parser.add_argument("--output", default="results", help="folder of embeddings.json and .md")
    parser.add_argument("--table", metavar="FILE", help="print the tables of this embeddings.json")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        print(markdown(read_json(args.table, "scores")))
        return
    if len(args.runs) != len(args.data):
        raise UserError(f"--runs names {len(args.runs)} folders, --data {len(args.data)}")
    output = cli.output_folder(args.output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    results = [
        measure(Path(run), Path(data)) for run, data in zip(args.runs, args.data, strict=True)
    ]
    write_json(output / "embeddings.json", results)
    write_atomic(output / "embeddings.md", markdown(results))
    print(markdown(results))


def measure(run, data):
    """All scores of one run."""
    flags = ["--checkpoint", str(run), "--features", str(data / "features"), "--workers", "0"]
    flags += ["--annotations", str(data / "annotations"), "--batch-size", "32"]
    args = embed.parse_args([*flags, "--window", str(WINDOW), "--stride", str(STRIDE)])
    checkpoint, encoder, captioner = windows.load_models(args)
    records = [r for r in load_records(args.annotations, VALIDATION) if r["label"]]
    result = {"run": str(run), "clips": len(records), "queries": captioner.qformer.queries.shape[0]}
    for name, score in {
        "retrieval": lambda: same_template(captioner, checkpoint, records, args),
        "text": lambda: text_to_clip(captioner, checkpoint, records, args),
        "cost": lambda: cost(captioner, records, args, flags),
        "films": lambda: scenes_found(captioner, encoder, records, data, args),
        "words": lambda: words_hit(captioner, checkpoint, records, args),
    }.items():
        began = time.perf_counter()
        result[name] = score()
        note(f"{run}: {name} {time.perf_counter() - began:.0f} s")
    return result


def stored(records, checkpoint, args, size=32):
    """Batches of (records, their features in stored form)."""
    from dataset import load_features, stack_stored

    settings, root = checkpoint["manifest"]["settings"], Path(args.features, args.split)
    for start in range(0, len(records), size):
        some = records[start : start + size]
        clips = [load_features(root / f"{r['id']}.pt", r["id"], settings) for r in some]
        yield some, stack_stored(clips)


# ---- one vector a clip ---------------------------------------------------------------------


def same_template(captioner, checkpoint, records, args):
    """`embed.score_rows` of the vectors, of chance, and of a Q-Former that has not been trained."""
    import copy

    import torch

    from qformer import QFormer

    def vectors(model):
        parts = [embeddings.embed(model, **clips) for _, clips in stored(records, checkpoint, args)]
        return {kind: torch.cat([p[kind] for p in parts]).numpy() for kind in embeddings.KINDS}

    by_kind = vectors(captioner)
    untrained = copy.copy(captioner)
    torch.manual_seed(0)
    qformer = QFormer(**captioner.qformer.sizes).eval()
    qformer.standardise(captioner.qformer.mean, captioner.qformer.std)
    untrained._modules = captioner._modules | {"qformer": qformer}
    by_kind["untrained"] = vectors(untrained)[embeddings.BEST]
    by_kind["chance"] = embed.chance(by_kind["features"].shape, args.seed)
    return embed.score_rows(by_kind, records, args.seed)


def text_to_clip(captioner, checkpoint, records, args):
    """How often the clip of a label is among the first of all clips: by the label's likelihood, and by
    the state behind the label itself as a prefix. Clips with the same label are as right."""
    import torch
    import torch.nn.functional as F

    labels = [r["label"] for r in records]
    likely, shown = [], []
    with torch.inference_mode():
        for _, clips in stored(records, checkpoint, args):
            shown.append(embeddings.embed(captioner, **clips)["prompted"])
            cache = captioner.prefix(**clips)
            likely.append(captioner.log_likelihoods(cache, "label", labels))
        table, state = captioner.lm.get_input_embeddings(), []
        prompt = captioner.tokenizer(embeddings.PROMPT, add_special_tokens=False)["input_ids"]
        for label in labels:
            ids = captioner.tokenizer(label, add_special_tokens=False)["input_ids"]
            words = table(torch.tensor([ids + prompt]))
            state.append(captioner.lm.base_model(inputs_embeds=words).last_hidden_state[:, -1])
    likelihood = torch.cat(likely).T  # (texts, clips)
    prefix = F.normalize(torch.cat(state), dim=-1) @ torch.cat(shown).T
    right = torch.tensor([[a == b for b in labels] for a in labels])
    found = {}
    for name, scores in (("likelihood", likelihood), ("own prefix", prefix)):
        order = right.gather(1, scores.argsort(1, descending=True))  # (texts, clips)
        found[name] = {f"R@{k}": order[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return found


def cost(captioner, records, args, flags):
    """Seconds of embedding the split from the cache, and of its validation loss without generation, in
    turn; and the memory of a process that embeds few and many clips."""
    import torch

    from dataset import batches
    from evaluate import clip_batches, to_device

    def passes(work):
        began = time.perf_counter()
        loader = clip_batches(captioner, args, VALIDATION, records, "label", args.batch_size)
        with torch.inference_mode():
            for batch in batches(loader):
                work(to_device(batch, captioner.device))
        return time.perf_counter() - began

    def vectors(b):
        embeddings.embed(captioner, b["features"], b["scale"], b["offset"])

    def loss(b):
        cache = captioner.prefix(b["features"], b["scale"], b["offset"])
        captioner.loss(cache, b["input_ids"], b["positions"], b["targets"])

    passes(vectors), passes(loss)
    times = [(passes(vectors), passes(loss)) for _ in range(5)]
    seconds = {"embed": [a for a, _ in times], "loss": [b for _, b in times]}
    return {"seconds": seconds, "peak_bytes": {n: peak(flags, n) for n in (100, 250, 4000)}}


def peak(flags, clips):
    """The most bytes that a process held which embeds so many training clips."""
    code = (
        "import resource, sys, embed; embed.main(sys.argv[1:]);"
        " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    with tempfile.TemporaryDirectory() as folder:
        what = ["--split", "train", "--limit", str(clips), "--output", f"{folder}/embeddings.npz"]
        here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-P", "-c", code, *flags, *what]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=here)
    return int(done.stdout.split()[-1])


# ---- two films -----------------------------------------------------------------------------


def scenes_found(captioner, encoder, records, data, args):
    """Films of shared scenes, in another order and among others, matched by each kind of vector.

    A scene is found if what is reported covers half of it in both films (intersection over union).
    Boundaries are those of the scenes found and of the true ones in the first film, right within
    half a window.
    """
    rng, rows = random.Random(args.seed), {kind: [] for kind in (*embeddings.KINDS, "chance")}
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(FILMS):
            ids = [r["id"] for r in records]
            rng.shuffle(ids)
            ids = iter(ids)
            scenes = [list(islice(ids, CLIPS_A_SCENE)) for _ in range(SCENES + 2 * APART)]
            shared, mine, theirs = scenes[:SCENES], scenes[SCENES:-APART], scenes[-APART:]
            spans, vectors = [], []
            for name, those in (("a", [*shared, *mine]), ("b", [*shared, *theirs])):
                rng.shuffle(those)
                path = Path(folder, f"{name}{trial}.webm")
                bounds = write_film(path, those, data / "videos")
                spans.append([bounds[those.index(scene)] for scene in shared])
                vectors.append(embed.film(path, captioner, encoder, args))
            for kind, found in rows.items():
                (times_a, a), (times_b, b) = (
                    (t, v["features" if kind == "chance" else kind]) for t, v in vectors
                )
                if kind == "chance":
                    a, b = (embed.chance(x.shape, trial + n) for n, x in enumerate((a, b)))
                seen = films.scenes(films.compare(a, b), times_a, times_b)
                found.append(quality(seen, *spans))
    return {
        kind: {name: statistics.fmean(row[name] for row in those) for name in those[0]}
        for kind, those in rows.items()
    }


def write_film(path, scenes, videos):
    """Clips one after the other, encoded anew; returns [(start, end)] of the scenes in seconds."""
    import av
    import numpy as np

    import video

    rate, shown, bounds = 12, 0, []
    with av.open(str(path), "w") as container:
        track = container.add_stream("libvpx-vp9", rate=rate, options={"crf": "30", "b:v": "0"})
        size = video.probe(videos / f"{scenes[0][0]}.webm")
        track.width, track.height, track.pix_fmt = size.width, size.height, "yuv420p"
        for scene in scenes:
            start = shown
            for clip_id in scene:
                for _, picture in video.stream(videos / f"{clip_id}.webm"):
                    picture = np.ascontiguousarray(picture)
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    container.mux(track.encode(frame))
                    shown += 1
            bounds.append((start / rate, shown / rate))
        container.mux(track.encode())
    return bounds


def quality(found, true_a, true_b):
    """Recall, precision and boundary F1 of scenes found; true_a[n] is shown again as true_b[n]."""

    def overlap(a, b):
        both = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        return both / (max(a[1], b[1]) - min(a[0], b[0]))

    def same(scene, n):
        pairs = ((scene.start_a, scene.end_a), true_a[n]), ((scene.start_b, scene.end_b), true_b[n])
        return all(overlap(*pair) >= 0.5 for pair in pairs)

    every = range(len(true_a))
    recall = statistics.fmean(any(same(s, n) for s in found) for n in every)
    precision = statistics.fmean(any(same(s, n) for n in every) for s in found) if found else 0.0
    edges = [edge for s in found for edge in (s.start_a, s.end_a)]
    truth = [edge for span in true_a for edge in span]

    def near(some, others):
        return statistics.fmean(any(abs(a - b) <= WINDOW / 2 for b in others) for a in some)

    right, reached = (near(edges, truth), near(truth, edges)) if edges else (0.0, 0.0)
    f1 = 2 * right * reached / (right + reached) if right + reached else 0.0
    return {"recall": recall, "precision": precision, "boundary F1": f1}


# ---- queries as words ----------------------------------------------------------------------


def words_hit(captioner, checkpoint, records, args):
    """How often the nearest tokens of any query hold a word of the clip's label, or of another clip's;
    and the CIDEr that is lost when a query is replaced by its mean over the clips."""
    import torch

    import words
    from evaluate import score
    from metrics import derangement

    corpus = words.Corpus(captioner, embed.corpus(args))
    tokens, prompts = {"embedding": [], "context": []}, []
    with torch.inference_mode():
        for _, clips in stored(records, checkpoint, args):
            soft = captioner.soft_prompts(**clips)
            prompts.append(soft)
            found = {"embedding": words.nearest_tokens(captioner.lm, soft, TOPS[-1])[0]}
            found["context"] = corpus.nearest(soft, TOPS[-1])[0]
            for name, ids in found.items():  # (B, Q, 20) -> of each clip, of each query its tokens
                for clip in ids:
                    tokens[name].append([words.spoken(corpus.tokenizer, row) for row in clip])
        labels = [r["label"] for r in records]
        others = [labels[n] for n in derangement(len(labels), args.seed)]
        hits = {}
        for name, clips in tokens.items():
            for k in TOPS:
                for which, captions in (("own", labels), ("shuffled", others)):
                    found = [
                        words.words_found([t for query in clip for t in query[:k]], caption)
                        for clip, caption in zip(clips, captions, strict=True)
                    ]
                    hits[f"{name}, top {k}, {which}"] = {
                        "any": statistics.fmean(bool(hit) for hit, _ in found),
                        "share": statistics.fmean(len(hit) / len(all_) for hit, all_ in found),
                    }

        soft = torch.cat(prompts)  # (n, Q, D)

        def cider(prompts):
            said = {}
            for start in range(0, len(records), 32):
                cache = captioner.read(prompts[start : start + 32])
                texts = captioner.generate(cache, "label")
                said |= zip([r["id"] for r in records[start : start + 32]], texts, strict=True)
            result, _ = score(said, records, records, args.annotations, with_meteor=False)
            return result["metrics"]["CIDEr"]

        whole, drops = cider(soft), []
        for query in range(soft.shape[1]):
            changed = soft.clone()
            changed[:, query] = soft[:, query].mean(0)
            drops.append(whole - cider(changed))
    return {"hits": hits, "CIDEr": whole, "drops": drops}


# ---- the page ------------------------------------------------------------------------------

TEXT = """# What the queries know, on the toy world

Made by `python embed_report.py`, see its first lines; the figures are in `embeddings.json`. {seeds} runs of
`demo.py` (seeds 0, 1, …), {clips} validation clips each, mean and in brackets the range of the runs. A tiny
world of moving shapes, a random V-JEPA 2 and a language model that has learned to turn keywords into captions:
nothing here is a claim about SSv2, V-JEPA 2 or Qwen2.

## 1. One vector a clip

Clips of the same template among all validation clips, each asked in turn (R@k: one of the first k is right;
mAP; kNN: vote of the nearest 20; NMI: k-means clusters, as many as templates). "No object shared": neighbours
that show an object of the query are left out, so that motion is what is scored. `untrained` is `prompted` of a
Q-Former with random weights, `chance` are random vectors.

{same}

The further behind the language model a vector is taken, the more it says of the action: the state behind the
label prompt, about to write the caption, knows most, the mean of the features next to nothing. That the
features know so little is the toy encoder's doing, whose weights are random; V-JEPA 2's own features may well
do better, and only a run on them can say.

Text to clip: how often a clip with this very label is among the first, by the likelihood of the label as the
clip's caption, or by the state behind the label itself as a prefix. `--text` uses the likelihood.

{text}

Embedding takes {ratio} times a pass for the validation loss, without generation, over the same clips (median
of five in turn). Memory does not grow with the clips:

{memory}

## 2. Two films, scene by scene

{films} pairs of films a run: {scenes} scenes of {clips_a_scene} clips each are in both, in another order and
encoded anew, beside {apart} in one film only. A scene is found when what is reported covers half of it in both
films (intersection over union); boundaries are right within half a window of 2 s, windows start every 0.5 s.

{found}

Scenes are the same footage, so how a clip looks is as good a sign as what happens in it, and the vectors
closest to the video do best: `--match` uses `attended`. The caption's state is alike for two clips of one
action, and matches what is not the same scene. Whether that is wanted is for the user to say (`--kind`).

## 3. Do the queries look like words?

The nearest 1, 5 or 20 tokens of each query, over all queries, against the words of the clip's label (three
letters or more), and of another clip's label: how often any word is there, and what share of the words.

{hits}

Here they do: the toy language model was trained with keywords in the place of the soft prompts, so words are
what steers it. A pretrained language model has not been, and the literature finds prefixes that are no words;
this says how to look, not what one would see.

What is lost when one query is replaced by its mean over the clips, of a CIDEr of {cider}, sorted in each run:

{lost}
"""


def mean_and_range(values, digits=3):
    low, high = min(values), max(values)
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:.{digits}f} – {high:.{digits}f})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown(results):
    """The page of all runs: means, and in brackets the range of the seeds."""

    def of(*keys):
        values = results
        for key in keys:
            values = [v[key] for v in values]
        return mean_and_range(values)

    first = results[0]
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
        for r in results
    ]
    memory = [
        [n, mean_and_range([r["cost"]["peak_bytes"][n] / 1e6 for r in results], 0)]
        for n in first["cost"]["peak_bytes"]
    ]
    drops = [sorted(r["words"]["drops"], reverse=True) for r in results]
    lost = [
        [f"query number {n + 1} in importance", mean_and_range([d[n] for d in drops], 2)]
        for n in range(len(drops[0]))
    ]
    return TEXT.format(
        seeds=len(results),
        clips=first["clips"],
        same=table(["vector", "neighbours", "NMI", *names], same),
        text=table(["by", "R@1", "R@5", "R@10"], text),
        ratio=mean_and_range(ratios, 2),
        memory=table(["clips embedded", "peak, MB"], memory),
        films=FILMS,
        scenes=SCENES,
        clips_a_scene=CLIPS_A_SCENE,
        apart=APART,
        found=table(["vector", "recall", "precision", "boundary F1"], scenes),
        hits=table(["nearest tokens", "a word of the label", "share of its words"], hits),
        cider=of("words", "CIDEr"),
        lost=table(["replaced by its mean", "CIDEr lost"], lost),
    )


if __name__ == "__main__":
    cli.run(main)
