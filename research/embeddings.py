"""One vector a clip, in five kinds, from a cache of features; and the file that keeps them.

Shapes: B clips, n clips of a split, N video tokens, E video width, Q queries, D language model width.
"""

import json
import os
import shutil
import tempfile
import zipfile
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import weights_digest
from dataset import STYLES, FeatureDataset, batches, loader
from runtime.errors import UserError
from runtime.files import temporary_name

# From what knows least of the caption to what knows most
KINDS = {
    "features": "mean of the V-JEPA 2 features, standardised",
    "attended": "mean over the queries of what the last cross-attention brings in",
    "prompts": "mean of the soft prompts",
    "hidden": "the language model's last hidden state over the soft prompts",
    "prompted": "its state behind the label prompt, about to write the caption",
}
PROMPT = STYLES["label"]
BEST, BEST_OF_FILMS = "prompted", "features"  # see results/embeddings.md


def embed(captioner, features, scale, offset):
    """{kind: float32 (B, E or D), rows of length 1} of B clips in stored form.

    A clip's vectors do not depend on those beside it, up to the last bits of the matrix products.
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


def write(path, captioner, checkpoint, features, split, records, batch_size, workers):
    """Embed the clips of a split and write a file that `read` reads.

    float16, one array a kind, uncompressed. Rows go to the disk batch by batch, into files without a
    name, so memory does not grow with the number of clips, and nothing is left of a process that dies
    while it embeds.
    """
    settings = checkpoint["manifest"].settings
    dataset = FeatureDataset(features, split, records, settings, None, lambda record: [])
    about = {
        "weights": weights_digest(checkpoint["qformer"]),
        "step": checkpoint["step"],
        "split": split,
    }
    small = {"ids": np.array([r["id"] for r in records]), "about": np.array(json.dumps(about))}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_name(path)
    with ExitStack() as stack:
        stack.callback(unfinished.unlink, missing_ok=True)
        rows_of = {k: stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for k in KINDS}
        bar = stack.enter_context(tqdm(total=len(records), unit="clip", desc="embed"))
        for batch in batches(loader(dataset, batch_size, workers, captioner.device)):
            stored = (batch[k].to(captioner.device) for k in ("features", "scale", "offset"))
            for kind, rows in embed(captioner, *stored).items():
                rows, file = rows.cpu().numpy().astype("<f2"), rows_of[kind]
                if not file.tell():
                    head = np.lib.format.header_data_from_array_1_0(rows)
                    head["shape"] = (len(records), rows.shape[1])
                    np.lib.format.write_array_header_1_0(file, head)
                file.write(rows.tobytes())
            bar.update(len(batch["ids"]))
        out = stack.enter_context(open(unfinished, "wb"))
        with zipfile.ZipFile(out, "w") as archive:
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
            for kind, file in rows_of.items():
                file.seek(0)
                with archive.open(f"{kind}.npy", "w", force_zip64=True) as entry:
                    shutil.copyfileobj(file, entry)
        out.flush()
        os.fsync(out.fileno())
        os.replace(unfinished, path)


def read(path, kind, checkpoint=None):
    """(ids, vectors float16 (n, D), split) of a file of `write`.

    Raises UserError for a missing, damaged or foreign file, and for one of another checkpoint.
    """
    if not path.is_file():
        raise UserError(
            f"no embeddings: {path} does not exist. Write them first: python -m research.embed without"
            " --query and --score, with the same --checkpoint and --split"
        )
    try:
        # opened here: numpy leaves a file open if it is not an archive
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            ids, vectors = file["ids"].tolist(), file[kind]
            split, digest, step = about["split"], about["weights"], about["step"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no embeddings ({type(error).__name__}: {error})") from None
    if vectors.ndim != 2 or not 0 < len(vectors) == len(ids) or vectors.dtype != np.float16:
        raise UserError(f"{path} holds no embeddings of {kind}")
    if not np.isfinite(vectors).all():
        raise UserError(
            f"{path} is damaged: its {kind} are not all numbers. Run research/embed.py again"
        )
    if checkpoint is not None:
        weights = checkpoint["qformer"]
        if digest != weights_digest(weights):
            raise UserError(
                f"{path} was made with another checkpoint (at step {step}): run research/embed.py again"
            )
        if vectors.shape[1] != len(weights["mean" if kind == "features" else "gain"]):
            raise UserError(f"{path} holds no embeddings of {kind}")
    return ids, vectors, split
