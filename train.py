"""Teach a frozen language model to caption videos: train a Q-Former on cached features.

    python train.py               (SSv2 with its defaults; --dry-run prints the plan and stops)
    python train.py --resume      (continues exactly where a run was stopped)

    torchrun --nproc-per-node 4 train.py     (the same run on four GPUs: the same clips a step)

Needs a GPU with 14 GB. Writes <output>/: last.pt and the previous one, best.pt (best
validation CIDEr), curves.png, metrics.csv, metrics.jsonl, losses.txt, validation_epoch_N.json,
predictions_validation.json, evaluation_validation.json, args.json.
"""

import runtime.start

import hashlib
import math
import random
import time
from collections import namedtuple
from contextlib import closing
from functools import partial
from itertools import islice
from statistics import fmean, median

from dataset import (
    TRAIN,
    VALIDATION,
    FeatureDataset,
    batches,
    by_hash,
    channel_statistics,
    choose_captions,
    clip_bytes,
    load_manifest,
    load_records,
    loader,
    require_features,
    shared_memory,
)
from evaluate import BATCH as VALIDATION_BATCH
from evaluate import caption, clip_batches, score, to_device, write_predictions
from runtime import cli, dashboard, devices, distributed, errors, ranks, run_folder
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import write_json

STATISTICS_CLIPS = 1000  # for the channels' mean and standard deviation
TIMED_STEPS, WARM_UP_STEPS = 20, 2  # of --dry-run; the first steps also start workers
STEP = 64  # clips per step, unless both --batch-size and --grad-accum are given
BAD_STEPS = 5  # steps in a row without a finite loss and gradient that end a run

# manifest of the features; records to train on, to validate on at the end, and after each epoch;
# `split`: all validation records, whose references give CIDEr its document frequencies
Data = namedtuple("Data", "manifest train validation subset split")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--features", default=cli.FEATURES, help="cache of preprocess_ssv2.py")
    group.add_argument("--annotations", default=cli.ANNOTATIONS, help="of prepare_annotations.py")
    group.add_argument("--output", default="results/ssv2", help="run folder")
    group.add_argument(
        "--allow-missing", type=cli.whole(0), default=0, help="clips that may lack features"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--lm", default=cli.LM, help="Hub id or folder of a causal LM")
    group.add_argument("--num-queries", type=cli.whole(1), default=64, help="soft prompts")
    group.add_argument("--num-blocks", type=cli.whole(1), default=1, help="Q-Former blocks")
    group.add_argument("--num-heads", type=cli.whole(1), default=4, help="attention heads")
    group.add_argument("--dropout", type=cli.number(least=0, below=1), default=0.1, help="dropout")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=cli.whole(1), default=6, help="passes over the clips")
    group.add_argument(
        "--batch-size",
        type=cli.whole(1),
        help=f"clips per micro-batch (default: {STEP} / --grad-accum)",
    )
    group.add_argument(
        "--grad-accum",
        type=cli.whole(1),
        help=f"micro-batches per step, over all processes (default: {STEP} / --batch-size; with neither"
        " flag, the number of processes, but at least 2)",
    )
    group.add_argument("--captions-per-clip", type=cli.whole(1), default=2, help="per pass")
    group.add_argument("--lr", type=cli.number(above=0), default=5e-5, help="peak learning rate")
    group.add_argument("--weight-decay", type=cli.number(least=0), default=0.03, help="of AdamW")
    group.add_argument("--warmup-steps", type=cli.whole(0), default=500, help="linear warm-up")
    group.add_argument("--clip-grad", type=cli.number(above=0), default=1.0, help="gradient norm")
    group = parser.add_argument_group("run")
    group.add_argument("--eval-clips", type=cli.whole(1), default=2000, help="scored each epoch")
    group.add_argument(
        "--no-meteor",
        action="store_true",
        help="leave METEOR out at the end: it needs 10 s to start",
    )
    group.add_argument("--save-every", type=cli.whole(1), default=500, help="steps between saves")
    group.add_argument("--resume", action="store_true", help="continue the run in --output")
    group.add_argument("--overwrite", action="store_true", help="start over in --output")
    group.add_argument("--dry-run", action="store_true", help="print the plan, time a few steps")
    group.add_argument("--export", help="only write best.pt of --output to this folder, to share")
    group.add_argument(
        "--report-to", choices=dashboard.NAMES, default="none", help="a dashboard to log to as well"
    )
    cli.add_common(parser)
    args = parser.parse_args(argv)
    args.batch_size, args.grad_accum = split_step(
        args.batch_size, args.grad_accum, ranks.world_size()
    )
    return args


def split_step(batch_size, grad_accum, processes):
    """Fill in what is None of (clips per micro-batch, micro-batches per step) for a step of 64 clips.

    If both are None, each process gets one micro-batch, and a single one gets two: 32 clips at once need
    14 GB on a GPU, 64 need 23. Raises UserError if the numbers do not divide 64.
    """
    if batch_size and grad_accum:
        return batch_size, grad_accum
    if batch_size:
        if STEP % batch_size:
            raise UserError(
                f"--batch-size {batch_size} does not divide {STEP} clips per step: give --grad-accum too"
            )
        return batch_size, STEP // batch_size
    count = grad_accum or max(2, processes)
    if STEP % count == 0:
        return STEP // count, count
    if grad_accum:
        raise UserError(
            f"--grad-accum {grad_accum} does not divide {STEP} clips per step: give --batch-size too"
        )
    raise UserError(
        f"{STEP} clips per step cannot be shared equally by {processes} processes: give --batch-size and"
        " --grad-accum"
    )


def main(argv=None):
    args = parse_args(argv)
    if args.export is not None:
        from tools import export

        return print(*export.export(args.output, args.export), sep="\n")
    if ranks.world_size() > args.grad_accum:
        raise UserError(
            f"--grad-accum {args.grad_accum} deals no micro-batch to some of {ranks.world_size()} processes:"
            " raise it and lower --batch-size (the same step), or start fewer"
        )
    dashboard.check(args.report_to)
    folder = run_folder.claim(args)
    data = read_data(args)
    device, dtype = devices.resolve(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")  # resolved, for --resume to compare
    model, frozen, optimizer = build(args, data, device, dtype)  # before the folder is claimed
    sizes = {"training": args.batch_size, "validation": VALIDATION_BATCH}
    memory = shared_memory(data.manifest["settings"], args.workers, **sizes)
    with distributed.joined(devices.backend(device)), run_folder.held(folder, args), memory:
        return learn(args, data, folder, model, frozen, optimizer)


def learn(args, data, folder, model, frozen, optimizer):
    """From the first step, or the last saved one, to the scores. Returns the exit code."""
    per_epoch = math.ceil(len(data.train) / (args.batch_size * args.grad_accum))
    total = args.epochs * per_epoch

    # scored: the step of the last evaluation whose best is kept; bad: steps skipped in a row
    step, scored, bad, best = 0, 0, 0, -math.inf
    ours = run_folder.identity(args, data.train)
    saved = run_folder.newest(folder, args.dry_run) if args.resume else None
    if saved:
        step, scored, bad, best = run_folder.restore(
            saved, frozen, ours, args, total, model, optimizer
        )
        note(f"resuming after step {step:,} of {total:,}")
    elif ranks.rank() == 0:
        model.qformer.standardise(*statistics(args, data))
    distributed.broadcast(model.qformer.state_dict().values())
    print_plan(args, data, model, total)
    if args.dry_run:
        return time_steps(args, data, model, total)

    told = dashboard.Reporter("none" if ranks.rank() else args.report_to, folder, step, vars(args))
    trainable = sum(p.numel() for p in model.qformer.parameters())
    run_folder.start(
        folder, args, model.device, clips=len(data.train), trainable_parameters=trainable
    )
    stop = run_folder.Stop()
    model.train()

    def state():
        return frozen | {"qformer": model.qformer.state_dict(), "step": step, "best": best}

    def save():
        log.sync()
        counts = {"scored": scored, "bad": bad, "optimizer": optimizer.state_dict()}
        disk.write(folder / "last.pt", state() | ours | counts)

    def end_epoch():
        """Evaluate, and keep the best. All is saved: a signal ends this at once."""
        nonlocal best, scored
        disk.wait()
        stop.saved = True
        if stop.signal:
            raise errors.Stopped(stop.signal)
        epoch = step // per_epoch
        result, predictions, val_loss = evaluate(args, data, model, data.subset)
        stop.saved = False
        log.epoch(step, epoch, val_loss, result, predictions, data.subset)
        # without CIDEr, the loss decides
        quality = result["metrics"].get("CIDEr", -math.inf if val_loss is None else -val_loss)
        if quality > best or not scored:
            best = quality
            disk.write(folder / "best.pt", state())
        scored = step
        save()

    with run_folder.Log(folder, step, total, told) as log, run_folder.Writer() as disk:
        if not saved:
            save()  # from here on a folder without last.pt has lost it
        elif step % per_epoch == 0 and step > scored:
            end_epoch()  # it was left for a signal, or its best.pt is lost
        for epoch, ids, window in windows(args, data, model.tokenizer, model.device, step):
            lr = lr_at(step, total, args.lr, args.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, tokens = micro_steps(model, window, dropout_seed(args.seed, step))
            norm = scale_and_clip(model.qformer, tokens, args.clip_grad)
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            log.step(step, epoch, lr, loss, norm, tokens, ids, window.seconds)
            bad = 0 if finite else bad + 1
            if bad == BAD_STEPS:
                raise not_finite(folder)
            disk.check()
            stopping = distributed.maximum(stop.signal)
            if step % per_epoch == 0 or step % args.save_every == 0 or stopping:
                save()
            if stopping:
                break
            if step % per_epoch == 0:
                end_epoch()
    stop.restore()  # all is saved: from here a signal ends the script as usual
    if stopping := distributed.maximum(stop.signal):
        note(f"stopped after step {step:,}; continue with --resume")
        return errors.SIGNALLED + stopping
    return finish(args, data, model, folder)


def not_finite(folder):
    return UserError(
        f"{BAD_STEPS} steps in a row had no finite loss and gradient (their clips are in"
        f" {folder / 'metrics.jsonl'}); they changed nothing in last.pt. Try a lower --lr, and"
        " preprocess_ssv2.py --verify.",
        code=1,
    )


def build(args, data, device, dtype):
    """A new model, what its checkpoints hold whatever it learns, and its optimizer."""
    import torch

    import captioner

    torch.manual_seed(args.seed)
    model, lm_fingerprint = captioner.build(
        data.manifest,
        args.lm,
        device,
        dtype,
        captions=(text for r in data.train for text in (r["label"], *r["paraphrases"])),
        num_queries=args.num_queries,
        num_blocks=args.num_blocks,
        num_heads=args.num_heads,
        dropout=args.dropout,
    )
    frozen = captioner.model_state(model, data.manifest, args.lm, lm_fingerprint)
    frozen["templates"] = sorted({r["template"] for r in data.train} - {None})
    return model, frozen, make_optimizer(model.qformer, args.lr, args.weight_decay)


def read_data(args):
    """The manifest and the records that have a label and features. Raises UserError."""

    def labelled(split):
        records = [r for r in load_records(args.annotations, split)[: args.limit] if r["label"]]
        if not records:
            raise UserError(f"split {split!r} in {args.annotations} has no captions")
        if split == VALIDATION and len(records) < 2:
            raise UserError(f"split {split!r} needs two captioned clips: CIDEr compares clips")
        there = require_features(args.features, split, records, args.allow_missing)
        if len(there) < (2 if split == VALIDATION else 1):
            raise UserError(f"split {split!r}: {len(there)} of {len(records)} clips have features")
        return records, there

    manifest = load_manifest(args.features)
    _, train = labelled(TRAIN)
    split, validation = labelled(VALIDATION)
    chosen = set(by_hash((r["id"] for r in validation), args.seed)[: args.eval_clips])
    return Data(manifest, train, validation, [r for r in validation if r["id"] in chosen], split)


def statistics(args, data):
    """Per-channel mean and standard deviation of a seeded sample of the training clips."""
    ids = by_hash((r["id"] for r in data.train), args.seed)[:STATISTICS_CLIPS]
    return channel_statistics(args.features, TRAIN, ids, data.manifest["settings"], args.workers)


def lr_at(step, total, peak, warmup):
    """Linear warm-up, then a cosine to zero: a pure function of the step, from 0."""
    warmup = min(warmup, total // 2)  # a short run still reaches its peak
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def epoch_order(records, seed, epoch):
    """The clips in the order of one epoch: a pure function of (seed, epoch, ids)."""
    records = list(records)
    random.Random(f"order:{seed}:{epoch}").shuffle(records)
    return records


def make_optimizer(qformer, lr, weight_decay):
    """AdamW, fused into one kernel on a GPU."""
    import torch

    groups = parameter_groups(qformer, weight_decay)
    return torch.optim.AdamW(groups, lr, fused=devices.on_gpu(qformer.queries.device))


def parameter_groups(qformer, weight_decay):
    """Weight decay on the weights of Linear layers only: not on biases, norms, tables and gain."""
    import torch

    linear = [m.weight for m in qformer.modules() if isinstance(m, torch.nn.Linear)]
    known = {id(p) for p in linear}
    others = [p for p in qformer.parameters() if id(p) not in known]
    return [
        {"params": linear, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def in_groups(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def windows(args, data, tokenizer, device, step):
    """Yield (epoch from 0, clip ids, micro-batches) of each step, from `step` to the last.

    Of several processes each reads its share of the micro-batches; the ids are the whole step's. The
    last window of an epoch is as short as the clips that are left.

    The micro-batches of a step are an iterator, which must be exhausted before the next step. They are
    read one at a time: a batch from a worker holds one file descriptor per tensor, and 256 batches
    exceed the limit of a process.
    """
    start, done = divmod(step, math.ceil(len(data.train) / (args.batch_size * args.grad_accum)))
    for epoch in range(start, args.epochs):
        order = epoch_order(data.train, args.seed, epoch)
        steps = in_groups(in_groups(order, args.batch_size), args.grad_accum)[done:]
        ours = [r for micro_batches in steps for m in ranks.share(micro_batches) for r in m]
        choose = partial(choose_captions, count=args.captions_per_clip, seed=args.seed, epoch=epoch)
        settings = data.manifest["settings"]
        dataset = FeatureDataset(args.features, TRAIN, ours, settings, tokenizer, choose)
        reader = batches(loader(dataset, args.batch_size, args.workers, device))
        for micro_batches in steps:
            ids = [r["id"] for m in micro_batches for r in m]
            yield epoch, ids, Timed(islice(reader, len(ranks.share(micro_batches))))
        done = 0


class Timed:
    """An iterator that adds up the `seconds` its user waits for items.

    A GPU may compute meanwhile, so this is an upper bound on the time lost.
    """

    def __init__(self, items):
        self.items, self.seconds = items, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began


def dropout_seed(seed, step):
    """Of the first micro-batch of a step; the others count on from it.

    A function of the micro-batch alone, so that neither a restart nor the number of processes
    changes a mask.
    """
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{step}".encode()).digest()[:7])


def micro_steps(model, window, seed=0):
    """Forward and backward of each micro-batch, on sums, and their sums over all processes.

    One exchange a step: what DistributedDataParallel does behind `no_sync`, but without dividing by
    the number of processes, and a process whose share of a short window is empty adds zero. The
    Q-Former's gradient is the last that a backward pass computes, so there is nothing with which an
    earlier exchange could overlap. Returns (summed loss, number of tokens).
    """
    import torch

    loss, tokens = torch.zeros((), device=model.device), 0
    for n, batch in enumerate(window):
        torch.manual_seed(seed + ranks.rank() + n * ranks.world_size())
        b = to_device(batch, model.device)
        cache = model.prefix(b["features"], b["scale"], b["offset"])
        total = model.loss(cache, b["input_ids"], b["positions"], b["targets"])
        total.backward()
        loss, tokens = loss + total.detach(), tokens + len(b["targets"])
    for name, p in model.qformer.named_parameters():
        if p.grad is None:
            assert not tokens, f"the loss has no gradient for {name}"
            p.grad = torch.zeros_like(p)
    distributed.all_reduce(p.grad for p in model.qformer.parameters())
    # the only wait for the GPU in a step, with the gradient's norm
    loss, tokens = distributed.sums(loss.item(), tokens)
    return loss, int(tokens)


def scale_and_clip(qformer, tokens, clip_grad):
    """Make the summed gradient that of the mean over a window's tokens, then clip its norm.

    Dividing once by the real count is exact however the tokens fall on micro-batches and however
    short the last window is. Returns the norm before clipping.
    """
    import torch

    torch._foreach_div_([p.grad for p in qformer.parameters()], tokens)
    return torch.nn.utils.clip_grad_norm_(qformer.parameters(), clip_grad).item()


def evaluate(args, data, model, records, with_meteor=False):
    """Caption validation clips in label style. Returns (result, {id: caption}, loss per token).

    Every process captions its share; rank 0 alone has scores.
    """
    predictions, loss = caption(model, validation_batches(args, model, records), "label")
    predictions = {r["id"]: predictions[r["id"]] for r in records}
    if ranks.rank():
        return {"metrics": {}}, predictions, loss
    result, _ = score(
        predictions,
        records,
        data.split,
        args.annotations,
        seed=args.seed,
        with_meteor=with_meteor,
    )
    return result, predictions, loss


def validation_batches(args, model, records):
    """This process's share of the validation clips, in batches of the same size as in evaluate.py."""
    return clip_batches(model, args, VALIDATION, records, "label", VALIDATION_BATCH)


def finish(args, data, model, folder):
    """Score the best checkpoint on all validation clips."""
    import captioner
    import metrics

    distributed.all_gather(None)  # rank 0 may still have been writing it
    best = captioner.read_checkpoint(folder / "best.pt")
    model.qformer.load_state_dict(best["qformer"])
    result, predictions, loss = evaluate(
        args, data, model, data.validation, with_meteor=not args.no_meteor
    )
    if ranks.rank():
        return
    write_predictions(folder / "predictions_validation.json", predictions)
    settings = {"split": VALIDATION, "style": "label", "step": best["step"], "loss": loss}
    settings["weights"] = captioner.weights_digest(best["qformer"])
    settings["missing"] = len(data.split) - len(data.validation)
    result |= {"checkpoint": str(folder / "best.pt"), "settings": settings}
    write_json(folder / "evaluation_validation.json", result)
    print(metrics.format_table(result))
    note(f"best checkpoint: {folder / 'best.pt'} (step {best['step']:,})")


def print_plan(args, data, model, total):
    """The derived facts, once."""
    settings, k = data.manifest["settings"], args.captions_per_clip
    trained = sum(p.numel() for p in model.qformer.parameters())
    frozen = sum(p.numel() for p in model.lm.parameters())
    tokens = math.prod(settings["grid"])
    paraphrases = sum(len(r["paraphrases"]) for r in data.train)
    note(
        f"parameters   {trained:,} trained, {frozen:,} frozen in {model.lm.dtype}, {model.device}\n"
        f"clips        {len(data.train):,} training, {len(data.validation):,} validation"
        f" ({len(data.subset):,} scored each epoch)\n"
        f"captions     {len(data.train):,} labels, {paraphrases:,} paraphrases,"
        f" {k} per clip and pass, {k * args.epochs} caption passes\n"
        f"step         {args.batch_size} x {args.grad_accum} x {k}"
        f" = {args.batch_size * args.grad_accum * k} captions, {total:,} steps in {args.epochs} epochs\n"
        f"features     {tokens} x {settings['width']} {settings['store']},"
        f" {clip_bytes(settings) * (len(data.train) + len(data.validation)) / 1e9:.1f} GB"
    )


def time_steps(args, data, model, total):
    """--dry-run: time a few steps and a validation batch without changing anything."""
    from tqdm import tqdm

    computing, waiting = [], []
    began = time.perf_counter()
    with closing(windows(args, data, model.tokenizer, model.device, 0)) as steps:
        count = min(total, TIMED_STEPS)
        for *_, window in tqdm(islice(steps, count), "timing", count, leave=False, unit="step"):
            micro_steps(model, window)
            model.qformer.zero_grad()
            seconds, began = time.perf_counter() - began, time.perf_counter()
            computing.append(seconds - window.seconds)
            waiting.append(window.seconds)
    if count > WARM_UP_STEPS:
        computing, waiting = computing[WARM_UP_STEPS:], waiting[WARM_UP_STEPS:]
    # several workers deliver batches in bursts: a median would miss the few steps that wait
    wait = fmean(waiting)
    step = median(computing) + wait
    print(
        f"estimated time {step * total / 3600:.2f} h: {total:,} steps of {step:.2f} s,"
        f" {100 * wait / step:.0f} % of it waiting for data"
    )
    clips = data.subset[: VALIDATION_BATCH * ranks.world_size()]
    began = time.perf_counter()
    caption(model, validation_batches(args, model, clips), "label")
    seconds = time.perf_counter() - began
    print(f"validation     {seconds:.1f} s for a batch of {len(ranks.share(clips))} clips")
    if devices.on_gpu(model.device):
        used, reserved = (count / 1e9 for count in devices.peak_memory(model.device))
        print(f"GPU memory     {used:.1f} GB at most, {reserved:.1f} GB with torch's own reserve")


if __name__ == "__main__":
    cli.run(main)
