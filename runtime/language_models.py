"""Load a frozen language model and its tokenizer, and hide whether it is causal or an encoder-decoder.

    causal            [Q soft prompts][style prompt][ caption][eos]
    encoder-decoder   its encoder: [Q soft prompts]
                      its decoder: [start][style prompt][ caption][eos]

Shapes: B clips, R texts, Q soft prompts, L text tokens. D is the width and V the vocabulary size.
"""

import inspect
import sys

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutput

from runtime import devices, hub
from runtime.errors import UserError


class Causal:
    """A causal language model. Soft prompts and text are one sequence.

    `reader` is the module that computes hidden states without a key/value cache, `writer` the one that
    computes them with a cache. Here both are the base model.
    """

    start = None  # id of the token before the style prompt, if the model needs one

    def __init__(self, lm):
        self.lm, self.reader, self.writer = lm, lm.base_model, lm.base_model

    def read(self, run, rows):
        """Compute the cache and the hidden states of soft prompts (B, Q, D).

        run: `VideoCaptioner.run_lm`, which calls `reader` and `writer`.
        """
        cache = DynamicCache(config=self.lm.config)
        return cache, run(cache, inputs_embeds=rows).last_hidden_state

    def positions(self, queries):
        """Return how many positions of the text's context the prefix takes. queries: its length."""
        return queries

    def extra_inputs(self, cache):
        """Return the arguments that `writer` needs besides the text and the cache."""
        return {}

    def logits(self, hidden):
        """Apply the output head: (..., D) -> (..., V)."""
        return self.lm.get_output_embeddings()(hidden)

    def beam_inputs(self, cache, ids):
        """Return the arguments of generate() for prompts `ids` (B, L) after the prefixes of B clips.

        generate() also needs ids for the cached positions. They are arbitrary.
        """
        filler = ids.new_zeros(len(ids), cache.get_seq_length())
        inputs = torch.cat([filler, ids], 1)
        return {"inputs": inputs, "attention_mask": torch.ones_like(inputs)}

    def full_pass(self, rows, ids):
        """Run transformers' own forward on soft prompts (R, Q, D) and ids (R, L), without a cache.

        Returns the hidden states before the output head and the logits. Their last L positions are those
        of `ids`.
        """
        rows = torch.cat([rows, self.lm.get_input_embeddings()(ids)], 1)
        hidden = self.reader(inputs_embeds=rows, use_cache=False).last_hidden_state
        return hidden, self.lm(inputs_embeds=rows, use_cache=False).logits


class EncoderDecoder(Causal):
    """An encoder-decoder such as T5. Its encoder reads the soft prompts, its decoder the text.

    The cache holds the decoder's keys and values for the encoder's output and for the start token.
    """

    def __init__(self, lm):
        self.lm, self.reader, self.writer = lm, lm.get_encoder(), lm.get_decoder()
        self.start = getattr(lm.config, "decoder_start_token_id", None)
        if self.start is None:
            raise UserError(
                f"--lm {lm.config.name_or_path}: {type(lm).__name__} has no decoder_start_token_id"
            )

    def read(self, run, rows):
        states = run(inputs_embeds=rows).last_hidden_state  # (B, Q, D)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        run(cache, self._starts(rows), encoder_hidden_states=states)
        return cache, states

    def _starts(self, rows):
        return torch.full((len(rows), 1), self.start, device=rows.device)

    def positions(self, queries):
        return 1

    def extra_inputs(self, cache):
        """Return a placeholder of the encoder's output; only its shape matters, as the keys are cached."""
        if not cache.get_seq_length():
            return {}
        keys = cache.cross_attention_cache.layers[0].keys  # (R, heads, Q, D / heads)
        shape = len(keys), keys.shape[2], self.lm.config.hidden_size
        return {"encoder_hidden_states": keys.new_zeros(()).expand(shape)}

    def logits(self, hidden):
        if getattr(self.lm.config, "scale_decoder_outputs", False):  # T5, not Flan-T5 or T5 v1.1
            hidden = hidden * self.lm.config.hidden_size**-0.5
        return super().logits(hidden)

    def beam_inputs(self, cache, ids):
        ids = torch.cat([self._starts(ids), ids], 1)
        states = self.extra_inputs(cache)["encoder_hidden_states"]  # (B, Q, D)
        return {
            "decoder_input_ids": ids,
            # without this mask, the start token is read twice
            "decoder_attention_mask": torch.ones_like(ids),
            "encoder_outputs": BaseModelOutput(states),
            "attention_mask": ids.new_ones(states.shape[:2]),
        }

    def full_pass(self, rows, ids):
        ids = torch.cat([self._starts(ids), ids], 1)
        states = self.reader(inputs_embeds=rows).last_hidden_state
        hidden = self.writer(input_ids=ids, encoder_hidden_states=states, use_cache=False)
        logits = self.lm(inputs_embeds=rows, decoder_input_ids=ids, use_cache=False).logits
        return hidden.last_hidden_state, logits


def kind_of(lm):
    """Return a `Causal` or an `EncoderDecoder` for a language model of transformers."""
    return EncoderDecoder(lm) if lm.config.is_encoder_decoder else Causal(lm)


def cache_name(lm):
    """Return the name of the argument of a language model's forward that takes the key/value cache.

    It is "cache" since transformers 5.24 and "past_key_values" before. From 5.40 on, models silently
    ignore the old name. Raises UserError if the model has no such argument.
    """
    parameters = inspect.signature(lm.base_model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise UserError(f"--lm {lm.config.name_or_path}: {type(lm).__name__} has no key/value cache")


def clips_of(cache):
    """Return the number of clips in a key/value cache."""
    return getattr(cache, "self_attention_cache", cache).layers[0].keys.shape[0]


def max_positions(lm):
    """Return the context length of a language model, in tokens."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def embedding_table(lm):
    """Return the embeddings (V, D) of all tokens.

    This is the output of the embedding layer, not its weight, because some layers scale their weight.
    """
    layer = lm.get_input_embeddings()
    with torch.inference_mode():
        return layer(torch.arange(layer.num_embeddings, device=layer.weight.device))


def first_token(tokenizer):
    """Return the id of the bos token if the tokenizer puts it before every text, else None."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def largest_id(tokenizer):
    """Return the largest token id that a tokenizer uses for ordinary text and eos.

    Added tokens are ignored, because Gemma 3's text models do not embed the tokenizer's image token.
    """
    added = tokenizer.added_tokens_decoder.keys()
    return max(tokenizer.eos_token_id, *(tokenizer.get_vocab().values() - added))


def load_lm(name, device, dtype):
    """Load a causal or encoder-decoder language model from a folder or Hub id.

    Returns (model on the device, tokenizer, fingerprint). On a CPU its weights are float32, see
    `VideoCaptioner`. Raises UserError if it cannot be loaded, is quantised, or does not match its
    tokenizer.
    """
    dtype = dtype if devices.on_gpu(device) else torch.float32
    folder = hub.find_model(name, "--lm")
    if hub.is_quantised(folder):
        raise UserError(f"--lm {name} is quantised, which is not supported; use the original model")
    is_causal = not hub.load(AutoConfig, folder, "--lm").is_encoder_decoder
    auto_class = AutoModelForCausalLM if is_causal else AutoModelForSeq2SeqLM
    lm = hub.load_model(auto_class, folder, "--lm", dtype=dtype).to(device)
    tokenizer = hub.load(AutoTokenizer, folder, "--lm")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--lm {name}: the tokenizer has no end-of-text token")
    word = "moving"
    try:
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        is_complete = bool(ids) and word in tokenizer.batch_decode([ids])[0].lower()
    except Exception:  # for example, a setting in tokenizer_config.json has the wrong type
        is_complete = False
    if not is_complete:
        raise UserError(
            f"--lm {name}: the tokenizer cannot encode {word!r}; check that its files are complete"
        )
    rows = lm.get_input_embeddings().num_embeddings
    if largest_id(tokenizer) >= rows:
        raise UserError(
            f"--lm {name}: the tokenizer has token ids up to {largest_id(tokenizer)}, but the model"
            f" embeds only {rows:,} tokens; the files are from different models"
        )
    return lm, tokenizer, hub.fingerprint(folder)
