"""The on-disk formats of annotations and features, and the data loaders that read them.

data/annotations/<split>.json        a list of records, see `load_records`
data/features/manifest.json          how the features were computed, see `Manifest`
data/features/<split>/<id>.pt        the features of one clip, see `save_features`
"""

from runtime.start import SIGNALS

import hashlib
import math
import os
import random
import signal
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from runtime import devices, ranks
from runtime.errors import UserError, out_of_files, out_of_memory
from runtime.files import is_clip_id, read_json, read_torch, torch_bytes, write_atomic

FORMAT_VERSION = 1
TRAIN, VALIDATION, TEST = "train", "validation", "test"

# The text prompt between the soft prompts and the caption. One model writes captions in both styles,
# and each style is scored against references of the same style. The first prompt is the one used by
# the original code.
STYLES = {
    "label": "a video showing:",  # the wording of the dataset's labels; validation uses this style
    "sentence": "a sentence about the video:",  # a paraphrase, with a capital letter and a full stop
}


# ---- annotations ---------------------------------------------------------------------------


def load_records(annotations, split):
    """Read `<annotations>/<split>.json` and return a list of dicts, one per clip.

    Each record has the keys `id`, `video` (file name), `label`, `template` (with [placeholders]),
    `placeholders` (list) and `paraphrases` (list). Missing values become None or [].
    Raises UserError if the file is missing, is not a list of records, contains an id twice, contains
    control characters, or names a video outside the video folder.
    """
    if not is_clip_id(split):
        raise UserError(f"split {split!r} is not a valid name")
    path = Path(annotations) / f"{split}.json"
    if not path.is_file():
        available = sorted(p.stem for p in Path(annotations).glob("*.json"))
        raise UserError(
            f"no annotations for split {split!r}: {path} does not exist"
            f" (available splits: {', '.join(available) or 'none'}). Run prepare_annotations.py first."
        )
    records = read_json(path, "annotations")
    texts = {"video": str, "label": str, "template": str, "placeholders": list, "paraphrases": list}
    lists = ("placeholders", "paraphrases")

    def is_record(r):
        return (
            isinstance(r, dict)
            and is_clip_id(r.get("id"))
            and all(r.get(k) is None or isinstance(r[k], t) for k, t in texts.items())
            and all(isinstance(t, str) for k in lists for t in r.get(k) or [])
        )

    if not isinstance(records, list):
        raise UserError(f"annotations {path} must contain a JSON list of records")
    for i, record in enumerate(records):
        if not is_record(record):
            raise UserError(f"annotations {path}: entry {i} is not a valid record: {record!r:.120}")
        if problem := unsafe_content(record):
            raise UserError(f"annotations {path}: clip {record['id']} {problem}")
    if len({r["id"] for r in records}) < len(records):
        raise UserError(
            f"annotations {path} contain an id more than once. Run prepare_annotations.py again."
        )
    return [{k: r.get(k) or ([] if k in lists else None) for k in ("id", *texts)} for r in records]


def unsafe_content(record):
    """Describe why a record is unsafe to use, or return None.

    Texts must not contain control characters, which could change the state of a terminal, and the
    video must be inside the video folder.
    """
    texts = [record.get(k) or "" for k in ("video", "label", "template")]
    for text in texts + [t for k in ("placeholders", "paraphrases") for t in record.get(k) or []]:
        if not text.isprintable() and (control := list(filter(is_control, text))):
            return f"contains the control character {control[0]!r} in {text!r:.80}"
    video = PurePosixPath(record.get("video") or "")
    if video.is_absolute() or ".." in video.parts:
        return f"names a video outside the video folder: {str(video)!r}"
    if len(str(video)) > 1000 or any(len(part.encode()) > 255 for part in video.parts):
        return f"has a video file name that is too long: {str(video)[:80]!r}…"


def is_control(character):
    """True for control characters, line and paragraph separators, and lone surrogates."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def by_hash(ids, seed):
    """Sort ids by hash(seed, id). The first N are a random sample that barely changes if ids are added."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def choose_captions(record, count, seed, epoch):
    """Sample `count` pairs (style, text) for one clip, as a pure function of (seed, epoch, id).

    The first pair is the label. The others are paraphrases, sampled without replacement and repeated
    if there are too few. If the clip has no paraphrases, all pairs are the label. If `count` is 1,
    the pair is the label or a paraphrase, with probability 1/2 each.
    """
    rng = random.Random(f"captions:{seed}:{epoch}:{record['id']}")
    label = ("label", record["label"])
    paraphrases = [("sentence", text) for text in record["paraphrases"]]
    rng.shuffle(paraphrases)
    if not paraphrases:
        return [label] * count
    if count == 1:
        return [label if rng.random() < 0.5 else paraphrases[0]]
    return [label] + [paraphrases[i % len(paraphrases)] for i in range(count - 1)]


def encode_caption(tokenizer, style, caption):
    """Tokenise one caption. Returns the ids of the style prompt and the ids of ' ' + caption + eos."""
    prompt = tokenizer(STYLES[style], add_special_tokens=False)["input_ids"]
    target = tokenizer(" " + caption, add_special_tokens=False)["input_ids"]
    return prompt, [*target, tokenizer.eos_token_id]


# ---- features ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How features were computed. Two caches are compatible only if all fields are equal."""

    format_version: int = FORMAT_VERSION
    encoder_fingerprint: str = ""
    num_frames: int = 32
    sampling: str = "bin_centres"  # or still: the first frame, repeated
    resize: str = "squash"  # or crop, pad
    size: int = 256  # pixels; frames are size x size
    pool: int = 1  # the encoder's tokens are averaged over squares of pool x pool
    grid: tuple = (16, 16, 16)  # number of tokens along (T, H, W)
    width: int = 1024  # E
    store: str = "int8"  # or fp16
    compute_dtype: str = "float32"  # or bfloat16

    @property
    def num_tokens(self):
        return math.prod(self.grid)

    @property
    def clip_bytes(self):
        """Size in bytes of one clip's features, including the scale and offset of each channel."""
        size = {"int8": 1, "fp16": 2}[self.store]
        return self.width * (self.num_tokens * size + 2 * 4)

    def check_same(self, other, what):
        """Raise UserError if `other` differs, naming the first field that does.

        what: a description of where `other` comes from, with which the message starts.
        """
        for field in fields(self):
            wanted, found = getattr(self, field.name), getattr(other, field.name)
            if wanted != found:
                raise UserError(
                    f"{what} has {field.name} = {found!r}, but this command needs {wanted!r}. Use the"
                    " same setting, or a different folder."
                )


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `settings` must be the same wherever the features are used. `info` (the encoder's name and the
    versions of packages) is for reference only.
    """

    settings: Settings
    info: dict

    @classmethod
    def parse(cls, value):
        """Convert a JSON value to a `Manifest`. Raises ValueError if it is not a valid manifest."""
        settings = value.get("settings") if isinstance(value, dict) else None
        if not _are_settings(settings) or not isinstance(value.get("info"), dict):
            raise ValueError("it is not a manifest written by preprocess_ssv2.py")
        return cls(Settings(**settings | {"grid": tuple(settings["grid"])}), value["info"])

    def as_dict(self):
        settings = asdict(self.settings) | {"grid": list(self.settings.grid)}
        return {"settings": settings, "info": self.info}


def load_manifest(features):
    """Read `<features>/manifest.json`. Raises UserError if it is missing or not valid."""
    path = Path(features) / "manifest.json"
    if not path.is_file():
        raise UserError(f"no feature cache: {path} does not exist. Run preprocess_ssv2.py first.")
    value = read_json(path, "manifest")
    settings = value.get("settings") if isinstance(value, dict) else None
    version = settings.get("format_version") if isinstance(settings, dict) else None
    # Checked before parsing: another version may have other fields.
    if type(version) is int and version != FORMAT_VERSION:
        raise UserError(
            f"manifest {path} has format version {version}, but this code reads version"
            f" {FORMAT_VERSION}. Run preprocess_ssv2.py with a new folder."
        )
    try:
        return Manifest.parse(value)
    except ValueError:
        raise UserError(f"manifest {path} was not written by preprocess_ssv2.py") from None


def is_count(value):
    """True for a positive int up to 2**20, the largest plausible size of a model or a grid."""
    return type(value) is int and 0 < value <= 1 << 20


def _are_settings(value):
    """True if a JSON value has exactly the fields of `Settings`, with valid types and values."""
    counts = ("format_version", "num_frames", "size", "pool", "width")
    words = ("encoder_fingerprint", "sampling", "resize", "store", "compute_dtype")
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in fields(Settings)}
        and all(is_count(value[k]) for k in counts)
        and all(isinstance(value[k], str) for k in words)
        and isinstance(value["grid"], list)
        and len(value["grid"]) == 3
        and all(map(is_count, value["grid"]))
        and value["store"] in ("int8", "fp16")
        and value["resize"] in ("squash", "crop", "pad")
        and value["sampling"] in ("bin_centres", "still")
        and value["compute_dtype"] in ("float32", "bfloat16")
    )


def checksum(clip_id, stored):
    """Compute the crc32 of a clip's features, scale, offset, shape and id."""
    value = 0
    for key in ("features", "scale", "offset"):
        if stored.get(key) is not None:
            value = zlib.crc32(stored[key].numpy(), value)
    return zlib.crc32(f"{tuple(stored['features'].shape)}{clip_id}".encode(), value)


def save_features(path, clip_id, stored, decoder):
    """Write the features of one clip atomically.

    stored: `features` int8 or float16 (N, E) and, for int8, `scale` and `offset` float32 (E,), where
    x = scale * features + offset. No tensor may be a view, because torch would save its whole base.
    decoder: the name of the library that decoded the clip.
    """
    record = {**stored, "crc32": checksum(clip_id, stored), "decoder": decoder}
    write_atomic(path, torch_bytes(record))


def load_features(path, clip_id, settings):
    """Read one clip: a dict with `id`, `features` (N, E), and `scale` and `offset` (E,).

    For float16 features, scale is 1 and offset is 0. Raises UserError (exit code 1) with the id of the
    clip if the file is missing, truncated, corrupt or of another format, or contains NaN or infinity.
    """

    def is_tensor(value, dtype, shape):
        return (
            type(value) is torch.Tensor
            and (value.dtype, tuple(value.shape)) == (dtype, shape)
            and (value.layout, value.device.type) == (torch.strided, "cpu")
            and value.is_contiguous()
            and not (value.requires_grad or value.is_neg() or value.is_nested)
        )

    def unusable(why):
        return UserError(
            f"features of clip {clip_id} ({path}) {why}."
            " Delete the file and run preprocess_ssv2.py again.",
            code=1,
        )

    try:
        record = read_torch(path, verify=False, mmap=True)  # the crc32 is compared below
    except FileNotFoundError:
        raise unusable("are missing") from None
    except (OSError, ValueError) as error:  # a disk error, or a truncated or foreign file
        if out_of_memory(error) or out_of_files(error):
            raise
        raise unusable(f"cannot be read ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("features"), torch.Tensor):
        raise unusable("are not a valid feature file")
    features, shape = record["features"], (settings.num_tokens, settings.width)
    dtype = {"int8": torch.int8, "fp16": torch.float16}[settings.store]
    if not is_tensor(features, dtype, shape):
        found = "nested" if features.is_nested else tuple(features.shape)
        raise unusable(f"have shape {found} and dtype {features.dtype}, not {shape} and {dtype}")
    extra = ("scale", "offset") if settings.store == "int8" else ()
    if not all(is_tensor(record.get(k), torch.float32, shape[1:]) for k in extra):
        raise unusable("do not have a valid scale and offset for each channel")
    stored = {k: record[k] for k in ("features", *extra)}
    if type(record.get("crc32")) is not int or record["crc32"] != checksum(clip_id, stored):
        raise unusable("are corrupt (wrong checksum)")
    if not all(stored[k].isfinite().all() for k in extra or ("features",)):
        raise unusable("contain NaN or infinity")
    return {"id": clip_id, **with_scale(stored)}


def with_scale(stored):
    """Return the features of a stored clip with scale and offset, which are 1 and 0 for float16."""
    width = stored["features"].shape[1]
    return {
        "features": stored["features"],
        "scale": stored.get("scale", torch.ones(width)),
        "offset": stored.get("offset", torch.zeros(width)),
    }


def stack_stored(clips):
    """Stack B stored clips: {"features" (B, N, E), "scale" (B, E), "offset" (B, E)}."""
    clips = [with_scale(c) for c in clips]
    return {k: torch.stack([c[k] for c in clips]) for k in ("features", "scale", "offset")}


def channel_statistics(features, split, ids, settings, workers):
    """Mean and standard deviation (E,) of each channel over the clips `ids`.

    The sums are float64, the results float32. The standard deviation is at least 1e-6.
    """

    def sums(clip_id):
        item = load_features(Path(features) / split / f"{clip_id}.pt", clip_id, settings)
        x = item["features"].double() * item["scale"].double() + item["offset"].double()
        return x.sum(0), x.square().sum(0)

    total = square = 0.0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for s, q in tqdm(
            pool.map(sums, ids), total=len(ids), unit="clip", desc="statistics", leave=False
        ):
            total, square = total + s, square + q
    mean = total / (len(ids) * settings.num_tokens)
    variance = square / (len(ids) * settings.num_tokens) - mean.square()
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


class FeatureDataset(Dataset):
    """The clips of one split, with features and tokenised captions.

    Item i: {"id", "features" int8 or fp16 (N, E), "scale" (E,), "offset" (E,),
             "captions": K pairs (prompt ids, target ids)}.
    `choose(record)` returns the K pairs (style, text) of a clip. It runs in the loader's workers, and
    so does the tokenizer.
    """

    def __init__(self, features, split, records, settings, tokenizer, choose):
        self.root, self.records, self.settings = Path(features) / split, records, settings
        self.tokenizer, self.choose = tokenizer, choose

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        try:
            item = load_features(self.root / f"{record['id']}.pt", record["id"], self.settings)
        except UserError as error:
            return error  # `batches` raises it; raised in a worker, it would become a traceback
        item["captions"] = [encode_caption(self.tokenizer, *c) for c in self.choose(record)]
        return item


def require_features(features, split, records, allow_missing=0):
    """Return the records that have features. Raises UserError if more than `allow_missing` do not."""
    root = Path(features) / split
    existing = {entry.name for entry in os.scandir(root)} if root.is_dir() else set()
    missing = [r["id"] for r in records if f"{r['id']}.pt" not in existing]
    if len(missing) > allow_missing:
        raise UserError(
            f"{len(missing)} of {len(records)} clips of split {split!r} have no features in {root}"
            f" (for example {', '.join(missing[:3])}). Run preprocess_ssv2.py --splits {split},"
            " or skip up to N such clips with --allow-missing N."
        )
    skipped = set(missing)
    return [r for r in records if r["id"] not in skipped]


def collate(items):
    """Stack B clips with K captions each.

    Returns {"ids": B strings, "features" (B, N, E), "scale" (B, E), "offset" (B, E),
             "input_ids" int64 (B*K, L), "targets" int64 (M,), "positions" int64 (M,)}.
    Texts are padded on the right, so with causal attention no caption token sees the padding. Only
    the M caption and eos tokens contribute to the loss. `positions` are the indices in the flattened
    (B*K*L) text at which they are predicted. They are computed here, in the worker, because finding
    them on the GPU would need a synchronisation.
    """
    if error := next((item for item in items if isinstance(item, UserError)), None):
        return error
    batch = stack_stored(items) | collate_text(pair for item in items for pair in item["captions"])
    # Move the batch to shared memory here, so that a full /dev/shm raises an error. In the worker's
    # sending thread, torch would drop the batch silently.
    if torch.utils.data.get_worker_info():
        for tensor in batch.values():
            tensor.share_memory_()
    return {"ids": [item["id"] for item in items], **batch}


def collate_text(pairs):
    """Pad pairs (prompt ids, target ids) into `input_ids`, `positions` and `targets`, see `collate`."""
    pairs = list(pairs)
    length = max((len(prompt) + len(target) for prompt, target in pairs), default=0)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    positions, targets = [], []
    for row, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        input_ids[row, :end] = torch.tensor(prompt + target)
        # the prompt's last token predicts the caption's first
        first = row * length + len(prompt) - 1
        positions.extend(range(first, first + len(target)))
        targets.extend(target)
    positions, targets = (torch.tensor(x, dtype=torch.long) for x in (positions, targets))
    return {"input_ids": input_ids, "positions": positions, "targets": targets}


def loader(dataset, batch_size, workers, device):
    """A DataLoader that leaves the global random state unchanged, for any number of workers.

    For a GPU, batches are in pinned memory, from which copies are asynchronous.
    """
    # torch warns if there are more workers than CPUs, but the user may have asked for that
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return DataLoader(
        dataset,
        batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=devices.on_gpu(device),
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )


def shared_bytes(settings, batch_size, workers):
    """Upper bound in bytes on the shared memory used by the loaders of all processes on this machine.

    Each worker prefetches two batches (torch's prefetch_factor), and one more is in use. The captions
    of a batch, a few kB, are not counted.
    """
    batches = 2 * workers + 1 if workers else 0
    return ranks.local_world_size() * batches * batch_size * settings.clip_bytes


@contextmanager
def shared_memory(settings, workers, **batch_sizes):
    """Turn torch's error about a full /dev/shm into a UserError that says how much is needed.

    batch_sizes: {purpose of a loader: its batch size}. The loaders run one after the other.
    """
    try:
        yield
    except RuntimeError as error:
        if "shared memory" not in str(error) or not workers or "nccl" in str(error).lower():
            raise
        needs = {k: shared_bytes(settings, size, workers) / 1e6 for k, size in batch_sizes.items()}
        listed = " and then ".join(f"{mb:,.0f} MB for {what}" for what, mb in needs.items())
        raise UserError(
            f"/dev/shm is too small: --workers {workers} needs {listed}. Use --workers 0 or increase it"
            f" (for a container: --shm-size {math.ceil(max(needs.values()))}m)",
            code=1,
        ) from None


def _leave_signals_to_the_parent(_):
    """Keep the loader's workers alive on a signal, because the parent still has to finish its step.

    Ctrl-C and the SIGTERM of a batch system reach the workers too. `cli.run` kills them when the script
    ends. If that does not happen, a worker exits 10 minutes after a SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


def batches(loader):
    """Iterate over a loader. Raises the UserError of a clip whose features could not be read."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
