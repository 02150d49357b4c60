"""The code changes of bench/ablation.py and bench/tabletop.py. Everything else runs unchanged.

Each returns [(object, attribute or key, replacement)].
"""

import random
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import dataset
import train
from captioner import VideoCaptioner
from dataset import STYLES
from qformer import CrossAttention, QFormer
from runtime.errors import UserError


@contextmanager
def changed(change):
    """Apply one of CHANGES, or nothing if `change` is None, and undo it at the end."""
    with ExitStack() as stack:
        for owner, attribute, value in CHANGES[change]() if change else []:
            if isinstance(owner, dict):
                stack.enter_context(mock.patch.dict(owner, {attribute: value}))
            else:
                stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


def no_positions():
    """Set the position tables to zero and do not train them."""
    original = QFormer.__init__

    def init(self, **sizes):
        original(self, **sizes)
        self.pos = Tables(table.detach().zero_() for table in self.pos)

    return [(QFormer, "__init__", init)]


class Tables(nn.Module):
    """Position tables that move with the model, but are neither trained nor saved."""

    def __init__(self, tables):
        super().__init__()
        for n, table in enumerate(tables):
            self.register_buffer(f"axis{n}", table, persistent=False)

    def __iter__(self):
        return self.buffers()


def keys_only():
    """Add positions to keys but not to values."""

    def read(self, x, video, need_weights=False):
        q, k, v = self.q(x), self.k(video.tokens()), self.v(video.projected())
        q, k, v = (self.heads(y) for y in (q, k, v))  # (B, A, Q or N, D/A)
        scores = q @ k.mT / k.shape[-1] ** 0.5  # (B, A, Q, N)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), None

    return [(CrossAttention, "forward", read)]


def no_standardisation():
    """Use features as they come from the encoder, without standardisation."""

    def statistics(data, seed):
        width = data.manifest.settings.width
        return torch.zeros(width), torch.ones(width)

    return [(train, "statistics", statistics)]


def no_gain():
    """Start soft prompts at the norm of a LayerNorm's output, sqrt(D), not the embeddings' norm."""
    original = QFormer.initialise

    def initialise(self, output_norm):
        original(self, self.gain.numel() ** 0.5)

    return [(QFormer, "initialise", initialise)]


def no_style_prompts():
    """Use the same prompt for labels and sentences."""
    return [(STYLES, "sentence", STYLES["label"])]


def original():
    """Use the original's recipe, as listed below the table in ablation.md."""

    def loader(*args):
        made = dataset.loader(*args)
        made.collate_fn = collate_with_pads
        return made

    changes = no_positions() + no_standardisation() + no_gain() + no_style_prompts()
    return [
        *changes,
        (train, "choose_captions", any_caption),
        (train, "loader", loader),  # training only, because validation calls dataset.loader
        (train, "lr_at", lambda step, total, peak, warmup: peak),
    ]


def any_caption(record, count, seed, epoch):
    """Sample `count` captions, each uniformly from the label and all paraphrases."""
    rng = random.Random(f"captions:{seed}:{epoch}:{record['id']}")
    texts = [("label", record["label"]), *(("sentence", text) for text in record["paraphrases"])]
    return [rng.choice(texts) for _ in range(count)]


def collate_with_pads(items):
    """Pad captions to the longest of the batch with end-of-text tokens, which all have a loss."""
    if any(isinstance(item, UserError) for item in items):
        return dataset.collate(items)
    longest = max(len(c.prompt) + len(c.target) for i in items for c in i["captions"])

    def pad(caption):
        eos = caption.target[-1:]
        missing = longest - len(caption.prompt) - len(caption.target)
        return caption._replace(target=caption.target + eos * missing)

    return dataset.collate([i | {"captions": list(map(pad, i["captions"]))} for i in items])


def per_caption():
    """Weight captions equally, and not their tokens: divide each token's loss by its caption's length."""
    original = VideoCaptioner.loss

    def loss(self, cache, text):
        values = original(self, cache, text)  # (M,)
        if not self.training:
            return values
        rows = text["positions"] // text["input_ids"].shape[1]  # (M,), the caption of each token
        lengths = rows.bincount()[rows]
        return values * (len(rows) / len(rows.unique()) / lengths)  # the mean weight is 1

    return [(VideoCaptioner, "loss", loss)]


def eot_in_front():
    """Put the embedding of the end-of-text token before the soft prompts."""
    original = VideoCaptioner.__init__

    def init(self, qformer, lm, tokenizer, bos=None, *args, **options):
        original(self, qformer, lm, tokenizer, tokenizer.eos_token_id, *args, **options)

    return [(VideoCaptioner, "__init__", init)]


CHANGES = {
    change.__name__: change
    for change in (
        *(no_positions, keys_only, no_standardisation, no_gain, no_style_prompts, original),
        *(per_caption, eot_in_front),
    )
}
