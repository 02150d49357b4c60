"""Train a probe on cached features to recognise the action in a clip, and score it.

    python probe.py                                          (an attentive probe on SSv2's templates)
    python probe.py --evaluate results/probe --split validation
    python probe.py --published                              (V-JEPA 2's own SSv2 classifier)

The classes are the templates of the clips, or their actions if they have any; a clip can have
several actions. One head is trained for each combination of --lr and --weight-decay, all at the
same time, so the features are read once per epoch. The best head is chosen on a tenth of the
training clips, which are held out. Writes best.pt, last.pt, metrics.jsonl, args.json and
evaluation_<split>.json to --output.
"""

import runtime.start

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import heads
from checkpoint import json_digest
from dataset import (
    TRAIN,
    VALIDATION,
    by_hash,
    feature_batches,
    hold_out,
    sample_statistics,
    shared_memory,
    with_features,
)
from optim import dropout_seed, epoch_order, lr_at, parameter_groups
from runtime import cli, devices, published_head, ranks, run_folder
from runtime.charades import write_submission
from runtime.cli import note
from runtime.errors import FAILED, Stopped, UserError
from runtime.feature_cache import load_manifest
from runtime.files import json_line, write_json
from runtime.head_run import DIVERGED, HeadRun
from runtime.intervals import bootstrap
from runtime.names import counted, first_few
from runtime.run_log import truncate_log

CLIP_GRAD = 1.0
OUTPUT, OF_PUBLISHED = "results/probe", "results/published"
PUBLISHED = "facebook/vjepa2-vitl-fpc16-256-ssv2"
# flags that only matter for training
TRAINING = ("head", "on", "layers", "num_heads", "no_positions", "dropout", "epochs", "lr")
TRAINING += ("weight_decay", "warmup_steps", "resume", "overwrite")
# flags that a resumed run may change
MAY_CHANGE = {"output", "device", "workers", "resume", "overwrite", "features", "annotations"}
MAY_CHANGE |= {"split", "windows", "submission", "allow_missing"}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    cli.add_cached(add)
    text = (
        f"folder for the results (default: {OUTPUT}, the folder of --evaluate, or {OF_PUBLISHED})"
    )
    add("--output", help=text)
    text = "maximum number of clips per split without features; they are skipped"
    add("--allow-missing", type=cli.whole(0), default=0, help=text)
    add = parser.add_argument_group("head").add_argument
    add("--head", choices=heads.HEADS, default="attentive", help="type of the head")
    text = "input of the head: all tokens, their mean, a mean with one learned weight per token, or"
    text += " the CLS token (default: tokens for an attentive head, otherwise mean)"
    add("--on", choices=heads.INPUTS, help=text)
    text = "layers of an attentive head; all but the last are self-attention over the tokens"
    add("--layers", type=cli.whole(1), default=1, help=text)
    text = "number of attention heads of an attentive head"
    add("--num-heads", type=cli.whole(1), default=16, help=text)
    add("--no-positions", action="store_true", help="do not add position embeddings to the tokens")
    add("--dropout", type=cli.number(least=0, below=1), default=0.1, help="dropout rate")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.whole(1), default=20, help="passes over the training clips")
    add("--batch-size", type=cli.whole(1), default=64, help="clips per step")
    lr, decay = cli.number(above=0), cli.number(least=0)
    add("--lr", type=lr, nargs="+", default=[1e-3, 3e-4, 1e-4], help="peak learning rates to try")
    text = "weight decays of AdamW to try"
    add("--weight-decay", type=decay, nargs="+", default=[0.1, 0.01], help=text)
    add("--warmup-steps", type=cli.whole(0), default=500, help="steps of linear warm-up")
    add("--resume", action="store_true", help="continue the run in --output after its last epoch")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add = parser.add_argument_group("scoring").add_argument
    add("--evaluate", metavar="PATH", help="do not train; score this probe on --split")
    text = "do not train; score a published classifier (default: %(const)s) on --split. --features"
    text += " must be made with its encoder"
    add("--published", nargs="?", const=PUBLISHED, metavar="MODEL", help=text)
    add("--split", default=VALIDATION, help="split to score; it is not used to choose the head")
    text = "how to combine the scores of the windows of a video, if the classes are actions"
    add("--windows", choices=["max", "mean"], default="max", help=text)
    text = "still: --features was made with preprocess_ssv2.py --still"
    add("--control", choices=["none", "still"], default="none", help=text)
    text = "also write the scores in the format of the Charades challenge"
    add("--submission", metavar="FILE", help=text)
    cli.add_common(parser)
    args = parser.parse_args(argv)
    if args.evaluate or args.published:
        parser.refuse_given(args, TRAINING, "cannot be used with --evaluate or --published")
    args.on = args.on or ("tokens" if args.head == "attentive" else "mean")
    if (args.head == "attentive") != (args.on == "tokens"):
        parser.error("--head attentive and --on tokens can only be used together")
    if args.layers > 1 and args.head != "attentive":
        parser.error("--layers can only be used with --head attentive")
    if args.evaluate and args.published:
        parser.error("--evaluate and --published are mutually exclusive")
    if args.control != "none" and not args.evaluate:
        parser.error("--control needs --evaluate")
    if args.submission:
        cli.output_folder(Path(args.submission).parent, "--submission")
    run_folder.fill_paths(args, args.evaluate)
    return args


def main(argv=None):
    args = parse_args(argv)
    if ranks.world_size() > 1:
        raise UserError("probe.py runs in a single process; start it without torchrun")
    if args.evaluate or args.published:
        return evaluate(args)
    folder = run_folder.check(args.output or OUTPUT, args.resume, args.overwrite)
    manifest = load_manifest(args.features)
    source = args.features, args.annotations, args.limit, args.allow_missing
    train = with_features(TRAIN, *source)
    classes, multi = heads.class_names(train)
    train, held_out = hold_out(heads.annotated(train, multi), args.seed)
    if not train:
        raise UserError(
            "the training split needs at least two videos with classes, since one is held out"
        )
    records = to_score(args.split, multi, *source)
    settings = manifest.settings
    if args.on == "cls" and not settings.cls:
        raise UserError(f"--on cls: the encoder of the cache {args.features} has no CLS token")
    if args.head == "attentive" and settings.width % args.num_heads:
        raise UserError(f"--num-heads {args.num_heads} does not divide the width {settings.width}")
    device, _ = devices.resolve(args.device, args.dtype)
    read = partial(feature_batches, args.features, batch_size=args.batch_size)
    read = partial(read, workers=args.workers, device=device)
    with (
        run_folder.locked(folder, args.resume, args.overwrite),
        shared_memory(settings, args.workers, training=args.batch_size),
    ):
        state = State(args, manifest, train, classes, multi, device)
        resumed = args.resume and state.resume(folder)
        facts = {"clips": len(train), "finished": state.epoch == args.epochs}
        with run_folder.recorded(folder, vars(args), args.overwrite, device, **facts):
            if not resumed:
                state.save(folder)
            print_plan(args, state, train, held_out, records)
            try:
                fit(args, state, train, held_out, read, folder)
            except Stopped:
                if state.epoch:
                    note(f"stopped after epoch {state.epoch}; use --resume to continue")
                raise
        probe = heads.read_probe(folder, "--output")
        note_edge(probe["chosen"]["lr"], args.lr)
        head, controls = heads.load_probe(probe, device), {"shuffled_labels": state.heads[-1]}
        report(args, scores_of(args, probe, head, controls, records, read), folder)


def to_score(split, multi, *source):
    """Return the records of a split that have features and a class.

    source: the other arguments of `with_features`. Raises UserError if there are no such records.
    """
    records = with_features(split, *source)
    if not records:
        raise UserError(f"no clip of split {split!r} has features")
    records, what = heads.annotated(records, multi), "an action" if multi else "a template"
    if not any(heads.names_of(r, multi) for r in records):
        raise UserError(f"no clip of split {split!r} has {what}, so there is nothing to score")
    return records


# ---- training -------------------------------------------------------------------------------


class State(HeadRun):
    """The heads of a run, their optimizer and the facts that are saved with them.

    The last head is a control. It has the middle values of the grid and is trained on labels that are
    shuffled among the training clips. If it scores better than chance, there is a leak.
    """

    def __init__(self, args, manifest, train, classes, multi, device):
        """Make the heads of a new run."""
        settings, trained, groups = manifest.settings, [], []
        self.grid = list(itertools.product(args.lr, args.weight_decay))
        statistics = sample_statistics(args.features, train, settings, args.seed, args.workers)
        sizes = {"classes": len(classes), "video_width": settings.width, "grid": settings.grid}
        sizes |= {"kind": args.head, "on": args.on, "layers": args.layers, "dropout": args.dropout}
        sizes |= {"num_heads": args.num_heads, "positions": not args.no_positions}
        for lr, decay in [*self.grid, self.grid[len(self.grid) // 2]]:
            torch.manual_seed(args.seed)
            head = heads.Probe(**sizes)
            head.standardise(*statistics)
            trained.append(head.to(device))
            groups += [group | {"peak": lr} for group in parameter_groups(head, decay)]
        optimizer = torch.optim.AdamW(groups, fused=devices.on_gpu(device))
        wanted = heads.targets(train, classes, multi)
        counts = wanted.sum(0) if multi else np.bincount(wanted, minlength=len(classes))
        fixed = {
            "probe_version": heads.VERSION,
            "sizes": head.sizes,
            "classes": classes,
            "counts": [int(n) for n in counts],
            "multi": multi,
            "manifest": manifest.as_dict(),
        }
        flags = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
        labels = [[r["id"], heads.names_of(r, multi)] for r in train]
        identity = {"flags": flags, "train": labels}
        what = "training clips or their classes"
        super().__init__(trained, optimizer, fixed, identity, what)


def fit(args, state, train, held_out, read, folder):
    """Train all heads. Writes last.pt after each epoch, and best.pt if the best score improved.

    read: function (split, records) -> batches, see `dataset.feature_batches`.
    """
    device = next(state.heads[0].parameters()).device
    classes, multi = state.fixed["classes"], state.fixed["multi"]
    wanted = torch.as_tensor(heads.targets(train, classes, multi))
    row = {r["id"]: i for i, r in enumerate(train)}
    order = by_hash(row, f"shuffled labels:{args.seed}")
    shuffled = torch.tensor([row[i] for i in order])  # clip i gets the label of clip shuffled[i]
    steps = math.ceil(len(train) / args.batch_size)
    truncate_log(folder / "metrics.jsonl", state.epoch * steps)
    for epoch in range(state.epoch, args.epochs):
        records = epoch_order(train, args.seed, epoch)
        total = torch.zeros(len(state.heads), device=device)
        for head in state.heads:
            head.train()
        data = read(TRAIN, records)
        with tqdm(total=len(records), unit="clip", desc=f"epoch {epoch + 1}", leave=False) as bar:
            for step, batch in enumerate(data, epoch * steps):
                inputs = heads.head_inputs(batch, device)
                rows = torch.tensor([row[i] for i in batch["ids"]])
                for group in state.optimizer.param_groups:
                    group["lr"] = lr_at(step, steps * args.epochs, group["peak"], args.warmup_steps)

                # forward and backward of all heads; they share no parameter
                losses = []
                for head in state.heads:
                    torch.manual_seed(dropout_seed(args.seed, step))
                    labels = wanted[shuffled[rows] if head is state.heads[-1] else rows].to(device)
                    with devices.autocast(device):
                        losses.append(heads.loss(head(**inputs).float(), labels))
                sum(losses).backward()

                for head in state.heads:
                    nn.utils.clip_grad_norm_(head.parameters(), CLIP_GRAD)
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                total += torch.stack(losses).detach() * len(rows)
                bar.update(len(rows))

        # keep the head and epoch with the best score on the held-out clips or, if scores are equal,
        # the smallest loss; the control is left out
        found = heads.predict(state.heads[:-1], read(TRAIN, held_out), device)
        values = [quality(state, held_out, logits) for logits in found]
        best = values.index(max(values))
        if max(values[best], state.best) == DIVERGED:
            raise UserError(
                "the training of all heads has diverged: use smaller values of --lr", code=FAILED
            )
        if values[best] > state.best:
            state.best = values[best]
            lr, decay = state.grid[best]
            chosen = {"lr": lr, "weight_decay": decay, "epoch": epoch + 1}
            state.save_best(folder, state.heads[best], chosen | {"held_out": values[best][0]})
        scores = [score for score, _ in values]
        state.epoch = epoch + 1
        log_epoch(state, total / len(records), scores, best, state.epoch * steps, folder)
        state.save(folder)


def quality(state, records, logits):
    """Return (top-1 accuracy or mAP, minus the loss) of {id: logits}, or DIVERGED.

    Larger is better.
    """
    classes, multi = state.fixed["classes"], state.fixed["multi"]
    values = np.stack([logits[r["id"]] for r in records])
    if not np.isfinite(values).all():
        return DIVERGED
    wanted = torch.as_tensor(heads.targets(records, classes, multi))
    loss = heads.loss(torch.as_tensor(values), wanted).item()
    return heads.score(records, logits, classes, multi)[0]["mAP" if multi else "top1"], -loss


def log_epoch(state, losses, held_out, best, step, folder):
    """Print the best head of an epoch, and append the results of all heads to metrics.jsonl."""
    name = "mAP" if state.fixed["multi"] else "top-1"
    lr, decay = state.grid[best]
    note(
        f"epoch {state.epoch}: training loss {losses[best]:.3f}, held-out {name} {held_out[best]:.3f}"
        f" (lr {lr:g}, weight decay {decay:g})"
    )
    entry = {"step": step, "epoch": state.epoch, "heads": []}
    for (lr, decay), *values in zip(state.grid, losses[:-1].tolist(), held_out, strict=True):
        loss, value = (v if math.isfinite(v) else None for v in values)
        entry["heads"].append({"lr": lr, "weight_decay": decay, "loss": loss, "held_out": value})
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json_line(entry))


def note_edge(chosen, rates):
    """Suggest further learning rates if the best one is at the edge of the grid."""
    if len(rates) > 1 and chosen in (min(rates), max(rates)):
        which, way = ("smallest", "smaller") if chosen == min(rates) else ("largest", "larger")
        note(
            f"note: the best learning rate, {chosen:g}, is the {which} of --lr; a {way} one may be better"
        )


def print_plan(args, state, train, held_out, records):
    size = sum(p.numel() for p in state.heads[0].parameters() if p.requires_grad)
    kind = "actions, several per clip" if state.fixed["multi"] else "templates"
    note(
        f"parameters   {size:,} per head, {len(state.grid)} heads and one control\n"
        f"clips        {len(train):,} training, {len(held_out):,} held out, {len(records):,} {args.split}\n"
        f"classes      {len(state.fixed['classes'])} ({kind})"
    )


# ---- scoring --------------------------------------------------------------------------------


def evaluate(args):
    """Score a trained or published head on --split."""
    probe = heads.read_probe(args.evaluate, "--evaluate") if args.evaluate else None
    manifest = load_manifest(args.features)
    device, _ = devices.resolve(args.device, args.dtype)
    if args.evaluate:
        wanted = probe["manifest"].settings
        if args.control == "still":
            wanted = heads.still(wanted)
        wanted.check_same(manifest.settings, f"the cache {args.features}")
        head = heads.load_probe(probe, device)
        path = Path(args.evaluate)
        folder = path if path.is_dir() else path.parent
    else:
        probe, head = published_head.published(args.published, manifest, device)
        folder = OF_PUBLISHED
    source = args.features, args.annotations, args.limit, args.allow_missing
    records = to_score(args.split, probe["multi"], *source)
    read = partial(feature_batches, args.features, batch_size=args.batch_size)
    read = partial(read, workers=args.workers, device=device)
    folder = cli.output_folder(args.output or folder, "--output")
    with shared_memory(manifest.settings, args.workers, scoring=args.batch_size):
        report(args, scores_of(args, probe, head, {}, records, read), folder)


def scores_of(args, probe, head, controls, records, read):
    """Predict and score the records. Returns the content of evaluation_<split>.json.

    controls: {name: head}, more heads to score on the same clips.
    """
    classes, multi = probe["classes"], probe["multi"]
    device = next(head.parameters()).device
    data = read(args.split, records)
    logits, *others = heads.predict([head, *controls.values()], data, device)
    controls = dict(zip(controls, others, strict=True))
    if probe["counts"]:
        controls["majority"] = dict.fromkeys(logits, np.array(probe["counts"], np.float32))
    else:  # the class names of a published head have no brackets
        records = [r | {"template": heads.plain(r["template"])} for r in records]

    score = partial(heads.score, records, classes=classes, multi=multi, how=args.windows)
    scores, details = score(logits)
    if "right" in details:
        details["ci95"] = {"top1": bootstrap(details.pop("right"), args.seed)}
    videos = heads.by_video(records, logits, args.windows)
    if args.submission:
        probabilities = {video: heads.probabilities(x, multi) for video, _, x in videos}
        write_submission(args.submission, probabilities, classes)
    clips = json_digest([r["id"] for r in records])
    settings = {
        "split": args.split,
        "windows": args.windows,
        "control": args.control,
        "clips": clips,
    }
    settings |= {
        "chosen": probe["chosen"],
        "unknown_classes": heads.unknown_classes(records, classes, multi),
    }
    return {
        "n": len(videos if multi else records),
        "classes": len(classes),
        "metrics": scores,
        **details,
        "controls": {name: score(values)[0] for name, values in controls.items()},
        "settings": settings,
    }


def report(args, result, folder):
    """Write the result and print it."""
    parts = [args.split] + [args.control] * (args.control != "none")
    parts += ["published"] if args.published else []
    parts += [f"first{args.limit}"] if args.limit else []
    parts += [args.windows] if args.windows != "max" and "per_class" in result else []
    path = folder / f"evaluation_{'_'.join(parts)}.json"
    before = run_folder.replaced_scores(path, result)
    if before.get("settings") == result["settings"]:
        # keep the control "shuffled_labels", which only training can score
        result["controls"] = before["controls"] | result["controls"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    names = list(result["metrics"])
    print(" " * 16, *(f"{name:>12}" for name in names))
    for row, values in {"probe": result["metrics"], **result["controls"]}.items():
        print(f"{row:>16}", *(f"{values[name]:12.3f}" for name in names))
    for entry in result.get("worst", []):
        taken = ", ".join(f"{name} ({count})" for name, count in entry["taken_for"].items())
        text = f"{entry['accuracy']:.2f}  {entry['class']}"
        print(text + (f"  taken for {taken}" if taken else ""))
    if unknown := result["settings"]["unknown_classes"]:
        classes = counted(len(unknown), "class", "classes")
        note(f"WARNING: the probe does not know {classes} of these clips: {first_few(unknown)}")
    note(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
