"""Vectors of texts by a frozen text model, and the files that cache them.

The model is a language model, or a sentence encoder, in the format of transformers. The vector of a text is
the mean of the last hidden states of its tokens. Shapes: n texts, L tokens, D width of the text model.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from runtime import devices, hub
from runtime.cli import note
from runtime.errors import FAILED, UserError, out_of_files, out_of_memory
from runtime.files import temporary_name, write_atomic

MAX_TOKENS = 200  # of a text; the rest is ignored
BATCH = 256  # texts per batch
# weights that some checkpoints lack; the last hidden states do not depend on them
UNUSED = ("pooler",)


class TextModel:
    """A frozen text model, which is only loaded while texts are encoded.

    name: its folder or Hub id. On a CPU its weights are float32. Raises UserError if it is not found.
    """

    def __init__(self, name, device, dtype):
        self.name, self.device = name, device
        self.dtype = dtype if devices.on_gpu(device) else torch.float32
        self.folder = hub.find_model(name, "--lm")
        self.fingerprint = hub.fingerprint(self.folder)

    def load(self):
        """Return (model, tokenizer). Of an encoder-decoder, the model is the encoder."""
        how = {"unused": UNUSED, "dtype": self.dtype}
        model = hub.load_model(AutoModel, self.folder, "--lm", **how)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        return model.to(self.device).eval(), hub.load(AutoTokenizer, self.folder, "--lm")

    def vectors(self, texts):
        """Encode n texts. Yields (their indices, float32 (batch, D) on the CPU), the shortest texts first.

        Raises UserError if the model does not encode text or if a vector is not finite.
        """
        model, tokenizer = self.load()
        limit = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
        limit = min(limit, MAX_TOKENS)
        rows = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        with tqdm(total=len(texts), unit="text", desc="texts", delay=1, leave=False) as bar:
            for start in range(0, len(order), BATCH):
                indices = order[start : start + BATCH]
                batch = [torch.tensor(rows[i], dtype=torch.long) for i in indices]
                yield indices, self.encode(model, batch)
                bar.update(len(indices))

    @torch.inference_mode()
    def encode(self, model, rows):
        """Encode rows of token ids. Returns float32 (rows, D) on the CPU."""
        ids = pad_sequence(rows, batch_first=True).to(self.device)  # (rows, L)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        try:
            states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            why = f"{type(model).__name__} does not encode text ({error})"
            raise UserError(f"--lm {self.name}: {why}") from None
        # padding is set to 0, because it may be NaN
        states = states.float().masked_fill(~mask[..., None], 0)  # (rows, L, D)
        vectors = states.sum(1) / lengths[:, None]
        if not vectors.isfinite().all():
            raise UserError(f"--lm {self.name}: a text has no finite vector", code=FAILED)
        return vectors.cpu()


def of_texts(texts, model, folder, alone=False):
    """Return the vectors of distinct texts, float16 (n, D), memory-mapped from a file.

    The file, in `folder`, is written if it is missing. Its name contains a digest of the texts and the model,
    so it is never out of date. It is hidden, so that the folder still counts as empty.
    alone: delete the files of other texts, which can have several GB.
    """
    facts = json.dumps([model.fingerprint, str(model.dtype), MAX_TOKENS, texts])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    path = Path(folder) / f".text_vectors_{digest}.npy"
    if not path.is_file():
        write(path, texts, model)
    for other in path.parent.glob(".text_vectors_*.npy") if alone else ():
        if other != path:
            other.unlink()
    return np.load(path, mmap_mode="r")


def write(path, texts, model):
    """Write the vectors of texts to an .npy file, one batch at a time to save memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, start = temporary_name(path), None
    try:
        with open(unfinished, "wb") as file:
            for indices, vectors in model.vectors(texts):
                if start is None:
                    shape = len(texts), vectors.shape[1]
                    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    start = file.tell()
                for index, row in zip(indices, vectors.numpy().astype("<f2"), strict=True):
                    file.seek(start + index * row.nbytes)
                    file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def kept(path, key, compute):
    """Return {name: array} from an .npz file that contains `key`.

    If the file is missing, damaged or has another key, it is written with the result of `compute()`.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        if str(arrays.pop("key")) == key:
            return arrays
        note(f"{path} is out of date and is written again")
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file can raise almost anything in zipfile and NumPy
        if out_of_memory(error) or out_of_files(error):
            raise
        note(f"{path} cannot be read and is written again ({type(error).__name__})")
    arrays, buffer = compute(), io.BytesIO()
    np.savez(buffer, key=np.array(key), **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return arrays
