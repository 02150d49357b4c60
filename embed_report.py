"""Score what embed.py does on the toy world, beside controls: results/embeddings.json and .md.

    python demo.py && python demo.py --seed 1 --data data/toy1 --output results/demo1    (and so on)
    python embed_report.py --runs results/demo results/demo1 results/demo2 --data data/toy data/toy1 data/toy2

About four minutes a run on two cores.
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
from embed_table import markdown
from files import read_json, write_atomic, write_json

FILMS = {  # of each of so many pairs: scenes in both films, in one only, and clips a scene
    **{"pairs": 4, "scenes": 6, "apart": 3, "clips_a_scene": 3},
    **{"window": 2.0, "stride": 0.5},  # seconds; the toy world's clips have about two
}
TOPS = (1, 5, 20)
SSV2 = (220847, 1536)  # clips of SSv2, width of Qwen2-1.5B


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
    results = {"films": FILMS, "search": {"shape": SSV2, "seconds": search_seconds()}}
    results["runs"] = [
        measure(Path(run), Path(data)) for run, data in zip(args.runs, args.data, strict=True)
    ]
    write_json(output / "embeddings.json", results)
    write_atomic(output / "embeddings.md", markdown(results))
    print(markdown(results))


def measure(run, data):
    """All scores of one run."""
    flags = ["--checkpoint", str(run), "--features", str(data / "features"), "--workers", "0"]
    flags += ["--annotations", str(data / "annotations"), "--batch-size", "32"]
    times = ["--window", str(FILMS["window"]), "--stride", str(FILMS["stride"])]
    args = embed.parse_args([*flags, *times])
    checkpoint, encoder, captioner = windows.load_models(args)
    records = [r for r in load_records(args.annotations, VALIDATION) if r["label"]]
    result = {"run": str(run), "clips": len(records), "queries": captioner.qformer.queries.shape[0]}
    for name, score in {
        "retrieval": lambda: same_template(captioner, checkpoint, records, args),
        "text": lambda: text_to_clip(captioner, checkpoint, records, args),
        "cost": lambda: cost(captioner, records, args, flags),
        "films": lambda: scenes_found(captioner, encoder, records, data, run / "films", args),
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


def search_seconds():
    """Seconds to find the 10 nearest of as many random float16 vectors as SSv2 has clips; five times."""
    import numpy as np

    import retrieval

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
        "import re, sys, embed; embed.main(sys.argv[1:]);"
        r" print(re.search(r'VmHWM:\s*(\d+) kB', open('/proc/self/status').read())[1])"
    )
    with tempfile.TemporaryDirectory() as folder:
        what = ["--split", "train", "--limit", str(clips), "--output", f"{folder}/embeddings.npz"]
        here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-P", "-c", code, *flags, *what]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=here)
    return 1024 * int(done.stdout.split()[-1])


# ---- two films -----------------------------------------------------------------------------


def scenes_found(captioner, encoder, records, data, folder, args):
    """`films.quality` of films of shared scenes, in another order and among others, by each kind of
    vector. The films stay in `folder`."""
    each, apart = FILMS["scenes"], FILMS["apart"]
    rng, rows = random.Random(args.seed), {kind: [] for kind in (*embeddings.KINDS, "chance")}
    folder.mkdir(exist_ok=True)
    for trial in range(FILMS["pairs"]):
        ids = [r["id"] for r in records]
        rng.shuffle(ids)
        ids = iter(ids)
        scenes = [list(islice(ids, FILMS["clips_a_scene"])) for _ in range(each + 2 * apart)]
        shared, mine, theirs = scenes[:each], scenes[each:-apart], scenes[-apart:]
        spans, vectors = [], []
        for name, those in (("a", [*shared, *mine]), ("b", [*shared, *theirs])):
            rng.shuffle(those)
            path = folder / f"{name}{trial}.webm"
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
            found.append(films.quality(seen, *spans, within=FILMS["window"] / 2))
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


if __name__ == "__main__":
    cli.run(main)
