"""Annotations, style prompts and captions, and the data loaders that combine them with features.

data/annotations/<split>.json        a list of records, see `load_records`
"""

from runtime.start import SIGNALS

import hashlib
import math
import random
import signal
import unicodedata
import warnings
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from runtime import devices, ranks
from runtime.errors import FAILED, UserError, refuse_file
from runtime.feature_cache import (
    channel_statistics,
    feature_file,
    load_features,
    load_manifest,
    require_features,
    stack_stored,
)
from runtime.files import read_json
from runtime.names import id_problem, list_files

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELD_OUT = 10  # one of this many training videos, see `hold_out`
STATISTICS_CLIPS = 1000  # clips used for the mean and standard deviation of each channel

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
    `placeholders` (list), `paraphrases` (list), `start` and `end` (seconds; the clip is this span of the
    file), and `actions` (list of class names; [] means that there are none, and None that the clip is not
    annotated). Missing values become None, or [] for placeholders and paraphrases.
    Raises UserError if the file is missing, is not a list of records, is empty, contains an id twice,
    contains control characters, or names a video outside the video folder.
    """
    if problem := id_problem(split):
        raise UserError(f"split {split!r} is not a valid name: it {problem}")
    refuse_file(annotations, "--annotations")
    path = Path(annotations) / f"{split}.json"
    if not path.exists():
        available = [p.stem for p in list_files(annotations, ".json")]
        raise UserError(
            f"no annotations for split {split!r}: {path} does not exist"
            f" (available splits: {', '.join(available) or 'none'}). Run prepare_annotations.py first."
        )
    records = read_json(path, "annotations")
    texts = {"video": str, "label": str, "template": str, "placeholders": list, "paraphrases": list}
    lists = ("placeholders", "paraphrases")
    texts |= {"actions": list, "start": (int, float), "end": (int, float)}

    def is_record(r):
        return (
            isinstance(r, dict)
            and all(r.get(k) is None or isinstance(r[k], t) for k, t in texts.items())
            and all(isinstance(t, str) for k in (*lists, "actions") for t in r.get(k) or [])
            and is_span(r.get("start"), r.get("end"))
        )

    if not isinstance(records, list):
        raise UserError(f"annotations {path} must contain a JSON list of records")
    if not records:
        raise UserError(f"annotations {path} contain no clips. Run prepare_annotations.py again.")
    for i, record in enumerate(records):
        if not is_record(record):
            raise UserError(f"annotations {path}: entry {i} is not a valid record: {record!r:.120}")
        if problem := id_problem(record.get("id")):
            raise UserError(
                f"annotations {path}: entry {i} is not a valid record: its id {problem}:"
                f" {record.get('id')!r:.120}"
            )
        if problem := unsafe_content(record):
            raise UserError(f"annotations {path}: clip {record['id']} {problem}")
    if len({r["id"] for r in records}) < len(records):
        raise UserError(
            f"annotations {path} contain an id more than once. Run prepare_annotations.py again."
        )

    def value(r, key):
        return r[key] if r.get(key) not in (None, "") else [] if key in lists else None

    return [{key: value(r, key) for key in ("id", *texts)} for r in records]


def is_span(start, end):
    """True if both are None, or if 0 <= start < end in seconds."""
    if start is None or end is None:
        return start is end
    return not {type(start), type(end)} & {bool} and 0 <= start < end < math.inf


def unsafe_content(record):
    """Describe why a record is unsafe to use, or return None.

    Texts must not contain control characters, which could change the state of a terminal, and the
    video must be inside the video folder.
    """
    texts = [record.get(k) or "" for k in ("video", "label", "template")]
    lists = ("placeholders", "paraphrases", "actions")
    for text in texts + [t for k in lists for t in record.get(k) or []]:
        if not text.isprintable() and (control := list(filter(is_control, text))):
            return f"contains the control character {control[0]!r} in {text!r:.80}"
    video = PurePosixPath((record.get("video") or "").replace("\\", "/"))  # as written on Windows
    if video.is_absolute() or PureWindowsPath(str(video)).is_absolute() or ".." in video.parts:
        return f"names a video outside the video folder: {str(video)!r}"
    if len(str(video)) > 1000 or any(len(part.encode()) > 255 for part in video.parts):
        return f"has a video file name that is too long: {str(video)[:80]!r}…"


def is_control(character):
    """True for control characters, line and paragraph separators, and lone surrogates."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def by_hash(ids, seed):
    """Sort ids by hash(seed, id). The first N are a random sample that barely changes if ids are added."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def sample_statistics(features, records, settings, seed, workers):
    """Compute the mean and standard deviation (E,) of each channel over a sample of the training clips."""
    ids = by_hash((r["id"] for r in records), seed)[:STATISTICS_CLIPS]
    return channel_statistics(features, TRAIN, ids, settings, workers)


def choose_captions(record, count, seed, epoch):
    """Sample `count` pairs (style, text) for one clip, as a pure function of (seed, epoch, id).

    The first pair is the label. The others are paraphrases, sampled without replacement. There are
    fewer than `count` pairs if the clip has too few paraphrases: computing a caption twice would cost
    time and give the same gradient. If `count` is 1, the pair is the label or a paraphrase, with
    probability 1/2 each.
    """
    rng = random.Random(f"captions:{seed}:{epoch}:{record['id']}")
    label = ("label", record["label"])
    paraphrases = [("sentence", text) for text in dict.fromkeys(record["paraphrases"])]
    rng.shuffle(paraphrases)
    if paraphrases and count == 1:
        return [label if rng.random() < 0.5 else paraphrases[0]]
    return [label, *paraphrases[: count - 1]]


class Caption(NamedTuple):
    """A tokenised caption."""

    style: str
    prompt: list  # ids of the style prompt
    target: list  # ids of ' ' + caption + eos


def encode_caption(tokenizer, style, caption):
    """Tokenise one caption. Returns a `Caption`."""
    prompt = tokenizer(STYLES[style], add_special_tokens=False)["input_ids"]
    target = tokenizer(" " + caption, add_special_tokens=False)["input_ids"]
    return Caption(style, prompt, [*target, tokenizer.eos_token_id])


def with_features(split, features, annotations, limit=None, allow_missing=0):
    """Read the records of a split, or its first `limit`, and return those that have features."""
    records = load_records(annotations, split)[:limit]
    return require_features(features, split, records, allow_missing)


def video_of(record):
    """Return the name of a record's video, which all windows of the video share."""
    return record["video"] or record["id"]


def hold_out(records, seed):
    """Split training records into (train, held out). Windows of a video are in the same part.

    A tenth of the videos is held out, to choose the best epoch of a head.
    """
    videos = {video_of(r) for r in records}
    chosen = set(by_hash(videos, f"held out:{seed}")[: max(1, len(videos) // HELD_OUT)])
    held_out = [r for r in records if video_of(r) in chosen]
    return [r for r in records if video_of(r) not in chosen], held_out


# ---- batches ----------------------------------------------------------------------------


def no_captions(_):
    return []


class FeatureDataset(Dataset):
    """The clips of one split, with features and tokenised captions.

    Item i: {"id", "features" int8 or fp16 (N, E), "scale" (E,), "offset" (E,), "cls" (E,) if stored,
             "captions": a list of `Caption`}.
    `choose(record)` returns the pairs (style, text) of a clip. It runs in the loader's workers, and so
    does the tokenizer. By default no clip has captions.
    """

    def __init__(self, features, split, records, settings, tokenizer=None, choose=no_captions):
        self.features, self.split = Path(features), split
        self.records, self.settings = records, settings
        self.tokenizer, self.choose = tokenizer, choose

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        try:
            path = feature_file(self.features, self.split, record["id"])
            item = load_features(path, record["id"], self.settings)
        except UserError as error:
            return error  # `batches` raises it; raised in a worker, it would become a traceback
        item["captions"] = [encode_caption(self.tokenizer, *c) for c in self.choose(record)]
        return item


def collate(items):
    """Stack B clips with their captions.

    Returns {"ids": B strings, "features" (B, N, E), "scale" (B, E), "offset" (B, E)}, "cls" (B, E) if
    stored, and the texts as in `collate_text`.
    """
    if error := next((item for item in items if isinstance(item, UserError)), None):
        return error
    batch = stack_stored(items) | collate_text([item["captions"] for item in items])
    # Move the batch to shared memory here, so that a full /dev/shm raises an error. In the worker's
    # sending thread, torch would drop the batch silently.
    if torch.utils.data.get_worker_info():
        for tensor in batch.values():
            tensor.share_memory_()
    return {"ids": [item["id"] for item in items], **batch}


def collate_text(captions):
    """Pad the captions of B clips, which are B lists of `Caption`, with R captions in total.

    Returns int64 tensors {"input_ids" (R, L), "targets" (M,), "positions" (M,), "styles" (M,)}. Texts
    are padded on the right, so with causal attention no caption token sees the padding. Only the M
    caption and eos tokens contribute to the loss. `positions` are the indices in the flattened (R*L)
    text at which they are predicted, and `styles` are the indices of their styles in `STYLES`. They are
    computed here, in the worker, because finding them on the GPU would need a synchronisation.
    If the clips have different numbers of captions, there is also "clips" (R,), the clip of each text.
    """
    texts = [caption for of_clip in captions for caption in of_clip]
    length = max((len(prompt) + len(target) for _, prompt, target in texts), default=0)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    positions, targets, styles = [], [], []
    for row, (style, prompt, target) in enumerate(texts):
        end = len(prompt) + len(target)
        input_ids[row, :end] = torch.tensor(prompt + target)
        # the prompt's last token predicts the caption's first
        first = row * length + len(prompt) - 1
        positions.extend(range(first, first + len(target)))
        targets.extend(target)
        styles.extend([[*STYLES].index(style)] * len(target))
    text = {"positions": positions, "targets": targets, "styles": styles}
    counts = list(map(len, captions))
    if len(set(counts)) > 1:
        text["clips"] = [clip for clip, count in enumerate(counts) for _ in range(count)]
    text = {k: torch.tensor(v, dtype=torch.long) for k, v in text.items()}
    return {"input_ids": input_ids, **text}


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


def feature_batches(features, split, records, batch_size, workers, device):
    """Iterate over batches of the features of records, in their order and without captions."""
    data = FeatureDataset(features, split, records, load_manifest(features).settings)
    return batches(loader(data, batch_size, workers, device))


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
            code=FAILED,
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
