"""Convert the weights of Self-supervised Video Transformer (SVT) to a folder for --encoder.

    python -m tools.convert_svt kinetics400_vitb_ssl.pth data/svt

SVT (Ranasinghe et al. 2022, arXiv:2112.01514) is a TimeSformer. The folder contains a TimeSformer
model of transformers, for 8 frames of 224 x 224 pixels, and a preprocessor file with the
normalisation of its pixels.
"""

import runtime.start

import math
import re
from pathlib import Path

import torch
from transformers import TimesformerConfig, TimesformerModel

from runtime import cli
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import write_json

# Names of SVT's tensors and of transformers' modules. "qkv" and "proj" occur in both attentions.
RENAMED = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("time_embed", "embeddings.time_embeddings"),
    ("temporal_norm1", "temporal_layernorm"),
    ("temporal_attn.qkv", "temporal_attention.attention.qkv"),
    ("temporal_attn.proj", "temporal_attention.output.dense"),
    ("temporal_fc", "temporal_dense"),
    ("attn.qkv", "attention.attention.qkv"),
    ("attn.proj", "attention.output.dense"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("norm", "layernorm"),
)
PREPROCESSOR = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.45] * 3,
    "image_std": [0.225] * 3,
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("weights", help="file with SVT's weights (.pth)")
    parser.add_argument("output", help="folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    path = cli.existing(args.weights, "weights", "Download SVT's kinetics400_vitb_ssl.pth first.")
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} already exists; choose another folder")
    model = convert(read(path))
    model.save_pretrained(output)
    size = model.config.image_size
    write_json(
        output / "preprocessor_config.json",
        PREPROCESSOR | {"size": {"height": size, "width": size}},
    )
    note(f"written to {output}; use --encoder {output} --num-frames {model.config.num_frames}")


def read(path):
    """Read SVT's tensors. Returns {name: tensor}, without the prefix "backbone.".

    The head of SVT's training is left out. No code in the file is executed. Raises UserError if it
    does not contain the weights of SVT.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a foreign file can raise almost anything in torch
        raise UserError(
            f"{path} cannot be read as a file of weights without executing code in it"
        ) from None
    for key in ("teacher", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    found = (
        {k.removeprefix("module."): v for k, v in found.items()} if isinstance(found, dict) else {}
    )
    found = {
        k.removeprefix("backbone."): v for k, v in found.items() if isinstance(v, torch.Tensor)
    }
    weights = {k: v for k, v in found.items() if not k.startswith("head.")}
    if not {"cls_token", "pos_embed", "time_embed", "patch_embed.proj.weight"} <= weights.keys():
        raise UserError(
            f"{path} does not contain the weights of SVT: it lacks time_embed or another tensor"
        )
    return weights


def convert(weights):
    """Return a `TimesformerModel` with SVT's tensors. Raises UserError if one is missing or unknown."""
    names = ("patch_embed.proj.weight", "cls_token", "pos_embed", "time_embed")
    kernel, *tokens = (weights[name].shape for name in names)
    if len(kernel) != 4 or not all(len(shape) == 3 for shape in tokens) or tokens[0][-1] % 64:
        raise UserError("the weights are not those of SVT: their shapes differ")
    patch, width = kernel[-1], tokens[0][-1]
    layers = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    config = TimesformerConfig(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        patch_size=patch,
        image_size=math.isqrt(weights["pos_embed"].shape[1] - 1) * patch,
        num_frames=weights["time_embed"].shape[1],
    )
    model = TimesformerModel(config)
    try:
        model.load_state_dict({rename(name): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise UserError(
            f"the weights are not those of SVT: {str(error).splitlines()[1].strip():.300}"
        ) from None
    return model.eval()


def rename(name):
    """Return the name in transformers of one of SVT's tensors."""
    name = name.replace("blocks.", "encoder.layer.", 1)
    for old, new in RENAMED:
        renamed = re.sub(rf"(?<![a-z_0-9]){re.escape(old)}(?![a-z_0-9])", new, name, count=1)
        if renamed != name:
            return renamed
    return name


if __name__ == "__main__":
    cli.run(main)
