"""Score what research/embed.py does on the toy world, beside controls: results/embeddings.json and .md.

    python -m worlds.demo && python -m worlds.demo --seed 1 --data data/toy1 --output results/demo1    (and so on)
    python -m research.embed_report --runs results/demo results/demo1 results/demo2 --data data/toy data/toy1 data/toy2

About four minutes a run on two cores.
"""

import runtime.start

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import video
from captioner import VideoCaptioner
from checkpoint import load_models, read_checkpoint
from dataset import (
    TRAIN,
    VALIDATION,
    FeatureDataset,
    batches,
    load_manifest,
    load_records,
    loader,
)
from evaluate import clip_batches, score, to_device
from metrics import derangement
from qformer import QFormer
from research import embed, embeddings, retrieval, scenes, words
from research.embed_table import markdown
from research.words import words_found
from runtime import cli, devices, start
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import read_json, write_atomic, write_json
from worlds.shapes import COLOURS, SHAPES

FILMS = {  # of each of so many pairs: scenes in both films, in one only, and clips a scene
    **{"pairs": 4, "scenes": 6, "apart": 3, "clips_a_scene": 3},
    **{"window": 2.0, "stride": 0.5},  # seconds; the toy world's clips have about two
}
TOPS = (1, 5, 20)
BATCH, TIMED = 32, 2000  # clips at once, clips whose embedding is timed
SSV2 = (220847, 1536)  # clips of SSv2, width of Qwen2-1.5B


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--runs", nargs="+", default=["results/demo"], help="run folders of worlds/demo.py"
    )
    parser.add_argument("--data", nargs="+", default=["data/toy"], help="their toy worlds")
    parser.add_argument("--output", default="results", help="folder of embeddings.json and .md")
    parser.add_argument("--table", metavar="FILE", help="print the tables of this embeddings.json")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        try:
            print(markdown(read_json(args.table, "scores")))
        except (KeyError, TypeError):
            raise UserError(f"{args.table} was not written by research/embed_report.py") from None
        return
    embed.require_sklearn()
    if len(args.runs) != len(args.data):
        raise UserError(f"--runs names {len(args.runs)} folders, --data {len(args.data)}")
    for run, data in zip(args.runs, args.data, strict=True):
        needed = [Path(data, name) for name in ("features", "features_still", "videos")]
        for path in (Path(run, "args.json"), *needed):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist: --runs and --data are those of worlds/demo.py"
                )
    output = cli.output_folder(args.output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    results = {"films": FILMS, "search": {"shape": SSV2, "seconds": search_seconds()}}
    results["runs"] = [
        measure(Path(run), Path(data)) for run, data in zip(args.runs, args.data, strict=True)
    ]
    write_json(output / "embeddings.json", results)
    write_atomic(output / "embeddings.md", markdown(results))
    print(markdown(results))


def measure(run, data):
    """All scores of one run."""
    flags = ["--checkpoint", str(run), "--features", str(data / "features")]
    flags += ["--workers", "0", "--device", "cpu"]
    flags += ["--annotations", str(data / "annotations"), "--batch-size", str(BATCH)]
    times = ["--window", str(FILMS["window"]), "--stride", str(FILMS["stride"])]
    args = embed.parse_args([*flags, *times])
    checkpoint = read_checkpoint(args.checkpoint)
    encoder, captioner = load_models(
        checkpoint, *devices.resolve(args.device, args.dtype), args.encoder, args.lm
    )
    records = [r for r in load_records(args.annotations, VALIDATION) if r["label"]]
    seed = read_json(run / "args.json", "arguments")["args"]["seed"]
    models = {"": captioner, "untrained ": untrained(captioner, seed)}
    result = {"run": str(run), "clips": len(records), "queries": captioner.qformer.queries.shape[0]}
    for name, measure in {
        "retrieval": lambda: same_template(models, records, data, seed),
        "text": lambda: text_to_clip(captioner, records, args),
        "cost": lambda: cost(captioner, checkpoint, args, flags),
        "films": lambda: scenes_found(models, encoder, records, data, run / "films", args),
        "words": lambda: words_hit(captioner, records, args),
    }.items():
        began = time.perf_counter()
        result[name] = measure()
        note(f"{run}: {name} {time.perf_counter() - began:.0f} s")
    return result


def untrained(captioner, seed):
    """The captioner with a Q-Former as it is before the first step."""
    torch.manual_seed(seed)
    qformer = QFormer(**captioner.qformer.sizes)
    qformer.standardise(captioner.qformer.mean, captioner.qformer.std)
    return VideoCaptioner(qformer, captioner.lm, captioner.tokenizer).eval()


def stored(features, records, device):
    """Validation clips of a cache in stored form, in batches."""
    settings = load_manifest(features).settings
    data = FeatureDataset(features, VALIDATION, records, settings, None, lambda record: [])
    for batch in batches(loader(data, BATCH, 0, device)):
        yield {name: batch[name].to(device) for name in ("features", "scale", "offset")}


# ---- one vector a clip ---------------------------------------------------------------------


def same_template(models, records, data, seed):
    """`embed.score_rows` of the vectors, and of controls: a Q-Former that has not been trained, clips of
    which only the first frame is seen, random vectors; and of the features in another mean."""
    captioner = models[""]

    def vectors(model, features="features"):
        parts = [
            embeddings.embed(model, **clips)
            for clips in stored(data / features, records, model.device)
        ]
        return {
            kind: torch.cat([p[kind] for p in parts]).cpu().numpy() for kind in embeddings.KINDS
        }

    by_kind = vectors(captioner)
    by_kind["features by attention"] = torch.cat(
        [
            where_attended(captioner.qformer, **clips)
            for clips in stored(data / "features", records, captioner.device)
        ]
    ).numpy()
    new, still = vectors(models["untrained "]), vectors(captioner, "features_still")
    for kind in ("attended", "prompts", "prompted"):
        by_kind[f"{kind}, untrained"] = new[kind]
    by_kind["prompted, first frame only"] = still["prompted"]
    by_kind["chance"] = embed.chance(by_kind["features"].shape, seed)
    return embed.score_rows(by_kind, records, seed)


def where_attended(qformer, features, scale, offset):
    """Standardised features (B, E), each token weighted by the last block's mean attention on it."""
    weights = qformer.attention(features, scale, offset)[:, -1].mean((1, 2)).flatten(1)  # (B, N)
    pooled = (weights[..., None] * features).sum(1) * scale + offset
    return (pooled - qformer.mean) / qformer.std


def text_to_clip(captioner, records, args):
    """How often the clip of a label is among the first of all clips: by the label's likelihood, by the
    state behind the label itself as a prefix, and by chance. Clips with the same label are as right."""
    labels = [r["label"] for r in records]
    likely, shown = [], []
    with torch.inference_mode():
        for clips in stored(args.features, records, captioner.device):
            shown.append(embeddings.embed(captioner, **clips)["prompted"])
            cache = captioner.prefix(**clips)
            likely.append(captioner.log_likelihoods(cache, "label", labels))
        table, state = captioner.lm.get_input_embeddings(), []
        prompt = captioner.tokenizer(embeddings.PROMPT, add_special_tokens=False)["input_ids"]
        for label in labels:
            ids = captioner.tokenizer(" " + label, add_special_tokens=False)["input_ids"]
            words = table(torch.tensor([ids + prompt], device=captioner.device))
            state.append(captioner.run_lm(inputs_embeds=words).last_hidden_state[:, -1])
    likelihood = torch.cat(likely).T  # (texts, clips)
    prefix = F.normalize(torch.cat(state), dim=-1) @ torch.cat(shown).T
    chance = torch.rand(prefix.shape, generator=torch.Generator().manual_seed(0))
    right = torch.tensor([[a == b for b in labels] for a in labels])
    found = {}
    for name, scores in (("likelihood", likelihood), ("own prefix", prefix), ("chance", chance)):
        order = right.gather(1, scores.cpu().argsort(1, descending=True))  # (texts, clips)
        found[name] = {f"R@{k}": order[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return found


def cost(captioner, checkpoint, args, flags):
    """Seconds of embedding training clips from the cache into a file, and of their loss without
    generation, in turn; and the memory of a process that embeds few and many clips."""
    records = load_records(args.annotations, TRAIN)[:TIMED]

    def embedded():
        with tempfile.TemporaryDirectory() as folder:
            what = (args.features, TRAIN, records, BATCH, 0)
            embeddings.write(Path(folder, "e.npz"), captioner, checkpoint, *what)

    def loss():
        with torch.inference_mode():
            for b in batches(clip_batches(captioner, args, TRAIN, records, "label", BATCH)):
                b = to_device(b, captioner.device)
                cache = captioner.prefix(b["features"], b["scale"], b["offset"])
                captioner.loss(cache, b["input_ids"], b["positions"], b["targets"])

    def seconds(work):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    loss()
    times = [(seconds(embedded), seconds(loss)) for _ in range(3)]
    taken = {"embed": [a for a, _ in times], "loss": [b for _, b in times]}
    memory = {n: peak(flags, n) for n in (100, 1000, 4000)}
    return {"clips": len(records), "seconds": taken, "peak_bytes": memory}


def search_seconds():
    """Seconds to find the 10 nearest of as many random float16 vectors as SSv2 has clips; five times."""
    rng, vectors = np.random.default_rng(0), np.empty(SSV2, np.float16)
    for row in range(0, len(vectors), 1 << 14):
        part = vectors[row : row + (1 << 14)]
        part[:] = rng.standard_normal(part.shape, np.float32)

    def search():
        began = time.perf_counter()
        retrieval.nearest(vectors[7:8], vectors, 10)
        return time.perf_counter() - began

    return [search() for _ in range(5)]


def peak(flags, clips):
    """The most bytes that a process held which embeds so many training clips. Linux only.

    From /proc: a new process's ru_maxrss begins with that of the one that started it.
    """
    code = (
        "import re, sys; from research import embed; embed.main(sys.argv[1:]);"
        r" print(re.search(r'VmHWM:\s*(\d+) kB', open('/proc/self/status').read())[1])"
    )
    with tempfile.TemporaryDirectory() as folder:
        what = ["--split", "train", "--limit", str(clips), "--output", f"{folder}/embeddings.npz"]
        command = [sys.executable, "-P", "-c", code, *flags, *what]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=start.environment()
        )
    return 1024 * int(done.stdout.split()[-1])


# ---- two films -----------------------------------------------------------------------------


def scenes_found(models, encoder, records, data, folder, args):
    """`films.quality` of films of shared scenes, in another order and among others, by each kind of
    vector. The films stay in `folder`.

    Two controls: what is found against the truth of the next pair of films, and how many scenes are
    found in two films that share none, which are the first of one pair and the second of another.
    """
    pairs = []  # of each (truth in a, in b), spans and vectors of a, of b
    each, apart, rng = FILMS["scenes"], FILMS["apart"], random.Random(args.seed)
    folder.mkdir(exist_ok=True)
    ids = [r["id"] for r in records]
    rng.shuffle(ids)
    ids = iter(ids)  # no clip is in two pairs
    for trial in range(FILMS["pairs"]):
        groups = [list(islice(ids, FILMS["clips_a_scene"])) for _ in range(each + 2 * apart)]
        shared, mine, theirs = groups[:each], groups[each:-apart], groups[-apart:]
        truth, seen = [], []
        for name, those in (("a", [*shared, *mine]), ("b", [*shared, *theirs])):
            rng.shuffle(those)
            path = folder / f"{name}{trial}.webm"
            bounds = write_film(path, those, data / "videos")
            truth.append([bounds[those.index(scene)] for scene in shared])
            vectors = {}
            for model, captioner in models.items():
                spans, found = embed.film(path, captioner, encoder, args)
                vectors |= {model + kind: v for kind, v in found.items()}
            seen.append((spans, vectors))
        pairs.append((as_shown(*truth), *seen))

    def found(kind, a, b):
        similarity = scenes.compare(a[1][kind], b[1][kind])
        return scenes.scenes(similarity, a[0], b[0])

    def mean(rows):
        return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}

    result, within = {}, FILMS["window"] / 2
    for kind in (*embeddings.KINDS, "untrained attended", "untrained prompts"):
        matched = [found(kind, a, b) for _, a, b in pairs]
        rows = [scenes.quality(m, *t, within) for m, (t, *_) in zip(matched, pairs, strict=True)]
        others = [t for t, *_ in (*pairs[1:], pairs[0])]
        dealt = [scenes.quality(m, *t, within) for m, t in zip(matched, others, strict=True)]
        foreign = [
            len(found(kind, a, b))
            for n, (_, a, _) in enumerate(pairs)
            for m, (*_, b) in enumerate(pairs)
            if n != m
        ]
        result[kind] = mean(rows) | {
            "recall, another's truth": mean(dealt)["recall"],
            "F1, another's truth": mean(dealt)["boundary F1"],
            "scenes where none is shared": statistics.fmean(foreign) if foreign else 0.0,
        }
    return result


def as_shown(in_a, in_b):
    """The same scenes in film a and b, [(start, end)] each, where two that follow each other in both
    films are one."""
    joined_a, joined_b = [], []
    for a, b in sorted(zip(in_a, in_b, strict=True)):
        if joined_a and (joined_a[-1][1], joined_b[-1][1]) == (a[0], b[0]):
            joined_a[-1], joined_b[-1] = (joined_a[-1][0], a[1]), (joined_b[-1][0], b[1])
        else:
            joined_a.append(a)
            joined_b.append(b)
    return joined_a, joined_b


def write_film(path, groups, videos):
    """Clips one after the other, encoded anew; returns [(start, end)] of the scenes in seconds."""
    import av

    rate, shown, bounds = 12, 0, []
    with av.open(str(path), "w") as container:
        track = container.add_stream("libvpx-vp9", rate=rate, options={"crf": "30", "b:v": "0"})
        size = video.probe(videos / f"{groups[0][0]}.webm")
        track.width, track.height, track.pix_fmt = size.width, size.height, "yuv420p"
        for scene in groups:
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


# ---- queries as words ----------------------------------------------------------------------


def words_hit(captioner, records, args):
    """How often the nearest tokens of any query hold a word of the clip's label, or of another clip's;
    and of each query the CIDEr that is lost when it is replaced by its mean over the clips, beside what
    its nearest token in context is."""
    corpus = words.Corpus(captioner, embed.corpus(args))
    tokens, prompts = {"embedding": [], "context": []}, []
    with torch.inference_mode():
        for clips in stored(args.features, records, captioner.device):
            soft = captioner.soft_prompts(**clips)
            prompts.append(soft)
            found = {"embedding": words.nearest_tokens(captioner.lm, soft, TOPS[-1])[0]}
            found["context"] = corpus.nearest(soft, TOPS[-1])[0]
            for name, ids in found.items():  # (B, Q, 20) -> of each clip, of each query its tokens
                for clip in ids:
                    tokens[name].append([words.spoken(corpus.tokenizer, row) for row in clip])
        soft = torch.cat(prompts)  # (n, Q, D)

        def cider(prompts):
            said = {}
            for start in range(0, len(records), BATCH):
                cache, _ = captioner.read(prompts[start : start + BATCH])
                texts = captioner.generate(cache, "label")
                said |= zip([r["id"] for r in records[start : start + BATCH]], texts, strict=True)
            result, _ = score(said, records, records, args.annotations, with_meteor=False)
            return result["metrics"]["CIDEr"]

        whole, lost = cider(soft), []
        for query in range(soft.shape[1]):
            changed = soft.clone()
            changed[:, query] = soft[:, query].mean(0)
            lost.append(whole - cider(changed))

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
    queries = [
        {"CIDEr lost": drop} | named([clip[q][0] for clip in tokens["context"]], labels, others)
        for q, drop in enumerate(lost)
    ]
    return {"hits": hits, "CIDEr": whole, "queries": queries}


def named(tokens, labels, others):
    """What a query's nearest token is, over n clips: its commonest, the share of colours and of things,
    and how often it is a word of the clip's label or of another's."""

    def share(of):
        return statistics.fmean(map(bool, of))

    said = [token.lower() for token in tokens]
    return {
        "commonest": Counter(said).most_common(3),
        "colours": share(token in COLOURS for token in said),
        "things": share(token in SHAPES for token in said),
        "own": share(words_found([t], c)[0] for t, c in zip(said, labels, strict=True)),
        "another's": share(words_found([t], c)[0] for t, c in zip(said, others, strict=True)),
    }


if __name__ == "__main__":
    cli.run(main)
