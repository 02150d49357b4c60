"""VideoCaptioner: a Q-Former writes soft prompts for a frozen language model.

    [Q soft prompts][style prompt][ caption][eos]

Shapes: B clips, K captions per clip, Q queries, D width and V vocabulary of the language model,
L text tokens.
"""

import copy
import inspect
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from dataset import STYLES, collate_text, encode_caption
from qformer import QFormer
from runtime import devices, hub
from runtime.errors import UserError, out_of_memory

READ_CHUNK = 16  # clips the Q-Former reads at a time in inference: features in float32, 268 MB
TEXTS_CHUNK = 32  # texts compared at a time: a key/value cache each
MAX_NEW_TOKENS = 50  # of a generated caption
LOGITS_CHUNK = 256  # labelled tokens at a time: 256 x V floats are 156 MB for Qwen2


class VideoCaptioner(nn.Module):
    """Q-Former + frozen language model.

    qformer: a `QFormer` whose width is the language model's; lm: a causal LM of transformers;
    tokenizer: its tokenizer, with an eos token; bos: id of a token before the soft prompts, or None.
    """

    def __init__(self, qformer, lm, tokenizer, bos=None):
        super().__init__()
        self.qformer, self.lm, self.tokenizer = qformer, lm.requires_grad_(False), tokenizer
        self.bos, self.cache_name = bos, cache_name(lm)
        self.train(self.training)

    def train(self, mode=True):
        """Frozen means frozen: the language model stays in eval mode, without dropout."""
        super().train(mode)
        self.lm.eval()
        return self

    @property
    def device(self):
        return self.qformer.queries.device

    def soft_prompts(self, features, scale, offset):
        """Stored features of B clips -> soft prompts (B, Q, D)."""
        clips = features, scale, offset
        with devices.autocast(self.device):
            if torch.is_grad_enabled():
                return self.qformer(*clips)
            groups = zip(*(t.split(READ_CHUNK) for t in clips), strict=True)
            return torch.cat([self.qformer(*group) for group in groups])

    def prefix(self, features, scale, offset):
        """Stored features -> the LM's key/value cache over the soft prompts of B clips.

        Computed once per clip: every caption, loss and generation of the clip continues from it.
        """
        return self.read(self.soft_prompts(features, scale, offset))[0]

    def read(self, soft):
        """Soft prompts (B, Q, D) -> the LM's key/value cache over them and its hidden states (B, Q, D).

        With a bos, both start with one more position.
        """
        cache = DynamicCache(config=self.lm.config)
        return cache, self.run_lm(cache, inputs_embeds=self.embedded(soft)).last_hidden_state

    def embedded(self, soft):
        """Input embeddings of the prefix: bos, if there is one, and the soft prompts, in the LM's dtype."""
        soft = soft.to(self.lm.dtype)
        if self.bos is None:
            return soft
        bos = torch.full((len(soft), 1), self.bos, device=soft.device)
        return torch.cat([self.lm.get_input_embeddings()(bos).to(soft.dtype), soft], 1)

    def run_lm(self, cache=None, input_ids=None, inputs_embeds=None, **kwargs):
        """Run the frozen language model on B rows of L tokens that follow the contents of `cache`.

        All calls of the base model go through here. Appends the tokens to the cache in place. Returns
        transformers' output, with `last_hidden_state` (B, L, D). Raises UserError if the cache did not
        grow: the model would ignore the prefix and write the same caption for every clip.
        """
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if cache is None:
            return self.lm.base_model(use_cache=False, **kwargs)
        before = cache.get_seq_length()
        out = self.lm.base_model(use_cache=True, **{self.cache_name: cache}, **kwargs)
        if cache.get_seq_length() != before + out.last_hidden_state.shape[1]:
            raise UserError(
                f"--lm: in this version of transformers, {type(self.lm).__name__} does not fill the"
                " key/value cache it is given",
                code=1,
            )
        return out

    def continued(self, cache, input_ids):
        """Hidden states (B*K, L, D) of K texts per clip, `input_ids` (B*K, L).

        cache: the prefixes of B clips, which the texts follow. It is consumed.
        """
        cache.batch_repeat_interleave(len(input_ids) // clips_of(cache))  # B -> B*K, differentiable
        return self.run_lm(cache, input_ids).last_hidden_state

    def loss(self, cache, input_ids, positions, targets):
        """Summed cross-entropy of K captions per clip, a float32 scalar.

        cache: of `prefix`, consumed by the call; input_ids (B*K, L), positions and targets (M,): see
        `dataset.collate`. Rows are padded on the right, which causal attention never looks at, so
        no mask is needed.
        """
        hidden = self.continued(cache, input_ids)  # (B*K, L, D)
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # (M, D)
        return chunked_cross_entropy(self.lm.get_output_embeddings(), hidden, targets)

    @torch.inference_mode()
    def generate(self, cache, style, max_new_tokens=MAX_NEW_TOKENS, num_beams=1):
        """Caption B clips from their `prefix` cache, which is consumed. Returns B strings."""
        prompt = self.tokenizer(STYLES[style], add_special_tokens=False, return_tensors="pt")
        ids = prompt["input_ids"].to(self.device)  # (1, L)
        ids = ids.expand(clips_of(cache), -1)  # (B, L)
        room = max_positions(self.lm) - cache.get_seq_length() - ids.shape[1]
        if max_new_tokens > room:
            raise UserError(
                f"--max-new-tokens {max_new_tokens}: {self.lm.config.name_or_path} has room for {room}"
                " tokens after the prompt"
            )
        if num_beams == 1:
            rows = self._greedy(cache, ids, max_new_tokens)
        else:
            rows = self._beams(cache, ids, max_new_tokens, num_beams)
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _greedy(self, cache, ids, max_new_tokens):
        eos, columns = self.tokenizer.eos_token_id, []
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            out = self.run_lm(cache, ids)
            logits = self.lm.get_output_embeddings()(out.last_hidden_state[:, -1])  # (B, V)
            token = logits.argmax(-1).masked_fill(done, eos)  # (B,)
            columns.append(token)
            done |= token == eos
            if done.all():
                break
            ids = token[:, None]
        rows = torch.stack(columns, 1).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    def _beams(self, cache, ids, max_new_tokens, num_beams):
        """Beam search of transformers, behind the same prefix."""
        past = cache.get_seq_length()
        cache.batch_repeat_interleave(num_beams)  # generate() repeats the ids only
        # it wants ids for the cached positions too, and strips them with the prompt
        filler = ids.new_full((len(ids), past), self.tokenizer.eos_token_id)
        full = torch.cat([filler, ids], 1)
        self.lm.generation_config = GenerationConfig()  # a model may bring sampling or penalties
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        out = self.lm.generate(
            full,
            attention_mask=torch.ones_like(full),
            generation_config=config,
            **{self.cache_name: cache},
        )
        return out[:, full.shape[1] :]

    @torch.inference_mode()
    def log_likelihoods(self, cache, style, texts):
        """How likely each text is as the caption of B clips: float32 (B, len(texts)), at most 0.

        The mean log-probability of its tokens and eos, so that a long text does not lose by its
        length. cache: of `prefix`; it is left as it is.
        """
        clips, scores = clips_of(cache), []
        for start in range(0, len(texts), TEXTS_CHUNK):
            some = texts[start : start + TEXTS_CHUNK]
            pairs = [encode_caption(self.tokenizer, style, text) for text in some]
            text = {k: v.to(self.device) for k, v in collate_text(pairs * clips).items()}
            hidden = self.continued(copy.deepcopy(cache), text["input_ids"])  # (B*K, L, D)
            hidden = hidden.flatten(0, 1).index_select(0, text["positions"])  # (M, D)
            chunks = zip(*(x.split(LOGITS_CHUNK) for x in (hidden, text["targets"])), strict=True)
            head = self.lm.get_output_embeddings()
            log_p = [-F.cross_entropy(head(h).float(), t, reduction="none") for h, t in chunks]
            rows = text["positions"] // text["input_ids"].shape[1]  # (M,)
            sums = torch.zeros(clips * len(some), device=self.device)
            sums.index_add_(0, rows, torch.cat(log_p))
            scores.append((sums / rows.bincount()).unflatten(0, (clips, -1)))  # (B, K)
        return torch.cat(scores, 1)

    @torch.inference_mode()
    def captions(self, batch, style, max_new_tokens=MAX_NEW_TOKENS, num_beams=1):
        """Caption B clips given as `features` (B, N, E), `scale` and `offset` (B, E)."""
        cache = self.prefix(batch["features"], batch["scale"], batch["offset"])
        return self.generate(cache, style, max_new_tokens, num_beams)

    def validation(self, batch, style, max_new_tokens, num_beams=1):
        """Loss and captions of B clips behind one prefix pass.

        Returns (summed loss, number of tokens, B strings); the loss is None unless each clip has one
        reference.
        """
        with torch.inference_mode():
            cache = self.prefix(batch["features"], batch["scale"], batch["offset"])
            total = None
            tokens = len(batch["targets"])
            if len(batch["input_ids"]) == len(batch["ids"]):  # every clip has its reference
                text = batch["input_ids"], batch["positions"], batch["targets"]
                total = self.loss(copy.deepcopy(cache), *text).item()
            return total, tokens, self.generate(cache, style, max_new_tokens, num_beams)


def cache_name(lm):
    """The name of the key/value cache among the arguments of a language model's forward.

    It is "cache" since transformers 5.24 and "past_key_values" before. From 5.40 on, models silently
    ignore the old name. Raises UserError if the model has no such argument.
    """
    parameters = inspect.signature(lm.base_model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise UserError(f"--lm {lm.config.name_or_path}: {type(lm).__name__} has no key/value cache")


def clips_of(cache):
    """The number of clips in a key/value cache."""
    return cache.layers[0].keys.shape[0]


def max_positions(lm):
    """The largest number of tokens that a language model can read."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def chunked_cross_entropy(head, hidden, targets):
    """Summed cross-entropy of head(hidden), hidden (M, D), targets (M,), at least in float32.

    Logits exist a chunk at a time and are computed again on the way back: V is 99 times D in Qwen2,
    so all of them at once would be the largest thing in memory.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def cross_entropy(h, t):
        # On a GPU autograd repeats this in a thread of its own. The clone is the first thing that thread
        # does with CUDA; if it were the matrix product, torch would warn of a missing CUDA context.
        return F.cross_entropy(head(h.clone()).to(dtype), t, reduction="sum")

    total = hidden.new_zeros((), dtype=dtype)
    for h, t in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
        total = total + checkpoint(
            cross_entropy, h, t, use_reentrant=False, preserve_rng_state=False
        )
    return total


def build(manifest, lm_name, device, dtype, captions=(), **sizes):
    """A new captioner over the features of `manifest`. Returns it and the LM's fingerprint.

    captions: the training captions; sizes: num_queries, num_blocks, num_heads, dropout of `QFormer`.
    Raises UserError if the language model cannot be loaded or is not supported, if the longest caption
    does not fit, or if the sizes do not divide.
    """
    lm, tokenizer, fingerprint = load_lm(lm_name, device, dtype)
    embeddings = embedding_table(lm)  # (V, D)
    if embeddings.shape[1] % sizes["num_heads"]:
        raise UserError(f"--num-heads {sizes['num_heads']} does not divide {embeddings.shape[1]}")
    qformer = QFormer(
        width=embeddings.shape[1],
        video_width=manifest.settings.width,
        grid=manifest.settings.grid,
        output_norm=embeddings.float().norm(dim=1).mean().item(),
        **sizes,
    )
    model = VideoCaptioner(qformer.to(device), lm, tokenizer, first_token(tokenizer))
    check_lm(model, lm_name)
    check_room(model, lm_name, captions)
    return model, fingerprint


def embedding_table(lm):
    """The output (V, D) of the language model's embedding layer; some layers scale their weight."""
    layer = lm.get_input_embeddings()
    with torch.inference_mode():
        return layer(torch.arange(layer.num_embeddings, device=layer.weight.device))


def first_token(tokenizer):
    """The beginning-of-text token if the tokenizer puts it before every text, else None."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def largest_id(tokenizer):
    """The largest token id that a tokenizer returns for ordinary text, or at its end.

    Added tokens do not count: Gemma 3's text models do not embed the image token of their tokenizer.
    """
    added = tokenizer.added_tokens_decoder.keys()
    return max(tokenizer.eos_token_id, *(tokenizer.get_vocab().values() - added))


def load_lm(name, device, dtype):
    """Return (causal LM on the device, tokenizer, fingerprint) for a folder or Hub id."""
    folder = hub.find_model(name, "--lm")
    if hub.is_quantised(folder):
        raise UserError(f"--lm {name} is quantised; use the original model")
    lm = hub.load_model(AutoModelForCausalLM, folder, "--lm", dtype=dtype).to(device)
    tokenizer = hub.load(AutoTokenizer, folder, "--lm")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--lm {name}: its tokenizer has no end-of-text token")
    word = "moving"
    ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    if not ids or word not in tokenizer.batch_decode([ids])[0].lower():
        raise UserError(
            f"--lm {name}: its tokenizer cannot encode {word!r}; are its files complete?"
        )
    rows = lm.get_input_embeddings().num_embeddings
    if largest_id(tokenizer) >= rows:
        raise UserError(
            f"--lm {name}: its tokenizer has token ids up to {largest_id(tokenizer)}, its model embeds"
            f" {rows:,} tokens; these are not files of one model"
        )
    return lm, tokenizer, hub.fingerprint(folder)


# Largest difference between the logits after a cached prefix and those of one full pass, relative to
# their standard deviation. Kernels round differently for different shapes.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2}


@torch.inference_mode()
def check_lm(model, name):
    """Raise UserError unless our two shortcuts give the logits of the language model's own forward.

    The shortcuts are applying the head to the labelled tokens only, and running K texts after one cached
    prefix. They silently compute the wrong loss for models that scale or cap their logits, have another
    kind of cache or attend to later tokens.
    """
    lm, device = model.lm, model.device
    rng = torch.Generator().manual_seed(0)
    prefix, text, texts = (
        torch.randint(lm.get_input_embeddings().num_embeddings, size, generator=rng).to(device)
        for size in ((3, 6), (3, 8), (6, 8))
    )
    try:
        head = lm.get_output_embeddings()
        wanted = lm(input_ids=text, use_cache=False).logits.double()  # (3, 8, V)
        found = head(model.run_lm(input_ids=text).last_hidden_state).double()
        if not wanted.isfinite().all():
            raise UserError(f"--lm {name}: its logits are not finite in {lm.dtype}; see --dtype")
        if not torch.equal(wanted, found):
            raise UserError(
                f"--lm {name}: {type(lm).__name__} does more to its logits than apply its head,"
                " which is not supported; use another model"
            )
        soft = lm.get_input_embeddings()(prefix)  # (3, 6, D)
        found = head(model.continued(model.read(soft)[0], texts)).double()  # (6, 8, V)
        rows = model.embedded(soft).repeat_interleave(2, 0)
        rows = torch.cat([rows, lm.get_input_embeddings()(texts)], 1)
        wanted = lm(inputs_embeds=rows, use_cache=False).logits[:, -texts.shape[1] :].double()
        difference = ((found - wanted).std() / wanted.std()).item()
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError),
        *(NotImplementedError, RuntimeError, TypeError, ValueError),
    ) as error:
        if out_of_memory(error):
            raise
        difference = f"{type(error).__name__}: {str(error).strip()[:200]}"
    if isinstance(difference, str) or not difference <= TOLERANCE[lm.dtype]:
        raise UserError(
            f"--lm {name}: {type(lm).__name__} gives other logits after a cached prefix than in one full"
            f" pass ({difference}); use another model"
        )


def check_room(model, name, captions):
    """Raise UserError unless the longest caption fits after the prefix and the longest prompt."""

    def prompt_length(style):
        return len(encode_caption(model.tokenizer, style, "")[0])

    style = max(STYLES, key=prompt_length)
    queries = model.qformer.sizes["num_queries"] + (model.bos is not None)
    room = max_positions(model.lm) - queries - prompt_length(style)
    # a token is at least one byte of text, so texts with few bytes need not be tokenised
    long = [text for text in captions if len(text.encode()) + 2 > room]
    lengths = {text: len(encode_caption(model.tokenizer, style, text)[1]) for text in long}
    longest = max([MAX_NEW_TOKENS, *lengths.values()])
    if longest > room:
        text = next((text for text in long if lengths[text] == longest), None)
        what = "generation may take" if text is None else f"{text[:60]!r} takes"
        raise UserError(
            f"--lm {name} reads {max_positions(model.lm)} tokens: {queries} soft prompts and the prompt"
            f" leave {room} for a caption, but {what} {longest}; use another model, fewer --num-queries"
            " or shorter captions"
        )
