"""What the queries know of a clip: find its like, match two films, read its soft prompts as words.

    python -m research.embed                                    (a vector for each validation clip, from the cache)
    python -m research.embed --query my_clip.mp4                (the clips most like it)
    python -m research.embed --text "pushing something"         (the clips this is likeliest the caption of)
    python -m research.embed --score                            (does it find clips of the same action?)
    python -m research.embed --match a.mp4 b.mp4 --window 6 --stride 3      (scenes of a that are in b)
    python -m research.embed --words my_clip.mp4                (the tokens that each query is nearest to)

Results go to stdout, files into the checkpoint's folder. --limit N: the first N clips of a split (into a
file of their own) or of --query, windows of each film, captions that --words compares with. 220,000
clips are searched in memory, by brute force; beyond 10 million an index such as faiss takes over.
"""

import runtime.start

import importlib.util
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import windows
from checkpoint import load_captioner, load_models, read_checkpoint
from dataset import (
    TRAIN,
    VALIDATION,
    FeatureDataset,
    batches,
    by_hash,
    check_same_settings,
    load_manifest,
    load_records,
    loader,
    require_features,
)
from evaluate import default_output
from research import embeddings, retrieval, scenes
from research import words as reading
from runtime import cli, devices
from runtime.cli import note
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.files import write_atomic
from video import find_clips
from viz.text import require

CORPUS = 2000  # captions
LONGEST_TEXT = 200  # tokens of a caption


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("what to do, if not to embed a split")
    todo = group.add_mutually_exclusive_group()
    todo.add_argument("--query", nargs="+", metavar="CLIP", help="print the clips most like these")
    todo.add_argument("--text", help="print the clips that this caption is likeliest of")
    todo.add_argument("--score", action="store_true", help="score retrieval of the same template")
    todo.add_argument(
        "--match", nargs=2, metavar="FILM", help="find the scenes of one in the other"
    )
    todo.add_argument("--words", metavar="CLIP", help="print the tokens nearest to each query")
    group = parser.add_argument_group("model and data")
    cli.add_models(group)
    group.add_argument("--features", default=cli.FEATURES, help="cache of preprocess_ssv2.py")
    group.add_argument("--annotations", default=cli.ANNOTATIONS, help="of prepare_annotations.py")
    group.add_argument("--split", default=VALIDATION, help="which clips")
    group.add_argument(
        "--allow-missing", type=cli.whole(0), default=0, help="clips that may lack features"
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--kind",
        choices=embeddings.KINDS,
        help=f"of vector (default: {embeddings.BEST}; with --match {embeddings.BEST_OF_FILMS})",
    )
    group.add_argument("--count", type=cli.whole(1), default=10, help="clips or tokens to print")
    group = parser.add_argument_group("clips of --query, --match and --words")
    windows.add_flags(group)
    parser.set_defaults(stride=3.0)  # windows that overlap: a scene begins anywhere
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="JSON instead of text")
    group.add_argument(
        "--output",
        help="file of the vectors, .npz, or picture of --match and --words, .png (default: in the"
        " checkpoint's folder, embeddings_<split>.npz, match_<a>_<b>.png, words_<clip>.png)",
    )
    cli.add_common(parser, workers=2)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.kind and not (args.query or args.match):
        raise UserError("--kind chooses the vectors that --query and --match compare; leave it out")
    args.kind = args.kind or (embeddings.BEST_OF_FILMS if args.match else embeddings.BEST)
    modes = {"query": query, "text": text, "score": score, "match": match, "words": words}
    asked = [do for flag, do in modes.items() if getattr(args, flag) not in (None, False)]
    return asked[0](args) if asked else embed_split(args)


def output_file(args, name):
    """--output, or a file of this name in the checkpoint's folder (results/<name> for a Hub id). Raises
    UserError if it cannot be written, or has another ending: it may be somebody's film or checkpoint."""
    path = Path(args.output or default_output(args.checkpoint) / name)
    if path.suffix != Path(name).suffix or path.is_dir():
        raise UserError(f"--output {path}: name a file that ends in {Path(name).suffix}")
    cli.output_folder(path.parent, "--output")
    return path


def embeddings_file(args, limit=None):
    return output_file(args, f"embeddings_{args.split}{f'_first{limit}' if limit else ''}.npz")


def cached_clips(args):
    """The checkpoint, and the records of the split that have features of its encoder. Raises UserError
    before a model is loaded."""
    manifest = load_manifest(args.features)
    records = load_records(args.annotations, args.split)[: args.limit]
    records = require_features(args.features, args.split, records, args.allow_missing)
    if not records:
        raise UserError(f"there are no clips in split {args.split!r} of {args.annotations}")
    checkpoint = read_checkpoint(args.checkpoint)
    settings = checkpoint["manifest"]["settings"]
    check_same_settings(settings, manifest["settings"], f"the cache {args.features}")
    return checkpoint, records


def say_cut_short(batch, paths):
    """Note the files of a batch of windows that have less in them than they say."""
    for n in sorted({w.file for w in batch if w.truncated}):
        note(f"{cli.printable(paths[n])}: the file is cut short; what is there is used")


# ---- one vector a clip ---------------------------------------------------------------------


def embed_split(args):
    path = embeddings_file(args, args.limit)
    checkpoint, records = cached_clips(args)
    captioner = load_captioner(checkpoint, *devices.resolve(args.device, args.dtype), args.lm)
    how = (args.features, args.split, records, args.batch_size, args.workers)
    embeddings.write(path, captioner, checkpoint, *how)
    print(json.dumps({"output": str(path), "clips": len(records)}) if args.json else path)
    note(f"{len(records):,} clips, of each the vectors {', '.join(embeddings.KINDS)}")


def query(args):
    """The clips most like each window of each --query."""
    paths = find_clips(args.query)[: args.limit]
    checkpoint = read_checkpoint(args.checkpoint)
    ids, vectors, split = embeddings.read(embeddings_file(args), args.kind, checkpoint)
    labels, answered, failed = known_labels(args, split), 0, 0
    encoder, captioner = load_models(
        checkpoint, *devices.resolve(args.device, args.dtype), args.encoder, args.lm
    )
    for batch in windows.read(paths, encoder, windows.Windowing.of(args)):
        for w in (w for w in batch if w.error):
            note(str(w.error))
            failed += 1
        say_cut_short(batch, paths)
        sound = [w for w in batch if not w.error]
        answered += len(sound)
        if not sound:
            continue
        asked = embeddings.embed(captioner, **windows.features(sound, captioner.device))[args.kind]
        nearest = retrieval.nearest(asked.cpu().numpy(), vectors, args.count)
        for w, numbers, cosines in zip(sound, *nearest, strict=True):
            found = zip(numbers.tolist(), cosines.tolist(), strict=True)
            where = {"path": str(paths[w.file])}
            where |= {} if w.alone else {"start": w.start, "end": w.end}
            show(args, where, [(ids[n], cosine, labels.get(ids[n])) for n, cosine in found])
    return DONE if not failed else PARTIAL if answered else FAILED


def known_labels(args, split):
    """{id: label} of a split, none where its annotations are not at hand."""
    if not Path(args.annotations, f"{split}.json").is_file():
        return {}
    return {r["id"]: r["label"] for r in load_records(args.annotations, split)}


def show(args, asked, found):
    """Print the clips found: one JSON object, or a line each behind what was asked."""
    if args.json:
        rows = [{"id": i, "score": round(score, 4), "label": label} for i, score, label in found]
        print(json.dumps(asked | {"found": rows}), flush=True)
        return
    head = [cli.printable(asked.get("path") or asked.get("text"), keep="")]
    head += [f"{asked['start']:.1f}-{asked['end']:.1f}"] if "start" in asked else []
    for clip_id, score, label in found:
        print(*head, f"{score:.3f}", clip_id, label or "", sep="\t", flush=True)


def text(args):
    """The clips of the split whose caption --text is likeliest to be."""
    if not args.text.strip():
        raise UserError("--text is empty")
    checkpoint, records = cached_clips(args)
    captioner = load_captioner(checkpoint, *devices.resolve(args.device, args.dtype), args.lm)
    if (tokens := len(captioner.tokenizer(args.text)["input_ids"])) > LONGEST_TEXT:
        raise UserError(f"--text has {tokens:,} tokens; a caption has at most {LONGEST_TEXT}")
    settings = checkpoint["manifest"]["settings"]
    data = FeatureDataset(args.features, args.split, records, settings, None, lambda record: [])
    scores = []
    with torch.inference_mode(), tqdm(total=len(records), unit="clip", desc="read") as bar:
        for batch in batches(loader(data, args.batch_size, args.workers, captioner.device)):
            stored = (batch[k].to(captioner.device) for k in ("features", "scale", "offset"))
            cache = captioner.prefix(*stored)
            scores += captioner.log_likelihoods(cache, "label", [args.text])[:, 0].tolist()
            bar.update(len(batch["ids"]))
    best = sorted(zip(records, scores, strict=True), key=lambda pair: -pair[1])[: args.count]
    show(args, {"text": args.text}, [(r["id"], score, r["label"]) for r, score in best])


def score(args):
    """Does a vector find clips of the same action? The file's kinds beside chance, on stdout."""
    require_sklearn()
    path, checkpoint, by_kind = embeddings_file(args), read_checkpoint(args.checkpoint), {}
    for kind in embeddings.KINDS:
        ids, by_kind[kind], split = embeddings.read(path, kind, checkpoint)
    known = {r["id"]: r for r in load_records(args.annotations, split)}
    if lost := [i for i in ids if i not in known]:
        raise UserError(f"{path} has {len(lost)} clips that {args.annotations} does not name")
    by_kind["chance"] = chance(by_kind["features"].shape, args.seed)
    by_kind = {kind: vectors[: args.limit] for kind, vectors in by_kind.items()}
    rows = score_rows(by_kind, [known[i] for i in ids[: args.limit]], args.seed)
    note(f"{len(ids[: args.limit]):,} clips of {path}")
    print(json.dumps(rows) if args.json else score_table(rows))


def require_sklearn():
    """Raises UserError where there is no k-means."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("clusters need scikit-learn: pip install -e '.[embed]'", code=1)


def chance(shape, seed):
    """Vectors without any meaning."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def score_rows(by_kind, records, seed):
    """{kind: scores} of `retrieval`, of vectors {kind: (n, D)} of n records, with and without
    neighbours that share a word of their objects ("red cup", "red box"). Raises UserError where there
    are no templates to find."""
    known = [n for n, r in enumerate(records) if r["template"]]
    templates = [records[n]["template"] for n in known]
    if len(set(templates)) < 2:
        raise UserError("nothing to score: the clips have no templates that could be told apart")
    objects, rows = [object_words(records[n]) for n in known], {}
    for kind, vectors in by_kind.items():
        vectors = retrieval.unit(vectors[known])
        rows[kind] = {
            "all": retrieval.retrieval(vectors, templates, objects),
            "no shared object": retrieval.retrieval(vectors, templates, objects, False)
            if any(objects)
            else None,
            "NMI": retrieval.clusters(vectors, templates, seed),
        }
    return rows


def object_words(record):
    """{"red", "cup"} of a record whose placeholder is "the Red cup": letters enough to mean something."""
    words = re.findall(r"\w+", " ".join(record["placeholders"]).lower())
    return {word for word in words if len(word) > 2} - {"the", "and", "with"}


def score_table(rows):
    names = ("R@1", "R@5", "R@10", "mAP", "kNN")
    lines = [f"{'vector':<10}{'NMI':>7}" + "".join(f"{n:>7}" for n in names) * 2]
    lines[0] += "   (right half: neighbours that share no object)"
    for kind, row in rows.items():
        halves = [
            row[part] or dict.fromkeys(names, math.nan) for part in ("all", "no shared object")
        ]
        cells = [row["NMI"], *(half[name] for half in halves for name in names)]
        lines.append(f"{kind:<10}" + "".join(f"{cell:>7.3f}" for cell in cells))
    return "\n".join(lines)


# ---- two films -----------------------------------------------------------------------------


def match(args):
    """The scenes of the first film that are in the second, with a picture of all similarities."""
    require()
    paths = find_clips(args.match)
    if len(paths) != 2:
        raise UserError(f"--match takes two films, not the {len(paths)} that these folders hold")
    output = output_file(args, "match_{}_{}.png".format(*windows.output_names(paths)))
    checkpoint = read_checkpoint(args.checkpoint)
    encoder, captioner = load_models(
        checkpoint, *devices.resolve(args.device, args.dtype), args.encoder, args.lm
    )
    (spans_a, a), (spans_b, b) = (film(path, captioner, encoder, args) for path in paths)
    if len(spans_a) == len(spans_b) == 1:
        raise UserError(
            f"both films are one window of {args.window:g} s: use a smaller --window and --stride"
            + (", or a larger --limit" if args.limit == 1 else "")
        )
    similarity = scenes.compare(a[args.kind], b[args.kind])
    found = scenes.scenes(similarity, spans_a, spans_b)
    names = [cli.printable(path.name, keep="") for path in paths]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, scenes.draw(similarity, spans_a, spans_b, found, names))
    if args.json:
        print(json.dumps({"films": [str(p) for p in paths], "scenes": [asdict(s) for s in found]}))
    else:
        for s in found:
            times = (f"{scenes.clock(t)}" for t in (s.start_a, s.end_a, s.start_b, s.end_b))
            print("{}-{}\t{}-{}\t{:.3f}".format(*times, s.score))
    note(f"{len(found)} scenes of {names[0]} are in {names[1]}: {output}")


def film(path, captioner, encoder, args):
    """(spans of the windows of one film, {kind: vectors (n, D)}): the first --limit windows; NaN where
    one could not be decoded. Raises UserError if none can be."""
    spans, vectors, errors = [], {}, []
    for batch in windows.read([path], encoder, windows.Windowing.of(args), args.limit):
        spans += [(w.start, w.end) for w in batch]
        errors += [w.error for w in batch if w.error]
        say_cut_short(batch, [path])
        if not (sound := [w for w in batch if not w.error]):
            continue
        rows = embeddings.embed(captioner, **windows.features(sound, captioner.device))
        for kind, found in rows.items():
            for w, vector in zip(sound, found.cpu().numpy(), strict=True):
                vectors.setdefault(kind, {})[w.start, w.end] = vector
    if not vectors:
        raise UserError(str(errors[0]), code=1)
    if errors:
        note(f"{len(errors)} of {len(spans)} windows are left out, the first because {errors[0]}")
    lost = {kind: np.full_like(next(iter(v.values())), np.nan) for kind, v in vectors.items()}
    return spans, {k: np.stack([v.get(s, lost[k]) for s in spans]) for k, v in vectors.items()}


# ---- queries as words ----------------------------------------------------------------------


def words(args):
    """Of each query of one clip the nearest tokens, by input embedding and in context."""
    require()
    [path, *more] = find_clips([args.words])
    if more:
        raise UserError(f"--words reads one clip, not the {len(more) + 1} in {args.words}")
    output = output_file(args, f"words_{windows.output_names([path])[0]}.png")
    texts = corpus(args)
    checkpoint = read_checkpoint(args.checkpoint)
    encoder, captioner = load_models(
        checkpoint, *devices.resolve(args.device, args.dtype), args.encoder, args.lm
    )
    first = next(
        batch[0] for batch in windows.read([path], encoder, windows.Windowing.of(args), limit=1)
    )
    if first.error:
        raise UserError(str(first.error), code=1)
    say_cut_short([first], [path])
    if not first.alone:
        note(f"{path}: its first {first.end:.1f} s are read")
    features = windows.features([first], captioner.device)
    caption = captioner.captions(features, "label")[0]
    with torch.inference_mode():
        soft = captioner.soft_prompts(**features)
    table = reading.Corpus(captioner, texts).table(soft, args.count)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, reading.draw(table, f"{cli.printable(path.name)}: {caption}"))
    if args.json:
        print(json.dumps({"path": str(path), "caption": caption, "queries": table}))
        return
    print(cli.printable(path, keep=""), caption, sep="\t")
    for n, row in enumerate(table):
        print(n, *(" ".join(t for t, *_ in row[part]) for part in ("tokens", "context")), sep="\t")
    note(f"a line a query: its nearest tokens by embedding, then in context; written to {output}")


def corpus(args):
    """At most `CORPUS` labels of training clips, drawn by the seed: the words that queries may mean."""
    records = {
        r["id"]: r for r in load_records(args.annotations, TRAIN) if (r["label"] or "").strip()
    }
    if not records:
        raise UserError(f"no captions to read the queries by: {args.annotations} has no labels")
    drawn = by_hash(records, args.seed)[: min(CORPUS, args.limit or CORPUS)]
    return [records[i]["label"] for i in drawn]


if __name__ == "__main__":
    cli.run(main)
