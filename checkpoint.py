"""Checkpoints: their content, reading and validating them, rebuilding a captioner, resuming a run.

best.pt is a dict of tensors and plain types with
    qformer, sizes       the Q-Former's weights {name: float32} and constructor arguments
    manifest             of the features it was trained on, with the encoder's name and fingerprint
    lm, styles           name and fingerprint of the language model; the style prompts
    templates            the action templates of the training clips
    trained_styles       the styles of the training captions
    max_new_tokens       the default limit for generated captions
    step, best           optimizer steps done; validation CIDEr, or -loss if there is none
    best_loss            validation loss per token
    init                 name and digest of the checkpoint that the run started from, if there is one
    checkpoint_version
last.pt also has what a resumed run needs
    optimizer            its state
    scored, bad          step of the last evaluation; consecutive steps that were not finite
    args                 flags
    data, validation     hashes of the training and validation clips and captions
    sources              of the same clips, see `feature_cache.source_numbers`
An exported folder (tools/export.py) has the content of best.pt as config.json and model.safetensors.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from captioner import MAX_NEW_TOKENS, VideoCaptioner, load_lm
from dataset import STYLES, TRAIN, VALIDATION
from encoder import VideoEncoder
from qformer import QFormer
from runtime import devices, distributed, hub, ranks
from runtime.cli import note
from runtime.errors import FAILED, UserError, out_of_memory
from runtime.feature_cache import Manifest, is_count, source_numbers
from runtime.files import read_json, read_torch
from runtime.names import counted, first_few
from runtime.run_folder import BEST, CORRUPT, LAST, PREVIOUS, read_args, trained_runs

NO_CHECKPOINT = (
    "No checkpoint is distributed: train one with train.py, or run `make demo` for one of the toy world"
    " (results/demo)."
)

VERSION = 1

# Files of an exported folder, and the keys in its config.json
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEYS = ("checkpoint_version", "sizes", "manifest", "lm", "styles", "step", "templates", "best")
KEYS += ("trained_styles", "max_new_tokens", "init")
WEIGHTS_BYTES = 4 << 30  # limit: the file is read into memory; the default Q-Former has 0.16 GB

# Flags that a resumed run may change because they do not affect the trained weights
MAY_CHANGE = {
    *("annotations", "features", "lm", "output", "device", "workers", "report_to"),
    *("init", "resume", "overwrite", "dry_run", "save_every", "allow_missing", "no_meteor"),
}
STEP_SIZE = ("batch_size", "grad_accum")  # may change if their product stays the same


class CorruptCheckpoint(UserError):
    """A checkpoint exists but is not usable."""


# ---- reading -------------------------------------------------------------------------------


def read_checkpoint(path, flag="--checkpoint"):
    """Load and validate a checkpoint. No code in it is executed, so the file may be untrusted.

    path: a file, a run folder (its best.pt is read), an exported folder, or the Hub id of one.
    flag: the command-line flag to name in messages.
    Raises UserError if the checkpoint does not exist, and `CorruptCheckpoint` if it is damaged (even by
    one flipped byte), was not written by train.py, or has weights that do not fit its sizes.
    """
    location = hub.find_model(path, flag) if hub.is_id(path) else Path(path)
    exported = is_export(location)
    if not exported and os.path.isdir(location):
        path = location = location / BEST
    if not exported and not os.path.isfile(location):  # Path.is_file raises if the name is too long
        runs = first_few([*map(str, trained_runs())], 5)
        hint = f"There are runs of train.py in {runs}." if runs else NO_CHECKPOINT
        raise UserError(f"{flag} {path} does not exist. {hint}")
    try:
        checkpoint = read_export(location) if exported else read_torch(location)
    except PermissionError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    except (ValueError, OSError) as error:
        if out_of_memory(error):
            raise
        raise CorruptCheckpoint(f"{flag} {path} is not a valid checkpoint ({error})") from None
    version = checkpoint.get("checkpoint_version") if isinstance(checkpoint, dict) else None
    if type(version) is int and version != VERSION:
        raise UserError(f"{flag} {path} has version {version}, but this code reads {VERSION}")
    try:
        check_content(checkpoint)
        checkpoint["manifest"] = Manifest.parse(checkpoint["manifest"])
        with torch.device("meta"):  # untrusted sizes must not allocate memory
            # dict() copies, because torch records `assign` in the state dict itself. Loading it again
            # would replace the model's parameters, which its optimizer would not notice.
            load_weights(QFormer(**checkpoint["sizes"]), dict(checkpoint["qformer"]), assign=True)
    except (TypeError, ValueError, OverflowError, UserError) as error:
        raise CorruptCheckpoint(f"{flag} {path} was not written by train.py: {error}") from None
    if not exported:
        manifest, lm = checkpoint["manifest"], checkpoint["lm"]
        hub.locate("name", lm, lm["fingerprint"], location)
        hub.locate("encoder", manifest.info, manifest.settings.encoder_fingerprint, location)
    return checkpoint


def check_content(checkpoint):
    """Raise ValueError if an entry that the scripts use is missing or has the wrong type."""

    def require(condition, what):
        if not condition:
            raise ValueError(f"it has no valid {what}")

    parts = ("qformer", "sizes", "manifest", "lm", "styles")
    for part in parts:
        require(isinstance(checkpoint, dict) and isinstance(checkpoint.get(part), dict), part)
    manifest, lm, sizes = (checkpoint[part] for part in ("manifest", "lm", "sizes"))
    weights, settings = checkpoint["qformer"].values(), Manifest.parse(manifest).settings
    require(type(checkpoint.get("checkpoint_version")) is int, "version")
    require(type(checkpoint.get("step")) is int and checkpoint["step"] >= 0, "step")
    templates = checkpoint.get("templates", [])
    require(isinstance(templates, list) and all(isinstance(t, str) for t in templates), "templates")
    styles = checkpoint.get("trained_styles", [])
    require(isinstance(styles, list) and all(s in STYLES for s in styles), "trained_styles")
    require(is_count(checkpoint.get("max_new_tokens", 1)), "max_new_tokens")
    names = lm.get("name"), lm.get("fingerprint"), manifest["info"].get("encoder")
    require(all(isinstance(name, str) for name in names), "model name")
    init = checkpoint.get("init", {})
    require(isinstance(init, dict) and all(isinstance(v, str) for v in init.values()), "init")
    require("bos" not in lm or (type(lm["bos"]) is int and lm["bos"] >= 0), "bos")
    counts = [sizes.get(k) for k in ("num_queries", "num_blocks", "num_heads", "width")]
    require(all(map(is_count, counts)), "sizes")
    shape = list(settings.grid), settings.width
    require((sizes.get("grid"), sizes.get("video_width")) == shape, "grid")
    # a huge num_blocks would take forever to build
    require(sizes["num_blocks"] <= len(weights), "number of blocks")
    for w in weights:
        require(isinstance(w, torch.Tensor) and w.dtype == torch.float32, "weights")
        require(w.isfinite().all(), "weights (NaN or infinity)")


def is_export(folder):
    """True for an exported folder, complete or not. False for a run folder."""
    files = [os.path.isfile(folder / name) for name in (BEST, CONFIG, WEIGHTS)]
    return not files[0] and any(files)


def read_export(folder):
    """Read the checkpoint in an exported folder. Its entries are not validated; see `check_content`.

    No code in it is executed. Raises ValueError, with the reason, if the folder is incomplete or damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"it has no {name}: the export was not finished, run it again")
    if (size := (folder / WEIGHTS).stat().st_size) > WEIGHTS_BYTES:
        raise ValueError(f"its {WEIGHTS} has {size / 1e9:.1f} GB, too much for a Q-Former")
    try:
        config = read_json(folder / CONFIG, "file")
    except UserError as error:
        raise ValueError(str(error)) from None
    if not isinstance(config, dict) or "checkpoint_version" not in config:
        raise ValueError(f"its {CONFIG} was not written by tools.export")
    data = (folder / WEIGHTS).read_bytes()  # read once, so that the hashed bytes are those loaded
    if hashlib.sha256(data).hexdigest() != config.get("sha256"):
        raise ValueError(f"its {WEIGHTS} is damaged or does not belong to its {CONFIG}")
    try:
        weights = load_safetensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"its {WEIGHTS} cannot be read: {error}") from None
    return {k: config[k] for k in KEYS if k in config} | {"qformer": weights}


# ---- writing and rebuilding ----------------------------------------------------------------


def fixed_state(captioner, manifest, lm_name, lm_fingerprint, templates, styles):
    """The entries of a checkpoint that stay the same during training, as plain types.

    With the weights they suffice to rebuild the captioner. templates, styles: the action templates and
    the styles that occur in the training captions.
    """
    lm = hub.record("name", lm_name) | {"fingerprint": lm_fingerprint}
    return {
        "checkpoint_version": VERSION,
        "sizes": captioner.qformer.sizes,
        "manifest": manifest.as_dict(),
        "lm": lm if captioner.bos is None else lm | {"bos": captioner.bos},
        "styles": dict(STYLES),
        "templates": templates,
        "trained_styles": styles,
        "max_new_tokens": captioner.max_new_tokens,
    }


def weights_digest(weights):
    """A 16-digit hex digest of a Q-Former's weights {name: tensor}, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def origin(path, checkpoint):
    """Return the entry "init" for a run that starts from this checkpoint: its name and a digest."""
    location = Path(path)
    if hub.is_id(path) or location.is_dir():
        name = str(path) if hub.is_id(path) else location.resolve().name
    else:
        name = "/".join(location.resolve().parts[-2:])
    return {"name": name, "digest": weights_digest(checkpoint["qformer"])}


def load_weights(qformer, weights, **kwargs):
    """`qformer.load_state_dict(weights, **kwargs)`. Raises UserError if the weights do not fit."""
    try:
        qformer.load_state_dict(weights, **kwargs)
    except (RuntimeError, AttributeError) as error:
        why = str(error).strip().splitlines()[-1].strip()  # the first line is generic
        raise UserError(f"the checkpoint's weights do not fit its Q-Former: {why}") from None


def check_frozen(checkpoint, lm_name, fingerprint):
    """Raise UserError if a checkpoint was trained with another language model or other style prompts."""
    if fingerprint != checkpoint["lm"]["fingerprint"]:
        raise UserError(
            f"--lm {lm_name} has fingerprint {fingerprint}, but the checkpoint was trained with"
            f" {checkpoint['lm']['name']} ({checkpoint['lm']['fingerprint']})"
        )
    if checkpoint["styles"] != STYLES:
        raise UserError(
            f"the checkpoint was trained with different style prompts: {checkpoint['styles']}"
        )


def load_captioner(checkpoint, device, dtype, lm_name=None):
    """Rebuild the `VideoCaptioner` from the return value of `read_checkpoint`.

    lm_name: the language model's folder or Hub id, if it is not the one stored in the checkpoint. Raises
    UserError if the language model or the style prompts differ from those in training.
    """
    name = lm_name or hub.recorded("name", checkpoint["lm"], "--lm")
    lm, tokenizer, fingerprint = load_lm(name, device, dtype)
    check_frozen(checkpoint, name, fingerprint)
    if checkpoint["sizes"]["width"] != lm.get_input_embeddings().embedding_dim:
        raise UserError(f"the width of the checkpoint's Q-Former does not match --lm {name}")
    qformer = QFormer(**checkpoint["sizes"])
    load_weights(qformer, checkpoint["qformer"])
    limit = checkpoint.get("max_new_tokens", MAX_NEW_TOKENS)  # earlier versions did not store it
    bos = checkpoint["lm"].get("bos")
    autocast = lm.dtype != dtype
    return VideoCaptioner(qformer.to(device), lm, tokenizer, bos, limit, autocast).eval()


def warn_if_untrained(checkpoint, style):
    """Print a warning if the training captions of a checkpoint had no caption of this style."""
    if style not in checkpoint.get("trained_styles", STYLES):
        note(
            f"WARNING: no {style} was among the captions that this checkpoint was trained on; --style"
            f" {style} may write nonsense"
        )


def world_note(checkpoint):
    """Return a sentence if a checkpoint was trained on a synthetic world, whose nouns it uses for any clip.

    Otherwise return "".
    """
    world = checkpoint["manifest"].info.get("world")
    if not (isinstance(world, dict) and world.get("synthetic")):
        return ""
    nouns = world.get("nouns")
    nouns = first_few([*map(str, nouns)], 6) if isinstance(nouns, list) else "few objects"
    return f"This model was trained on a synthetic world and only knows {nouns}"


def load_models(checkpoint, device, dtype, encoder=None, lm=None):
    """Rebuild (`VideoEncoder`, `VideoCaptioner`) from the return value of `read_checkpoint`.

    encoder, lm: folders or Hub ids of the frozen models, if they are not those stored in the checkpoint.
    Raises UserError if a model is not found or has a different fingerprint.
    """
    captioner = load_captioner(checkpoint, device, dtype, lm)
    return VideoEncoder.from_manifest(checkpoint["manifest"], device, encoder), captioner


# ---- resuming ------------------------------------------------------------------------------


@dataclass
class Progress:
    """The counters of a run, stored in its checkpoints."""

    step: int = 0  # optimizer steps done
    best_score: float = -math.inf  # of best.pt: validation CIDEr, or -loss if CIDEr is not computed
    best_loss: float = math.inf  # of best.pt: validation loss per token, which decides between ties
    evaluated: int = 0  # the step of the last evaluation that best_score includes
    bad_steps: int = 0  # consecutive steps whose loss or gradient was not finite


@dataclass
class TrainingState:
    """The state of a training run. `best` and `last` return it as the content of a checkpoint.

    fixed: the result of `fixed_state`. identity: the result of `run_identity`.
    """

    model: VideoCaptioner
    optimizer: torch.optim.Optimizer
    fixed: dict
    identity: dict
    progress: Progress = field(default_factory=Progress)

    def best(self):
        """The content of best.pt."""
        p, weights = self.progress, {"qformer": self.model.qformer.state_dict()}
        best = {"step": p.step, "best": p.best_score, "best_loss": p.best_loss}
        return self.fixed | weights | best

    def last(self):
        """The content of last.pt."""
        counters = {"scored": self.progress.evaluated, "bad": self.progress.bad_steps}
        optimizer = {"optimizer": self.optimizer.state_dict()}
        return self.best() | self.identity | counters | optimizer


def run_identity(flags, train, validation, sources):
    """Return what must match to resume a run: its flags, and hashes of its clips, captions and sources.

    train: records. validation: the records that are scored after each epoch, and all records of the
    split, on which CIDEr counts document frequencies. sources: the result of `recorded_sources`.
    """
    encoded = {TRAIN: train, VALIDATION: validation[0]}
    numbers = {
        split: source_numbers(sources, split, [r["id"] for r in records])
        for split, records in encoded.items()
    }
    train = [(r["id"], r["label"], r["paraphrases"]) for r in train]
    validation = [[(r["id"], r["label"]) for r in records] for records in validation]
    return {
        "args": {k: v for k, v in flags.items() if k not in MAY_CHANGE},
        "data": json_digest(train),
        "validation": json_digest(validation),
        "sources": numbers,
    }


def json_digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_newest(folder, dry_run=False):
    """Return the checkpoint from which to resume a run, or None if there is none yet.

    This is last.pt, or previous.pt if last.pt is missing or corrupt. A corrupt file is renamed, with a
    warning, unless `dry_run` is set. Raises UserError if no checkpoint of the run is usable.
    """
    paths = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    state, corrupt = None, []
    for path in paths:
        try:
            state = read_checkpoint(path, "--resume")
            break
        except CorruptCheckpoint as error:
            corrupt.append(path)
            note(f"WARNING: {error}")
    if len(set(distributed.all_gather(state and state["step"]))) > 1:
        raise UserError(f"--resume: the processes do not see the same {folder / LAST}", code=FAILED)
    if state is None and (paths or (folder / BEST).exists()):
        raise UserError(
            f"--resume: the run in {folder} has no checkpoint to continue from; start over with"
            " --overwrite",
            code=FAILED,
        )
    if state is None:
        note(f"--resume: there is no {folder / LAST}, starting from the first step")
    elif path.name != LAST:
        note(f"WARNING: {LAST} cannot be used; resuming from {path}, at step {state['step']:,}")
        if corrupt and not dry_run and ranks.rank() == 0:
            # otherwise the next save would replace the good previous.pt with it
            os.replace(corrupt[0], folder / CORRUPT)
    return state


def check_run(saved, identity, manifest, lm_name, folder, total):
    """Return the checkpoint `saved`, from `read_newest`, if a run of `total` steps can be resumed from it.

    identity: the result of `run_identity`. manifest: that of the feature cache. Entries that earlier
    versions did not save are added. Raises UserError if flags, features, language model or clips have
    changed.
    """
    kinds = {"optimizer": dict, "args": dict, "data": str, "best": float}
    kinds |= {"scored": int, "bad": int}
    # runs of earlier versions have none of these
    added = {"best_loss": math.inf} | {key: identity[key] for key in ("validation", "sources")}
    kinds |= {"best_loss": float, "validation": str, "sources": dict}
    saved = added | saved
    if not all(isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        raise UserError(
            f"--resume: {folder / LAST} has no training state (is it a copy of best.pt?)"
        )
    check_same_flags(identity["args"], saved["args"], folder)
    saved["manifest"].settings.check_same(manifest.settings, "the feature cache")
    if saved["lm"]["fingerprint"] != hub.fingerprint(hub.find_model(lm_name, "--lm")):
        raise UserError(f"--resume: --lm {lm_name} is not the model the run was started with")
    if saved["data"] != identity["data"] or saved["styles"] != STYLES:
        raise UserError("--resume: the training clips or their captions have changed")
    if saved["validation"] != identity["validation"]:
        raise UserError(
            "--resume: the validation clips or their captions have changed, so new scores could not be"
            f" compared with that of {folder / BEST}; restore them, or start over with --overwrite"
        )
    check_sources(identity["sources"], saved["sources"], folder)
    if saved["step"] > total:
        raise UserError(f"--resume: {folder / LAST} is at step {saved['step']} of {total}")
    return saved


def resume(state, saved, folder):
    """Load a checkpoint that `check_run` has returned into a `TrainingState`.

    No random state needs to be restored: clip order, caption choice and dropout are functions of seed,
    epoch, step and clip.
    """
    state.fixed |= {"init": saved["init"]} if "init" in saved else {}
    load_weights(state.model.qformer, saved["qformer"])
    try:
        state.optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--resume: the optimizer's state does not fit this run: {error}") from None
    before, device = read_args(folder).get("device"), devices.describe(state.model.device)
    if before and before != device:
        note(
            f"--resume: the run was started on {before} and continues on {device}; results may differ"
            " slightly"
        )
    progress = Progress(saved["step"], saved["best"], saved["best_loss"])
    progress.evaluated, progress.bad_steps = saved["scored"], saved["bad"]
    state.progress = progress
    if progress.best_score > -math.inf:
        try:
            read_checkpoint(folder / BEST, "--resume")
        except UserError as error:
            lost = f"--resume: {folder / BEST} does not exist"
            note(f"WARNING: {error if (folder / BEST).exists() else lost}")
            note("WARNING: the best checkpoint is lost; the next evaluation writes a new best.pt")
            progress.best_score, progress.best_loss, progress.evaluated = -math.inf, math.inf, 0


def check_same_flags(now, before, folder):
    """Raise UserError naming the first flag that a resumed run must not change but does.

    --batch-size and --grad-accum may change if their product stays the same.
    """
    if before.get("dtype") == "auto":  # older runs stored "auto" instead of the resolved dtype
        before = before | {"dtype": now["dtype"]}
    may_differ = set()
    if clips_per_step(now) == clips_per_step(before):
        may_differ = set(STEP_SIZE)
        old, new = (" x ".join(str(flags[key]) for key in STEP_SIZE) for flags in (before, now))
        if old != new:
            note(
                f"--resume: a step is now {new} clips instead of {old}; its clips are the same, but the"
                " dropout masks differ"
            )
    for key in sorted((now.keys() | before.keys()) - may_differ):
        if now.get(key) != before.get(key):
            keys = STEP_SIZE if key in STEP_SIZE else [key]
            flags = " ".join(f"--{k.replace('_', '-')} {before.get(k)}" for k in keys)
            hint = f"; to train on, start a new run with --init {folder}" if key == "epochs" else ""
            raise UserError(
                f"--resume: the run in {folder} was started with {flags},"
                f" not {' x '.join(str(now.get(k)) for k in keys)}{hint}"
            )


def check_sources(now, before, folder):
    """Warn if training clips were encoded from other files since the run was saved.

    now, before: {split: numbers of `source_numbers`}. Raises UserError for validation clips.
    """
    changed = {}
    for split, new in now.items():
        old = before.get(split)
        if not isinstance(old, torch.Tensor) or (old.dtype, old.shape) != (new.dtype, new.shape):
            raise UserError(f"--resume: {folder / LAST} has no valid sources of split {split!r}")
        # a source becomes known, not 0, only when its clip is encoded again
        changed[split] = int(((old != new) & (new != 0)).sum())
    if changed[VALIDATION]:
        clips = counted(changed[VALIDATION], "validation clip was", "validation clips were")
        raise UserError(
            f"--resume: {clips} encoded from another file since the run was saved, so new scores could not"
            f" be compared with that of {folder / BEST}; restore the features, or start over with"
            " --overwrite"
        )
    if changed[TRAIN]:
        clips = counted(changed[TRAIN], "training clip was", "training clips were")
        note(
            f"WARNING: --resume: {clips} encoded from another file since the run was saved; training"
            " continues with the new features"
        )


def clips_per_step(flags):
    """The clips per step of a run with these flags, or None if the flags are not valid."""
    sizes = [flags.get(key) for key in STEP_SIZE]
    return math.prod(sizes) if all(type(size) is int for size in sizes) else None
