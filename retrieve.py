"""Train and score a retriever on cached features, and search for clips by text or by clip.

    python retrieve.py                                         (trains on SSv2)
    python retrieve.py --evaluate --split validation           (scores results/retrieval/best.pt)
    python retrieve.py --text "moving a red ball to the left"  (prints the nearest clips of a split)
    python retrieve.py --query my_clip.mp4                     (prints the nearest captions and clips)

A Q-Former with few queries maps each clip to a vector. A frozen language model and an MLP map each
caption to a vector. Q-Former and MLP are trained with a contrastive loss, so that a clip is near its
captions. The best epoch is chosen on a tenth of the training videos, which are held out. Writes best.pt,
last.pt, metrics.jsonl, args.json and evaluation_<split>.json to --output.
"""

import runtime.start

import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import heads
import windows
from checkpoint import json_digest, weights_digest
from dataset import (
    TRAIN,
    VALIDATION,
    by_hash,
    choose_captions,
    feature_batches,
    hold_out,
    sample_statistics,
    shared_memory,
    with_features,
)
from encoder import VideoEncoder
from metrics import derangement
from optim import dropout_seed, epoch_order, lr_at, make_optimizer, set_lr
from runtime import cli, devices, hub, ranks, run_folder, text_vectors
from runtime.cli import note, printable
from runtime.clip_files import find_clips
from runtime.errors import DONE, FAILED, PARTIAL, SIGNALLED, UserError
from runtime.feature_cache import (
    load_manifest,
    recorded_sources,
    source_numbers,
)
from runtime.files import json_line, write_json
from runtime.head_run import HeadRun
from runtime.intervals import bootstrap
from runtime.names import counted, file_size, to_utf8
from runtime.retrieval_scores import RECALLS, Pairs, summary
from runtime.run_log import truncate_log

STATISTICS_TEXTS = 20_000  # training captions used for those of the text vectors
TEMPERATURE = 0.07  # at the start
CLIP_GRAD = 1.0
OUTPUT = "results/retrieval"
# flags that only matter for training
TRAINING = ("width", "num_queries", "num_heads", "dropout", "epochs", "batch_size", "lr")
TRAINING += ("weight_decay", "warmup_steps", "no_paraphrases", "resume", "overwrite")
# flags that a resumed run may change
MAY_CHANGE = {"output", "device", "workers", "resume", "overwrite", "features", "annotations", "lm"}
MAY_CHANGE |= {"split", "allow_missing", "checkpoint", "encoder", "top", "micro_batch"}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("mode (default: train)")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--evaluate", action="store_true", help="score --checkpoint on --split")
    mode.add_argument("--text", help="print the clips of --split that are nearest to this text")
    text = "print the captions and clips of --split that are nearest to this video file"
    mode.add_argument("--query", metavar="CLIP", help=text)
    add = parser.add_argument_group("data").add_argument
    cli.add_cached(add)
    add("--split", default=VALIDATION, help="split to score or search")
    text = f"folder for the results (default: {OUTPUT}, or that of --checkpoint)"
    add("--output", help=text)
    text = "maximum number of clips per split without features; they are skipped"
    add("--allow-missing", type=cli.whole(0), default=0, help=text)
    add = parser.add_argument_group("model").add_argument
    text = "Hub id or folder of the frozen language model or sentence encoder"
    add("--lm", help=f"{text} (default: {cli.LM}, or that of --checkpoint)")
    add("--width", type=cli.whole(1), default=256, help="width of the Q-Former and of the vectors")
    add("--num-queries", type=cli.whole(1), default=4, help="number of queries")
    add("--num-heads", type=cli.whole(1), default=4, help="attention heads of the Q-Former")
    add("--dropout", type=cli.number(least=0, below=1), default=0.1, help="dropout rate")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.whole(1), default=20, help="passes over the training clips")
    add("--batch-size", type=cli.whole(1), default=512, help="clips per step")
    text = "clips computed at a time, to save memory; must divide --batch-size"
    add("--micro-batch", type=cli.whole(1), default=64, help=text)
    add("--lr", type=cli.number(above=0), default=1e-3, help="peak learning rate")
    add("--weight-decay", type=cli.number(least=0), default=0.05, help="weight decay of AdamW")
    add("--warmup-steps", type=cli.whole(0), default=500, help="steps of linear warm-up")
    add("--no-paraphrases", action="store_true", help="train on the labels only")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add = parser.add_argument_group("scoring and searching").add_argument
    text = "best.pt of a run, or its run folder"
    add("--checkpoint", default=OUTPUT, help=text)
    text = "score the captions in this file instead of the labels of --split: a JSON list of"
    text += ' {"image": file or files, "caption": text}, such as SSv2-label and SSv2-template'
    add("--lists", help=text)
    text = "still: --features was made with preprocess_ssv2.py --still"
    add("--control", choices=["none", "still"], default="none", help=text)
    add("--top", type=cli.whole(1), default=5, help="number of clips or captions to print")
    add("--encoder", help="folder of the video encoder for --query, if it has moved")
    cli.add_common(parser)
    args = parser.parse_args(argv)
    finished = args.evaluate or args.text is not None or args.query
    run_folder.fill_paths(args, args.checkpoint if finished else None)
    if finished:
        parser.refuse_given(args, TRAINING, "can only be used for training")
    else:
        names = ("checkpoint", "encoder", "top")
        parser.refuse_given(args, names, "needs --evaluate, --text or --query")
    if not args.evaluate:
        parser.refuse_given(args, ("lists", "control"), "needs --evaluate")
    if args.text is not None and not args.text.strip():
        parser.error("--text is empty")
    if args.batch_size % args.micro_batch:
        if args.batch_size > args.micro_batch:
            sizes = (
                f"--micro-batch {args.micro_batch} does not divide --batch-size {args.batch_size}"
            )
            parser.error(f"{sizes}; set --micro-batch to a divisor")
        args.micro_batch = args.batch_size
    if args.width % args.num_heads:
        parser.error(f"--num-heads {args.num_heads} does not divide --width {args.width}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if ranks.world_size() > 1:
        raise UserError("retrieve.py runs in a single process; start it without torchrun")
    if args.evaluate:
        return evaluate(args)
    if args.text is not None or args.query:
        return search(args)
    return train(args)


def captioned(split, *source):
    """Return the records of a split that have features and a label, see `with_features`."""
    records = [r for r in with_features(split, *source) if r["label"]]
    if not records:
        raise UserError(f"split {split!r} has no clip with a caption and features")
    return records


# ---- training -------------------------------------------------------------------------------


class Captions:
    """The captions of clips, with their vectors.

    texts: distinct captions. vectors: float16 (n, D), in the same order. paraphrases: whether to train on
    paraphrases too.
    """

    def __init__(self, texts, vectors, paraphrases):
        self.row = {text: row for row, text in enumerate(texts)}
        self.vectors, self.paraphrases = vectors, paraphrases

    def of(self, texts):
        """Return the vectors of texts, float32 (B, D)."""
        return torch.from_numpy(self.vectors[[self.row[t] for t in texts]].astype(np.float32))

    def sample(self, records, seed, epoch):
        """Sample a caption of each of B clips. Returns their vectors (B, D) and `right`, bool (B, B).

        right[i, j] is True if the texts or the labels of clips i and j are equal. A sample is a pure
        function of (seed, epoch, id), see `choose_captions`.
        """
        labels = [r["label"] for r in records]
        texts = labels
        if self.paraphrases:
            texts = [choose_captions(r, 1, seed, epoch)[0][1] for r in records]
        right = torch.zeros(len(records), len(records), dtype=torch.bool)
        for names in (texts, labels):
            rows = torch.tensor([self.row[name] for name in names])
            right |= rows[:, None] == rows
        return self.of(texts), right

    def statistics(self, texts):
        """Return the mean and standard deviation (D,) of the vectors of some texts."""
        vectors = self.of(texts)
        return vectors.mean(0), vectors.std(0, correction=0).clamp(min=1e-6)


def train(args):
    folder = run_folder.check(args.output or OUTPUT, args.resume, args.overwrite)
    manifest = load_manifest(args.features)
    source = args.features, args.annotations, args.limit, args.allow_missing
    records = captioned(TRAIN, *source)
    clips, held_out = hold_out(records, args.seed)
    if not clips:
        raise UserError("the training split needs at least two videos, because one is held out")
    scored = captioned(args.split, *source)
    device, dtype = devices.resolve(args.device, args.dtype)
    model = text_vectors.TextModel(args.lm or cli.LM, device, dtype)
    texts = {text for r in records for text in captions_of(r, args.no_paraphrases)}
    texts = sorted(texts | {r["label"] for r in scored})
    read = reader(args, device)
    with (
        run_folder.locked(folder, args.resume, args.overwrite),
        shared_memory(manifest.settings, args.workers, training=args.micro_batch),
    ):
        vectors = text_vectors.of_texts(texts, model, folder, alone=True)
        captions = Captions(texts, vectors, not args.no_paraphrases)
        state = new_state(args, manifest, clips, captions, model, device)
        resumed = args.resume and state.resume(folder)
        facts = {"clips": len(clips), "finished": state.epoch == args.epochs}
        with run_folder.recorded(folder, vars(args), args.overwrite, device, **facts):
            if not resumed:
                state.save(folder)
            print_plan(args, state, clips, held_out, scored, texts, manifest)
            stop = run_folder.Stop()
            fit(args, state, (clips, held_out), captions, read, folder, stop)
        if stop.signal:
            note(run_folder.stopped_after(state.step))
            return SIGNALLED + stop.signal
        stop.restore()
        saved = heads.read_retriever(folder, "--output")
        tower, pairs = heads.load_retriever(saved, device), Pairs.of_labels(scored)
        report(args, scores_of(args, saved, tower, pairs, captions.of(pairs.texts), read), folder)


def captions_of(record, labels_only):
    """Return the texts that a clip may be trained on."""
    return [record["label"], *([] if labels_only else record["paraphrases"])]


def reader(args, device):
    """Return a function (split, records) -> micro-batches of features, see `feature_batches`."""
    how = {"batch_size": args.micro_batch, "workers": args.workers, "device": device}
    return partial(feature_batches, args.features, **how)


def new_state(args, manifest, clips, captions, model, device):
    """Make the `HeadRun` of a new run."""
    settings = manifest.settings
    video = sample_statistics(args.features, clips, settings, args.seed, args.workers)
    texts = {text for r in clips for text in captions_of(r, args.no_paraphrases)}
    text = captions.statistics(by_hash(texts, args.seed)[:STATISTICS_TEXTS])
    torch.manual_seed(args.seed)
    tower = heads.Retriever(
        width=args.width,
        text_width=captions.vectors.shape[1],
        temperature=TEMPERATURE,
        video_width=settings.width,
        grid=list(settings.grid),
        num_queries=args.num_queries,
        num_heads=args.num_heads,
        dropout=args.dropout,
    )
    tower.standardise(video, text)
    tower.to(device)
    fixed = {
        "retriever_version": heads.RETRIEVER_VERSION,
        "sizes": tower.sizes,
        "lm": hub.record("name", model.name) | {"fingerprint": model.fingerprint},
        "manifest": manifest.as_dict(),
    }
    flags = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    data = [[r["id"], *captions_of(r, args.no_paraphrases)] for r in clips]
    identity = {"flags": flags, "train": data, "lm": model.fingerprint}
    optimizer = make_optimizer(tower, args.lr, args.weight_decay)
    return HeadRun([tower], optimizer, fixed, identity, "training clips, their captions or --lm")


def fit(args, state, clips, captions, read, folder, stop):
    """Train until the last epoch or a signal. Writes last.pt, and best.pt if the recall has improved.

    clips: (records to train on, records held out). The remainder of an epoch that does not fill a batch is
    left out, because the loss of a smaller batch is easier. It consists of other clips in each epoch.
    """
    (train, held_out), [tower] = clips, state.heads
    device = tower.log_scale.device
    steps = max(1, len(train) // args.batch_size)
    truncate_log(folder / "metrics.jsonl", state.step)
    with (
        open(folder / "metrics.jsonl", "a", encoding="utf-8") as log,
        tqdm(total=steps * args.epochs, initial=state.step, unit="step") as bar,
    ):
        for epoch in range(state.epoch, args.epochs):
            # the rest of the epoch; a resumed run may start in the middle or at the end
            order = epoch_order(train, args.seed, epoch)[: steps * args.batch_size]
            order = order[(state.step - epoch * steps) * args.batch_size :]
            groups = [order[n : n + args.batch_size] for n in range(0, len(order), args.batch_size)]
            micro_batches = iter(read(TRAIN, order))
            tower.train()
            for group in groups:
                count = math.ceil(len(group) / args.micro_batch)
                batch = [heads.head_inputs(next(micro_batches), device) for _ in range(count)]
                lr = lr_at(state.step, steps * args.epochs, args.lr, args.warmup_steps)
                set_lr(state.optimizer, lr)
                seed = dropout_seed(args.seed, state.step)
                loss = step(state, batch, captions.sample(group, args.seed, epoch), seed)
                state.step += 1
                entry = {"step": state.step, "epoch": epoch + 1, "loss": loss, "lr": lr}
                entry["temperature"] = math.exp(-tower.log_scale.item())
                log.write(json_line(entry))
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                if stop.signal:
                    log.flush()
                    return state.save(folder)
            state.epoch = epoch + 1
            log.write(json_line(end_epoch(state, held_out, captions, read, folder)))
            log.flush()
            state.save(folder)


def step(state, batch, captions, seed):
    """Update the weights with one batch. Returns the loss.

    batch: micro-batches of features on the device. captions: the result of `Captions.sample`. The loss
    compares all clips with all texts. Micro-batches are therefore computed once to get all vectors, and
    again, one after the other, in the backward pass. The gradient is that of the whole batch, but only the
    activations of one micro-batch are in memory (as in GradCache, Gao et al. 2021, arXiv:2101.06983).
    """
    [tower] = state.heads
    device = tower.log_scale.device
    vectors, right = (t.to(device) for t in captions)

    def embed(inputs, seed):
        torch.manual_seed(seed)  # of dropout, the same in both passes
        return tower.clips(**inputs)

    if len(batch) > 1:
        embed = partial(checkpoint, embed, use_reentrant=False, preserve_rng_state=False)
    with devices.autocast(device):
        clips = torch.cat([embed(inputs, seed + n) for n, inputs in enumerate(batch)])  # (B, W)
        texts = tower.texts(vectors)  # (B, W)
    loss = heads.contrastive_loss(clips, texts, right, tower.log_scale.exp())
    if not loss.isfinite():
        raise UserError(
            f"the loss is not finite at step {state.step + 1}: use a smaller --lr", code=FAILED
        )
    loss.backward()
    nn.utils.clip_grad_norm_(tower.parameters(), CLIP_GRAD)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    tower.clamp_temperature()
    return loss.item()


def end_epoch(state, held_out, captions, read, folder):
    """Score the held-out clips, and write best.pt if their mean recall is the best so far.

    Between equal recalls, the larger mean reciprocal rank decides. Returns the entry of metrics.jsonl.
    """
    [tower], pairs = state.heads, Pairs.of_labels(held_out)
    [clips] = embed_clips([tower.eval()], read(TRAIN, pairs.records), len(pairs.records))
    texts = embed_texts(tower, captions.of(pairs.texts))
    found = pairs.ranks(clips, texts)
    scores = {way: summary(ranks) for way, ranks in found.items()}
    recalls = [s[name] for s in scores.values() for name in RECALLS]
    quality = float(np.mean(recalls)), float(np.mean([(1 / r).mean() for r in found.values()]))
    if quality > state.best:
        state.best = quality
        chosen = {"epoch": state.epoch, "held_out": quality[0]}
        state.save_best(folder, tower, chosen)
    ways = ", ".join(f"{way.replace('_', ' ')} R@1 {s['R@1']:.3f}" for way, s in scores.items())
    tqdm.write(f"epoch {state.epoch}: held-out {ways}", file=sys.stderr)
    return {"step": state.step, "epoch": state.epoch, "held_out": scores}


def print_plan(args, state, clips, held_out, scored, texts, manifest):
    size = sum(p.numel() for p in state.heads[0].parameters())
    epoch = (len(clips) + len(held_out)) * manifest.settings.clip_bytes
    note(
        f"parameters   {size:,}\n"
        f"clips        {len(clips):,} training, {len(held_out):,} held out, {len(scored):,} {args.split}\n"
        f"captions     {len(texts):,} distinct\n"
        f"reading      {file_size(epoch)} per epoch"
    )


# ---- vectors and scores ---------------------------------------------------------------------


@torch.inference_mode()
def embed_clips(towers, batches, count):
    """Embed batches of features with several towers. Returns float32 (count, W) for each."""
    found, device = [[] for _ in towers], towers[0].log_scale.device
    with tqdm(total=count, unit="clip", desc="clips", delay=1, leave=False) as bar:
        for batch in batches:
            inputs = heads.head_inputs(batch, device)
            with devices.autocast(device):
                for tower, rows in zip(towers, found, strict=True):
                    rows.append(tower.clips(**inputs).cpu())
            bar.update(len(batch["ids"]))
    return [torch.cat(rows).numpy() for rows in found]


@torch.inference_mode()
def embed_texts(tower, vectors):
    """Map the text model's vectors (n, D) to float32 (n, W)."""
    device = tower.log_scale.device
    with devices.autocast(device):
        return tower.texts(vectors.to(device)).cpu().numpy()


def scores_of(args, saved, tower, pairs, vectors, read):
    """Score the pairs, with controls. Returns the content of evaluation_<split>.json.

    vectors: the text model's vectors of the texts (m, D).
    """
    towers = tower, tower.untrained()
    embedded = embed_clips(towers, read(args.split, pairs.records), len(pairs.records))
    texts = [embed_texts(t, vectors) for t in towers]
    rows = {"retriever": (embedded[0], texts[0]), "untrained": (embedded[1], texts[1])}
    if len(pairs.records) > 1:
        order = derangement(len(pairs.records), args.seed)
        rows["shuffled"] = embedded[0][list(order)], texts[0]
    found = {name: pairs.ranks(*vectors) for name, vectors in rows.items()}
    scores = {name: {way: summary(r) for way, r in ways.items()} for name, ways in found.items()}
    intervals = {
        way: {name: bootstrap(r <= k, args.seed) for name, k in RECALLS.items()}
        for way, r in found["retriever"].items()
    }
    clips = json_digest([r["id"] for r in pairs.records])
    settings = {"split": args.split, "lists": args.lists, "control": args.control, "clips": clips}
    return {
        "n": {"clips": len(pairs.records), "texts": len(pairs.texts)},
        "metrics": scores.pop("retriever"),
        "ci95": intervals,
        "controls": scores,
        "settings": settings | {"chosen": saved["chosen"]},
    }


def report(args, result, folder):
    """Write the result and print it."""
    parts = [args.split] + [args.control] * (args.control != "none")
    parts += [Path(args.lists).stem] if args.lists else []
    parts += [f"first{args.limit}"] if args.limit else []
    path = folder / f"evaluation_{'_'.join(parts)}.json"
    run_folder.replaced_scores(path, result)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    names = {**RECALLS, "median_rank": "median"}
    print(" " * 10, *(f"{way.replace('_', ' '):^36}" for way in result["metrics"]))
    print(" " * 10, *(f"{'median' if n == 'median_rank' else n:>8}" for n in [*names] * 2))
    for row, ways in {"retriever": result["metrics"], **result["controls"]}.items():
        cells = [f"{ways[w][n]:8.{1 if n == 'median_rank' else 3}f}" for w in ways for n in names]
        print(f"{row:>10}", *cells)
    note(
        f"{counted(result['n']['clips'], 'clip')}, {counted(result['n']['texts'], 'distinct caption')};"
        f" written to {path}"
    )


def read_checkpoint(args):
    """Read --checkpoint. Returns its content and the folder for results.

    Raises UserError if it is not valid or was trained with other settings of the features.
    """
    saved = heads.read_retriever(args.checkpoint, "--checkpoint")
    wanted = saved["manifest"].settings
    if args.control == "still":
        wanted = heads.still(wanted)
    wanted.check_same(load_manifest(args.features).settings, f"the cache {args.features}")
    path = Path(args.checkpoint)
    folder = cli.output_folder(args.output or (path if path.is_dir() else path.parent), "--output")
    return saved, folder


def load_models(args, saved):
    """Return the tower of a checkpoint and its `TextModel`. Raises UserError if --lm is another one."""
    device, dtype = devices.resolve(args.device, args.dtype)
    name = args.lm or hub.recorded("name", saved["lm"], "--lm")
    model = text_vectors.TextModel(name, device, dtype)
    if model.fingerprint != saved["lm"]["fingerprint"]:
        raise UserError(
            f"--lm {name} has fingerprint {model.fingerprint}, but the retriever was trained with"
            f" {saved['lm']['name']} ({saved['lm']['fingerprint']})"
        )
    return heads.load_retriever(saved, device), model


def evaluate(args):
    """Score --checkpoint on --split or --lists."""
    saved, folder = read_checkpoint(args)
    source = args.features, args.annotations, args.limit, args.allow_missing
    if args.lists:
        pairs = Pairs.of_list(args.lists, with_features(args.split, *source))
    else:
        pairs = Pairs.of_labels(captioned(args.split, *source))
    tower, model = load_models(args, saved)
    vectors = text_vectors.of_texts(pairs.texts, model, folder)
    vectors = torch.from_numpy(vectors.astype(np.float32))
    read = reader(args, model.device)
    with shared_memory(saved["manifest"].settings, args.workers, scoring=args.micro_batch):
        report(args, scores_of(args, saved, tower, pairs, vectors, read), folder)


# ---- search ---------------------------------------------------------------------------------


def search(args):
    """Print the clips (and captions) of --split nearest to --text or --query. Returns the exit code."""
    paths = find_clips([args.query]) if args.query else []
    saved, folder = read_checkpoint(args)
    source = args.features, args.annotations, args.limit, args.allow_missing
    records = with_features(args.split, *source)
    if not records:
        raise UserError(f"no clip of split {args.split!r} has features")
    began = time.perf_counter()
    tower, model = load_models(args, saved)
    encoder = None
    if paths:
        encoder = VideoEncoder.from_manifest(saved["manifest"], model.device, args.encoder)
    clips, labels, texts = split_vectors(args, saved, tower, model, records, folder)
    if paths:
        index = (clips, records), (texts, labels)
        return search_by_clip(paths, encoder, tower, index, args.top, args.workers)
    [(_, vector)] = model.vectors([args.text])
    loaded = time.perf_counter()
    found = nearest(embed_texts(tower, vector)[0], clips, args.top)
    seconds = time.perf_counter() - loaded
    for n, score in found:
        print_clip([], score, records[n])
    many = counted(len(records), "clip")
    note(f"searched {many} in {1e3 * seconds:.1f} ms, after {loaded - began:.1f} s of loading")
    return DONE


def search_by_clip(paths, encoder, tower, index, top, workers):
    """Print the captions and clips nearest to each window of each file. Returns the exit code.

    index: (vectors of clips (n, W), their records), (vectors of captions (m, W), the captions).
    """
    ((clips, records), (texts, labels)), device = index, tower.log_scale.device
    answered = failed = 0
    for batch in windows.read(paths, encoder, windows.Windowing(workers=workers)):
        windows.note_damage(batch, paths)
        for w in batch:
            if w.error:
                note(str(w.error))
                failed += 1
                continue
            inputs = windows.features([w], device)
            with torch.inference_mode(), devices.autocast(device):
                query = tower.clips(**inputs)[0].cpu().numpy()  # (W,)
            head = [printable(to_utf8(paths[w.file]), keep="")]
            head += [] if w.alone else [f"{w.start:.1f}-{w.end:.1f}"]
            for n, score in nearest(query, texts, top):
                print(*head, "caption", f"{score:.3f}", labels[n], sep="\t")
            for n, score in nearest(query, clips, top):
                print_clip([*head, "clip"], score, records[n])
            w.frames = w.stored = None  # a long film has many windows
            answered += 1
    return DONE if not failed else PARTIAL if answered else FAILED


def print_clip(head, score, record):
    """Print a clip that was found: its score, id, file and label."""
    cells = f"{score:.3f}", record["id"], record["video"] or "", record["label"] or ""
    print(*head, *cells, sep="\t", flush=True)


def nearest(query, vectors, count):
    """Return [(index, dot product)] of the `count` vectors (n, W) nearest to a query (W,), best first."""
    scores = vectors @ query
    return [(int(n), float(scores[n])) for n in np.argsort(-scores, kind="stable")[:count]]


def split_vectors(args, saved, tower, model, records, folder):
    """Return the vectors of the clips (n, W), their distinct labels, and the vectors of the labels (m, W).

    The vectors are kept in vectors_<split>.npz. They are recomputed if the weights, clips, labels, or the
    files that the features were computed from have changed.
    """
    ids, labels = [r["id"] for r in records], [r["label"] for r in records]
    sources = source_numbers(recorded_sources(Path(args.features), (0, 1)), args.split, ids)
    key = json_digest([weights_digest(saved["weights"]), ids, labels, sources.tolist()])
    labels = list(dict.fromkeys(filter(None, labels)))

    def compute():
        read = reader(args, model.device)
        with shared_memory(saved["manifest"].settings, args.workers, searching=args.micro_batch):
            [clips] = embed_clips([tower], read(args.split, records), len(records))
        texts = np.zeros((0, clips.shape[1]), np.float32)
        if labels:
            vectors = text_vectors.of_texts(labels, model, folder).astype(np.float32)
            texts = embed_texts(tower, torch.from_numpy(vectors))
        return {"clips": clips, "texts": texts}

    first = f"_first{args.limit}" if args.limit else ""
    kept = text_vectors.kept(folder / f"vectors_{args.split}{first}.npz", key, compute)
    return kept["clips"], labels, kept["texts"]


if __name__ == "__main__":
    cli.run(main)
