"""Small heads on cached features: probes, which predict actions, and the retriever's tower.

A probe shows what the features contain, independently of the captioner. The retriever finds clips by text
and texts by clip. Shapes: B clips, N = T*H*W video tokens, E video width,
C classes, W width of the retriever's vectors, D width of the text model.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset import video_of
from qformer import QFormer
from runtime import hub
from runtime.class_scores import multi_label_scores, ranks, single_label_scores
from runtime.errors import UserError
from runtime.feature_cache import is_count, stack_stored
from runtime.head_run import read_head
from runtime.names import counted

HEADS = ("attentive", "mlp", "linear")
INPUTS = ("tokens", "mean", "weights", "cls")
VERSION = 1
RETRIEVER_VERSION = 1
LEAST_TEMPERATURE = 0.01


# ---- the head -------------------------------------------------------------------------------


class Probe(nn.Module):
    """A head that maps the stored features of clips (B, N, E) to logits (B, C).

    kind: "linear", "mlp" (one hidden layer of width E) or "attentive". The attentive probe is that
    of V-JEPA 2 (Assran et al. 2025, arXiv:2506.09985): `layers` - 1 layers of self-attention over
    the tokens, one learned query that attends to them (here a `QFormer` with one query), and a
    linear layer.
    on: the input of the head: all "tokens" (attentive only), their "mean", their mean with one
    learned weight for each of the N places ("weights"), or the "cls" token of the encoder.
    positions: whether an attentive probe adds learned position embeddings to the tokens.
    """

    def __init__(
        self, *, kind, on, classes, video_width, grid, layers, num_heads, positions, dropout
    ):
        super().__init__()
        self.sizes = {
            "kind": kind,
            "on": on,
            "classes": classes,
            "video_width": video_width,
            "grid": list(grid),
            "layers": layers,
            "num_heads": num_heads,
            "positions": positions,
            "dropout": dropout,
        }
        self.on, self.grid, width = on, tuple(grid), video_width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        if kind == "attentive":
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, num_heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers - 1)
            )
            self.query = QFormer(
                num_queries=1,
                width=width,
                video_width=width,
                grid=grid,
                num_blocks=1,
                num_heads=num_heads,
                dropout=dropout,
                output_norm=width**0.5,
            )
            if not positions:
                for table in self.query.pos:
                    nn.init.zeros_(table).requires_grad_(False)
        if on == "weights":
            self.token_weights = nn.Parameter(torch.zeros(int(np.prod(grid))))
        hidden = [nn.Linear(width, width), nn.GELU()] if kind == "mlp" else []
        self.classify = nn.Sequential(*hidden, nn.Dropout(dropout), nn.Linear(width, classes))
        nn.init.zeros_(self.classify[-1].bias)
        nn.init.trunc_normal_(self.classify[-1].weight, std=0.02)

    def standardise(self, mean, std):
        """Set the channel statistics (E,) of the training features."""
        self.mean.copy_(mean)
        self.std.copy_(std)
        if self.on == "tokens":
            self.query.standardise(mean, std)

    def forward(self, features, scale, offset, cls=None):
        """Map features (B, N, E), with scale and offset (B, E), or cls (B, E), to logits (B, C)."""
        if self.on == "cls":
            return self.classify(F.layer_norm(cls.float(), cls.shape[-1:]))
        if self.on == "tokens":
            return self.classify(self.attend(features, scale, offset))
        n = features.shape[1]
        weights = (
            self.token_weights.softmax(0) if self.on == "weights" else scale.new_full((n,), 1 / n)
        )
        # bfloat16 has too few digits for x - mean
        with torch.autocast(scale.device.type, enabled=False):
            x = torch.einsum("n,bne->be", weights, features.to(scale.dtype)) * scale + offset
            x = (x - self.mean) / self.std
        return self.classify(x)

    def attend(self, features, scale, offset):
        """Pool the tokens with one query: (B, N, E) -> (B, E)."""
        if self.layers:
            video = self.query.stored(features, scale, offset)
            x = (features.to(scale.dtype) * scale[:, None] + offset[:, None] - self.mean) / self.std
            x = x + video.positions()  # (B, N, E)
            for layer in self.layers:
                x = layer(x)
            # self.query computes (x * scale + offset - mean) / std, which is now x
            features, scale, offset = x, self.std.expand_as(scale), self.mean.expand_as(offset)
        return self.query(features, scale, offset)[:, 0]


class Retriever(nn.Module):
    """Maps clips and texts to unit vectors (B, W), such that a clip is near its captions.

    A dual encoder like CLIP (Radford et al. 2021, arXiv:2103.00020) with two small heads: a `QFormer` with
    few queries and a linear layer on the stored features of clips, and an MLP on the vectors (B, D) of a
    frozen text model. The logarithm of the inverse temperature is learned.
    """

    def __init__(self, *, width, text_width, temperature, **query):
        """query: the arguments of the `QFormer`, apart from its width, blocks and output norm."""
        super().__init__()
        self.sizes = {"width": width, "text_width": text_width, "temperature": temperature, **query}
        self.query = QFormer(width=width, num_blocks=1, output_norm=width**0.5, **query)
        num_queries = len(self.query.queries)
        self.clip = nn.Linear(num_queries * width, width)
        self.text = nn.Sequential(nn.Linear(text_width, width), nn.GELU(), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.register_buffer("text_mean", torch.zeros(text_width))
        self.register_buffer("text_std", torch.ones(text_width))

    def standardise(self, video, text):
        """Set (mean, std) of the training features, (E,) each, and of the training texts, (D,) each."""
        self.query.standardise(*video)
        self.text_mean.copy_(text[0])
        self.text_std.copy_(text[1])

    def untrained(self):
        """Return a control: a retriever with the same statistics and random weights."""
        torch.manual_seed(0)
        other = Retriever(**self.sizes)
        video = self.query.mean, self.query.std
        other.standardise(video, (self.text_mean, self.text_std))
        return other.to(self.log_scale.device).eval()

    def clips(self, features, scale, offset, cls=None):
        """Map features (B, N, E), with scale and offset (B, E), to unit vectors (B, W)."""
        pooled = self.query(features, scale, offset).flatten(1)  # (B, Q*W)
        return unit(self.clip(pooled))

    def texts(self, vectors):
        """Map vectors of texts (B, D) to unit vectors (B, W)."""
        return unit(self.text((vectors - self.text_mean) / self.text_std))

    @torch.no_grad()
    def clamp_temperature(self):
        """Keep the temperature at LEAST_TEMPERATURE or above, as CLIP does."""
        self.log_scale.clamp_(max=-math.log(LEAST_TEMPERATURE))


def unit(x):
    """Normalise vectors (B, W) to length 1, in float32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def contrastive_loss(clips, texts, right, scale):
    """Return the symmetric InfoNCE of a batch in which several texts may describe a clip.

    clips, texts: unit vectors (B, W). right: bool (B, B), right[i, j] if text j describes clip i. scale:
    the inverse of the temperature. With s = scale * clips @ texts.T and R = right / sum_j right:

        1/2 [-1/B sum_ij R_ij log softmax_j(s_ij)] + 1/2 [the same for s.T and right.T]

    If `right` is the identity, this is the loss of CLIP, otherwise that of UniCL (Yang et al. 2022,
    arXiv:2204.03610).
    """

    def one_way(logits, right):
        return F.cross_entropy(logits, right / right.sum(1, keepdim=True))

    logits, right = scale * clips @ texts.T, right.to(clips.dtype)
    return (one_way(logits, right) + one_way(logits.T, right.T)) / 2


@torch.inference_mode()
def predict(heads, batches, device):
    """Apply heads to batches of features. Returns {id: float32 logits (C,)} for each head."""
    found = [{} for _ in heads]
    for head in heads:
        head.eval()
    for batch in batches:
        inputs = head_inputs(batch, device)
        for head, logits_of in zip(heads, found, strict=True):
            logits_of |= zip(batch["ids"], head(**inputs).float().cpu().numpy(), strict=True)
    return found


def head_inputs(batch, device):
    """Return the tensors of a batch that a head takes, on a device."""
    names = ("features", "scale", "offset", "cls")
    return {k: batch[k].to(device, non_blocking=True) for k in names if k in batch}


# ---- labels ---------------------------------------------------------------------------------


def class_names(records):
    """Return (classes, multi) of training records.

    classes: sorted class names. If any record has a list of actions, the classes are the actions,
    otherwise the templates. multi: True if they are actions, since a clip can have several. Raises
    UserError if there are fewer than two classes.
    """
    multi = any(r["actions"] is not None for r in records)
    classes = sorted({name for r in records for name in names_of(r, multi)})
    if len(classes) < 2:
        raise UserError(
            f"the training clips have {counted(len(classes), 'class', 'classes')}, but a probe needs"
            " at least two. Classes are templates, as in Something-Something-V2, or actions, as in"
            " Charades."
        )
    return classes, multi


def names_of(record, multi):
    """Return the class names of a record: its actions, or its template."""
    if multi:
        return record["actions"] or []
    return [record["template"]] if record["template"] else []


def annotated(records, multi):
    """Return the records with a template or, if `multi`, with a list of actions, possibly empty."""
    return [r for r in records if (r["actions"] is not None if multi else r["template"])]


def targets(records, classes, multi):
    """Return the targets of n records: 0 or 1, float32 (n, C), or the class indices, int64 (n,).

    An action that is not in `classes` is ignored. A template that is not in `classes` gets index -1.
    """
    index = {name: i for i, name in enumerate(classes)}
    if not multi:
        return np.array([index.get(r["template"], -1) for r in records])
    found = np.zeros((len(records), len(classes)), np.float32)
    for row, record in zip(found, records, strict=True):
        row[[index[name] for name in record["actions"] if name in index]] = 1
    return found


def loss(logits, wanted):
    """Return the cross-entropy of class indices (B,), or the binary cross-entropy of 0 and 1 (B, C)."""
    if wanted.dtype == torch.int64:
        return F.cross_entropy(logits, wanted)
    return F.binary_cross_entropy_with_logits(logits, wanted)


# ---- scores ---------------------------------------------------------------------------------


def by_video(records, logits, how="max"):
    """Combine the logits of the windows of each video by their maximum or mean.

    Returns [(video, records, logits (C,))] in the order of the records.
    """
    groups = {}
    for record in records:
        groups.setdefault(video_of(record), []).append(record)
    reduce = {"max": np.max, "mean": np.mean}[how]
    return [
        (video, rows, reduce([logits[r["id"]] for r in rows], axis=0))
        for video, rows in groups.items()
    ]


def unknown_classes(records, classes, multi):
    """Return the sorted names of the classes of records that are not in `classes`."""
    return sorted({name for r in records for name in names_of(r, multi)} - {*classes})


def score(records, logits, classes, multi, how="max"):
    """Score {id: logits (C,)}. Returns (scores, details), see `runtime.class_scores`.

    how: "max" or "mean", how to combine the windows of a video if `multi`. Otherwise each record is
    scored on its own, because the windows of a video may show different actions.
    details: {"per_class": average precisions} or, if not `multi`,
    {"worst": classes, "right": bool (n,)}.
    Actions that no training clip has are not in `classes`. They still count in the mean average
    precision, with scores below all others.
    """
    if not multi:
        wanted = targets(records, classes, multi)
        values = np.stack([logits[r["id"]] for r in records])
        scores, worst = single_label_scores(values, wanted, classes)
        return scores, {"worst": worst, "right": ranks(values, wanted) == 1}
    videos, unknown = by_video(records, logits, how), unknown_classes(records, classes, multi)
    classes, lowest = [*classes, *unknown], np.finfo(np.float32).min
    wanted = np.stack([targets(rows, classes, multi).max(0) for _, rows, _ in videos])
    values = np.stack([v for *_, v in videos])  # (n, C)
    values = np.pad(values, ((0, 0), (0, len(unknown))), constant_values=lowest)
    scores, precisions = multi_label_scores(values, wanted)
    precisions = [None if math.isnan(v) else v for v in precisions.tolist()]
    return scores, {"per_class": dict(zip(classes, precisions, strict=True))}


# ---- checkpoints ----------------------------------------------------------------------------


def read_probe(path, flag):
    """Read a probe's checkpoint: best.pt, or the run folder that contains it.

    Returns a dict with "weights", "sizes", "classes", "counts" (number of training clips of each
    class), "multi", "manifest" (a `Manifest`) and "chosen" (learning rate, weight decay, epoch and
    held-out score). Raises UserError if it does not exist or is not valid.
    """

    def check(probe):
        classes, counts, sizes = (probe.get(k) for k in ("classes", "counts", "sizes"))
        return (
            probe["probe_version"] == VERSION
            and isinstance(classes, list)
            and all(isinstance(c, str) and c.isprintable() for c in classes)
            and len({*classes}) == len(classes)
            and isinstance(counts, list)
            and len(counts) == len(classes) == sizes["classes"]
            and all(type(n) is int and n >= 0 for n in counts)
            and type(probe.get("multi")) is bool
            and are_numbers(probe.get("chosen"))
            and all(map(is_count, (sizes["layers"], sizes["num_heads"], sizes["video_width"])))
            and sizes["layers"] <= len(probe["weights"])
        )

    return read_head(path, flag, "probe", "probe.py", check, Probe)


def are_numbers(value):
    """Return True for a dict of numbers."""
    return isinstance(value, dict) and all(type(v) in (int, float) for v in value.values())


def load_probe(probe, device):
    """Rebuild a `Probe` from the result of `read_probe`."""
    head = Probe(**probe["sizes"])
    head.load_state_dict(probe["weights"])
    return head.to(device).eval()


def read_retriever(path, flag):
    """Read a retriever's checkpoint: best.pt, or the run folder that contains it.

    Returns a dict with "weights", "sizes", "lm" (name and fingerprint of the text model), "manifest" (a
    `Manifest`) and "chosen" (epoch and held-out recall). Raises UserError if it does not exist or is not
    valid.
    """

    def check(saved):
        counts = ("width", "text_width", "video_width", "num_queries", "num_heads")
        return (
            saved["retriever_version"] == RETRIEVER_VERSION
            and all(is_count(saved["sizes"][key]) for key in counts)
            and all(isinstance(saved["lm"][key], str) for key in ("name", "fingerprint"))
            and isinstance(saved["manifest"]["info"]["encoder"], str)
            and are_numbers(saved.get("chosen"))
        )

    saved = read_head(path, flag, "retriever", "retrieve.py", check, Retriever)
    manifest, lm = saved["manifest"], saved["lm"]
    hub.locate("name", lm, lm["fingerprint"], path)
    hub.locate("encoder", manifest.info, manifest.settings.encoder_fingerprint, path)
    return saved


def load_retriever(saved, device):
    """Rebuild a `Retriever` from the result of `read_retriever`."""
    head = Retriever(**saved["sizes"])
    head.load_state_dict(saved["weights"])
    return head.to(device).eval()


def probabilities(logits, multi):
    """Turn logits (C,) into probabilities: by sigmoid if `multi`, otherwise by softmax."""
    if multi:
        return 1 / (1 + np.exp(-logits.astype(np.float64)))
    x = np.exp(logits.astype(np.float64) - logits.max())
    return x / x.sum()


def likeliest(logits, classes, multi, count=5):
    """Return the `count` most probable classes, [{"action", "probability"}], the most probable first."""
    p = probabilities(logits, multi)
    return [
        {"action": classes[i], "probability": float(p[i])}
        for i in np.argsort(-p, kind="stable")[:count]
    ]


def read_matching_probe(path, flag, settings):
    """Return `read_probe(path, flag)`. Raises UserError if it was trained on features with other settings."""
    probe = read_probe(path, flag)
    probe["manifest"].settings.check_same(settings, f"the features for {flag} {path}")
    return probe


def recogniser(probe, device):
    """Return a function that maps a list of stored clips to the likeliest actions in each.

    probe: the content of its checkpoint, from `read_probe`. The actions are as in `likeliest`.
    """
    head, classes, multi = load_probe(probe, device), probe["classes"], probe["multi"]

    @torch.inference_mode()
    def recognise(clips):
        inputs = {k: v.to(device) for k, v in stack_stored(clips).items()}
        logits = head(**inputs).float().cpu().numpy()
        return [likeliest(row, classes, multi) for row in logits]

    return recognise


def plain(template):
    """Return a template without its brackets, as in SSv2's list of classes."""
    return template.replace("[", "").replace("]", "")


def still(settings):
    """Return the settings of the same cache made with --still."""
    return replace(settings, sampling="still")
