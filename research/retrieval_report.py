"""Compare retrieve.py with the captioner's likelihood and the vectors of research.embed on the toy world.

    python -m worlds.demo
    python -m worlds.demo --seed 1 --data data/toy1 --output results/demo1            (and so on for seed 2)
    python -m research.retrieval_report --runs results/demo{,1,2} --data data/toy{,1,2}

Writes retrieval.json and retrieval.md. Retrievers are trained in results/<run>_retrieval, unless they exist.
Takes about five minutes per run on two cores.
"""

import runtime.start

import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

import heads
from checkpoint import load_captioner, read_checkpoint
from dataset import VALIDATION, load_records
from research import embeddings, retrieval
from research.probe_report import shell
from retrieve import embed_clips, embed_texts, nearest
from runtime import cli, text_vectors
from runtime.errors import UserError
from runtime.feature_cache import load_manifest
from runtime.files import read_json, write_atomic, write_json
from runtime.provenance import provenance
from runtime.retrieval_scores import RECALLS, Pairs, inverse, rank, summary

TRAINING = "--width 128 --batch-size 128 --micro-batch 128 --lr 3e-3 --epochs 20 --warmup-steps 100"
SPLITS = {"validation_pairs": "retriever, unseen pairs"}
SPLITS |= {"validation_objects": "retriever, unseen objects"}
RETRIEVER, LIKELIHOOD, STILL = (
    "retriever",
    "likelihood of the captioner",
    "control: first frame only",
)
CONTROLS = {"shuffled": "control: shuffled", "untrained": "control: untrained"}
ROWS = (RETRIEVER, LIKELIHOOD, *SPLITS.values(), *CONTROLS.values(), STILL)
WAYS = {"text_to_video": "text to clip", "video_to_text": "clip to text"}
VECTORS = {"retriever": "retriever", "prompted": "`prompted` of research.embed"}
VECTORS |= {"features": "`features` of research.embed"}
BATCH, QUERIES = 64, 10  # clips per batch; searches that are timed


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add, several = parser.add_argument, {"nargs": "+", "metavar": "DIR"}
    add("--runs", **several, default=["results/demo"], help="run folders of worlds.demo")
    text = "folders of their worlds, in the same order"
    add("--data", **several, default=["data/toy"], help=text)
    text = "folder for retrieval.json and retrieval.md"
    add("--output", default="results", help=text)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if len(args.runs) != len(args.data):
        raise UserError(f"--runs has {len(args.runs)} folders, --data has {len(args.data)}")
    pairs = [(Path(run), Path(data)) for run, data in zip(args.runs, args.data, strict=True)]
    for run, data in pairs:
        for path in (run / "best.pt", data / "features_still"):
            if not path.exists():
                raise UserError(f"{path} does not exist: run python -m worlds.demo first")
    output = cli.output_folder(args.output, "--output")
    found = {"training": TRAINING, "runs": [measure(run, data) for run, data in pairs]}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "retrieval.json", provenance() | found)
    write_atomic(output / "retrieval.md", markdown(found["runs"]))
    print(markdown(found["runs"]), end="")


def measure(run, data):
    """Train and score a retriever, and score the captioner of a run on the same clips.

    Returns {"clips", "texts", "rows": {row: {way: scores}}, "same_template": {vectors: scores}, "seconds"}.
    """
    folder, common = run.with_name(f"{run.name}_retrieval"), ["--device", "cpu", "--workers", 0]
    common += ["--annotations", data / "annotations"]
    cached = [*common, "--features", data / "features"]
    if not (folder / "evaluation_validation.json").exists():
        flags = ["--lm", data / "lm", *TRAINING.split(), "--output", folder, "--overwrite"]
        shell("retrieve.py", *cached, *flags)
    score = ["--evaluate", "--checkpoint", folder]
    for split in SPLITS:
        shell("retrieve.py", *cached, *score, "--split", split)
    still = ["--features", data / "features_still", "--control", "still"]
    shell("retrieve.py", *common, *score, *still)

    def scores(name):
        return read_json(folder / f"evaluation_{name}.json", "evaluation")

    result = scores(VALIDATION)
    rows = {RETRIEVER: result["metrics"], STILL: scores(f"{VALIDATION}_still")["metrics"]}
    rows |= {text: result["controls"][name] for name, text in CONTROLS.items()}
    rows |= {text: scores(split)["metrics"] for split, text in SPLITS.items()}
    rows[LIKELIHOOD], same_template, seconds = compare(run, data, folder)
    return result["n"] | {"rows": rows, "same_template": same_template, "seconds": seconds}


@torch.inference_mode()
def compare(run, data, folder):
    """Search the validation clips by likelihood, and compare the vectors of clips.

    Returns the scores by likelihood, those of each kind of vector for clips with the same template, and
    the mean seconds of a search.
    """
    checkpoint, device = read_checkpoint(run), torch.device("cpu")
    captioner = load_captioner(checkpoint, device, torch.float32, str(data / "lm"))
    records = [r for r in load_records(data / "annotations", VALIDATION) if r["label"]]
    pairs = Pairs.of_labels(records)
    settings = load_manifest(data / "features").settings
    clips = embeddings.CachedClips(data / "features", VALIDATION, records, settings, BATCH)

    def likelihood(texts):  # (texts, clips), as research.embed --text
        caches = (captioner.prefix(**batch) for batch in clips.batches(device))
        scores = [captioner.log_likelihoods(cache, "label", texts) for cache in caches]
        return torch.cat(scores).T.numpy()

    scores, ways = likelihood(pairs.texts), {}
    wanted = (pairs.right, inverse(pairs.right, len(records)))
    for way, values, right in zip(WAYS, (scores, scores.T), wanted, strict=True):
        mask = np.zeros(values.shape, bool)
        for row, indices in zip(mask, right, strict=True):
            row[indices] = True
        ways[way] = summary(rank(values, mask))

    saved = heads.read_retriever(folder, "--checkpoint")
    tower = heads.load_retriever(saved, device)
    parts = [embeddings.embed(captioner, **batch) for batch in clips.batches(device)]
    vectors = {k: torch.cat([p[k] for p in parts]).numpy() for k in ("prompted", "features")}
    batches = (batch | {"ids": batch["scale"]} for batch in clips.batches(device))
    [vectors["retriever"]] = embed_clips([tower], batches, len(records))
    templates = [r["template"] for r in records]
    objects = [retrieval.object_words(r) for r in records]
    same = {
        kind: retrieval.score(retrieval.unit(v), templates, objects) for kind, v in vectors.items()
    }

    model = text_vectors.TextModel(str(data / "lm"), device, torch.float32)
    network, tokenizer = model.load()

    def search(text):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        query = embed_texts(tower, model.encode(network, [ids]))[0]
        nearest(query, vectors["retriever"], 10)

    seconds = {RETRIEVER: timed(search, pairs.texts)}
    seconds[LIKELIHOOD] = timed(lambda text: likelihood([text]), pairs.texts)
    return ways, same, seconds


def timed(search, texts):
    """Return the mean seconds of a search, after one that is not timed."""
    search(texts[0])
    began = time.perf_counter()
    for text in texts[1 : QUERIES + 1]:
        search(text)
    return (time.perf_counter() - began) / len(texts[1 : QUERIES + 1])


def markdown(runs):
    """Format the scores in both directions, the search for the same template, and the times."""

    def cell(values, digits=3):
        if len(values) == 1:
            return f"{values[0]:.{digits}f}"
        return f"{fmean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    lines = []
    for way, text in WAYS.items():
        lines += [f"| {text} | {' | '.join(RECALLS)} | median rank |", "|---" * 5 + "|"]
        for row in ROWS:
            values = [[run["rows"][row][way][name] for run in runs] for name in RECALLS]
            medians = cell([run["rows"][row][way]["median_rank"] for run in runs], 1)
            lines.append(f"| {row} | {' | '.join(map(cell, values))} | {medians} |")
        lines.append("")
    names = ("R@1", "mAP")
    lines += [
        "| vectors of clips, same template but no shared object | R@1 | mAP |",
        "|---|---|---|",
    ]
    for kind, text in VECTORS.items():
        values = [[run["same_template"][kind][name] for run in runs] for name in names]
        lines.append(f"| {text} | {' | '.join(map(cell, values))} |")
    clips = " / ".join(sorted({str(run["clips"]) for run in runs}))
    lines += ["", f"| search by text among {clips} clips | milliseconds |", "|---|---|"]
    for row in (RETRIEVER, LIKELIHOOD):
        lines.append(f"| {row} | {cell([1e3 * run['seconds'][row] for run in runs], 1)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
