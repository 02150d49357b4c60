"""Search clips, match films and read soft prompts as words, with a trained checkpoint.

    python -m research.embed                              write vectors of the cached validation clips
    python -m research.embed --query my_clip.mp4          print the most similar clips
    python -m research.embed --text "pushing something"   print the clips that this caption fits best
    python -m research.embed --score                      measure how well search finds the same action
    python -m research.embed --match a.mp4 b.mp4          print the scenes that both films contain
    python -m research.embed --words my_clip.mp4          print the tokens nearest to each query

Results go to stdout, files to the checkpoint's folder. --limit N uses only the first N clips of the split
or of --query, the first N windows of each film of --match, or N captions for --words. Vectors of a limited
split are written to a separate file. --text reads the features of all clips for every search; with a trained
retriever, retrieve.py --text takes milliseconds.
"""

import runtime.start

import json
from dataclasses import asdict
from pathlib import Path

import torch

import windows
from checkpoint import load_captioner, load_models, read_checkpoint
from dataset import VALIDATION, load_records
from evaluate import default_output
from research import embeddings, retrieval, scenes
from research.words import Corpus, sample_labels
from research.words import draw as draw_words
from runtime import cli, devices, run_folder
from runtime.cli import note, printable
from runtime.clip_files import find_clips
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.feature_cache import load_manifest, require_features
from runtime.files import write_atomic
from runtime.names import counted, to_utf8
from viz.draw_text import require

MAX_TEXT = 200  # tokens of --text


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("mode (default: write the vectors of a split)")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--query", nargs="+", metavar="CLIP", help="print the most similar clips")
    text = "print the clips that this caption fits best, by likelihood; see also retrieve.py --text"
    mode.add_argument("--text", help=text)
    mode.add_argument(
        "--score",
        action="store_true",
        help="score how well each kind of vector finds clips with the same template",
    )
    mode.add_argument(
        "--match", nargs=2, metavar="FILM", help="print the scenes that both films contain"
    )
    mode.add_argument("--words", metavar="CLIP", help="print the tokens nearest to each query")
    group = parser.add_argument_group("model and data")
    cli.add_models(group)
    cli.add_cached(group.add_argument)
    group.add_argument("--split", default=VALIDATION, help="split to search")
    missing = {"type": cli.whole(0), "default": 0, "metavar": "N"}
    group.add_argument("--allow-missing", **missing, help="number of clips that may lack features")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--kind",
        choices=embeddings.KINDS,
        help="vectors compared by --query and --match"
        f" (default: {embeddings.BEST}; with --match, {embeddings.BEST_FOR_FILMS})",
    )
    group.add_argument(
        "--top",
        "--count",
        type=cli.whole(1),
        default=10,
        help="number of clips or tokens to print",
    )
    group = parser.add_argument_group("windows of --query, --match and --words")
    windows.add_flags(group)
    parser.set_defaults(stride=3.0)  # overlapping windows: a scene may begin anywhere
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of text")
    group.add_argument(
        "--output",
        metavar="FILE",
        help="file of vectors (.npz), or picture of --match or --words (.png) (default:"
        " embeddings_<split>.npz, match_<a>_<b>.png or words_<clip>.png in the checkpoint's folder)",
    )
    cli.add_common(parser, workers=2)
    args = parser.parse_args(argv)
    run_folder.fill_paths(args, args.checkpoint)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.kind and not (args.query or args.match):
        raise UserError("--kind only applies to --query and --match")
    args.kind = args.kind or (embeddings.BEST_FOR_FILMS if args.match else embeddings.BEST)
    if args.query:
        return query(args)
    if args.text is not None:
        if not args.text.strip():
            raise UserError("--text is empty")
        return text(args, *cached_clips(args))
    if args.score:
        return score(args)
    if args.match:
        return match(args)
    if args.words:
        return words(args)
    return embed_split(args, *cached_clips(args))


def output_path(output, checkpoint, name):
    """Return --output, or by default the file `name` in the checkpoint's folder.

    Raises UserError if it cannot be written. A suffix other than that of `name` is an error too, because
    the file may be a film or a checkpoint.
    """
    path = Path(output or default_output(checkpoint) / name)
    if path.suffix != Path(name).suffix or path.is_dir():
        raise UserError(f"--output {path} must be a file name that ends in {Path(name).suffix}")
    cli.output_folder(path.parent, "--output")
    return path


def cached_clips(args):
    """Return the checkpoint and the `CachedClips` of --split. No model is loaded.

    Raises UserError if there are no clips, or if the cache and the checkpoint have different settings.
    """
    checkpoint = read_checkpoint(args.checkpoint)
    manifest = load_manifest(args.features)
    records = load_records(args.annotations, args.split)[: args.limit]
    records = require_features(args.features, args.split, records, args.allow_missing)
    if not records:
        raise UserError(f"there are no clips in split {args.split!r} of {args.annotations}")
    settings = checkpoint["manifest"].settings
    settings.check_same(manifest.settings, f"the cache {args.features}")
    how = settings, args.batch_size, args.workers
    return checkpoint, embeddings.CachedClips(args.features, args.split, records, *how)


# ---- search --------------------------------------------------------------------------------


def embed_split(args, checkpoint, clips):
    """Write the vectors of all clips of a split."""
    first = f"_first{args.limit}" if args.limit else ""
    name = f"embeddings_{args.split}{first}.npz"
    path = output_path(args.output, args.checkpoint, name)
    captioner = load_captioner(checkpoint, *devices.resolve(args.device, args.dtype), args.lm)
    embeddings.write(path, captioner, checkpoint, clips)
    count = len(clips.records)
    print(json.dumps({"output": to_utf8(path), "clips": count}) if args.json else path)
    kinds = embeddings.KINDS
    note(f"{counted(count, 'clip')}, {len(kinds)} vectors each: {', '.join(kinds)}")


def query(args):
    """Print the clips most similar to each window of each --query."""
    paths = find_clips(args.query)[: args.limit]
    checkpoint = read_checkpoint(args.checkpoint)
    path = output_path(args.output, args.checkpoint, f"embeddings_{args.split}.npz")
    ids, vectors, split = embeddings.read(path, args.kind, checkpoint)
    embeddings.check_current(path, ids, split, args.features)
    labels = {}
    if Path(args.annotations, f"{split}.json").is_file():
        labels = {r["id"]: r["label"] for r in load_records(args.annotations, split)}
    device, dtype = devices.resolve(args.device, args.dtype)
    models = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    answered = failed = 0
    windowing = windows.Windowing.of(args)
    for batch, rows in embeddings.embed_windows(paths, *models, windowing):
        for window in (w for w in batch if w.error):
            note(str(window.error))
            failed += 1
        if not rows:
            continue
        decoded = [w for w in batch if not w.error]
        answered += len(decoded)
        nearest = retrieval.nearest(rows[args.kind], vectors, args.top)
        for w, indices, cosines in zip(decoded, *nearest, strict=True):
            source = {"path": to_utf8(paths[w.file])}
            source |= {} if w.alone else {"start": w.start, "end": w.end}
            found = zip(indices.tolist(), cosines.tolist(), strict=True)
            print_clips(source, [(ids[n], c, labels.get(ids[n])) for n, c in found], args.json)
    return DONE if not failed else PARTIAL if answered else FAILED


def text(args, checkpoint, clips):
    """Print the clips of the split for which --text is the most likely caption."""
    captioner = load_captioner(checkpoint, *devices.resolve(args.device, args.dtype), args.lm)
    if (tokens := len(captioner.tokenizer(args.text)["input_ids"])) > MAX_TEXT:
        raise UserError(f"--text has {tokens:,} tokens; at most {MAX_TEXT} are allowed")
    scores = []
    with torch.inference_mode():
        for batch in clips.batches(captioner.device):
            cache = captioner.prefix(**batch)
            scores += captioner.log_likelihoods(cache, "label", [args.text])[:, 0].tolist()
    best = sorted(zip(clips.records, scores, strict=True), key=lambda pair: -pair[1])
    found = [(r["id"], score, r["label"]) for r, score in best[: args.top]]
    print_clips({"text": args.text}, found, args.json)


def print_clips(source, found, as_json):
    """Print the clips found for a query, [(id, score, label or None)], as JSON or one per line."""
    if as_json:
        rows = [{"id": i, "score": round(score, 4), "label": label} for i, score, label in found]
        print(json.dumps(source | {"found": rows}), flush=True)
        return
    head = [printable(source.get("path") or source.get("text"), keep="")]
    head += [f"{source['start']:.1f}-{source['end']:.1f}"] if "start" in source else []
    for clip_id, score, label in found:
        print(*head, f"{score:.3f}", clip_id, label or "", sep="\t", flush=True)


def score(args):
    """Print how well each kind of vector, and random vectors, find clips of the same template."""
    retrieval.require_sklearn()
    path = output_path(args.output, args.checkpoint, f"embeddings_{args.split}.npz")
    checkpoint, by_kind = read_checkpoint(args.checkpoint), {}
    for kind in embeddings.KINDS:
        ids, by_kind[kind], split = embeddings.read(path, kind, checkpoint)
    embeddings.check_current(path, ids, split, args.features)
    known = {r["id"]: r for r in load_records(args.annotations, split)}
    if unknown := [i for i in ids if i not in known]:
        clips = counted(len(unknown), "clip that is", "clips that are")
        raise UserError(f"{path} has {clips} not in {args.annotations}")
    by_kind["chance"] = retrieval.chance(by_kind["features"].shape, args.seed)
    by_kind = {kind: vectors[: args.limit] for kind, vectors in by_kind.items()}
    records = [known[i] for i in ids[: args.limit]]
    rows = retrieval.score_kinds(by_kind, records, args.seed)
    note(f"{counted(len(records), 'clip')} of {path}")
    print(json.dumps(rows) if args.json else retrieval.format_scores(rows))


# ---- films and words -----------------------------------------------------------------------


def match(args):
    """Print the scenes that two films share, and draw the similarity of all windows."""
    require()
    paths = [path for film in args.match for path in find_clips([film])]
    if len(paths) != 2:
        raise UserError(f"--match takes two films; these folders have {len(paths)}")
    name = "match_{}_{}.png".format(*windows.output_names(paths))
    output = output_path(args.output, args.checkpoint, name)
    device, dtype = devices.resolve(args.device, args.dtype)
    models = load_models(read_checkpoint(args.checkpoint), device, dtype, args.encoder, args.lm)
    how = windows.Windowing.of(args), args.limit
    (spans_a, a), (spans_b, b) = (embeddings.embed_film(p, *models, *how) for p in paths)
    if len(spans_a) == len(spans_b) == 1:
        raise UserError(
            f"both films have only one window of {args.window:g} s: use a smaller --window and --stride"
            + (", or a larger --limit" if args.limit == 1 else "")
        )
    similarity = scenes.compare(a[args.kind], b[args.kind])
    found = scenes.find(similarity, spans_a, spans_b)
    names = [printable(path.name, keep="") for path in paths]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, scenes.draw(similarity, spans_a, spans_b, found, names))
    if args.json:
        print(
            json.dumps({"films": [to_utf8(p) for p in paths], "scenes": [asdict(s) for s in found]})
        )
    else:
        for s in found:
            times = (clock(t) for t in (s.start_a, s.end_a, s.start_b, s.end_b))
            print("{}-{}\t{}-{}\t{:.3f}".format(*times, s.score))
    note(f"{counted(len(found), 'scene')} of {names[0]} found in {names[1]}; picture: {output}")


def clock(seconds):
    """Format seconds as mm:ss.s."""
    return f"{int(seconds // 60):02d}:{seconds % 60:04.1f}"


def words(args):
    """Print and draw the tokens nearest to each query of a clip, by embedding and in context."""
    require()
    [path, *more] = find_clips([args.words])
    if more:
        raise UserError(f"--words takes one clip; {args.words} has {len(more) + 1}")
    name = f"words_{windows.output_names([path])[0]}.png"
    output = output_path(args.output, args.checkpoint, name)
    labels = sample_labels(args.annotations, args.seed, args.limit)
    device, dtype = devices.resolve(args.device, args.dtype)
    checkpoint = read_checkpoint(args.checkpoint)
    encoder, captioner = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    [first] = next(windows.read([path], encoder, windows.Windowing.of(args), limit=1))
    if first.error:
        raise UserError(str(first.error), code=FAILED)
    windows.note_damage([first], [path])
    if not first.alone:
        note(f"{path}: using only the first {first.end:.1f} s")
    features = windows.features([first], captioner.device)
    caption = captioner.captions(features, "label")[0]
    with torch.inference_mode():
        soft = captioner.soft_prompts(**features)
    table = Corpus(captioner, labels).table(soft, args.top)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, draw_words(table, f"{printable(path.name)}: {caption}"))
    if args.json:
        print(json.dumps({"path": to_utf8(path), "caption": caption, "queries": table}))
        return
    print(printable(path, keep=""), caption, sep="\t")
    for n, row in enumerate(table):
        print(n, *(" ".join(t for t, *_ in row[part]) for part in ("tokens", "context")), sep="\t")
    note(
        f"columns: query, nearest tokens by embedding, nearest tokens in context; picture: {output}"
    )


if __name__ == "__main__":
    cli.run(main)
