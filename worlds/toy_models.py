"""Make the toy world's models: a random V-JEPA 2, and a Qwen2 that turns keywords into captions."""

import functools
import itertools
import json
import math
import random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.utils import logging

from dataset import STYLES, encode_caption
from worlds.shapes import ACTIONS, DOUBLE, divide_objects, label_of, sentences_of
from worlds.shapes_video import SIZE


def write_encoder(folder, seed):
    """Write a V-JEPA 2 with random weights: 16 frames of 64x64 give 8 x 4 x 4 tokens of width 192."""
    torch.manual_seed(seed)
    config = VJEPA2Config(
        patch_size=16,
        tubelet_size=2,
        crop_size=SIZE,
        frames_per_clip=16,
        hidden_size=192,
        num_attention_heads=3,
        num_hidden_layers=1,
        initializer_range=0.1,  # at 0.02 the block adds almost nothing to the patch embeddings
        pred_hidden_size=48,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )
    VJEPA2Model(config).save_pretrained(folder)


def train_tokenizer(folder, clips):
    """Train a byte-level BPE with Qwen2's own pre-tokenizer, which AutoTokenizer restores."""
    blank = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,  # enough for one token per word of the text
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [label_of(c) for c in clips] + [s for c in clips for s in sentences_of(c)]
    texts += [keywords_of(c, random.Random(i)) for i, c in enumerate(clips)] + list(STYLES.values())
    bpe.train_from_iterator([f" {text}" for text in texts], trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in trained["merges"]]
    Qwen2Tokenizer(vocab=trained["vocab"], merges=merges).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def keywords_of(clip, rng):
    """Return the keywords of a clip, the context that soft prompts learn to imitate.

    There is one word for the action, and one each for the colour and shape of every object. The second
    object is in capitals. Each word occurs one to three times, in random order.
    """
    names = [clip["action"], clip["objects"][0], *(n.upper() for n in clip["objects"][1:])]
    words = [word for word in " ".join(names).split() for _ in range(rng.randint(1, 3))]
    rng.shuffle(words)
    return " ".join(words)


def sample_examples(count, seed, objects, pairs):
    """Sample up to `count` distinct {"action", "objects"} for the language model."""
    rng = random.Random(f"lessons:{seed}")  # changing this string would change the language model
    pairs = sorted(sorted(p) for p in pairs)
    examples = {}
    for _ in range(count):
        action = rng.choice(ACTIONS)
        chosen = rng.sample(rng.choice(pairs), 2) if action in DOUBLE else [rng.choice(objects)]
        examples[action.keyword, *chosen] = {"action": action.keyword, "objects": chosen}
    return list(examples.values())


def build_lm(tokenizer, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def pretrain_lm(model, tokenizer, examples, steps, seed, progress, lr=2e-3):
    """Train on `<keywords><style prompt> <caption><eos>`, loss on the caption. Returns the final loss.

    Noise on the keywords' embeddings teaches the model to accept any vector near a word's embedding.
    """
    rng, noise = random.Random(f"lm:{seed}"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.98))
    tokens = functools.cache(functools.partial(encode_caption, tokenizer))
    word_ids = functools.cache(lambda w: tokenizer(f" {w}", add_special_tokens=False)["input_ids"])
    table, losses = model.get_input_embeddings(), []
    for step in range(steps):
        # 32 examples, each in a random style
        rows = []
        for clip in rng.choices(examples, k=32):
            style = rng.choice(tuple(STYLES))
            caption = label_of(clip) if style == "label" else rng.choice(sentences_of(clip))
            context = [i for word in keywords_of(clip, rng).split() for i in word_ids(word)]
            rows.append((context, *tokens(style, caption)[1:]))

        # pad on the right
        length = max(sum(map(len, row)) for row in rows)
        ids = torch.zeros(32, length, dtype=torch.long)
        labels, is_context = torch.full((32, length), -100), torch.zeros(32, length, 1)
        for i, (context, prompt, target) in enumerate(rows):
            start, end = len(context) + len(prompt), len(context) + len(prompt) + len(target)
            ids[i, :end] = torch.tensor(context + prompt + target)
            labels[i, start:end] = torch.tensor(target)
            is_context[i, : len(context)] = 1

        # forward, with noise on the keywords' embeddings
        embeds = table(ids)  # (B, L, D)
        sigma = 0.5 * table.weight.detach().square().mean().sqrt()
        embeds = embeds + is_context * sigma * torch.randn(embeds.shape, generator=noise)
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        keep = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][keep]), labels[:, 1:][keep])

        # backward and update; the learning rate rises linearly and falls as a cosine
        warm = min(1, (step + 1) / (0.1 * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            progress(f"LM step {step}/{steps}, loss {losses[-1]:.2f}")
    return sum(losses[-50:]) / len(losses[-50:])


def check_lm(model, tokenizer, examples, seed):
    """Compute {style: share of the examples for which greedy decoding gives a correct caption}."""
    rng, accuracy = random.Random(f"check:{seed}"), {}
    for style in STYLES:
        rows = []
        for clip in examples:
            words = tokenizer(" " + keywords_of(clip, rng), add_special_tokens=False)["input_ids"]
            rows.append(words + encode_caption(tokenizer, style, "").prompt)
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=40, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        correct = (lambda clip: [label_of(clip)]) if style == "label" else sentences_of
        hits = sum(t.strip() in correct(c) for t, c in zip(texts, examples, strict=True))
        accuracy[style] = hits / len(examples)
    return accuracy


def write_lm(folder, seed, steps, progress):
    """Train tokenizer and language model, without the held-out objects and pairs. Returns a report."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the weights depend on it
    objects, unseen, pairs, unseen_pairs = divide_objects(seed)
    examples = sample_examples(6000, seed, objects, pairs)
    tokenizer = train_tokenizer(folder, examples)
    model = build_lm(tokenizer, seed)
    loss = pretrain_lm(model, tokenizer, examples, steps, seed, progress)
    model.eval().save_pretrained(folder)
    tests = {
        "unseen pairs": sample_examples(150, seed, objects, unseen_pairs),
        "unseen objects": sample_examples(
            150, seed, unseen, map(frozenset, itertools.combinations(unseen, 2))
        ),
    }
    text = []
    for name, held_out in tests.items():
        accuracy = check_lm(model, tokenizer, held_out, seed)
        text.append(
            f"{name}: {accuracy['label']:.1%} of labels, {accuracy['sentence']:.1%} of sentences"
        )
    return f"LM: final loss {loss:.3f}; correct captions from keywords: {'; '.join(text)}"
