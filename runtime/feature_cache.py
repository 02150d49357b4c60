"""The feature cache on disk: the format of one clip's file and of the manifest, and how to read them.

data/features/manifest.json          how the features were computed, see `Manifest`
data/features/<split>/<id>.pt        the features of one clip, see `save_features`
data/features/sources.jsonl          the video file of each clip, see `recorded_sources`

Shapes: N video tokens, E video width, B clips.
"""

import hashlib
import math
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import clip_log, distributed
from runtime.cli import note
from runtime.errors import DONE, FAILED, UserError, out_of_files, out_of_memory, refuse_file
from runtime.files import read_json, read_torch, torch_bytes, write_atomic
from runtime.names import counted, first_few, list_names
from runtime.sources import Source, has_changed

FORMAT_VERSION = 1
OPTIONAL = {"family", "mean_std", "cls"}  # fields of `Settings`
MANIFEST = "manifest.json"
SOURCES = "sources"  # the name of sources.jsonl in clip_log
# ImageNet mean and standard deviation, used by V-JEPA 2 (Assran et al. 2025, arXiv:2506.09985)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STORES = {"int8": torch.int8, "fp16": torch.float16}
CHOICES = {
    "sampling": ("bin_centres", "still"),  # still: the first frame, repeated
    "resize": ("squash", "crop", "pad"),  # see `encoder.transform`
    "store": tuple(STORES),
    "compute_dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Settings:
    """How features were computed. Two caches are compatible only if all fields are equal.

    `CHOICES` lists the values of the fields that have a fixed set of them. Manifests written before a
    field of `OPTIONAL` existed mean its default.
    """

    format_version: int = FORMAT_VERSION
    encoder_fingerprint: str = ""
    family: str = "vjepa2"  # type of the encoder, see `encoder.FAMILIES`
    num_frames: int = 32
    sampling: str = "bin_centres"
    resize: str = "squash"
    size: int = 256  # pixels; frames are size x size
    mean_std: tuple = IMAGENET  # of the pixels' three channels, on a scale from 0 to 1
    pool: int = 1  # the encoder's tokens are averaged over squares of pool x pool
    grid: tuple = (16, 16, 16)  # number of tokens along (T, H, W)
    width: int = 1024  # E
    cls: bool = False  # whether the CLS of each clip is stored too
    store: str = "int8"
    compute_dtype: str = "float32"

    @property
    def num_tokens(self):
        return math.prod(self.grid)

    @property
    def clip_bytes(self):
        """Size in bytes of one clip's features, including the scale and offset of each channel."""
        return self.width * (self.num_tokens * STORES[self.store].itemsize + 2 * 4 + 2 * self.cls)

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
        return cls(Settings(**{k: _frozen(v) for k, v in settings.items()}), value["info"])

    def as_dict(self):
        settings = asdict(self.settings) | {"grid": list(self.settings.grid)}
        return {"settings": settings, "info": self.info}


def load_manifest(features):
    """Read `<features>/manifest.json`. Raises UserError if it is missing or not valid."""
    refuse_file(features, "--features")
    path = Path(features) / MANIFEST
    if not path.exists():
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


def _frozen(value):
    """Convert the lists of a JSON value to tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _are_settings(value):
    """True if a JSON value has the fields of `Settings`, with valid types and values."""
    counts = ("format_version", "num_frames", "size", "pool", "width")
    return (
        isinstance(value, dict)
        and {field.name for field in fields(Settings)} - OPTIONAL <= value.keys()
        and value.keys() <= {field.name for field in fields(Settings)}
        and all(is_count(value[k]) for k in counts)
        and isinstance(value["encoder_fingerprint"], str)
        and isinstance(value["grid"], list)
        and len(value["grid"]) == 3
        and all(map(is_count, value["grid"]))
        and isinstance(value.get("family", ""), str)
        and type(value.get("cls", False)) is bool
        and _is_mean_std(value.get("mean_std", IMAGENET))
        and all(value[k] in choices for k, choices in CHOICES.items())
    )


def _is_mean_std(value):
    """True for two lists of three numbers, of which the second is positive."""
    try:
        mean, std = (list(map(float, v)) for v in value)
    except (TypeError, ValueError, OverflowError):
        return False
    return (
        len(mean) == len(std) == 3
        and all(map(math.isfinite, mean))
        and min(std) > 0
        and max(std) < math.inf
    )


def feature_file(features, split, clip_id):
    return features / split / f"{clip_id}.pt"


def complete(features, keys):
    """Return the keys (split, id) that have a feature file. A file gets its name once it is complete."""
    have = {
        split: set(list_names(features / split, ".pt")) for split in {split for split, _ in keys}
    }
    return {(split, clip_id) for split, clip_id in keys if f"{clip_id}.pt" in have[split]}


def recorded_sources(features, part):
    """Return {(split, id): `Source`}: the files that the features of a part, (i, n), were computed from.

    A cache made before sources were recorded has none.
    """
    entries = clip_log.read(features, SOURCES, part)
    return {key: found for key, entry in entries.items() if (found := Source.parse(entry))}


def source_numbers(sources, split, ids):
    """Return int64 (clips,), the first 60 bits of the digest of each clip's `Source`, or 0 if unknown.

    sources: the result of `recorded_sources`. The number of a clip changes if it is encoded from another
    file.
    """

    def number(source):
        if not (source and source.digest):
            return 0
        digest = source.digest
        if source.span:
            digest = hashlib.sha256(f"{digest}{source.span}".encode()).hexdigest()
        return int(digest[:15], 16)

    return torch.tensor([number(sources.get((split, i))) for i in ids], dtype=torch.int64)


def source_entry(key, source):
    """Return the line of sources.jsonl for the `Source` of the clip `key` (split, id), as a dict."""
    fields = {k: v for k, v in source._asdict().items() if k != "span" or v}
    return {"split": key[0], "id": key[1], **fields}


def checksum(clip_id, stored):
    """Compute the crc32 of a clip's features, scale, offset, CLS, shape and id."""
    value = 0
    for key in ("features", "scale", "offset", "cls"):
        if stored.get(key) is not None:
            value = zlib.crc32(stored[key].numpy(), value)
    return zlib.crc32(f"{tuple(stored['features'].shape)}{clip_id}".encode(), value)


def save_features(path, clip_id, stored, decoder):
    """Write the features of one clip atomically.

    stored: `features` int8 or float16 (N, E) and, for int8, `scale` and `offset` float32 (E,), where
    x = scale * features + offset; `cls` float16 (E,) if the encoder has a CLS. No tensor may be a view,
    because torch would save its whole base.
    decoder: the name of the library that decoded the clip.
    """
    record = {**stored, "crc32": checksum(clip_id, stored), "decoder": decoder}
    write_atomic(path, torch_bytes(record))


def load_features(path, clip_id, settings):
    """Read one clip: a dict with `id`, `features` (N, E), `scale` and `offset` (E,), and `cls` (E,) if stored.

    For float16 features, scale is 1 and offset is 0. Raises UserError (exit code 1) with the id of the
    clip if the file is missing, truncated, corrupt or of another format, or contains NaN or infinity.
    """

    def is_tensor(value, dtype, shape):
        return isinstance(value, torch.Tensor) and (value.dtype, value.shape) == (dtype, shape)

    def unusable(why):
        return UserError(
            f"features of clip {clip_id} ({path}) {why}."
            " Delete the file and run preprocess_ssv2.py again.",
            code=FAILED,
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
    dtype = STORES[settings.store]
    if not is_tensor(features, dtype, shape):
        found = tuple(features.shape), features.dtype
        raise unusable(f"have shape {found[0]} and dtype {found[1]}, not {shape} and {dtype}")
    extra = ("scale", "offset") if settings.store == "int8" else ()
    if not all(is_tensor(record.get(k), torch.float32, shape[1:]) for k in extra):
        raise unusable("do not have a valid scale and offset for each channel")
    if settings.cls and not is_tensor(record.get("cls"), torch.float16, shape[1:]):
        raise unusable("do not have a valid CLS")
    cls = ("cls",) if settings.cls else ()
    stored = {k: record[k] for k in ("features", *extra, *cls)}
    if type(record.get("crc32")) is not int or record["crc32"] != checksum(clip_id, stored):
        raise unusable("are corrupt (wrong checksum)")
    if not all(stored[k].isfinite().all() for k in (*(extra or ("features",)), *cls)):
        raise unusable("contain NaN or infinity")
    return {"id": clip_id, **stored, **with_scale(stored)}


def with_scale(stored):
    """Return the features of a stored clip with scale and offset, which are 1 and 0 for float16."""
    width = stored["features"].shape[1]
    return {
        "features": stored["features"],
        "scale": stored.get("scale", torch.ones(width)),
        "offset": stored.get("offset", torch.zeros(width)),
    }


def stack_stored(clips):
    """Stack B stored clips: {"features" (B, N, E), "scale" (B, E), "offset" (B, E)}, "cls" (B, E) if stored."""
    clips = [c | with_scale(c) for c in clips]
    names = ("features", "scale", "offset", "cls")
    return {k: torch.stack([c[k] for c in clips]) for k in names if k in clips[0]}


def channel_statistics(features, split, ids, settings, workers):
    """Mean and standard deviation (E,) of each channel over the clips `ids`.

    The sums are float64, the results float32. The standard deviation is at least 1e-6.
    """

    def sums(clip_id):
        path = feature_file(Path(features), split, clip_id)
        item = load_features(path, clip_id, settings)
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


def require_features(features, split, records, allow_missing=0):
    """Return the records that have features. Raises UserError if more than `allow_missing` do not."""
    root = Path(features) / split
    existing = set(list_names(root, ".pt"))
    missing = [r["id"] for r in records if f"{r['id']}.pt" not in existing]
    if len(missing) > allow_missing:
        raise UserError(
            f"{len(missing)} of {counted(len(records), 'clip')} of split {split!r} have no features in {root}"
            f" (for example {first_few(missing)}). Run preprocess_ssv2.py --split {split},"
            " or skip up to N such clips with --allow-missing N."
        )
    skipped = set(missing)
    return [r for r in records if r["id"] not in skipped]


def verify(features, keys, paths, spans, part, workers):
    """Check the feature files of clips for damage, wrong shapes and NaN, and print the result.

    keys: (split, id) of the clips of a part, (i, n). paths: {key: path} of the clips that have a file, to
    compare it with their recorded source, or None to check the features only. spans: {key: (start, end)} of
    the clips that are a part of their file. Returns exit code 1 if any features are damaged or missing, or
    any clip has changed or has no file, else 0.
    """
    settings, known = load_manifest(features).settings, recorded_sources(features, part)

    def check(key):
        try:
            load_features(feature_file(features, *key), key[1], settings)
        except UserError as error:
            return "damaged", str(error)
        if paths is None:
            return None
        if key not in paths:
            text = f"clip {key[1]}: it has features, but its file is not in --videos"
            return "without a file", text
        if key in known and has_changed(paths[key], known[key]):
            path = paths[key]
            return "changed", f"clip {key[1]}: {path} has changed since its features were computed"
        if key in known and known[key].span != spans.get(key):
            text = f"clip {key[1]}: its start and end have changed since its features were computed"
            return "changed", text

    have = complete(features, keys)
    unrecorded = have & paths.keys() - known.keys() if paths else set()
    with ThreadPoolExecutor(max(1, workers)) as threads:
        found = threads.map(check, sorted(have))
        bad = list(filter(None, tqdm(found, total=len(have), unit="file")))
    bad = [problem for part in distributed.all_gather(bad) for problem in part]
    for _, text in bad[:20]:
        note(text)
    if len(bad) > 20:
        note(f"… and {len(bad) - 20} more")
    sums = distributed.sums(len(have), len(keys), len(unrecorded))
    have, wanted, unrecorded = map(int, sums)
    if unrecorded:
        clips = counted(unrecorded, "clip was", "clips were")
        note(
            f"{clips} not compared with the files, because {SOURCES}.jsonl has no valid line for them"
        )
    kinds = Counter(kind for kind, _ in bad)
    text = f"{have - len(bad):,} intact, {kinds['damaged']:,} damaged, {wanted - have:,} missing"
    more = () if paths is None else ("changed", "without a file")
    print(", ".join([text, *(f"{kinds[kind]:,} {kind}" for kind in more)]))
    return FAILED if bad or have < wanted else DONE
