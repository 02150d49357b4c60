"""Compute one vector per clip, in five kinds, and store those of a split in an .npz file.

Shapes: B clips, n clips of a split or windows of a film, N video tokens, E video width, Q queries,
D language model width.
"""

import hashlib
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import windows
from checkpoint import weights_digest
from dataset import STYLES, FeatureDataset, batches, loader
from runtime.cli import note
from runtime.errors import FAILED, UserError, out_of_files, out_of_memory
from runtime.feature_cache import Settings, recorded_sources
from runtime.files import parse_json, temporary_name
from runtime.names import counted

# Ordered from least to most dependent on training for captions
KINDS = {
    "features": "mean of the V-JEPA 2 features, standardised",
    "attended": "mean over the queries of the last cross-attention's output",
    "prompts": "mean of the soft prompts",
    "hidden": "last hidden state of the language model on the soft prompts",
    "prompted": "its last hidden state on the label style prompt, just before the caption",
}
PROMPT = STYLES["label"]
BEST, BEST_FOR_FILMS = "prompted", "features"  # see results/embeddings.md


@dataclass(frozen=True)
class CachedClips:
    """Clips of a split that have features in the cache, and how to read them."""

    features: str | Path
    split: str
    records: list
    settings: Settings  # of the cache
    batch_size: int = 32
    workers: int = 0

    def batches(self, device):
        """Yield {"features" (B, N, E), "scale" (B, E), "offset" (B, E)} on the device, in order."""
        source = self.features, self.split, self.records, self.settings
        data = FeatureDataset(*source, tokenizer=None, choose=_no_captions)
        with tqdm(total=len(self.records), unit="clip", desc="read clips") as bar:
            for batch in batches(loader(data, self.batch_size, self.workers, device)):
                yield {k: batch[k].to(device) for k in ("features", "scale", "offset")}
                bar.update(len(batch["ids"]))


def _no_captions(record):
    return []


def embed(captioner, features, scale, offset):
    """Embed B clips in stored form. Returns {kind: float32 (B, E or D) with unit rows}.

    A clip's vectors do not depend on the rest of the batch, up to rounding in the matrix products.
    """
    qformer, attended = captioner.qformer, []
    last = qformer.blocks[-1].cross.out
    hook = last.register_forward_hook(lambda module, x, out: attended.append(out.float().mean(1)))
    try:
        with torch.inference_mode():
            soft = captioner.soft_prompts(features, scale, offset)  # (B, Q, D)
    finally:
        hook.remove()
    with torch.inference_mode():
        mean = features.mean(1, dtype=torch.float32) * scale + offset  # (B, E)
        cache, hidden = captioner.read(soft)
        prompt = captioner.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt], device=captioner.device).expand(len(soft), -1)  # (B, L)
        after = captioner.run_lm(cache, ids)
        vectors = {
            "features": (mean - qformer.mean) / qformer.std,
            "attended": torch.cat(attended),
            "prompts": soft.float().mean(1),
            "hidden": hidden[:, -1],
            "prompted": after.last_hidden_state[:, -1],
        }
        return {kind: F.normalize(vectors[kind].float(), dim=-1) for kind in KINDS}


# ---- windows of video files ----------------------------------------------------------------


def embed_windows(paths, encoder, captioner, windowing, limit=None):
    """Yield (`Window`s, {kind: float32 (decoded windows, E or D)}) for each batch of `windows.read`.

    Windows that could not be decoded have an `error` and no row. The dict is empty if all failed.
    """
    for batch in windows.read(paths, encoder, windowing, limit):
        windows.note_damage(batch, paths)
        vectors = {}
        if decoded := [w for w in batch if not w.error]:
            vectors = embed(captioner, **windows.features(decoded, captioner.device))
        yield batch, {kind: rows.cpu().numpy() for kind, rows in vectors.items()}


def embed_film(path, encoder, captioner, windowing, limit=None):
    """Embed at most `limit` windows of one film.

    Returns their n (start, end) in seconds and {kind: float32 (n, E or D)}, where the rows of windows
    that could not be decoded are NaN. Raises UserError if no window could be decoded.
    """
    read, parts = [], []
    for batch, vectors in embed_windows([path], encoder, captioner, windowing, limit):
        read += batch
        parts += [vectors] if vectors else []
        for window in batch:
            window.frames = window.stored = None  # a long film has many windows
    errors = [w.error for w in read if w.error]
    if not parts:
        raise UserError(str(errors[0]), code=FAILED)
    if errors:
        note(
            f"skipped {len(errors)} of {counted(len(read), 'window')}; the first error: {errors[0]}"
        )
    decoded, whole = [not w.error for w in read], {}
    for kind in KINDS:
        rows = np.concatenate([part[kind] for part in parts])
        whole[kind] = np.full((len(read), rows.shape[1]), np.nan, np.float32)
        whole[kind][decoded] = rows
    return [(w.start, w.end) for w in read], whole


# ---- the file ------------------------------------------------------------------------------


def write(path, captioner, checkpoint, clips):
    """Embed `CachedClips` and write an .npz file.

    It contains "ids", "about" (JSON) and a float16 (n, E or D) array per kind. The vectors are never all
    in memory: they are collected in unnamed temporary files, which disappear with the process, and
    copied through a memory map.
    """
    about = {
        "weights": weights_digest(checkpoint["qformer"]),
        "step": checkpoint["step"],
        "split": clips.split,
        "sources": sources_digest(clips.features, clips.split, [r["id"] for r in clips.records]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_name(path)
    with ExitStack() as stack:
        stack.callback(unfinished.unlink, missing_ok=True)
        files = {k: stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for k in KINDS}
        for batch in clips.batches(captioner.device):
            for kind, rows in embed(captioner, **batch).items():
                files[kind].write(rows.cpu().numpy().astype("<f2").tobytes())
        arrays = {"ids": np.array([r["id"] for r in clips.records])}
        arrays["about"] = np.array(json.dumps(about))
        for kind, file in files.items():
            file.flush()
            arrays[kind] = np.memmap(file, "<f2", "r").reshape(len(clips.records), -1)
        out = stack.enter_context(open(unfinished, "wb"))
        np.savez(out, **arrays)
        out.flush()
        os.fsync(out.fileno())
        os.replace(unfinished, path)


def sources_digest(features, split, ids):
    """Return a digest of the video files that the features of clips were computed from.

    None if not all of them are recorded in the cache.
    """
    known = recorded_sources(Path(features), (0, 1))
    sources = [known.get((split, i)) for i in ids]
    if None in sources:
        return None
    files = [(s.size, s.digest, *([s.span] if s.span else [])) for s in sources]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def check_current(path, ids, split, features):
    """Raise UserError if a file of embeddings was written before clips of its cache were encoded again.

    path, ids, split: as in `read`. features: a cache, compared only if it records sources of these clips.
    """
    with np.load(path, allow_pickle=False) as file:
        before = json.loads(str(file["about"])).get("sources")
    now = sources_digest(features, split, ids)
    if before and now and before != now:
        raise UserError(
            f"{path} was made from other clips than those that are now in {features}."
            " Run python -m research.embed again."
        )


def read(path, kind, checkpoint):
    """Read (ids, vectors float16 (n, E or D), split) from a file of `write`.

    Raises UserError if the file is missing or invalid, or was made with another checkpoint.
    """
    if not path.is_file():
        raise UserError(
            f"no embeddings: {path} does not exist. Write it first: run python -m research.embed without"
            " --query or --score, with the same --checkpoint and --split"
        )
    try:
        # opened here, because numpy leaves a file open if it is not an archive
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = parse_json(str(file["about"]))
            ids, vectors = file["ids"].tolist(), file[kind]
            split, digest, step = about["split"], about["weights"], about["step"]
            if vectors.ndim != 2 or not all(isinstance(i, str) for i in (split, *ids)):
                raise ValueError("it has other arrays")
    except Exception as error:  # a damaged file can raise almost anything in zipfile and NumPy
        if out_of_memory(error) or out_of_files(error):
            raise
        raise UserError(
            f"{path} is not a valid file of embeddings ({type(error).__name__}: {error})"
        ) from None
    again = "Run python -m research.embed again."
    weights = checkpoint["qformer"]
    if digest != weights_digest(weights):
        raise UserError(f"{path} was made with another checkpoint (at step {step}). {again}")
    width = len(weights["mean" if kind == "features" else "gain"])
    if vectors.shape != (len(ids), width) or vectors.dtype != np.float16 or not ids:
        raise UserError(f"{path} has no valid embeddings of kind {kind}. {again}")
    if not np.isfinite(vectors).all():
        raise UserError(f"{path} is damaged: its {kind} vectors contain NaN. {again}")
    return ids, vectors, split
