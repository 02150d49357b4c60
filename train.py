"""Train a Q-Former on cached V-JEPA 2 features to caption videos with a frozen language model.

    python train.py               (trains on SSv2; add --dry-run to print the plan and time a few steps)
    python train.py --resume      (continues a stopped run exactly where it ended)
    python train.py --init results/ssv2 --annotations A --features F --output O
                                 (starts a run on other clips from the weights of a trained Q-Former)

    torchrun --nproc-per-node 4 train.py     (the same run on four GPUs, with the same clips per step)

Needs a GPU with 14 GB of memory. Writes to --output: last.pt and previous.pt (to resume from), best.pt
(highest validation CIDEr; with fewer than 50 validation clips, lowest loss), curves.png, metrics.jsonl,
validation_epoch_N.json, predictions_validation.json, evaluation_validation.json and args.json.
"""

import runtime.start

import math
import time
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from tqdm import tqdm

import captioner
import checkpoint
import metrics
from checkpoint import TrainingState
from dataset import (
    STYLES,
    TRAIN,
    VALIDATION,
    FeatureDataset,
    batches,
    by_hash,
    choose_captions,
    load_records,
    loader,
    sample_statistics,
    shared_memory,
)
from evaluate import BATCH as VALIDATION_BATCH
from evaluate import caption, clip_loader, score, to_device
from optim import (
    CLIPS_PER_STEP,
    average_and_clip,
    dropout_seed,
    epoch_order,
    lr_at,
    make_optimizer,
    set_lr,
    split_step,
)
from runtime import cli, dashboard, devices, distributed, hub, ranks, run_folder
from runtime.cli import note
from runtime.errors import FAILED, SIGNALLED, UserError
from runtime.feature_cache import (
    Manifest,
    load_manifest,
    recorded_sources,
    require_features,
)
from runtime.files import write_json
from runtime.names import counted, duration, file_size, first_few
from runtime.predictions import write_predictions
from runtime.run_folder import BEST, LAST, PREVIOUS
from viz import curves

TIMED_STEPS, WARM_UP_STEPS = 20, 2  # of --dry-run; warm-up steps also start the workers
FEW_STEPS = 500  # with fewer steps in a run, a note suggests other flags
SMALL_BATCH = 8  # clips per step that this note suggests
# with fewer validation clips, CIDEr is too uncertain, so best.pt is chosen by the loss
FEW_CLIPS = 50
SIZES = ("num_queries", "num_blocks", "num_heads")  # flags that must fit the weights of --init
FROM_INIT = (*SIZES, "dropout", "lm")  # flags whose default is that of the checkpoint of --init
MAX_BAD_STEPS = 5  # consecutive steps without a finite loss and gradient
SAMPLES = 20  # example captions in validation_epoch_N.json


@dataclass(frozen=True)
class Data:
    """The records of all clips with a label and features, and the folders they come from."""

    features: str
    annotations: str
    manifest: Manifest
    train: list
    validation: list
    subset: list  # the part of `validation` that is scored after each epoch
    missing: int  # validation clips without features, at most --allow-missing
    all_validation: list  # of the whole split; they set the document frequencies of CIDEr
    workers: int


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of optimisation and sampling."""

    epochs: int
    batch_size: int  # clips per micro-batch
    grad_accum: int  # micro-batches per step, summed over all processes
    captions_per_clip: int
    lr: float  # peak learning rate
    weight_decay: float
    warmup_steps: int
    clip_grad: float
    seed: int

    @classmethod
    def of(cls, args):
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def steps_per_epoch(self, clips):
        return math.ceil(clips / (self.batch_size * self.grad_accum))


def make_parser():
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--features", default=cli.FEATURES, help="feature cache written by preprocess_ssv2.py")
    add("--annotations", default=cli.ANNOTATIONS, help="folder written by prepare_annotations.py")
    add("--output", default="results/ssv2", help="run folder")
    add(
        "--allow-missing",
        type=cli.whole(0),
        default=0,
        help="maximum number of clips per split without features; they are skipped",
    )
    add = parser.add_argument_group("model").add_argument
    add("--lm", default=cli.LM, help="Hub id or folder of the frozen language model")
    add("--num-queries", type=cli.whole(1), default=64, help="number of queries, or soft prompts")
    add("--num-blocks", type=cli.whole(1), default=1, help="number of Q-Former blocks")
    add("--num-heads", type=cli.whole(1), default=4, help="attention heads of the Q-Former")
    add("--dropout", type=cli.number(least=0, below=1), default=0.1, help="dropout rate")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.whole(1), default=6, help="passes over the training clips")
    add(
        "--batch-size",
        type=cli.whole(1),
        help=f"clips per micro-batch (default: {CLIPS_PER_STEP} / --grad-accum)",
    )
    add(
        "--grad-accum",
        type=cli.whole(1),
        help=f"micro-batches per step, summed over all processes (default: {CLIPS_PER_STEP} / --batch-size; if"
        " neither flag is given, the number of processes, but at least 2)",
    )
    add("--captions-per-clip", type=cli.whole(1), default=2, help="captions per clip and epoch")
    add("--lr", type=cli.number(above=0), default=1e-4, help="peak learning rate")
    add("--weight-decay", type=cli.number(least=0), default=0.03, help="weight decay of AdamW")
    add("--warmup-steps", type=cli.whole(0), default=500, help="steps of linear warm-up")
    add("--clip-grad", type=cli.number(above=0), default=1.0, help="maximum norm of the gradient")
    add = parser.add_argument_group("run").add_argument
    add(
        "--eval-clips",
        type=cli.whole(1),
        default=2000,
        help="validation clips to score after each epoch",
    )
    add(
        "--no-meteor",
        action="store_true",
        help="skip METEOR in the final evaluation; it takes 10 s to start",
    )
    add("--save-every", type=cli.whole(1), default=500, help="steps between checkpoints")
    add(
        "--init",
        help="start a new run from the weights of this checkpoint ("
        + cli.CHECKPOINT_KINDS
        + "); the sizes of the Q-Former, --dropout and --lm then default to those of the checkpoint",
    )
    add("--resume", action="store_true", help="continue the run in --output")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--dry-run", action="store_true", help="print the plan, time a few steps and exit")
    add("--report-to", choices=dashboard.NAMES, default="none", help="dashboard to also log to")
    cli.add_common(parser)
    return parser


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.init and args.resume:
        parser.error("--init starts a new run and --resume continues one; leave one of them out")
    if args.init or args.resume:  # None for the flags that were not given, until `read_init`
        parser.set_defaults(**dict.fromkeys(FROM_INIT))
        args = parser.parse_args(argv)
    args.batch_size, args.grad_accum = split_step(
        args.batch_size, args.grad_accum, ranks.world_size()
    )
    return args


def main(argv=None):
    args = parse_args(argv)
    if ranks.world_size() > args.grad_accum:
        raise UserError(
            f"--grad-accum {args.grad_accum} leaves some of the {ranks.world_size()} processes without a"
            " micro-batch; increase it and decrease --batch-size by the same factor, or start fewer"
            " processes"
        )
    dashboard.check(args.report_to)
    folder = run_folder.check(args.output, args.resume, args.overwrite, args.dry_run)
    data = read_data(args)
    recipe = Recipe.of(args)
    source = read_init(args, folder, data)
    device, dtype = devices.resolve(args.device, args.dtype)
    print_plan(data, recipe)
    note_small_data(data, recipe, bool(args.init))
    args.dtype = str(dtype).removeprefix("torch.")  # --resume compares the actual dtype, not "auto"
    batch_sizes = {"training": recipe.batch_size, "validation": VALIDATION_BATCH}
    with (
        distributed.joined(devices.backend(device)),
        run_folder.locked(folder, args.resume, args.overwrite, args.dry_run),
        shared_memory(data.manifest.settings, data.workers, **batch_sizes),
    ):
        # a run that cannot be resumed is refused before the language model is loaded
        saved = newest(args, data, recipe, folder) if args.resume else None
        state = build(args, data, recipe, device, dtype)
        state.fixed |= {"init": checkpoint.origin(args.init, source)} if source else {}
        start_or_resume(state, data, recipe, folder, saved, source)
        lm = state.model.lm
        trainable, frozen = (
            sum(p.numel() for p in m.parameters()) for m in (state.model.qformer, lm)
        )
        note(f"parameters   {trainable:,} trained, {frozen:,} frozen in {lm.dtype}, {device}")
        if args.dry_run:
            return time_steps(state.model, data, recipe)
        total = recipe.epochs * recipe.steps_per_epoch(len(data.train))
        step = state.progress.step
        facts = {"clips": len(data.train), "trainable_parameters": trainable}
        facts["finished"] = step == total
        with (
            run_folder.recorded(folder, vars(args), args.overwrite, device, **facts),
            run_folder.Run(
                folder, step, total, dashboard.connect(args.report_to, folder, step, vars(args))
            ) as run,
        ):
            if not saved:
                run.save(state.last())  # from now on, a missing last.pt means that it was deleted
            train(state, data, recipe, run, args.save_every)
        if signal := run.stop_signal():
            note(run_folder.stopped_after(state.progress.step))
            return SIGNALLED + signal
        with run_folder.resumable(state.progress.step):
            return finish(state.model, data, recipe, folder, with_meteor=not args.no_meteor)


def train(state, data, recipe, run, save_every):
    """Run the training loop until the last step or a signal."""
    model, optimizer, progress = state.model, state.optimizer, state.progress
    steps_per_epoch = recipe.steps_per_epoch(len(data.train))
    model.train()
    # the run may have stopped between an epoch's last step and its evaluation, or have lost best.pt
    epoch_ended = progress.step > 0 and progress.step % steps_per_epoch == 0
    if epoch_ended and progress.step > progress.evaluated:
        end_epoch(state, data, recipe, run)
    for epoch, ids, micro_batches in training_steps(
        data, recipe, model.tokenizer, model.device, progress.step
    ):
        lr = lr_at(progress.step, recipe.epochs * steps_per_epoch, recipe.lr, recipe.warmup_steps)
        set_lr(optimizer, lr)

        # forward and backward; afterwards .grad is that of the loss summed over all processes
        seed = dropout_seed(recipe.seed, progress.step)
        loss, tokens, by_style = accumulate(model, micro_batches, seed)

        # average over the tokens of the step, clip, and update the weights if all values are finite
        grad_norm = average_and_clip(model.qformer, tokens, recipe.clip_grad)  # before clipping
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.bad_steps = 0 if finite else progress.bad_steps + 1

        waited = micro_batches.seconds_waiting
        _, memory = devices.peak_memory(model.device)
        run.log.step(
            progress.step, epoch, ids, loss, tokens, by_style, lr, grad_norm, waited, memory
        )
        if progress.bad_steps == MAX_BAD_STEPS:
            raise not_finite_error()

        # save; at the end of an epoch also evaluate, and keep the best checkpoint
        run.writer.raise_if_failed()
        stop = run.stop_signal()
        epoch_ended = progress.step % steps_per_epoch == 0
        if epoch_ended or stop or progress.step % save_every == 0:
            run.save(state.last())
        if stop:
            break  # if an epoch has just ended, the resumed run evaluates it
        if epoch_ended:
            end_epoch(state, data, recipe, run)


def end_epoch(state, data, recipe, run):
    """Evaluate on the validation subset, and write best.pt if the score is the best so far."""
    progress = state.progress
    with run.evaluating(progress.step):
        result, predictions, loss = validate(state.model, data, recipe, data.subset)
    samples = [
        {"id": r["id"], "reference": r["label"], "prediction": predictions[r["id"]]}
        for r in data.subset[:SAMPLES]
    ]
    epoch = progress.step // recipe.steps_per_epoch(len(data.train))
    run.log.evaluation(progress.step, epoch, loss, result, samples)
    few_clips = len(data.subset) < FEW_CLIPS  # `note_small_data` has printed a note
    no_cider = result.get("controls", {}).get("ceiling", {}).get("CIDEr") == 0
    if no_cider and not few_clips and not progress.evaluated:
        note(f"note: {metrics.ALL_ZERO}; the validation loss chooses {BEST}")
    if not ranks.rank():
        curves.update(run.folder)
    # the highest CIDEr is the best; between equal ones, without CIDEr or with few clips, the lowest loss
    loss = math.inf if loss is None else loss
    value = result["metrics"].get("CIDEr", -loss)
    now, best = (value, -loss), (progress.best_score, -progress.best_loss)
    is_better = now[1] > best[1] if few_clips else now > best
    if is_better or not progress.evaluated:
        progress.best_score, progress.best_loss = value, loss
        run.save_best(state.best())
    progress.evaluated = progress.step
    run.save(state.last())  # again, so that --resume knows that this epoch is evaluated


def not_finite_error():
    return UserError(
        f"the loss or gradient was not finite in {MAX_BAD_STEPS} consecutive steps. These steps were"
        " skipped; their clips are listed above. Check the features with preprocess_ssv2.py --verify, or"
        " use a lower --lr.",
        code=FAILED,
    )


def read_init(args, folder, data):
    """Read the checkpoint of --init, or return None. Sets those flags FROM_INIT that are None to its values.

    Without --init, they are set to the defaults. If a run with --init is resumed, they are set to those in
    its args.json; the checkpoint is then read only if the run was stopped before it saved one of its own.
    Raises UserError if the checkpoint does not fit the features, the flags or the language model.
    """
    if args.resume:
        started = run_folder.read_args(folder).get("args", {})
        args.init = started.get("init")
        if args.init and any((folder / name).exists() for name in (LAST, PREVIOUS)):
            adopt_flags(args, started)
            return None
    if not args.init:
        for name in FROM_INIT:
            if getattr(args, name) is None:
                setattr(args, name, make_parser().get_default(name))
        return None
    source = checkpoint.read_checkpoint(args.init, "--init")
    features = f"--init {args.init} was trained on other features: the cache {data.features}"
    source["manifest"].settings.check_same(data.manifest.settings, features)
    lm = source["lm"]["name"] if args.lm else hub.recorded("name", source["lm"], "--lm")
    adopt_flags(args, source["sizes"] | {"lm": lm})
    checkpoint.check_frozen(source, args.lm, hub.fingerprint(hub.find_model(args.lm, "--lm")))
    return source


def adopt_flags(args, values):
    """Set the flags FROM_INIT that are None to `values`. Raises UserError for other sizes."""
    for name in FROM_INIT:
        given = getattr(args, name)
        if given is None:
            setattr(args, name, values[name])
        elif name in SIZES and given != values[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {given} does not fit --init {args.init}, which has {values[name]}; leave {flag} out"
            )


def build(args, data, recipe, device, dtype):
    """Build a new model and return its `TrainingState`."""
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
    templates = sorted({r["template"] for r in data.train} - {None})
    styles = ["label", "sentence"] if any(r["paraphrases"] for r in data.train) else ["label"]
    return TrainingState(
        model,
        make_optimizer(model.qformer, recipe.lr, recipe.weight_decay),
        fixed=checkpoint.fixed_state(
            model, data.manifest, args.lm, lm_fingerprint, templates, styles
        ),
        identity=identity_of(args, data),
    )


def identity_of(args, data):
    """Return what must match to resume a run, see `checkpoint.run_identity`."""
    return checkpoint.run_identity(
        vars(args),
        data.train,
        (data.subset, data.all_validation),
        recorded_sources(Path(data.features), (0, 1)),
    )


def newest(args, data, recipe, folder):
    """Return the newest checkpoint of the run, or None. Raises UserError if flags or clips have changed."""
    saved = checkpoint.read_newest(folder, args.dry_run)
    if saved:
        total = recipe.epochs * recipe.steps_per_epoch(len(data.train))
        identity = identity_of(args, data)
        saved = checkpoint.check_run(saved, identity, data.manifest, args.lm, folder, total)
        note(f"resuming after step {saved['step']:,} of {total:,}")
    return saved


def start_or_resume(state, data, recipe, folder, saved, source=None):
    """Load `saved`, the newest checkpoint of the run, or start a new run if it is None.

    A new run starts from the weights of `source`, the checkpoint of --init, or from random weights. It
    uses the feature statistics of its own clips: if these look different from those of the checkpoint,
    the loss may be lower even before training (results/warm_statistics.md).
    """
    if saved:
        checkpoint.resume(state, saved, folder)
    else:
        if source:
            checkpoint.load_weights(state.model.qformer, source["qformer"])
            note(
                f"starting from {state.fixed['init']['name']}, trained for {source['step']:,} steps"
            )
        if ranks.rank() == 0:
            state.model.qformer.standardise(*statistics(data, recipe.seed))
    distributed.broadcast(state.model.qformer.state_dict().values())


def read_data(args):
    """Read the `Data` of a run.

    Raises UserError if the annotations or features are missing, or too few clips have both.
    """

    def labelled(split):
        every = load_records(args.annotations, split)
        records = [r for r in every[: args.limit] if r["label"]]
        if not records:
            raise UserError(f"split {split!r} in {args.annotations} has no captions")
        if split == VALIDATION and len(records) < 2:
            raise UserError(f"split {split!r} needs at least two captioned clips to compute CIDEr")
        usable = require_features(args.features, split, records, args.allow_missing)
        if len(usable) < (2 if split == VALIDATION else 1):
            raise UserError(
                f"split {split!r} has too few clips with features: {len(usable)} of {len(records)}"
            )
        return [r for r in every if r["label"]], usable, len(records) - len(usable)

    manifest = load_manifest(args.features)
    all_train, train, _ = labelled(TRAIN)
    all_validation, validation, missing = labelled(VALIDATION)
    if both := sorted({r["id"] for r in all_train} & {r["id"] for r in all_validation}):
        raise UserError(
            f"{counted(len(both), 'clip is', 'clips are')} in both {TRAIN}.json and {VALIDATION}.json in"
            f" {args.annotations}: {first_few(both)}. One of the files may be of an earlier run of"
            " prepare_annotations.py; run it again with another --output."
        )
    chosen = set(by_hash((r["id"] for r in validation), args.seed)[: args.eval_clips])
    subset = [r for r in validation if r["id"] in chosen]
    return Data(
        features=args.features,
        annotations=args.annotations,
        manifest=manifest,
        train=train,
        validation=validation,
        subset=subset,
        missing=missing,
        all_validation=all_validation,
        workers=args.workers,
    )


def statistics(data, seed):
    """Compute the mean and standard deviation (E,) per channel over a sample of the training clips."""
    return sample_statistics(data.features, data.train, data.manifest.settings, seed, data.workers)


def split_into(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def training_steps(data, recipe, tokenizer, device, step):
    """Yield (epoch from 0, clip ids, micro-batches) for each step, starting at `step`.

    If there are several processes, each gets a share of the micro-batches, while the ids are those of
    the whole step. The last step of an epoch contains the remaining clips and may be shorter.

    The micro-batches of a step are a `TimedIterator`, which must be exhausted before the next step.
    They are read one at a time because a batch from a worker keeps one file descriptor open per tensor,
    and 256 batches would exceed the limit of a process.
    """
    first, done = divmod(step, recipe.steps_per_epoch(len(data.train)))
    for epoch in range(first, recipe.epochs):
        order = epoch_order(data.train, recipe.seed, epoch)
        steps = split_into(split_into(order, recipe.batch_size), recipe.grad_accum)[done:]
        # the records of this process, in order
        share = [r for step in steps for batch in ranks.share(step) for r in batch]
        choose = partial(
            choose_captions, count=recipe.captions_per_clip, seed=recipe.seed, epoch=epoch
        )
        settings = data.manifest.settings
        dataset = FeatureDataset(data.features, TRAIN, share, settings, tokenizer, choose)
        reader = batches(loader(dataset, recipe.batch_size, data.workers, device))
        for micro_batches in steps:
            ids = [r["id"] for m in micro_batches for r in m]
            yield epoch, ids, TimedIterator(islice(reader, len(ranks.share(micro_batches))))
        done = 0


class TimedIterator:
    """An iterator that measures the time spent waiting for items, in `seconds_waiting`.

    A GPU may be computing in the meantime, so this is an upper bound on the time lost.
    """

    def __init__(self, items):
        self.items, self.seconds_waiting = items, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds_waiting += time.perf_counter() - began


def accumulate(model, micro_batches, seed=0):
    """Run forward and backward for each micro-batch of a step, and sum over micro-batches and processes.

    Sums the gradients into .grad. Returns the summed loss, the number of tokens, and the mean loss per
    token of each style, {style: float}. Gradients are all-reduced once per step. This is like
    DistributedDataParallel with `no_sync`, except that gradients are summed and not averaged, and that a
    process without a micro-batch in a short step contributes zeros. An earlier all-reduce would not
    overlap with any computation, because the backward pass reaches the Q-Former last.
    """
    # sums over the tokens of each style
    losses, tokens = torch.zeros(2, len(STYLES), dtype=torch.float64, device=model.device)
    has_loss = False
    for n, batch in enumerate(micro_batches):
        torch.manual_seed(seed + ranks.rank() + n * ranks.world_size())
        b = to_device(batch, model.device)
        cache = model.prefix(b["features"], b["scale"], b["offset"])
        loss = model.loss(cache, b)  # (M,)
        loss.sum().backward()
        of_style = F.one_hot(b["styles"], len(STYLES)).double()  # (M, styles)
        losses += loss.detach().double() @ of_style
        tokens += of_style.sum(0)
        has_loss = True
    for name, p in model.qformer.named_parameters():
        if p.grad is None:
            # only a process without a micro-batch in this step may lack gradients
            assert not has_loss, f"the loss has no gradient for {name}"
            p.grad = torch.zeros_like(p)
    distributed.all_reduce(p.grad for p in model.qformer.parameters())
    # apart from the gradient norm, this is the only place where a step waits for the GPU
    sums = distributed.sums(*losses.tolist(), *tokens.tolist())
    losses, tokens = sums[: len(STYLES)], sums[len(STYLES) :]
    means = {s: a / n for s, a, n in zip(STYLES, losses, tokens, strict=True) if n}
    return sum(losses), int(sum(tokens)), means


def validate(model, data, recipe, records, with_meteor=False):
    """Caption validation clips in label style. Returns (result, {id: caption}, loss per token).

    Each process captions its share of the clips. Only rank 0 computes scores.
    """
    predictions, loss = caption(model, validation_loader(model, data, records), "label")
    predictions = {r["id"]: predictions[r["id"]] for r in records}
    if ranks.rank():
        return {"metrics": {}}, predictions, loss
    result, _ = score(
        predictions,
        records,
        data.all_validation,
        data.annotations,
        seed=recipe.seed,
        with_meteor=with_meteor,
    )
    return result, predictions, loss


def validation_loader(model, data, records):
    """Make a loader over this process's share of the clips, with the batch size of evaluate.py."""
    source = data.features, data.manifest.settings
    return clip_loader(model, *source, VALIDATION, records, "label", VALIDATION_BATCH, data.workers)


def finish(model, data, recipe, folder, with_meteor):
    """Evaluate the best checkpoint on all validation clips and write the results."""
    distributed.all_gather(None)  # wait until rank 0 has written best.pt
    best = checkpoint.read_checkpoint(folder / BEST)
    model.qformer.load_state_dict(best["qformer"])
    result, predictions, loss = validate(model, data, recipe, data.validation, with_meteor)
    if ranks.rank():
        return
    write_predictions(folder / "predictions_validation.json", predictions)
    settings = {"split": VALIDATION, "style": "label", "step": best["step"], "loss": loss}
    settings["weights"] = checkpoint.weights_digest(best["qformer"])
    settings["missing"] = data.missing
    result |= {"checkpoint": str(folder / BEST), "settings": settings}
    write_json(folder / "evaluation_validation.json", result)
    print(metrics.format_table(result))
    note(f"best checkpoint: {folder / BEST} (step {best['step']:,})")


def print_plan(data, recipe):
    """Print the sizes of the data and the run."""
    settings, k = data.manifest.settings, recipe.captions_per_clip
    paraphrases = sum(len(r["paraphrases"]) for r in data.train)
    per_epoch = sum(min(k, 1 + len(r["paraphrases"])) for r in data.train)
    clips, step = len(data.train), recipe.batch_size * recipe.grad_accum
    in_step = (
        counted(step, "clip") if step <= clips else f"up to {step:,} clips (there are {clips:,})"
    )
    steps = recipe.epochs * recipe.steps_per_epoch(clips)
    note(
        f"clips        {clips:,} training, {len(data.validation):,} validation"
        f" ({len(data.subset):,} scored each epoch)\n"
        f"captions     {counted(clips, 'label')}, {counted(paraphrases, 'paraphrase')},"
        f" {per_epoch / clips:.3g} per clip and epoch"
        f"{'' if paraphrases else ', so --style sentence is not trained'}\n"
        f"step         {recipe.batch_size} x {recipe.grad_accum} = {in_step},"
        f" {counted(steps, 'step')} in {counted(recipe.epochs, 'epoch')}\n"
        f"features     {settings.num_tokens} x {settings.width} {settings.store},"
        f" {file_size(settings.clip_bytes * (clips + len(data.validation)))}"
    )


def note_small_data(data, recipe, warm):
    """Print a note if there are few steps or few validation clips. warm: whether --init is used."""
    clips, steps = len(data.train), recipe.epochs * recipe.steps_per_epoch(len(data.train))
    if steps < FEW_STEPS:
        processes = ranks.world_size()  # each needs a micro-batch
        batch = max(1, min(SMALL_BATCH, recipe.batch_size * recipe.grad_accum) // processes)
        epochs = math.ceil(FEW_STEPS / math.ceil(clips / (batch * processes)))
        flags = f"--batch-size {batch} --grad-accum {processes} --epochs {epochs} --warmup-steps 50"
        init = "" if warm else ", and --init CHECKPOINT if you have a trained one"
        note(
            f"note: {counted(steps, 'step')} may be too few to learn; for {FEW_STEPS}, use {flags}{init}"
        )
    if len(data.subset) < FEW_CLIPS:
        scored = counted(len(data.subset), "validation clip is", "validation clips are")
        note(f"note: only {scored} scored, so the validation loss chooses {BEST}")


def time_steps(model, data, recipe):
    """Time a few steps and a validation batch for --dry-run, without updating weights or writing files."""
    model.train()
    total = recipe.epochs * recipe.steps_per_epoch(len(data.train))
    computing, waiting = [], []
    began = time.perf_counter()
    with closing(training_steps(data, recipe, model.tokenizer, model.device, 0)) as steps:
        timed = min(total, TIMED_STEPS)
        for *_, micro_batches in tqdm(
            islice(steps, timed), "timing", timed, leave=False, unit="step"
        ):
            accumulate(model, micro_batches)
            model.qformer.zero_grad()
            seconds, began = time.perf_counter() - began, time.perf_counter()
            computing.append(seconds - micro_batches.seconds_waiting)
            waiting.append(micro_batches.seconds_waiting)
    if timed > WARM_UP_STEPS:
        computing, waiting = computing[WARM_UP_STEPS:], waiting[WARM_UP_STEPS:]
    # Workers deliver batches in bursts, so only a few steps wait. A median would ignore them.
    wait = fmean(waiting)
    step = median(computing) + wait
    print(
        f"estimated time {duration(step * total)}: {counted(total, 'step')} of {step:.2f} s,"
        f" {100 * wait / step:.0f} % of it waiting for data"
    )
    clips = data.subset[: VALIDATION_BATCH * ranks.world_size()]
    began = time.perf_counter()
    caption(model, validation_loader(model, data, clips), "label")
    seconds = time.perf_counter() - began
    print(f"validation     {seconds:.1f} s per batch of {counted(len(ranks.share(clips)), 'clip')}")
    if devices.on_gpu(model.device):
        # training also has the two moments of AdamW, in float32
        adam = 8 * sum(p.numel() for p in model.qformer.parameters())
        used, reserved = (file_size(n + adam) for n in devices.peak_memory(model.device))
        print(f"GPU memory     {used} peak, {reserved} reserved by torch")


if __name__ == "__main__":
    cli.run(main)
