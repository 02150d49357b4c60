"""The trained classifier of a published V-JEPA 2 model, as a head on cached features.

Shapes: B clips, N video tokens, E video width, C classes.
"""

import torch
from torch import nn
from transformers import VJEPA2ForVideoClassification

from runtime import hub
from runtime.errors import UserError


class PublishedHead(nn.Module):
    """The classifier of a `VJEPA2ForVideoClassification`, applied to stored features."""

    def __init__(self, model):
        super().__init__()
        self.pooler, self.classifier = model.pooler, model.classifier

    def forward(self, features, scale, offset, cls=None):
        tokens = features.to(scale.dtype) * scale[:, None] + offset[:, None]  # (B, N, E)
        return self.classifier(self.pooler(tokens))  # (B, C)


def published(name, manifest, device):
    """Load the classifier of a published model. Returns (probe, head), see `heads.read_probe`.

    Raises UserError unless the cache contains all tokens of clips and was made with the model's
    encoder.
    """
    if manifest.settings.pool > 1 or manifest.settings.sampling == "still":
        raise UserError(f"--published {name} needs a cache made without --pool and --still")
    folder = hub.find_model(name, "--published")
    model = hub.load_model(VJEPA2ForVideoClassification, folder, "--published", dtype=torch.float32)
    if manifest.settings.encoder_fingerprint != hub.fingerprint(folder):
        require_same_encoder(model.vjepa2, name, manifest)
    classes = [model.config.id2label[i] for i in range(model.config.num_labels)]
    head = PublishedHead(model).to(device).eval()
    probe = {"classes": classes, "counts": None, "multi": False, "chosen": {"published": name}}
    return probe, head


def require_same_encoder(encoder, name, manifest):
    """Raise UserError unless the encoder of a cache has exactly the weights of another encoder.

    An encoder may be published both alone and with a classifier. The two models have different
    configurations, and so different fingerprints, although their features are the same.
    """
    other = hub.recorded("encoder", manifest.info, "--features")
    folder = hub.find_model(other, "the encoder")
    same = hub.fingerprint(folder) == manifest.settings.encoder_fingerprint
    if same and manifest.settings.family == "vjepa2":
        weights = hub.load_model(type(encoder), folder, "the encoder", dtype=torch.float32)
        weights, wanted = weights.encoder.state_dict(), encoder.encoder.state_dict()
        same = weights.keys() == wanted.keys() and all(
            torch.equal(weights[key], value) for key, value in wanted.items()
        )
        if same:
            return
    raise UserError(
        f"--published {name}: the cache was made with another encoder, {other}. Run preprocess_ssv2.py"
        f" --encoder {name} with another --features folder."
    )
