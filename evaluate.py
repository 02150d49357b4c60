"""Caption a split from its cached features, and score the captions and several controls.

    python evaluate.py                        (results/ssv2/best.pt on the validation split)
    python evaluate.py --predictions results/ssv2/predictions_validation.json     (no model, no GPU)
    python evaluate.py --predictions a.json --versus b.json      (compares two models)
    torchrun --nproc-per-node 4 evaluate.py   (the clips are shared between four GPUs)

Writes predictions_<split>.json (COCO result format) and evaluation_<split>.json, and prints a table of
the scores. Compute the features first, with preprocess_ssv2.py --split <split>. To create an HTML page
that shows each clip with its caption and score, run python -m viz.gallery RUN.
"""

import runtime.start

import math
import os
import re
import shlex
from collections import Counter
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import heads
import metrics
from captioner import Sampling
from checkpoint import is_export, load_captioner, read_checkpoint, warn_if_untrained, weights_digest
from dataset import (
    STYLES,
    TRAIN,
    VALIDATION,
    FeatureDataset,
    feature_batches,
    load_records,
    loader,
    shared_memory,
)
from dataset import batches as read_batches
from runtime import class_scores, cli, devices, distributed, hub, ranks, run_folder
from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.feature_cache import load_manifest, require_features
from runtime.files import in_shard, json_bytes, write_json
from runtime.names import counted, first_few
from runtime.predictions import predictions_by_id, read_coco, read_predictions, write_predictions

KEPT = 100  # clips with different captions in versus_*.json
BATCH = 64  # clips per batch, here and in the validation of train.py


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("what to score").add_argument
    add("--checkpoint", default=cli.CHECKPOINT, help=cli.CHECKPOINT_KINDS)
    cli.add_cached(add)
    add(
        "--predictions",
        nargs="+",
        help="score the captions in these files instead of running a checkpoint: predictions_<split>.json, or"
        " a .jsonl, .csv or .tsv file of infer.py; give all parts of a sharded run",
    )
    add(
        "--versus",
        nargs="+",
        help="compare --predictions with these files, the captions of another model for the same clips",
    )
    add("--common", action="store_true", help="with --versus: use only the clips that both have")
    add("--split", default=VALIDATION, help="split to caption and score")
    add("--style", choices=STYLES, default="label", help="caption style")
    add(
        "--control",
        choices=["none", "still"],
        default="none",
        help="still: --features contains first frames only (preprocess_ssv2.py --still)",
    )
    add(
        "--allow-missing",
        type=cli.whole(0),
        default=0,
        help="maximum number of clips without features; they are skipped",
    )
    add("--lm", help="folder of the checkpoint's language model, if it has moved")
    add(
        "--shard",
        type=cli.shard,
        default="0/1",
        help="process only part i of n, written i/n, with i from 0 to n - 1; 0/1 means all clips",
    )
    add(
        "--output",
        help="folder for the results (default: that of the checkpoint, or results/<name> for an exported"
        " folder or a Hub id)",
    )
    add(
        "--probe",
        help="checkpoint of a probe (probe.py): also count how often it and the captions name the right"
        " template, on the same clips",
    )
    add("--no-meteor", action="store_true", help="skip METEOR, which takes 10 s to start")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the scores as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--batch-size", type=cli.whole(1), default=BATCH, help="clips per batch")
    cli.add_generation(group)
    cli.add_sampling(
        group,
        "sample N captions of each clip and score the likeliest; the table also shows greedy search and the"
        " best of the N samples (oracle)",
    )
    cli.add_common(parser)
    args = parser.parse_args(argv)
    if args.predictions:
        names = ("checkpoint", "lm", "num_beams", "max_new_tokens", "sample")
        parser.refuse_given(args, names, "cannot be used with --predictions")
    if args.sample:
        parser.refuse_given(args, ["num_beams"], "cannot be used with --sample")
    else:
        parser.refuse_given(args, ["top_p", "temperature"], "can only be used with --sample")
    if args.versus and not args.predictions:
        parser.error("--versus needs --predictions, the captions of the first model")
    if args.versus:
        names = ("probe", "control", "allow_missing", "json", "markdown")
        parser.refuse_given(args, names, "cannot be used with --versus")
    else:
        parser.refuse_given(args, ["common"], "needs --versus")
    if args.shard != (0, 1):
        parser.refuse_given(args, ("probe", "json", "markdown"), "cannot be used with --shard")
    run_folder.fill_paths(args, args.predictions[0] if args.predictions else args.checkpoint)
    return args


def main(argv=None):
    args = parse_args(argv)
    if (args.predictions or args.sample) and args.shard != (0, 1):
        flag = "--predictions" if args.predictions else "--sample"
        raise UserError(f"--shard cannot be used with {flag}, which needs all clips together")
    checkpoint = None if args.predictions else read_checkpoint(args.checkpoint)
    for path in (args.predictions or []) + (args.versus or []):
        cli.existing(path, "predictions", "evaluate.py and infer.py --output write such files.")
    records = load_records(args.annotations, args.split)
    all_records = records
    records = [r for r in records[: args.limit] if in_shard(r["id"], *args.shard)]
    if not records:
        raise UserError(f"split {args.split!r} contains no clips, or none in this --shard")
    if args.style == "sentence" and not any(r["paraphrases"] for r in records):
        raise UserError(
            f"split {args.split!r} has no paraphrases, which --style sentence needs as references"
        )
    records = with_references(records, args.style)
    probe = heads.read_probe(args.probe, "--probe") if args.probe else None
    if probe:
        if probe["multi"]:
            raise UserError(f"--probe {args.probe} was trained on actions, not on templates")
        if args.style != "label" or not any(r["template"] for r in records):
            raise UserError("--probe needs --style label, and clips with a template")
        usable = require_features(args.features, args.split, records, args.allow_missing)
        wanted = load_manifest(args.features).settings
        probe["manifest"].settings.check_same(wanted, f"the cache {args.features}")
    source = args.predictions[0] if args.predictions else args.checkpoint
    output = cli.output_folder(args.output or default_output(source), "--output")
    if args.versus:
        return compare(args, output, records, all_records)
    if not args.predictions:
        check_same_clips(output, result_name(args, 0), records)
    if args.predictions:
        predictions, settings = captions_of(args.predictions, records, all_records), {}
        greedy = samples = None
    else:
        with distributed.joined():
            predictions, settings, samples = predict(args, checkpoint, records)
        greedy = predictions if samples else None
    if ranks.rank():
        return
    missing = [r["id"] for r in records if r["id"] not in predictions]
    if len(missing) > args.allow_missing or len(missing) == len(records):
        raise UserError(
            f"{len(missing)} of {counted(len(records), 'clip has', 'clips have')} no prediction:"
            f" {first_few(missing)}; --allow-missing N leaves up to N clips out"
        )
    skipped = len(missing)
    if skipped:
        records = [r for r in records if r["id"] in predictions]
        some = first_few(missing)
        clips = counted(skipped, "clip has no caption and is", "clips have no caption and are")
        note(f"{clips} left out of the scores, for example {some}")
    name = result_name(args, skipped)
    if not args.predictions:
        output.mkdir(parents=True, exist_ok=True)
        if samples:
            predictions = {i: next(iter(drawn)) for i, drawn in samples.items()}
            write_json(output / f"samples_{name}.json", samples)
        write_predictions(output / f"predictions_{name}.json", predictions)
        note(f"captions written to {output / f'predictions_{name}.json'}")
    settings = {"split": args.split, "style": args.style, "missing": skipped} | settings
    if args.shard != (0, 1):
        write_json(output / f"settings_{name}.json", settings)
        note(f"this is one part; score all parts together: {command_for_parts(args, output, name)}")
        return

    result, per_clip = score(
        predictions,
        records,
        all_records,
        args.annotations,
        args.style,
        args.seed,
        with_meteor=not args.no_meteor,
        greedy=greedy,
        samples=samples and {i: [*drawn] for i, drawn in samples.items()},
    )
    if probe:
        ids = {r["id"] for r in usable}
        cached = [r for r in records if r["id"] in ids]
        result["probe"] = compare_with_probe(args, probe, cached, per_clip)
    result |= {
        # absolute, because viz.gallery may compare them in another working directory
        "checkpoint": [os.path.abspath(path) for path in args.predictions or []] or args.checkpoint,
        "settings": settings,
    }
    output.mkdir(parents=True, exist_ok=True)
    if args.predictions:
        run_folder.replaced_scores(output / f"evaluation_{name}.json", result)
    write_json(output / f"evaluation_{name}.json", result)
    text = json_bytes(result).decode() if args.json else as_text(result, args.markdown) + "\n"
    print(text, end="")
    note(f"written to {output / f'evaluation_{name}.json'}")


def with_references(records, style):
    """Return the records with a caption in this style, or all records if none has one."""
    references = metrics.references_of(records, style)
    found = [r for r in records if references[r["id"]]]
    if found and (without := len(records) - len(found)):
        clips = counted(without, "clip has", "clips have")
        note(f"{clips} no {style} caption and will not be scored")
    return found or records


def check_same_clips(output, name, records):
    """Raise UserError if the results of this name in a folder are mostly of other clips than `records`.

    Otherwise captions for own clips would replace those that the checkpoint's run wrote for its data set.
    """
    ids = {r["id"] for r in records}
    for path in output.glob("predictions_*.json"):
        if re.sub(r"_without\d+", "", path.stem) != f"predictions_{name}":
            continue
        try:
            before = predictions_by_id(read_coco(path)).keys()
        except UserError:  # nothing that evaluate.py wrote
            continue
        if len(ids & before) < min(len(ids), len(before)) / 2:
            raise UserError(f"{path} has captions of other clips; choose another --output")


def command_for_parts(args, output, name):
    """Return the command that scores all parts of a sharded run. name: of the results of one part."""
    parts = name.replace(f"part{args.shard[0]}of", "part*of")
    flags = ["--annotations", str(args.annotations), "--split", args.split, "--style", args.style]
    flags += ["--limit", str(args.limit)] if args.limit else []
    flags += ["--allow-missing", str(args.allow_missing)] if args.allow_missing else []
    folder = shlex.quote(f"{output}/")  # the shell must see the asterisk
    return f"python evaluate.py --predictions {folder}predictions_{parts}.json {shlex.join(flags)}"


def as_text(result, markdown):
    """Format the scores for people: a table, and the counts of `compare_with_probe` if there are any."""
    text = (metrics.format_markdown if markdown else metrics.format_table)(result)
    if p := result.get("probe"):
        text += "\n- " if markdown else "\n"
        text += (
            f"probe: template accuracy {p['probe']:.3f}, captions {p['captions']:.3f} on the same"
            f" {counted(p['n'], 'clip')}; right: both {p['both']}, only the probe {p['only_probe']}, only the"
            f" captions {p['only_captions']}, neither {p['neither']}"
        )
    return text


def captions_of(paths, records, all_records):
    """Read files of captions, without clips that --limit leaves out. Returns {id: caption}."""
    predictions = read_predictions(paths, every := {r["id"] for r in all_records})
    left_out = every - {r["id"] for r in records}
    return {i: text for i, text in predictions.items() if i not in left_out}


def compare(args, output, records, all_records):
    """Compare --predictions with --versus. Prints the differences and writes them to versus_*.json."""
    files = args.predictions, args.versus
    first, second = (captions_of(paths, records, all_records) for paths in files)
    if args.common:
        records = common_clips(first, second, records)
        first, second = ({r["id"]: c[r["id"]] for r in records} for c in (first, second))
    elif first.keys() != second.keys():
        raise UserError(f"{difference(first, second)}; --common compares the clips in both")
    templates, _ = training_facts(str(args.annotations), args.style)
    templates |= {r["template"] for r in all_records} - {None}
    result, clips = metrics.compare(
        first,
        second,
        records,
        style=args.style,
        templates=sorted(templates),
        all_records=all_records,
        seed=args.seed,
        with_meteor=not args.no_meteor,
    )
    result |= {
        "first": [*map(os.path.abspath, args.predictions)],
        "second": [*map(os.path.abspath, args.versus)],
        "settings": {"split": args.split, "style": args.style},
        "clips": clips[:KEPT],
    }
    path = output / f"versus_{versus_name(args)}.json"
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"first   {', '.join(args.predictions)}\nsecond  {', '.join(args.versus)}")
    print(metrics.format_comparison(result, clips))
    note(f"written to {path}")


def common_clips(first, second, records):
    """Return the records of the clips in both of two {id: caption}. Raises UserError if there is none."""
    common = [r for r in records if r["id"] in first and r["id"] in second]
    if not common:
        raise UserError(f"no clip of this split is in both: {difference(first, second)}")
    if first.keys() != second.keys():
        note(f"left out: {difference(first, second)}")
    return common


def difference(first, second):
    """Describe how many clips are in only one of two {id: caption}."""
    only = first.keys() - second.keys(), second.keys() - first.keys()
    counts = (counted(len(ids), "clip is", "clips are") for ids in only)
    return "{} only in --predictions, {} only in --versus".format(*counts)


def versus_name(args):
    """Build the name of a comparison from both files, the split and other settings."""
    name = result_name(args, 0).removesuffix("_rescored")
    paths = [Path(files[0]).absolute() for files in (args.predictions, args.versus)]
    first, second = (path.stem.removeprefix("predictions_") for path in paths)
    folder = paths[0].parent.name if args.output else ""  # otherwise that of the result
    parts = [folder, first if first != name else ""]
    parts += [paths[1].parent.name, second if second != name else ""]
    return "_".join([*filter(None, parts), name, *(["common"] if args.common else [])])


def compare_with_probe(args, probe, records, per_clip):
    """Compare the templates that a probe and the captions name. Returns accuracies and four counts.

    A clip that only the probe gets right has the action in its features, and the captioner is at fault. If
    neither is right, the features may lack the action. per_clip: the second result of `metrics.score`.
    """
    head = heads.load_probe(probe, device := devices.resolve(args.device, args.dtype)[0])
    records = [r for r in records if "template_accuracy" in per_clip[r["id"]]]
    if not records:
        raise UserError("--probe: no caption of these clips can be compared with a template")
    source = args.features, args.split, records, args.batch_size, args.workers, device
    (logits,) = heads.predict([head], feature_batches(*source), device)
    wanted = heads.targets(records, probe["classes"], multi=False)
    by_probe = class_scores.ranks(np.stack([logits[r["id"]] for r in records]), wanted) == 1
    by_caption = np.array([per_clip[r["id"]]["template_accuracy"] == 1 for r in records])
    return {
        "n": len(records),
        "probe": float(by_probe.mean()),
        "captions": float(by_caption.mean()),
        "both": int((by_probe & by_caption).sum()),
        "only_probe": int((by_probe & ~by_caption).sum()),
        "only_captions": int((~by_probe & by_caption).sum()),
        "neither": int((~by_probe & ~by_caption).sum()),
    }


def default_output(path):
    """Return the default folder for the results of a checkpoint or prediction file.

    This is the folder it is in. For a Hub id or an exported folder it is results/<name>, so that a
    shared folder is not modified. Raises UserError if results/<name> is the folder of a training run.
    """
    if not (hub.is_id(path) or is_export(Path(path))):
        path = Path(path)
        return path if path.is_dir() else path.parent
    folder = Path("results", Path(path).name)
    if (folder / "best.pt").exists():
        # The scores of that run would be replaced by those of another model.
        raise UserError(
            f"{folder} already contains a training run; choose another folder with --output"
        )
    return folder


def result_name(args, skipped):
    """Build the suffix of the result files from the split and all settings that are not the default.

    Results with different settings therefore do not replace each other.
    """
    parts = [args.split]
    parts += [args.style] if args.style != "label" else []
    parts += [args.control] if args.control != "none" else []
    parts += [f"first{args.limit}"] if args.limit else []
    parts += [f"beams{args.num_beams}"] if args.num_beams != 1 else []
    parts += [f"tokens{args.max_new_tokens}"] if args.max_new_tokens else []
    if args.sample:
        parts += [f"sample{args.sample}"]
        parts += [f"top{args.top_p:g}"] if args.top_p != cli.TOP_P else []
        parts += [f"temperature{args.temperature:g}"] if args.temperature != cli.TEMPERATURE else []
        parts += [f"seed{args.seed}"] if args.seed else []
    parts += [f"without{skipped}"] if skipped else []
    parts += ["part{}of{}".format(*args.shard)] if args.shard != (0, 1) else []
    path = Path(args.checkpoint)
    if args.predictions:
        parts += ["rescored"]  # the result of the checkpoint must not be replaced
    elif path.suffix == ".pt" and path.stem != "best":
        parts += [path.stem]
    return "_".join(parts)


def predict(args, checkpoint, records):
    """Caption `records` with the checkpoint, a result of `read_checkpoint`.

    Returns {id: caption}, the settings used and, with --sample, the result of `sample`, else None.
    """
    manifest = load_manifest(args.features)
    clips = require_features(args.features, args.split, records, args.allow_missing)
    device, dtype = devices.resolve(args.device, args.dtype)
    wanted = checkpoint["manifest"].settings
    if args.control == "still":
        wanted = heads.still(wanted)
    wanted.check_same(manifest.settings, f"the cache {args.features}")
    warn_if_untrained(checkpoint, args.style)
    captioner = load_captioner(checkpoint, device, dtype, args.lm)
    source = args.features, manifest.settings
    batches = clip_loader(
        captioner, *source, args.split, clips, args.style, args.batch_size, args.workers
    )
    with shared_memory(manifest.settings, args.workers, captioning=args.batch_size):
        predictions, loss = caption(
            captioner, batches, args.style, args.max_new_tokens, args.num_beams
        )
        samples = None
        if args.sample:
            how = Sampling(args.sample, args.top_p, args.temperature, seed=args.seed)
            samples = sample(captioner, batches, args.style, how, args.max_new_tokens)
            samples = {r["id"]: samples[r["id"]] for r in clips}
    predictions = {r["id"]: predictions[r["id"]] for r in clips}
    limit = args.max_new_tokens or captioner.max_new_tokens
    settings = {"num_beams": args.num_beams, "max_new_tokens": limit}
    settings |= {"control": args.control, "step": checkpoint["step"], "loss": loss}
    settings["weights"] = weights_digest(checkpoint["qformer"])
    settings |= {"sampling": asdict(how)} if samples else {}
    settings |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    return predictions, settings, samples


def clip_loader(captioner, features, settings, split, records, style, batch_size, workers):
    """Make a loader over cached clips, each with one reference in the given style if there is one.

    features, settings: the cache folder and the settings in its manifest. If there are several
    processes, each gets a share of the batches, which are the same as in a single process.
    """
    groups = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    records = [r for group in ranks.share(groups) for r in group]
    choose = partial(reference, style=style)
    data = FeatureDataset(features, split, records, settings, captioner.tokenizer, choose)
    return loader(data, batch_size, workers, captioner.device)


def reference(record, style):
    """Return [(style, text)] for computing the loss, or [] if the clip has no caption in this style."""
    texts = {"label": [record["label"]], "sentence": record["paraphrases"]}[style][:1]
    return [(style, text) for text in texts if text]


def caption(captioner, batches, style, max_new_tokens=None, num_beams=1):
    """Caption every clip of a loader. Returns {id: caption} and the mean loss per reference token.

    The loss is None if any clip has no reference or if it is not finite. The captioner is returned to
    its previous mode (train or eval). If there are several processes, each passes its own loader, and
    all return the captions of all clips. Raises UserError if two processes captioned the same clip.
    """
    mode = captioner.training
    captioner.eval()
    predictions, total, tokens, cut = {}, 0.0, 0, captioner.cut_captions
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
    cut = captioner.cut_captions - cut
    *sums, without_loss, cut = distributed.sums(total or 0.0, tokens, total is None, cut)
    predictions = [
        item for part in distributed.all_gather(list(predictions.items())) for item in part
    ]
    if duplicates := len(predictions) - len(dict(predictions)):
        clips = counted(duplicates, "clip was", "clips were")
        raise UserError(f"{clips} captioned by more than one process", code=FAILED)
    if cut:
        limit = max_new_tokens or captioner.max_new_tokens
        captions = counted(len(predictions), "caption")
        note(f"{cut:.0f} of {captions} reached the limit of {limit} tokens")
    mean = sums[0] / sums[1] if sums[1] and not without_loss else math.nan
    return dict(predictions), mean if math.isfinite(mean) else None


def to_device(batch, device):
    """Move the tensors of a batch to a device. Copies from pinned memory to a GPU are asynchronous."""
    return {k: v if k == "ids" else v.to(device, non_blocking=True) for k, v in batch.items()}


def sample(captioner, batches, style, how, max_new_tokens=None):
    """Sample captions of every clip of a loader: {id: {text: score}}, see `VideoCaptioner.samples`.

    If there are several processes, each passes its own loader, and all return the samples of all clips.
    """
    captioner.eval()
    samples = {}
    with tqdm(total=len(batches.dataset), unit="clip", desc="sample", leave=False) as bar:
        for batch in read_batches(batches):
            batch = to_device(batch, captioner.device)
            drawn = captioner.samples(batch, batch["ids"], style, how, max_new_tokens)
            samples |= zip(batch["ids"], drawn, strict=True)
            bar.update(len(drawn))
    return {i: drawn for part in distributed.all_gather(samples) for i, drawn in part.items()}


def score(predictions, records, all_records, annotations, style="label", seed=0, **kwargs):
    """Call `metrics.score` with the class templates and the most frequent training caption.

    all_records: all records of the split. CIDEr counts its document frequencies on them, so that a clip
    gets the same score whether a part or all of the split is scored. Their templates are added to those
    of the training split.
    """
    templates, most_frequent = training_facts(str(annotations), style)
    templates = templates | {r["template"] for r in all_records} - {None}
    return metrics.score(
        predictions,
        records,
        style=style,
        templates=sorted(templates),
        all_records=all_records,
        most_frequent=most_frequent,
        seed=seed,
        **kwargs,
    )


@cache
def training_facts(annotations, style):
    """Return the templates and the most frequent caption of the training split.

    Without a training split there are no templates, and the caption is None. The result is cached,
    because the file is large and train.py needs it after each epoch.
    """
    path = Path(annotations, f"{TRAIN}.json")
    records = load_records(annotations, TRAIN) if path.is_file() else []
    texts = [
        t for r in records for t in ([r["label"]] if style == "label" else r["paraphrases"]) if t
    ]
    most_frequent = min(Counter(texts).items(), key=lambda x: (-x[1], x[0]))[0] if texts else None
    return frozenset(r["template"] for r in records) - {None}, most_frequent


if __name__ == "__main__":
    cli.run(main)
