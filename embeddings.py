"""One vector a clip, in five kinds, from a cache of features; and the file that keeps them.

Shapes: B clips, n clips of a split, N video tokens, E video width, Q queries, D language model width.
"""

import json
import os
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

from cli import UserError
from dataset import STYLES, FeatureDataset, batches, loader
from files import temporary_name

# From what knows least of the caption to what knows most
KINDS = {
    "features": "mean of the V-JEPA 2 features, standardised",
    "attended": "mean over the queries of what the last cross-attention brings in",
    "prompts": "mean of the soft prompts",
    "hidden": "the language model's last hidden state over the soft prompts",
    "prompted": "its state behind the label prompt, about to write the caption",
}
PROMPT = STYLES["label"]
BEST, BEST_OF_FILMS = "prompted", "prompts"  # see results/embeddings.md


def embed(captioner, features, scale, offset):
    """{kind: float32 (B, E or D), rows of length 1} of B clips in stored form.

    A clip's vectors do not depend on those beside it, up to the last bits of the matrix products.
    """
    import torch
    import torch.nn.functional as F

    from captioner import READ_CHUNK

    lm = captioner.lm
    with torch.inference_mode():
        groups = zip(*(t.split(READ_CHUNK) for t in (features, scale, offset)), strict=True)
        read = [_read(captioner, *group) for group in groups]
        mean, attended, soft = (torch.cat(parts) for parts in zip(*read, strict=True))
        out = lm.base_model(inputs_embeds=soft.to(lm.dtype), use_cache=True)
        prompt = captioner.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt], device=captioner.device).expand(len(soft), -1)  # (B, L)
        after = lm.base_model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        vectors = {
            "features": mean,
            "attended": attended,
            "prompts": soft.mean(1),
            "hidden": out.last_hidden_state[:, -1],
            "prompted": after.last_hidden_state[:, -1],
        }
        return {kind: F.normalize(vectors[kind].float(), dim=-1) for kind in KINDS}


def _read(captioner, features, scale, offset):
    """Mean features (B, E), mean attended (B, D) and soft prompts (B, Q, D) of a few clips."""
    from qformer import Video

    qformer, brought = captioner.qformer, []
    video = Video(features, scale, offset, qformer.mean, qformer.std, qformer.grid)

    def read_video(cross, x):
        brought.append(cross.absorbed(x, video, qformer.project, qformer.pos))
        return brought[-1]

    with captioner.autocast():
        soft = qformer.prompts(read_video)
    return video.standardised().mean(1), brought[-1].float().mean(1), soft.float()


def write(path, captioner, checkpoint, features, split, records, batch_size, workers):
    """Embed the clips of a split and write a file that `read` reads.

    float16, one array a kind, uncompressed. Rows go to the disk batch by batch, so memory does not
    grow with the number of clips.
    """
    import numpy as np
    from tqdm import tqdm

    from captioner import weights_digest

    settings = checkpoint["manifest"]["settings"]
    dataset = FeatureDataset(features, split, records, settings, None, lambda record: [])
    about = {
        "weights": weights_digest(checkpoint["qformer"]),
        "step": checkpoint["step"],
        "split": split,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_name(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with ExitStack() as stack, tqdm(total=len(records), unit="clip", desc="embed") as bar:
            arrays = {k: stack.enter_context(open(f"{folder}/{k}.npy", "wb")) for k in KINDS}
            for batch in batches(loader(dataset, batch_size, workers, captioner.device)):
                stored = (batch[k].to(captioner.device) for k in ("features", "scale", "offset"))
                for kind, rows in embed(captioner, *stored).items():
                    rows, file = rows.cpu().numpy().astype("<f2"), arrays[kind]
                    if not file.tell():
                        head = np.lib.format.header_data_from_array_1_0(rows)
                        head["shape"] = (len(records), rows.shape[1])
                        np.lib.format.write_array_header_1_0(file, head)
                    file.write(rows.tobytes())
                bar.update(len(batch["ids"]))
        np.save(Path(folder, "ids.npy"), np.array([r["id"] for r in records]))
        np.save(Path(folder, "about.npy"), np.array(json.dumps(about)))
        try:
            with zipfile.ZipFile(unfinished, "w", allowZip64=True) as file:
                for part in ("ids", "about", *KINDS):
                    file.write(Path(folder, f"{part}.npy"), f"{part}.npy")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def read(path, kind, checkpoint=None):
    """(ids, vectors float16 (n, D), split) of a file of `write`.

    Raises UserError for a missing, damaged or foreign file, and for one of another checkpoint.
    """
    import numpy as np

    from captioner import weights_digest

    if not path.is_file():
        raise UserError(
            f"no embeddings: {path} does not exist. Without --query and --score embed.py writes it."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            ids, vectors = file["ids"].tolist(), file[kind]
            whole = about["split"], about["weights"], about["step"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no embeddings ({type(error).__name__}: {error})") from None
    if vectors.ndim != 2 or len(vectors) != len(ids) or vectors.dtype != np.float16:
        raise UserError(f"{path} holds no embeddings of {kind}")
    if checkpoint is not None and whole[1] != weights_digest(checkpoint["qformer"]):
        raise UserError(
            f"{path} was made with another checkpoint (at step {whole[2]}): run embed.py again"
        )
    return ids, vectors, whole[0]
