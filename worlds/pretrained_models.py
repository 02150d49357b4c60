"""Convert the weights of pretrained models from other layouts to model folders of transformers."""

import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedTokenizerFast,
)

from runtime.feature_cache import IMAGENET
from runtime.files import write_json

CONTROL = 3  # gguf's token type of special tokens
LAYERS, SIZE = [11, 15], 160  # of the image encoder: hidden states, pixels

# ---- language model ------------------------------------------------------------------------

LLAMA_NAMES = {  # a layer's tensors: name in GGUF -> name in transformers
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_lm(gguf_file, folder):
    """Convert a GGUF file of a Llama with tied embeddings and a byte-level BPE to a transformers model folder.

    The weights are float32. In Q4_1 a weight is d * q + m with 4-bit q and float16 d and m. Storing it
    as bfloat16 or float16 would round it.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    tokenizer = make_tokenizer(reader)
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM(llama_config(reader, tokenizer))
    model.load_state_dict(llama_weights(reader, model.config))
    ids = {k: getattr(model.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)


def field(reader, name):
    """Return a value of a GGUF file's metadata."""
    return reader.fields[name].contents()


def llama_config(reader, tokenizer):
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    theta = field(reader, "llama.rope.freq_base")
    return LlamaConfig(
        **{name: field(reader, f"llama.{key}") for name, key in names.items()},
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def llama_weights(reader, config):
    """Dequantise the tensors of a GGUF file. Returns {name in transformers: float32 tensor}."""
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", unit=" tensors"):
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = separate_halves(values, heads[kind])
        weights[llama_name(tensor.name)] = values
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


def llama_name(name):
    """Translate the name of a tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{LLAMA_NAMES[match[2]]}.weight"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }[name]


def separate_halves(weight, heads):
    """Undo llama.cpp's order of the rows of q and k, (A * 2h, D) for A heads of width 2h.

    Rotary embeddings rotate pairs of rows. llama.cpp stores the two rows of a pair next to each other.
    transformers stores all first rows of a head before all second rows.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def make_tokenizer(reader):
    """Build the tokenizer from the vocabulary and merges in a GGUF file.

    It is a byte-level BPE that first splits off single digits, then applies GPT-2's regular expression
    (llama.cpp's pre-tokenizer "smollm").
    """
    kind = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    assert kind == ("gpt2", "smollm"), kind
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    types = field(reader, "tokenizer.ggml.token_type")
    bpe.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": tokens[field(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in names.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=field(reader, "llama.context_length"),
        chat_template=field(reader, "tokenizer.chat_template"),
        **special,
    )


# ---- image encoder -------------------------------------------------------------------------


def write_encoder(weights_file, folder):
    """Convert a MobileNetV2 in torchvision's layout to a model folder for transformers' MobileNetV2Model.

    Its features are the last maps with strides of 16 and 32 (`LAYERS`): 10 x 10 tokens of width 96 + 320 for
    frames of `SIZE` pixels, about the size of the tabletop world's clips.
    """
    model = MobileNetV2Model(mobilenet_config(out_indices=LAYERS))
    weights = torch.load(weights_file, weights_only=True, map_location="cpu")
    model.load_state_dict({mobilenet_name(name): value for name, value in weights.items()})
    model.save_pretrained(folder)
    mean, std = IMAGENET
    preprocessor = {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)


def mobilenet_config(**changes):
    """Return the configuration that computes what torchvision's MobileNetV2 computes.

    The defaults of transformers follow the TensorFlow model, whose padding and batch normalisation epsilon
    differ.
    """
    return MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, **changes)


def mobilenet_name(name):
    """Translate the name of a weight: features.2.conv.3.weight -> layer.0.conv_3x3.convolution.weight.

    Raises KeyError or ValueError for a name that MobileNetV2 does not have.
    """
    _, block, *path, number, kind = name.split(".")
    block, layer = int(block), int(number)
    # an inverted residual block: (convolution, normalisation, activation) x 2 or 3
    if path == ["conv"]:
        parts = (
            ("conv_3x3", "reduce_1x1") if block == 1 else ("expand_1x1", "conv_3x3", "reduce_1x1")
        )
        parent = f"{'conv_stem' if block == 1 else f'layer.{block - 2}'}.{parts[layer // 3]}"
    else:
        parent = {0: "conv_stem.first_conv", 18: "conv_1x1"}[block]
    return f"{parent}.{('convolution', 'normalization')[layer % 3]}.{kind}"
