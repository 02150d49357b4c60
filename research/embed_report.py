"""Score research.embed on the toy world, with controls. Writes embeddings.json and embeddings.md.

    python -m worlds.demo && python -m worlds.demo --seed 1 --data data/toy1 --output results/demo1    (and so on)
    python -m research.embed_report --runs results/demo results/demo1 results/demo2 --data data/toy data/toy1 data/toy2

About four minutes per run on two cores.
"""

import runtime.start

import random
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

import video
from captioner import VideoCaptioner
from checkpoint import load_models, read_checkpoint
from dataset import VALIDATION, load_records
from encoder import VideoEncoder
from evaluate import score
from metrics import derangement
from qformer import QFormer
from research import embeddings, retrieval, scenes, words
from research.embed_table import markdown
from runtime import cli
from runtime.cli import note
from runtime.errors import UserError
from runtime.feature_cache import load_manifest
from runtime.files import read_json, write_atomic, write_json
from runtime.provenance import provenance
from windows import Windowing
from worlds.shapes import COLOURS, SHAPES

# scenes: shared by a pair of films; apart: in one film only
FILMS = {
    **{"pairs": 4, "scenes": 6, "apart": 3, "clips_a_scene": 3},
    **{"window": 2.0, "stride": 0.5},  # seconds; the toy world's clips last about two
}
TOPS = (1, 5, 20)  # numbers of nearest tokens per query that are compared with the label
BATCH, SEED = 32, 0
SSV2 = (220847, 1536)  # number of clips in SSv2, width of Qwen2-1.5B


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--runs",
        nargs="+",
        help="run folders of worlds.demo (default: results/demo)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        help="folder of the toy world of each run (default: data/toy)",
    )
    parser.add_argument("--output", default="results", help="folder for embeddings.json and .md")
    parser.add_argument(
        "--table", metavar="FILE", help="print the Markdown page of this embeddings.json and exit"
    )
    args = parser.parse_args(argv)
    args.runs, args.data = args.runs or ["results/demo"], args.data or ["data/toy"]
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        try:
            print(markdown(read_json(args.table, "scores")))
        except (KeyError, TypeError):
            raise UserError(f"{args.table} was not written by research.embed_report") from None
        return
    retrieval.require_sklearn()
    if len(args.runs) != len(args.data):
        raise UserError(f"--runs has {len(args.runs)} folders, --data has {len(args.data)}")
    pairs = [(Path(run), Path(data)) for run, data in zip(args.runs, args.data, strict=True)]
    for run, data in pairs:
        for path in (run / "args.json", *(data / n for n in ("features_still", "videos"))):
            if not path.exists():
                raise UserError(f"{path} does not exist: run python -m worlds.demo first")
    output = cli.output_folder(args.output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    results = {"films": FILMS, "search": {"shape": SSV2, "seconds": search_seconds()}}
    results["runs"] = [measure(load(*pair)) for pair in pairs]
    write_json(output / "embeddings.json", provenance() | results)
    write_atomic(output / "embeddings.md", markdown(results))
    print(markdown(results))


@dataclass
class Run:
    """A run of worlds.demo: its folders, models and labelled validation clips."""

    folder: Path
    data: Path
    seed: int
    records: list
    encoder: VideoEncoder
    captioner: VideoCaptioner
    untrained: VideoCaptioner

    def batches(self, features="features"):
        """Yield batches of the validation clips in stored form, from one of the run's caches."""
        settings = load_manifest(self.data / features).settings
        source = self.data / features, VALIDATION, self.records, settings
        return embeddings.CachedClips(*source, BATCH).batches(self.captioner.device)


def load(folder, data):
    """Load a `Run` on the CPU, with an untrained Q-Former as a control."""
    checkpoint = read_checkpoint(folder)
    encoder, captioner = load_models(checkpoint, torch.device("cpu"), torch.float32)
    seed = read_json(folder / "args.json", "arguments")["args"]["seed"]
    torch.manual_seed(seed)
    qformer = QFormer(**captioner.qformer.sizes)
    qformer.standardise(captioner.qformer.mean, captioner.qformer.std)
    untrained = VideoCaptioner(qformer, captioner.lm, captioner.tokenizer).eval()
    records = [r for r in load_records(data / "annotations", VALIDATION) if r["label"]]
    return Run(folder, data, seed, records, encoder, captioner, untrained)


def measure(run):
    """Compute all scores of one run."""
    result = {"run": str(run.folder), "clips": len(run.records)}
    result["queries"] = run.captioner.qformer.queries.shape[0]
    parts = {"retrieval": same_template, "text": text_to_clip, "films": match_films}
    for name, score_part in (parts | {"words": name_words}).items():
        began = time.perf_counter()
        result[name] = score_part(run)
        note(f"{run.folder}: {name} {time.perf_counter() - began:.0f} s")
    return result


# ---- search --------------------------------------------------------------------------------


def same_template(run):
    """Score the vectors and three controls with `retrieval.score_kinds`.

    The controls are an untrained Q-Former, clips reduced to their first frame, and random vectors.
    """

    def vectors(captioner, features="features"):
        parts = [embeddings.embed(captioner, **batch) for batch in run.batches(features)]
        return {k: torch.cat([p[k] for p in parts]).cpu().numpy() for k in embeddings.KINDS}

    by_kind, untrained = vectors(run.captioner), vectors(run.untrained)
    for kind in ("attended", "prompts", "prompted"):
        by_kind[f"{kind}, untrained"] = untrained[kind]
    still = vectors(run.captioner, "features_still")
    by_kind["prompted, first frame only"] = still["prompted"]
    by_kind["chance"] = retrieval.chance(by_kind["features"].shape, run.seed)
    return retrieval.score_kinds(by_kind, run.records, run.seed)


def text_to_clip(run):
    """Measure how often a clip with exactly the queried label is among the first k.

    Clips are ranked by the likelihood of the label as their caption or, as a control, at random.
    """
    labels = [r["label"] for r in run.records]
    with torch.inference_mode():
        caches = (run.captioner.prefix(**batch) for batch in run.batches())
        scores = [run.captioner.log_likelihoods(cache, "label", labels) for cache in caches]
    likelihood = torch.cat(scores).T  # (texts, clips)
    chance = torch.rand(likelihood.shape, generator=torch.Generator().manual_seed(0))
    same = torch.tensor([[a == b for b in labels] for a in labels])
    found = {}
    for name, scores in (("likelihood", likelihood), ("chance", chance)):
        correct = same.gather(1, scores.cpu().argsort(1, descending=True))  # (texts, clips)
        found[name] = {f"R@{k}": correct[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return found


def search_seconds():
    """Time a search for the 10 nearest of SSV2 random float16 vectors. Returns seconds of five tries."""
    rng, vectors = np.random.default_rng(0), np.empty(SSV2, np.float16)
    for row in range(0, len(vectors), 1 << 14):
        part = vectors[row : row + (1 << 14)]
        part[:] = rng.standard_normal(part.shape, np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        retrieval.nearest(vectors[7:8], vectors, 10)
        times.append(time.perf_counter() - began)
    return times


# ---- films ---------------------------------------------------------------------------------


def match_films(run):
    """Score `scenes.find` with each kind of vector, on pairs of synthetic films.

    The films of a pair share some scenes, in different order. They are written to the run's folder. As a
    control, it counts the scenes found in films that share none: one of one pair and one of another.
    """
    windowing = Windowing(FILMS["window"], FILMS["stride"])
    rng, folder = random.Random(SEED), run.folder / "films"
    folder.mkdir(exist_ok=True)
    ids = [r["id"] for r in run.records]
    rng.shuffle(ids)
    ids = iter(ids)  # no clip is in two pairs
    each, apart, pairs = FILMS["scenes"], FILMS["apart"], []
    for trial in range(FILMS["pairs"]):
        groups = [list(islice(ids, FILMS["clips_a_scene"])) for _ in range(each + 2 * apart)]
        shared, only_a, only_b = groups[:each], groups[each:-apart], groups[-apart:]
        truth, films = [], []
        for name, group in (("a", [*shared, *only_a]), ("b", [*shared, *only_b])):
            rng.shuffle(group)
            path = folder / f"{name}{trial}.webm"
            bounds = write_film(path, group, run.data / "videos")
            truth.append([bounds[group.index(scene)] for scene in shared])
            spans, vectors = embeddings.embed_film(path, run.encoder, run.captioner, windowing)
            _, untrained = embeddings.embed_film(path, run.encoder, run.untrained, windowing)
            vectors |= {f"untrained {k}": untrained[k] for k in ("attended", "prompts")}
            films.append((spans, vectors))
        pairs.append((merge_adjacent(*truth), *films))

    def find(kind, a, b):
        return scenes.find(scenes.compare(a[1][kind], b[1][kind]), a[0], b[0])

    result = {}
    for kind in pairs[0][1][1]:
        rows = [scenes.quality(find(kind, a, b), *truth) for truth, a, b in pairs]
        result[kind] = {name: fmean(row[name] for row in rows) for name in rows[0]}
        unrelated = [(a, b) for _, a, own in pairs for *_, b in pairs if b is not own]
        reported = [len(find(kind, a, b)) for a, b in unrelated]
        result[kind]["scenes where none is shared"] = fmean(reported) if reported else 0.0
    return result


def merge_adjacent(in_a, in_b):
    """Merge shared scenes, [(start, end)] in film a and in b, that are adjacent in both films."""
    merged_a, merged_b = [], []
    for a, b in sorted(zip(in_a, in_b, strict=True)):
        if merged_a and (merged_a[-1][1], merged_b[-1][1]) == (a[0], b[0]):
            merged_a[-1], merged_b[-1] = (merged_a[-1][0], a[1]), (merged_b[-1][0], b[1])
        else:
            merged_a.append(a)
            merged_b.append(b)
    return merged_a, merged_b


def write_film(path, scenes, videos):
    """Concatenate scenes, each a list of clip ids, into a film. Returns their (start, end) in seconds."""
    import av

    rate, frames, bounds = 12, 0, []
    with av.open(str(path), "w") as container:
        track = container.add_stream("libvpx-vp9", rate=rate, options={"crf": "30", "b:v": "0"})
        size = video.probe(videos / f"{scenes[0][0]}.webm")
        track.width, track.height, track.pix_fmt = size.width, size.height, "yuv420p"
        for scene in scenes:
            start = frames
            for clip_id in scene:
                for _, picture in video.stream(videos / f"{clip_id}.webm"):
                    picture = np.ascontiguousarray(picture)
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    container.mux(track.encode(frame))
                    frames += 1
            bounds.append((start / rate, frames / rate))
        container.mux(track.encode())
    return bounds


# ---- words ---------------------------------------------------------------------------------


def name_words(run):
    """Compare the nearest tokens of the queries with the words of the clip's label.

    As a control, they are also compared with the label of another clip. For each query, it measures the
    CIDEr lost without it and what its nearest token names.
    """
    corpus = words.Corpus(run.captioner, words.sample_labels(run.data / "annotations", SEED))
    tokens, prompts = {"embedding": [], "context": []}, []  # [clip][query][token]
    with torch.inference_mode():
        for batch in run.batches():
            soft = run.captioner.soft_prompts(**batch)
            prompts.append(soft)
            embedding, _ = words.nearest_tokens(run.captioner.lm, soft, TOPS[-1])
            context, *_ = corpus.nearest(soft, TOPS[-1])
            for name, ids in (("embedding", embedding), ("context", context)):
                tokens[name] += [[words.decode_each(corpus.tokenizer, q) for q in c] for c in ids]
        cider, lost = cider_lost(run, torch.cat(prompts))
    labels = [r["label"] for r in run.records]
    others = [labels[n] for n in derangement(len(labels), SEED)]
    hits = {}
    for name, clips in tokens.items():
        for k in TOPS:
            for which, captions in (("own", labels), ("shuffled", others)):
                found = [
                    words.match_words([t for query in clip for t in query[:k]], caption)
                    for clip, caption in zip(clips, captions, strict=True)
                ]
                hits[f"{name}, top {k}, {which}"] = {
                    "any": fmean(bool(hit) for hit, _ in found),
                    "share": fmean(len(hit) / len(every) for hit, every in found),
                }
    nearest = [[clip[query][0].lower() for clip in tokens["context"]] for query in range(len(lost))]
    queries = [
        {"CIDEr lost": loss} | describe(names, labels, others)
        for loss, names in zip(lost, nearest, strict=True)
    ]
    return {"hits": hits, "CIDEr": cider, "queries": queries}


def cider_lost(run, soft):
    """Compute the CIDEr of captions from soft prompts (n, Q, D), and the loss without each query.

    A query is removed by replacing it with its mean over the clips. Returns (CIDEr, [loss per query]).
    """

    def cider(soft):
        texts = []
        for rows in soft.split(BATCH):
            cache, _ = run.captioner.read(rows)
            texts += run.captioner.generate(cache, "label")
        predictions = dict(zip([r["id"] for r in run.records], texts, strict=True))
        annotations = run.data / "annotations"
        result, _ = score(predictions, run.records, run.records, annotations, with_meteor=False)
        return result["metrics"]["CIDEr"]

    whole, lost = cider(soft), []
    for query in range(soft.shape[1]):
        without = soft.clone()
        without[:, query] = soft[:, query].mean(0)
        lost.append(whole - cider(without))
    return whole, lost


def describe(tokens, labels, others):
    """Summarise the nearest tokens of one query.

    tokens: the nearest token for each clip. labels: the clips' labels. others: labels of other clips.
    Returns the most common tokens, and the shares of tokens that are colours, things, words of the
    clip's own label and words of another label.
    """

    def share_in(captions):
        pairs = zip(tokens, captions, strict=True)
        return fmean(bool(words.match_words([t], caption)[0]) for t, caption in pairs)

    return {
        "commonest": Counter(tokens).most_common(3),
        "colours": fmean(token in COLOURS for token in tokens),
        "things": fmean(token in SHAPES for token in tokens),
        "own": share_in(labels),
        "another's": share_in(others),
    }


if __name__ == "__main__":
    cli.run(main)
