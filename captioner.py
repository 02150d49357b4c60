"""VideoCaptioner: a Q-Former maps video features to soft prompts for a frozen language model.

The language model reads
    [Q soft prompts][style prompt][ caption][eos]

or, if it is an encoder-decoder, the soft prompts in its encoder and the text in its decoder.

Shapes: B clips, K captions per clip, Q queries, L text tokens, M tokens with a loss. D is the width
and V the vocabulary size of the language model.
"""

import copy
import math
import random
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from dataset import STYLES, collate_text, encode_caption
from optim import uniforms
from qformer import QFormer
from runtime import devices
from runtime.cli import TEMPERATURE, TOP_P
from runtime.errors import FAILED, UserError, out_of_memory
from runtime.language_models import (
    cache_name,
    clips_of,
    embedding_table,
    first_token,
    kind_of,
    load_lm,
    max_positions,
)

READ_CHUNK = 16  # clips per Q-Former call in inference; their float32 features take 268 MB
TEXTS_CHUNK = 32  # texts scored at a time; each needs its own key/value cache
MAX_NEW_TOKENS = 50  # of a generated caption; more if the training captions are longer
LENGTHS_SAMPLE = 20_000  # training captions that are tokenised to find out
LOGITS_CHUNK = 256  # target tokens at a time; 256 x V floats take 156 MB for Qwen2


@dataclass(frozen=True)
class Sampling:
    """How to sample captions: `count` per clip, of which the likeliest share `keep` is returned."""

    count: int
    top_p: float = TOP_P
    temperature: float = TEMPERATURE
    keep: float = 1.0
    seed: int = 0


GREEDY = Sampling(1, top_p=1e-9)  # the nucleus is the likeliest token


class VideoCaptioner(nn.Module):
    """A Q-Former and a frozen language model.

    qformer: a `QFormer` with the width of the language model.
    lm: a causal or encoder-decoder language model of transformers.
    tokenizer: the tokenizer of `lm`. It must have an eos token.
    bos: the id of a token to put before the soft prompts, or None.
    max_new_tokens: the default limit for generated captions.
    autocast_lm: compute the language model in bfloat16 from float32 weights. This is what --dtype bfloat16
        means on a CPU. It is faster than float32 if the CPU has bfloat16 instructions.

    The attribute `cut_captions` counts the generated captions that reached their limit.
    """

    def __init__(
        self, qformer, lm, tokenizer, bos=None, max_new_tokens=MAX_NEW_TOKENS, autocast_lm=False
    ):
        super().__init__()
        self.qformer, self.lm, self.tokenizer = qformer, lm.requires_grad_(False), tokenizer
        self.kind, self.cache_name, self.bos = kind_of(lm), cache_name(lm), bos
        self.max_new_tokens, self.cut_captions = max_new_tokens, 0
        self.autocast_lm = autocast_lm
        self.train(self.training)

    def train(self, mode=True):
        """Set the mode of the Q-Former. The frozen language model stays in eval mode, without dropout."""
        super().train(mode)
        self.lm.eval()
        return self

    @property
    def device(self):
        return self.qformer.queries.device

    def soft_prompts(self, features, scale, offset):
        """Map the stored features of B clips to soft prompts (B, Q, D)."""
        clips = features, scale, offset
        with devices.autocast(self.device):
            if torch.is_grad_enabled():
                return self.qformer(*clips)
            groups = zip(*(t.split(READ_CHUNK) for t in clips), strict=True)
            return torch.cat([self.qformer(*group) for group in groups])

    def prefix(self, features, scale, offset):
        """Compute the language model's key/value cache over the soft prompts of B clips.

        This is done once per clip. The losses of all its captions and generation continue from it.
        """
        return self.read(self.soft_prompts(features, scale, offset))[0]

    def read(self, soft):
        """Run the language model on soft prompts (B, Q, D).

        Returns its key/value cache and hidden states (B, Q, D), which are those of the encoder if there is
        one. If there is a bos token, both have one more position at the start.
        """
        return self.kind.read(self.run_lm, self.embedded(soft))

    def embedded(self, soft):
        """Convert soft prompts to the LM's dtype and prepend the embedding of bos, if there is one."""
        soft = soft.to(self.lm.dtype)
        if self.bos is None:
            return soft
        bos = torch.full((len(soft), 1), self.bos, device=soft.device)
        return torch.cat([self.lm.get_input_embeddings()(bos).to(soft.dtype), soft], 1)

    def run_lm(self, cache=None, input_ids=None, inputs_embeds=None, **kwargs):
        """Run the frozen language model on B rows of L tokens that follow the contents of `cache`.

        Training, generation and scoring all use this method. The tokens are appended to the cache in place.
        Without a cache, an encoder-decoder runs its encoder on them. Returns the output of transformers,
        with `last_hidden_state` (B, L, D). Raises UserError if the cache did not grow, because then the model
        ignores the prefix and writes the same caption for every clip.
        """
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if cache is None:
            with self.lm_precision():
                return self.kind.reader(use_cache=False, **kwargs)
        kwargs = self.kind.extra_inputs(cache) | kwargs
        before = cache.get_seq_length()
        with self.lm_precision():
            out = self.kind.writer(use_cache=True, **{self.cache_name: cache}, **kwargs)
        if cache.get_seq_length() != before + out.last_hidden_state.shape[1]:
            raise UserError(
                f"--lm: in this version of transformers, {type(self.lm).__name__} does not fill the"
                " key/value cache it is given",
                code=FAILED,
            )
        return out

    @contextmanager
    def lm_precision(self):
        """Return the context in which the language model computes.

        In bfloat16 on a CPU, attention is computed step by step. The fused kernel's backward pass is so slow
        for a few dozen tokens that a training step takes 15 % longer.
        """
        plain = sdpa_kernel(SDPBackend.MATH) if self.autocast_lm else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast_lm), plain:
            yield

    def logits(self, hidden):
        """Apply the output head of the language model: (..., D) -> (..., V)."""
        with self.lm_precision():
            return self.kind.logits(hidden)

    def continued(self, cache, input_ids, clips=None):
        """Compute the hidden states (R, L, D) of texts that follow the prefixes of B clips.

        cache: from `prefix`. It is modified and cannot be used again. input_ids: (R, L). clips: int64
        (R,), the clip of each text. None means that each clip has R/B texts.
        """
        # both are differentiable; B -> R
        if clips is None:
            cache.batch_repeat_interleave(len(input_ids) // clips_of(cache))
        else:
            cache.batch_select_indices(clips)
        return self.run_lm(cache, input_ids).last_hidden_state

    def loss(self, cache, text):
        """Compute the cross-entropy (M,) of each caption and eos token, in float32.

        cache: from `prefix`. It is modified and cannot be used again.
        text: from `dataset.collate` or `collate_text`. Rows are padded on the right, where causal
        attention does not look, so no attention mask is needed.
        """
        hidden = self.continued(cache, text["input_ids"], text.get("clips"))  # (R, L, D)
        hidden = hidden.flatten(0, 1).index_select(0, text["positions"])  # (M, D)
        return chunked_cross_entropy(self.logits, hidden, text["targets"])

    @torch.inference_mode()
    def generate(self, cache, style, max_new_tokens=None, num_beams=1):
        """Caption B clips from their `prefix` cache and return B strings.

        The cache is modified and cannot be used again. max_new_tokens: None means the captioner's own
        limit. Raises UserError if it exceeds the context length of the language model.
        """
        max_new_tokens = max_new_tokens or self.max_new_tokens
        ids = self.prompt(style).expand(clips_of(cache), -1)  # (B, L)
        self.check_room(cache, ids, max_new_tokens)
        if num_beams == 1:
            rows = self._greedy(cache, ids, max_new_tokens)
        else:
            rows = self._beams(cache, ids, max_new_tokens, num_beams)
        return self.decoded(rows)

    def check_room(self, cache, ids, max_new_tokens):
        """Raise UserError if a caption could exceed the context length of the language model."""
        room = max_positions(self.lm) - cache.get_seq_length() - ids.shape[1]
        if max_new_tokens > room:
            raise UserError(
                f"--max-new-tokens {max_new_tokens} is too large: {self.lm.config.name_or_path} has room"
                f" for {room} tokens after the prompt"
            )

    def prompt(self, style):
        """Return the token ids of a style prompt, (1, L)."""
        prompt = self.tokenizer(STYLES[style], add_special_tokens=False, return_tensors="pt")
        return prompt["input_ids"].to(self.device)

    def decoded(self, rows):
        """Turn generated token ids into captions. Counts those without eos, which reached the limit."""
        eos = self.tokenizer.eos_token_id
        self.cut_captions += sum(eos not in row for row in rows)
        rows = [row[: row.index(eos)] if eos in row else row for row in rows]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _greedy(self, cache, ids, max_new_tokens):
        eos, columns = self.tokenizer.eos_token_id, []
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            out = self.run_lm(cache, ids)
            logits = self.logits(out.last_hidden_state[:, -1])  # (B, V)
            token = logits.argmax(-1).masked_fill(done, eos)  # (B,)
            columns.append(token)
            done |= token == eos
            if done.all():
                break
            ids = token[:, None]
        return torch.stack(columns, 1).tolist()

    @torch.inference_mode()
    def sample(self, cache, style, uniforms, top_p, temperature):
        """Sample n captions of each of B clips, with nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751).

        cache: from `prefix`. It is modified and cannot be used again. uniforms: (B, n, L) in [0, 1), one
        for each token of a caption; L is the limit of its length. The tokens are the inverse of the
        cumulative distribution at these numbers, so the captions of a clip do not depend on its batch.
        Returns (texts, scores): B lists of n strings, and float32 (B, n), the mean log-probability of each
        caption's tokens and eos, without temperature and nucleus.
        """
        clips, n, limit = uniforms.shape
        eos, ids = self.tokenizer.eos_token_id, self.prompt(style).expand(clips * n, -1)
        self.check_room(cache, ids, limit)
        cache.batch_repeat_interleave(n)
        uniforms = uniforms.flatten(0, 1).to(self.device)  # (B*n, L)
        done = torch.zeros(clips * n, dtype=torch.bool, device=self.device)
        sums, lengths, columns = torch.zeros(clips * n, device=self.device), 0 * done.long(), []
        for step in range(limit):
            hidden = self.run_lm(cache, ids).last_hidden_state[:, -1]
            log_p = self.logits(hidden).float().log_softmax(-1)  # (B*n, V)
            token = inverse_cdf(nucleus(log_p / temperature, top_p), uniforms[:, step])
            token = token.masked_fill(done, eos)
            sums += log_p.gather(1, token[:, None])[:, 0].masked_fill(done, 0)
            lengths += ~done
            columns.append(token)
            done |= token == eos
            if done.all():
                break
            ids = token[:, None]
        texts = self.decoded(torch.stack(columns, 1).tolist())
        grouped = [texts[i : i + n] for i in range(0, len(texts), n)]
        return grouped, (sums / lengths).unflatten(0, (clips, n))

    @torch.inference_mode()
    def samples(self, batch, names, style, how, max_new_tokens=None):
        """Sample captions of B clips. Returns B dicts {text: score}, the likeliest text first, see `sample`.

        batch: as for `captions`. names: of the clips. With the seed, they determine the samples.
        how: a `Sampling`.
        """
        numbers = uniforms(names, how.count, max_new_tokens or self.max_new_tokens, how.seed)
        cache = self.prefix(batch["features"], batch["scale"], batch["offset"])
        texts, scores = self.sample(cache, style, numbers, how.top_p, how.temperature)

        def likeliest(texts, scores):
            distinct = dict(zip(texts, scores, strict=True))
            ordered = sorted(distinct.items(), key=lambda pair: -pair[1])
            return dict(ordered[: math.ceil(how.keep * len(ordered))])

        return list(map(likeliest, texts, scores.tolist()))

    def _beams(self, cache, ids, max_new_tokens, num_beams):
        """Run the beam search of transformers after the cached prefix."""
        length = cache.get_seq_length() + ids.shape[1]
        inputs = self.kind.beam_inputs(cache, ids)
        cache.batch_repeat_interleave(num_beams)  # generate() only repeats the inputs
        # The model's own generation config may enable sampling or penalties.
        self.lm.generation_config = GenerationConfig()
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            decoder_start_token_id=self.kind.start,
        )
        with self.lm_precision():
            out = self.lm.generate(**inputs, generation_config=config, **{self.cache_name: cache})
        return out[:, length:].tolist()

    @torch.inference_mode()
    def log_likelihoods(self, cache, style, texts):
        """Score each text as a caption of each of B clips: float32 (B, len(texts)), at most 0.

        The score is the mean log-probability of the text's tokens and eos. It is a mean so that long
        texts are not penalised. cache: from `prefix`. It is not modified.
        """
        clips, scores = clips_of(cache), []
        for start in range(0, len(texts), TEXTS_CHUNK):
            chunk = texts[start : start + TEXTS_CHUNK]
            captions = [encode_caption(self.tokenizer, style, text) for text in chunk]
            text = {k: v.to(self.device) for k, v in collate_text([captions] * clips).items()}
            log_p = -self.loss(copy.deepcopy(cache), text)  # (M,)
            rows = text["positions"] // text["input_ids"].shape[1]  # (M,)
            sums = torch.zeros(clips * len(chunk), device=self.device)
            sums.index_add_(0, rows, log_p.float())
            scores.append((sums / rows.bincount()).unflatten(0, (clips, -1)))  # (B, K)
        return torch.cat(scores, 1)

    @torch.inference_mode()
    def captions(self, batch, style, max_new_tokens=None, num_beams=1):
        """Caption B clips and return B strings.

        batch: their stored features, `features` (B, N, E), `scale` (B, E) and `offset` (B, E).
        """
        cache = self.prefix(batch["features"], batch["scale"], batch["offset"])
        return self.generate(cache, style, max_new_tokens, num_beams)

    def validation(self, batch, style, max_new_tokens=None, num_beams=1):
        """Compute the loss and the captions of B clips, with one pass over the prefix.

        Returns (summed loss, number of tokens, B strings). The loss is None unless each clip has
        exactly one reference.
        """
        with torch.inference_mode():
            cache = self.prefix(batch["features"], batch["scale"], batch["offset"])
            total = None
            tokens = len(batch["targets"])
            if len(batch["input_ids"]) == len(batch["ids"]):  # one reference per clip
                total = self.loss(copy.deepcopy(cache), batch).sum().item()
            return total, tokens, self.generate(cache, style, max_new_tokens, num_beams)


def nucleus(logits, top_p):
    """Return the probabilities (R, V) of the smallest set of tokens that together have at least `top_p`.

    The others are 0, and the sum is at least top_p. logits: float32 (R, V).
    """
    p = logits.double().softmax(-1)
    # stable: of equal logits, which are common in bfloat16, the first is the likeliest, as for argmax
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < top_p)
    return p * kept


def inverse_cdf(p, uniforms):
    """Choose a token (R,) from unnormalised probabilities (R, V) at uniforms (R,) in [0, 1).

    The cumulative distribution is in the order of the vocabulary. In the order of the probabilities, two
    nearly equal ones could change places by rounding, and with them the token.
    """
    cumulative = p.cumsum(-1)  # (R, V)
    at = uniforms.to(p.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=p.shape[-1] - 1)


def chunked_cross_entropy(head, hidden, targets):
    """Compute the cross-entropy (M,) of head(hidden), in float32 or wider.

    hidden: (M, D), targets: (M,). Logits are computed in chunks and recomputed in the backward pass.
    V is 99 times D in Qwen2, so the logits of all tokens would be the largest tensor in memory.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def cross_entropy(h, t):
        # On a GPU, autograd repeats this in another thread. If the first CUDA call of that thread were
        # the matrix product instead of this clone, torch would warn about a missing CUDA context.
        return F.cross_entropy(head(h.clone()).to(dtype), t, reduction="none")

    chunks = zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
    no_state = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(cross_entropy, h, t, **no_state) for h, t in chunks])


def build(manifest, lm_name, device, dtype, captions=(), **sizes):
    """Build a new captioner for the features of `manifest`. Returns it and the LM's fingerprint.

    captions: the training captions, to check that the longest one fits.
    sizes: num_queries, num_blocks, num_heads and dropout of `QFormer`.
    Raises UserError if the language model cannot be loaded or is not supported, if the longest caption
    does not fit, or if num_heads does not divide the width of the language model.
    """
    lm, tokenizer, fingerprint = load_lm(lm_name, device, dtype)
    embeddings = embedding_table(lm)  # (V, D)
    if embeddings.shape[1] % sizes["num_heads"]:
        raise UserError(
            f"--num-heads {sizes['num_heads']} does not divide the width {embeddings.shape[1]} of the"
            " language model"
        )
    qformer = QFormer(
        width=embeddings.shape[1],
        video_width=manifest.settings.width,
        grid=manifest.settings.grid,
        output_norm=embeddings.float().norm(dim=1).mean().item(),
        **sizes,
    )
    bos, autocast = first_token(tokenizer), lm.dtype != dtype
    model = VideoCaptioner(qformer.to(device), lm, tokenizer, bos, autocast_lm=autocast)
    check_lm(model, lm_name)
    captions = list(captions)
    check_room(model, lm_name, captions)
    model.max_new_tokens = length_limit(tokenizer, captions)
    return model, fingerprint


def length_limit(tokenizer, captions):
    """Return the number of tokens that 99.9 % of captions do not exceed, at least `MAX_NEW_TOKENS`.

    It is computed on a sample of the captions, with their eos tokens.
    """
    sample = random.Random(0).sample(captions, min(len(captions), LENGTHS_SAMPLE))
    texts = [" " + text for text in sample if len(text.encode()) + 2 > MAX_NEW_TOKENS]
    if not texts:  # a token is at least one byte of text
        return MAX_NEW_TOKENS
    lengths = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    lengths = sorted([0] * (len(sample) - len(lengths)) + lengths)
    return max(MAX_NEW_TOKENS, lengths[math.ceil(0.999 * len(lengths)) - 1])


# Largest allowed difference between the logits after a cached prefix and those of one full pass,
# relative to their standard deviation. It is not zero because kernels for different shapes round
# differently.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2}


@torch.inference_mode()
def check_lm(model, name):
    """Raise UserError unless `VideoCaptioner` computes the same logits as the model's own forward.

    It takes two shortcuts: it applies the head to the target tokens only, and it runs K texts after one
    cached prefix. For models that scale or cap their logits, use another kind of cache or attend to
    later tokens, the loss would be wrong without an error.
    """
    lm, device = model.lm, model.device
    tolerance = TOLERANCE[torch.bfloat16 if model.autocast_lm else lm.dtype]
    rng = torch.Generator().manual_seed(0)
    prefix, texts = (
        torch.randint(lm.get_input_embeddings().num_embeddings, size, generator=rng).to(device)
        for size in ((3, 6), (6, 8))
    )
    try:
        soft = lm.get_input_embeddings()(prefix)  # (3, 6, D)
        with model.lm_precision():
            hidden, wanted = model.kind.full_pass(
                model.embedded(soft).repeat_interleave(2, 0), texts
            )
        if not wanted.isfinite().all():
            raise UserError(
                f"--lm {name}: the logits are not finite in {lm.dtype}; try another --dtype"
            )
        if not torch.equal(wanted, model.logits(hidden)):
            raise UserError(
                f"--lm {name}: {type(lm).__name__} modifies the logits after its output head (for"
                " example by scaling them), which is not supported; use another model"
            )
        found = model.logits(model.continued(model.read(soft)[0], texts)).double()  # (6, 8, V)
        wanted = wanted[:, -texts.shape[1] :].double()
        difference = ((found - wanted).std() / wanted.std()).item()
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError),
        *(NotImplementedError, RuntimeError, TypeError, ValueError),
    ) as error:
        if out_of_memory(error):
            raise
        difference = f"{type(error).__name__}: {str(error).strip()[:200]}"
    if isinstance(difference, str) or not difference <= tolerance:
        raise UserError(
            f"--lm {name}: {type(lm).__name__} computes different logits with a cached prefix than in"
            f" one full pass ({difference}), which is not supported; use another model"
        )


def check_room(model, name, captions):
    """Raise UserError unless the longest caption fits after the prefix and the longest prompt."""

    def prompt_length(style):
        return len(encode_caption(model.tokenizer, style, "").prompt)

    style = max(STYLES, key=prompt_length)
    prefix = model.kind.positions(model.qformer.sizes["num_queries"] + (model.bos is not None))
    room = max_positions(model.lm) - prefix - prompt_length(style)
    # A token is at least one byte of text, so short texts fit and need not be tokenised.
    long = [text for text in captions if len(text.encode()) + 2 > room]
    lengths = {text: len(encode_caption(model.tokenizer, style, text).target) for text in long}
    longest = max([MAX_NEW_TOKENS, *lengths.values()])
    if longest > room:
        text = next((text for text in long if lengths[text] == longest), None)
        what = "generation may need" if text is None else f"{text[:60]!r} needs"
        raise UserError(
            f"--lm {name} has a context of {max_positions(model.lm)} tokens: the prefix ({prefix}) and the"
            f" prompt leave {room} for a caption, but {what} {longest}; use another model, fewer"
            " --num-queries or shorter captions"
        )
