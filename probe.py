"""Train a probe on cached features to recognise the action in a clip, and score it.

    python probe.py                                          (an attentive probe on SSv2's templates)
    python probe.py --evaluate results/probe --split validation
    python probe.py --published                              (V-JEPA 2's own SSv2 classifier)

The classes are the actions of the records, of which a clip may have several, or else their templates.
Heads with all learning rates and weight decays of the grid are trained side by side in one pass over the
features. The best one is chosen on a tenth of the training clips, which are held out. Writes best.pt,
last.pt, metrics.jsonl, args.json and evaluation_<split>.json to --output.
"""

import runtime.start

import hashlib
import itertools
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import VJEPA2ForVideoClassification

import heads
from dataset import (
    TRAIN,
    VALIDATION,
    FeatureDataset,
    batches,
    by_hash,
    load_records,
    loader,
    shared_memory,
)
from feature_cache import channel_statistics, load_manifest, require_features
from metrics import bootstrap
from optim import dropout_seed, epoch_order, lr_at
from runtime import cli, devices, hub, ranks, run_folder
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import json_line, read_torch, torch_bytes, write_json
from runtime.names import counted, first_few
from runtime.run_log import truncate_log

STATISTICS_CLIPS = 1000  # clips used for the mean and standard deviation of each channel
HELD_OUT = 10  # one clip of so many training clips is held out to choose the best head
CLIP_GRAD = 1.0


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--features", default=cli.FEATURES, help="feature cache written by preprocess_ssv2.py")
    add("--annotations", default=cli.ANNOTATIONS, help="folder written by prepare_annotations.py")
    add("--output", default="results/probe", help="folder for the results")
    add(
        "--allow-missing",
        type=cli.whole(0),
        default=0,
        help="maximum number of clips per split without features; they are skipped",
    )
    add = parser.add_argument_group("head").add_argument
    add("--head", choices=heads.HEADS, default="attentive", help="type of the head")
    add(
        "--on",
        choices=heads.INPUTS,
        help="what the head reads; weights means a mean with one learned weight per token (default: tokens"
        " for an attentive head, or mean)",
    )
    add(
        "--layers",
        type=cli.whole(1),
        default=1,
        help="layers of an attentive head; all but the last are self-attention between the tokens",
    )
    add("--num-heads", type=cli.whole(1), default=16, help="attention heads of an attentive head")
    add("--no-positions", action="store_true", help="do not add positions to the tokens")
    add("--dropout", type=cli.number(least=0, below=1), default=0.1, help="dropout rate")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.whole(1), default=20, help="passes over the training clips")
    add("--batch-size", type=cli.whole(1), default=64, help="clips per step")
    lr, decay = cli.number(above=0), cli.number(least=0)
    add("--lr", type=lr, nargs="+", default=[1e-3, 3e-4, 1e-4], help="peak learning rates")
    add("--weight-decay", type=decay, nargs="+", default=[0.1, 0.01], help="weight decays of AdamW")
    add("--warmup-steps", type=cli.whole(0), default=500, help="steps of linear warm-up")
    add = parser.add_argument_group("run").add_argument
    add("--evaluate", metavar="CHECKPOINT", help="score a trained probe on --split instead")
    add(
        "--published",
        nargs="?",
        const="facebook/vjepa2-vitl-fpc16-256-ssv2",
        metavar="MODEL",
        help="score the classifier of a published model (default: %(const)s) on --split; --features must"
        " be a cache made with that model as --encoder",
    )
    add("--split", default=VALIDATION, help="split to score; it chooses nothing")
    add(
        "--windows",
        choices=["max", "mean"],
        default="max",
        help="how to combine the scores of the windows of one video",
    )
    add(
        "--control",
        choices=["none", "still"],
        default="none",
        help="still: --features contains first frames only (preprocess_ssv2.py --still)",
    )
    add(
        "--submission",
        metavar="FILE",
        help="also write the scores in the format of the Charades challenge",
    )
    add("--resume", action="store_true", help="continue the run in --output after its last epoch")
    add("--overwrite", action="store_true", help="replace the run in --output")
    cli.add_common(parser)
    args = parser.parse_args(argv)
    args.on = args.on or ("tokens" if args.head == "attentive" else "mean")
    if (args.head == "attentive") != (args.on == "tokens"):
        parser.error("--head attentive and --on tokens belong together")
    if args.layers > 1 and args.head != "attentive":
        parser.error("--layers is for --head attentive")
    if args.evaluate and args.published:
        parser.error("--evaluate and --published are mutually exclusive")
    if args.control != "none" and not args.evaluate:
        parser.error("--control needs --evaluate")
    return args


def main(argv=None):
    args = parse_args(argv)
    if ranks.world_size() > 1:
        raise UserError("probe.py runs in one process: start it without torchrun")
    if args.evaluate or args.published:
        return evaluate(args)
    folder = run_folder.check(args.output, args.resume, args.overwrite)
    manifest = load_manifest(args.features)
    train = usable(args, TRAIN)
    classes, multi = heads.class_names(train)
    train = heads.annotated(train, multi)
    scored = heads.annotated(usable(args, args.split), multi)
    train, held_out = hold_out(train, args.seed)
    if not train or not held_out or not scored:
        raise UserError(
            "too few clips: a probe needs some to train on, to choose from and to score"
        )
    if args.on == "cls" and not manifest.settings.cls:
        raise UserError(f"the cache {args.features} has no CLS, because its encoder has none")
    device, _ = devices.resolve(args.device, args.dtype)
    with (
        run_folder.locked(folder, args.resume, args.overwrite),
        shared_memory(manifest.settings, args.workers, training=args.batch_size),
    ):
        state = State.start(args, manifest, train, classes, multi, device)
        with run_folder.recorded(folder, vars(args), args.overwrite, device, clips=len(train)):
            if args.resume:
                state.resume(folder)
            else:
                state.save(folder)
            print_plan(args, state, train, held_out, scored)
            fit(args, state, train, held_out, folder)
        probe = heads.read_probe(folder, "--output")
        result = scores_of(args, probe, heads.load_probe(probe, device), scored, device)
        shuffled = scores_of(args, probe, state.heads[-1], scored, device, controls=False)
        result["controls"]["shuffled_labels"] = shuffled["metrics"]
        return report(args, result, folder)


def usable(args, split):
    """Return the records of a split that have features."""
    records = load_records(args.annotations, split)[: args.limit]
    return require_features(args.features, split, records, args.allow_missing)


def hold_out(records, seed):
    """Split training records into (train, held out). All windows of a video are on the same side."""
    videos = {r["video"] or r["id"] for r in records}
    chosen = set(by_hash(videos, f"held out:{seed}")[: max(1, len(videos) // HELD_OUT)])
    parts = [], []
    for record in records:
        parts[(record["video"] or record["id"]) in chosen].append(record)
    return parts


# ---- training -------------------------------------------------------------------------------


class State:
    """The heads of a run, their optimizer and what is recorded with them.

    The last head is a control: it has the middle values of the grid, and is trained on labels that are
    shuffled among the training clips. A head that learns more than chance from them would reveal a leak.
    """

    def __init__(self, heads, grid, optimizer, fixed, identity):
        self.heads, self.grid, self.optimizer = heads, grid, optimizer
        self.fixed, self.identity = fixed, identity
        self.epoch, self.best = 0, -math.inf

    @classmethod
    def start(cls, args, manifest, train, classes, multi, device):
        """Make the heads of a new run."""
        settings = manifest.settings
        sizes = {
            "kind": args.head,
            "on": args.on,
            "classes": len(classes),
            "video_width": settings.width,
            "grid": list(settings.grid),
            "layers": args.layers,
            "num_heads": args.num_heads,
            "positions": not args.no_positions,
            "dropout": args.dropout,
        }
        if args.head == "attentive" and settings.width % args.num_heads:
            raise UserError(
                f"--num-heads {args.num_heads} does not divide the width {settings.width}"
            )
        grid = list(itertools.product(args.lr, args.weight_decay))
        ids = by_hash((r["id"] for r in train), args.seed)[:STATISTICS_CLIPS]
        statistics = channel_statistics(args.features, TRAIN, ids, settings, args.workers)
        made, groups = [], []
        for lr, decay in [*grid, grid[len(grid) // 2]]:
            torch.manual_seed(args.seed)
            head = heads.Probe(**sizes)
            head.standardise(*statistics)
            made.append(head.to(device))
            groups += parameter_groups(head, lr, decay)
        optimizer = torch.optim.AdamW(groups, fused=devices.on_gpu(device))
        wanted = heads.targets(train, classes, multi)
        counts = wanted.sum(0) if multi else np.bincount(wanted, minlength=len(classes))
        fixed = {
            "probe_version": heads.VERSION,
            "sizes": sizes,
            "classes": classes,
            "counts": [int(n) for n in counts],
            "multi": multi,
            "manifest": manifest.as_dict(),
        }
        may_change = {
            "output",
            "device",
            "workers",
            "resume",
            "overwrite",
            "features",
            "annotations",
        }
        may_change |= {"split", "windows", "submission", "allow_missing"}
        flags = {k: v for k, v in vars(args).items() if k not in may_change}
        text = json_line(
            {"flags": flags, "train": [[r["id"], heads.names_of(r, multi)] for r in train]}
        )
        return cls(made, grid, optimizer, fixed, hashlib.sha256(text.encode()).hexdigest())

    def save(self, folder):
        """Write last.pt."""
        value = self.fixed | {
            "heads": [head.state_dict() for head in self.heads],
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "identity": self.identity,
        }
        run_folder.replace_checkpoint(folder / heads.LAST, torch_bytes(value))

    def save_best(self, folder, number, score):
        """Write best.pt with one of the heads."""
        lr, decay = self.grid[number]
        chosen = {"lr": lr, "weight_decay": decay, "epoch": self.epoch, "held_out": score}
        value = self.fixed | {"weights": self.heads[number].state_dict(), "chosen": chosen}
        run_folder.replace_checkpoint(folder / heads.BEST, torch_bytes(value))

    def resume(self, folder):
        """Load last.pt. Raises UserError if there is none, or if it is of another run."""
        try:
            saved = read_torch(folder / heads.LAST)
            if saved["identity"] != self.identity:
                raise UserError("--resume: flags, training clips or their classes have changed")
            if saved["manifest"] != self.fixed["manifest"]:
                raise UserError("--resume: the feature cache is another one")
            for head, weights in zip(self.heads, saved["heads"], strict=True):
                head.load_state_dict(weights)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.epoch, self.best = int(saved["epoch"]), float(saved["best"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"--resume: {folder / heads.LAST} cannot be used: {error}") from None
        note(f"resuming after epoch {self.epoch}")


def parameter_groups(head, lr, decay):
    """Return the groups of a head's parameters. Weight decay applies to matrices of Linear layers only."""
    trained = [p for p in head.parameters() if p.requires_grad]
    linear = {id(m.weight) for m in head.modules() if isinstance(m, nn.Linear)}
    parts = ([p for p in trained if (id(p) in linear) == decayed] for decayed in (True, False))
    return [
        {"params": part, "peak": lr, "weight_decay": weight_decay}
        for part, weight_decay in zip(parts, (decay, 0.0), strict=True)
    ]


def fit(args, state, train, held_out, folder):
    """Train all heads side by side, and write last.pt and, if it is the best so far, best.pt each epoch."""
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
        data = reader(args, TRAIN, records, device)
        with tqdm(total=len(records), unit="clip", desc=f"epoch {epoch + 1}", leave=False) as bar:
            for i, batch in enumerate(data):
                step = epoch * steps + i
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
        state.epoch = epoch + 1

        # the head and epoch with the best score on the held-out clips are kept
        values = [
            main_score(args, state, held_out, logits)
            for logits in predictions(args, state, held_out, device)
        ]
        best = int(np.nanargmax([-math.inf if math.isnan(v) else v for v in values]))
        if values[best] > state.best or epoch == 0:
            state.best = values[best]
            state.save_best(folder, best, values[best])
        log_epoch(state, total / len(records), values, best, (epoch + 1) * steps, folder)
        state.save(folder)


def reader(args, split, records, device):
    data = FeatureDataset(args.features, split, records, load_manifest(args.features).settings)
    return batches(loader(data, args.batch_size, args.workers, device))


def predictions(args, state, records, device):
    """Return {id: logits} of each head except the control."""
    return heads.predict(state.heads[:-1], reader(args, TRAIN, records, device), device)


def main_score(args, state, records, logits):
    """Return the top-1 accuracy, or mAP, of {id: logits} on the held-out records."""
    scores, _ = scored(args, records, logits, state.fixed["classes"], state.fixed["multi"])
    return scores["mAP" if state.fixed["multi"] else "top1"]


def log_epoch(state, losses, held_out, best, step, folder):
    name = "mAP" if state.fixed["multi"] else "top-1"
    lr, decay = state.grid[best]
    note(
        f"epoch {state.epoch}: training loss {losses[best]:.3f}, held-out {name} {held_out[best]:.3f}"
        f" (lr {lr:g}, weight decay {decay:g})"
    )
    entry = {"step": step, "epoch": state.epoch, "heads": []}
    for (lr, decay), loss, value in zip(state.grid, losses.tolist(), held_out, strict=False):
        entry["heads"].append({"lr": lr, "weight_decay": decay, "loss": loss, "held_out": value})
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json_line(entry))


def print_plan(args, state, train, held_out, scored):
    size = sum(p.numel() for p in state.heads[0].parameters() if p.requires_grad)
    kind = "actions, several per clip" if state.fixed["multi"] else "templates"
    note(
        f"parameters   {size:,} per head, {len(state.grid)} heads and one control\n"
        f"clips        {len(train):,} training, {len(held_out):,} held out, {len(scored):,} {args.split}\n"
        f"classes      {len(state.fixed['classes'])} ({kind})"
    )


# ---- scoring --------------------------------------------------------------------------------


def evaluate(args):
    """Score a trained or published head on --split."""
    manifest = load_manifest(args.features)
    device, _ = devices.resolve(args.device, args.dtype)
    if args.evaluate:
        probe = heads.read_probe(args.evaluate, "--evaluate")
        wanted = probe["manifest"].settings
        if args.control == "still":
            wanted = heads.still(wanted)
        wanted.check_same(manifest.settings, f"the cache {args.features}")
        head = heads.load_probe(probe, device)
        source = Path(args.evaluate)
        folder = source if source.is_dir() else source.parent
    else:
        probe, head = published(args.published, manifest, device)
        folder = Path(args.output)
    records = heads.annotated(usable(args, args.split), probe["multi"])
    if not records:
        raise UserError(f"no clip of split {args.split!r} has a class")
    folder = cli.output_folder(folder, "--output")
    with shared_memory(manifest.settings, args.workers, scoring=args.batch_size):
        return report(args, scores_of(args, probe, head, records, device), folder)


def published(name, manifest, device):
    """Load the classifier of a published model. Returns (probe, head), see `heads.read_probe`.

    Raises UserError unless the cache was made with the encoder of that model.
    """
    folder = hub.find_model(name, "--published")
    model = hub.load_model(VJEPA2ForVideoClassification, folder, "--published", dtype=torch.float32)
    if manifest.settings.encoder_fingerprint != hub.fingerprint(folder):
        require_same_encoder(model.vjepa2, name, manifest)
    classes = [model.config.id2label[i] for i in range(model.config.num_labels)]
    head = heads.PublishedHead(model).to(device).eval()
    probe = {"classes": classes, "counts": None, "multi": False, "chosen": {"published": name}}
    return probe, head


def require_same_encoder(encoder, name, manifest):
    """Raise UserError unless the encoder of a cache has exactly the weights of another encoder.

    A classifier may be published with an encoder that is also published alone. Their configurations, and
    thus their fingerprints, differ, although the features are the same.
    """
    other = hub.recorded("encoder", manifest.info, "--features")
    folder = hub.find_model(other, "the encoder")
    same = hub.fingerprint(folder) == manifest.settings.encoder_fingerprint
    if same and manifest.settings.family == "vjepa2":
        weights = hub.load_model(type(encoder), folder, "the encoder", dtype=torch.float32)
        weights, wanted = weights.encoder.state_dict(), encoder.encoder.state_dict()
        same = weights.keys() == wanted.keys() and all(
            torch.equal(weights[key], value) for key, value in wanted.items()
        )
        if same:
            return
    raise UserError(
        f"--published {name}: the cache was made with another encoder, {other}. Run preprocess_ssv2.py"
        f" --encoder {name} with another --features folder."
    )


def scored(args, records, logits, classes, multi):
    """Score {id: logits}, with the windows of a video combined. Returns (scores, details)."""
    videos = heads.by_video(records, logits, args.windows)
    values = np.stack([value for *_, value in videos])
    if not multi:
        wanted = heads.targets([rows[0] for _, rows, _ in videos], classes, multi)
        scores, worst = heads.single_label_scores(values, wanted, classes)
        return scores, {"worst": worst, "right": heads.ranks(values, wanted) == 1}
    # an action without training clips counts too, below all others
    unknown = unknown_classes(records, classes, multi)
    classes, least = [*classes, *unknown], np.finfo(np.float32).min
    values = np.pad(values, ((0, 0), (0, len(unknown))), constant_values=least)
    wanted = np.stack([heads.targets(rows, classes, multi).max(0) for _, rows, _ in videos])
    scores, per_class = heads.multi_label_scores(values, wanted)
    per_class = {
        c: None if math.isnan(v) else v for c, v in zip(classes, per_class.tolist(), strict=True)
    }
    return scores, {"per_class": per_class}


def scores_of(args, probe, head, records, device, controls=True):
    """Predict and score the records. Returns the content of evaluation_<split>.json."""
    classes, multi = probe["classes"], probe["multi"]
    (logits,) = heads.predict([head], reader(args, args.split, records, device), device)
    if probe["counts"] is None:  # the class names of a published head have no brackets
        records = [r | {"template": heads.plain(r["template"])} for r in records]
    result = {"n": len(heads.by_video(records, logits)), "classes": len(classes)}
    result["metrics"], details = scored(args, records, logits, classes, multi)
    if "right" in details:
        result["ci95"] = {"top1": bootstrap(details.pop("right"), args.seed)}
    result |= details
    result["controls"] = {}
    if controls and probe["counts"]:
        prior = dict.fromkeys(logits, np.array(probe["counts"], np.float32))
        result["controls"]["majority"], _ = scored(args, records, prior, classes, multi)
    result["settings"] = {
        "split": args.split,
        "windows": args.windows,
        "control": args.control,
        "chosen": probe["chosen"],
        "unknown_classes": unknown_classes(records, classes, multi),
    }
    if args.submission and controls:
        videos = heads.by_video(records, logits, args.windows)
        write_submission(args.submission, videos, classes, multi)
    return result


def unknown_classes(records, classes, multi):
    """Return the classes of the records that no training clip has."""
    return sorted({name for r in records for name in heads.names_of(r, multi)} - {*classes})


def write_submission(path, videos, classes, multi):
    """Write one line per video: its name and the probability of each class, in the order of the classes.

    A class of Charades has the column of its number. Columns of classes without training clips are 0.
    """
    numbers = [re.fullmatch(r"c(\d{3}) .*", name) for name in classes]
    columns = [int(n[1]) for n in numbers] if all(numbers) else list(range(len(classes)))
    with open(path, "w", encoding="utf-8") as file:
        for video, _, logits in videos:
            p = np.zeros(max(columns) + 1)
            p[columns] = heads.probabilities(logits, multi)
            file.write(f"{Path(video).stem} {' '.join(f'{v:.8g}' for v in p)}\n")


def report(args, result, folder):
    """Write the result and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "_".join([args.split] + [args.control] * (args.control != "none"))
    name += "_published" if args.published else ""
    write_json(folder / f"evaluation_{name}.json", result)
    names = list(result["metrics"])
    print(" ".join(f"{n:>12}" for n in ["", *names]))
    for row, values in {"probe": result["metrics"], **result["controls"]}.items():
        print(f"{row:>16} " + " ".join(f"{values[n]:12.3f}" for n in names))
    for entry in result.get("worst", []):
        taken = ", ".join(f"{name} ({count})" for name, count in entry["taken_for"].items())
        print(
            f"{entry['accuracy']:.2f}  {entry['class']}" + (f"  taken for {taken}" if taken else "")
        )
    if unknown := result["settings"]["unknown_classes"]:
        classes = counted(len(unknown), "class", "classes")
        note(f"WARNING: the probe does not know {classes} of these clips: {first_few(unknown)}")
    note(f"written to {folder / f'evaluation_{name}.json'}")


if __name__ == "__main__":
    cli.run(main)
