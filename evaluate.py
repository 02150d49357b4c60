"""Caption a split from its cached features and score the captions, with controls beside each score.

    python evaluate.py                        (results/ssv2/best.pt on the validation split)
    python evaluate.py --predictions results/ssv2/predictions_validation.json     (no model, no GPU)
    torchrun --nproc-per-node 4 evaluate.py   (a share of the clips on each of four GPUs)

Writes predictions_<split>.json (COCO result format) and evaluation_<split>.json; the table goes to
stdout. Needs features of the split: preprocess_ssv2.py --splits <split>. For a page that shows every
clip with its caption and score: python -m viz.gallery RUN.
"""

import runtime.start

import math
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

import metrics
from checkpoint import is_export, load_captioner, read_checkpoint, weights_digest
from dataset import (
    STYLES,
    TRAIN,
    VALIDATION,
    FeatureDataset,
    load_manifest,
    load_records,
    loader,
    require_features,
    shared_memory,
)
from dataset import batches as read_batches
from runtime import cli, devices, distributed, hub, ranks
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import in_shard, read_json, write_json

BATCH = 64  # clips captioned at once, here and in train.py's validation


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("what to score")
    group.add_argument("--checkpoint", default=cli.CHECKPOINT, help=cli.CHECKPOINT_KINDS)
    group.add_argument("--features", default=cli.FEATURES, help="cache of preprocess_ssv2.py")
    group.add_argument("--annotations", default=cli.ANNOTATIONS, help="of prepare_annotations.py")
    group.add_argument(
        "--predictions", nargs="+", help="score these files (the parts of a sharded run) instead"
    )
    group.add_argument("--split", default=VALIDATION, help="which split")
    group.add_argument("--style", choices=STYLES, default="label", help="kind of caption")
    group.add_argument(
        "--control",
        choices=["none", "still"],
        default="none",
        help="still: --features holds a cache made with preprocess_ssv2.py --still",
    )
    group.add_argument(
        "--allow-missing", type=cli.whole(0), default=0, help="clips that may lack features"
    )
    group.add_argument("--lm", help="where the checkpoint's language model lies, if elsewhere")
    group.add_argument("--shard", type=cli.shard, default=(0, 1), help="i/n: part i (from 0) of n")
    group.add_argument(
        "--output",
        help="folder of the results (default: the checkpoint's; results/<name> for an export or a Hub id)",
    )
    group.add_argument(
        "--no-meteor", action="store_true", help="leave METEOR out: it needs 10 s to start"
    )
    group = parser.add_argument_group("generation")
    group.add_argument("--batch-size", type=cli.whole(1), default=BATCH, help="clips at once")
    group.add_argument("--num-beams", type=cli.whole(1), default=1, help="1 is greedy")
    group.add_argument("--max-new-tokens", type=cli.whole(1), default=50, help="longest caption")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.predictions and args.shard != (0, 1):
        raise UserError("--predictions scores all parts of a run together: leave --shard out")
    records = load_records(args.annotations, args.split)
    everything = records
    records = [r for r in records[: args.limit] if in_shard(r["id"], *args.shard)]
    if not records:
        raise UserError(f"there are no clips in split {args.split!r}, or in this --shard of it")
    if args.style == "sentence" and not any(r["paraphrases"] for r in records):
        raise UserError(
            f"split {args.split!r} has no paraphrases: --style sentence has no references"
        )
    scored = args.predictions[0] if args.predictions else args.checkpoint
    output = cli.output_folder(args.output or default_output(scored), "--output")
    if args.predictions:
        predictions, settings = read_predictions(args.predictions), {}
    else:
        with distributed.joined():
            predictions, settings = predict(args, records)
    if ranks.rank():
        return
    missing = [r["id"] for r in records if r["id"] not in predictions]
    lacking = len(missing) if len(missing) <= args.allow_missing else 0  # more is an error, below
    if lacking:
        records = [r for r in records if r["id"] in predictions]
        note(f"{lacking} clips have no caption and are in no score: {', '.join(missing[:5])}")
    output.mkdir(parents=True, exist_ok=True)
    name = result_name(args, lacking)
    if not args.predictions:
        write_predictions(output / f"predictions_{name}.json", predictions)
        note(f"captions written to {output / f'predictions_{name}.json'}")
    if args.shard != (0, 1):
        note("a part only: score all parts together with --predictions PART PART …")
        return

    result, _ = score(
        predictions,
        records,
        everything,
        args.annotations,
        args.style,
        args.seed,
        with_meteor=not args.no_meteor,
    )
    result |= {
        "checkpoint": args.predictions or args.checkpoint,
        "settings": {"split": args.split, "style": args.style, "missing": lacking} | settings,
    }
    write_json(output / f"evaluation_{name}.json", result)
    print(metrics.format_table(result))
    note(f"written to {output / f'evaluation_{name}.json'}")


def default_output(path):
    """The folder of a file or folder; for what is shared, a Hub id or an exported folder, results/<name>,
    unless that is a run of one's own."""
    if not (hub.is_id(path) or is_export(Path(path))):
        path = Path(path)
        return path if path.is_dir() else path.parent
    folder = Path("results", Path(path).name)
    if (folder / "best.pt").exists():  # its scores would become those of another model
        raise UserError(f"{folder} holds a run: name the folder of these results with --output")
    return folder


def result_name(args, lacking):
    """The split and whatever is not the default, so that no result replaces another kind's."""
    parts = [args.split]
    parts += [args.style] if args.style != "label" else []
    parts += [args.control] if args.control != "none" else []
    parts += [f"first{args.limit}"] if args.limit else []
    parts += [f"beams{args.num_beams}"] if args.num_beams != 1 else []
    parts += [f"tokens{args.max_new_tokens}"] if args.max_new_tokens != 50 else []
    parts += [f"without{lacking}"] if lacking else []
    parts += ["part{}of{}".format(*args.shard)] if args.shard != (0, 1) else []
    path = Path(args.checkpoint)
    if args.predictions:
        parts += ["rescored"]  # of whatever file: it must not replace what a checkpoint scored
    elif path.suffix == ".pt" and path.stem != "best":
        parts += [path.stem]
    return "_".join(parts)


def predict(args, records):
    """Caption `records` with the checkpoint. Returns {id: caption} and the settings used."""
    manifest = load_manifest(args.features)
    clips = require_features(args.features, args.split, records, args.allow_missing)
    device, dtype = devices.resolve(args.device, args.dtype)
    checkpoint = read_checkpoint(args.checkpoint)
    wanted = checkpoint["manifest"].settings
    if args.control == "still":
        wanted = replace(wanted, sampling="still")
    wanted.check_same(manifest.settings, f"the cache {args.features}")
    captioner = load_captioner(checkpoint, device, dtype, args.lm)
    source = args.features, manifest.settings
    batches = clip_batches(
        captioner, *source, args.split, clips, args.style, args.batch_size, args.workers
    )
    with shared_memory(manifest.settings, args.workers, captioning=args.batch_size):
        predictions, loss = caption(
            captioner, batches, args.style, args.max_new_tokens, args.num_beams
        )
    predictions = {r["id"]: predictions[r["id"]] for r in clips}
    settings = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    settings |= {"control": args.control, "step": checkpoint["step"], "loss": loss}
    settings["weights"] = weights_digest(checkpoint["qformer"])
    return predictions, settings | {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def clip_batches(captioner, features, settings, split, records, style, batch_size, workers):
    """A loader over cached clips, each with its one reference of the style, if it has one.

    features, settings: the cache and its manifest's settings. Of several processes each gets its share,
    in the very batches that a single one would make.
    """
    groups = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    records = [r for group in ranks.share(groups) for r in group]
    choose = partial(reference, style=style)
    data = FeatureDataset(features, split, records, settings, captioner.tokenizer, choose)
    return loader(data, batch_size, workers, captioner.device)


def reference(record, style):
    """[(style, text)] to measure the loss on, or [] where the clip has no caption of the style."""
    texts = {"label": [record["label"]], "sentence": record["paraphrases"]}[style][:1]
    return [(style, text) for text in texts if text]


def caption(captioner, batches, style, max_new_tokens=50, num_beams=1):
    """Caption every clip of a loader. Returns {id: caption} and the mean loss per reference token.

    The loss is None where a clip has no reference, or where it is not finite. Leaves the captioner in the mode it was in. Of
    several processes each brings its own loader, and has the captions of all afterwards.
    """
    mode = captioner.training
    captioner.eval()
    predictions, total, tokens = {}, 0.0, 0
    try:
        with tqdm(total=len(batches.dataset), unit="clip", desc="caption", leave=False) as bar:
            for batch in read_batches(batches):
                batch = to_device(batch, captioner.device)
                loss, n, texts = captioner.validation(batch, style, max_new_tokens, num_beams)
                predictions |= zip(batch["ids"], texts, strict=True)
                total, tokens = None if loss is None or total is None else total + loss, tokens + n
                bar.update(len(texts))
    finally:
        captioner.train(mode)
    *sums, without = distributed.sums(total or 0.0, tokens, total is None)
    predictions = [
        item for part in distributed.all_gather(list(predictions.items())) for item in part
    ]
    if twice := len(predictions) - len(dict(predictions)):
        raise UserError(f"{twice} clips were captioned by two processes", code=1)
    mean = sums[0] / sums[1] if sums[1] and not without else math.nan
    return dict(predictions), mean if math.isfinite(mean) else None


def to_device(batch, device):
    """Move a batch's tensors; from pinned memory the copy overlaps with work on the GPU."""
    return {k: v if k == "ids" else v.to(device, non_blocking=True) for k, v in batch.items()}


def score(predictions, records, everything, annotations, style="label", seed=0, **kwargs):
    """`metrics.score` with what it needs from the annotations.

    everything: all records of the split; CIDEr's document frequencies come from them, so that a part
    of a split is scored as in the whole. Templates and the commonest caption come from training.
    """
    templates, commonest = training_facts(str(annotations), style)
    templates = templates | {r["template"] for r in everything} - {None}
    return metrics.score(
        predictions,
        records,
        style=style,
        templates=sorted(templates),
        all_records=everything,
        most_frequent=commonest,
        seed=seed,
        **kwargs,
    )


@cache
def training_facts(annotations, style):
    """The training clips' templates and commonest caption; none without a training split.

    Read once: training asks after each epoch, and the file is large.
    """
    path = Path(annotations, f"{TRAIN}.json")
    known = load_records(annotations, TRAIN) if path.is_file() else []
    texts = [
        t for r in known for t in ([r["label"]] if style == "label" else r["paraphrases"]) if t
    ]
    commonest = min(Counter(texts).items(), key=lambda x: (-x[1], x[0]))[0] if texts else None
    return frozenset(r["template"] for r in known) - {None}, commonest


def write_predictions(path, predictions):
    """COCO result format: [{"image_id": id, "caption": text}, …]"""
    write_json(path, [{"image_id": i, "caption": text} for i, text in predictions.items()])


def read_predictions(paths):
    """{id: caption} of files in COCO result format. Raises UserError; an id may occur once only."""
    files = [read_json(path, "predictions") for path in paths]
    if not all(isinstance(entries, list) for entries in files):
        raise UserError(f"predictions {', '.join(paths)} must hold JSON lists")
    return metrics.predictions_by_id(list(chain.from_iterable(files)))


if __name__ == "__main__":
    cli.run(main)
