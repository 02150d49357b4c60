"""Find the tokens nearest to each soft prompt, to see whether the prompts resemble words.

There are two measures: by input embedding, as Mokady et al. 2021 (arXiv:2111.09734) interpret prefixes,
and in context, where a query's hidden state at the middle layer is compared with those of real words.

Shapes: B clips, Q queries, D width and V vocabulary of the language model, M tokens of a corpus, of which
U are distinct.
"""

import io
import re
from itertools import zip_longest

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset import STYLES, TRAIN, by_hash, load_records
from runtime.errors import UserError
from runtime.writing_systems import MARKS, is_unspaced, pieces
from viz.draw_text import for_matplotlib

CORPUS = 2000  # captions
CAPTIONS_AT_ONCE = 32
VOCABULARY_BLOCK = 1 << 15  # rows compared at a time: 200 MB of Qwen2's embeddings in float32
MIN_LETTERS = 3  # shorter tokens are a prefix of too many words to count as a match


def sample_labels(annotations, seed, limit=None):
    """Sample at most `CORPUS` labels of training clips, or `limit` if lower."""
    labels = {r["id"]: r["label"] for r in load_records(annotations, TRAIN)}
    labels = {i: label for i, label in labels.items() if (label or "").strip()}
    if not labels:
        raise UserError(f"--annotations {annotations}: no training clip has a label")
    return [labels[i] for i in by_hash(labels, seed)[: min(CORPUS, limit or CORPUS)]]


def nearest_tokens(lm, soft, count):
    """Find the input embeddings nearest to soft prompts (B, Q, D): (ids, cosines) of (B, Q, count)."""
    table = lm.get_input_embeddings()  # called, not indexed, because some layers scale their weight
    soft, best = F.normalize(soft.float(), dim=-1), []
    vocabulary = torch.arange(table.num_embeddings, device=table.weight.device)  # (V,)
    for ids in vocabulary.split(VOCABULARY_BLOCK):
        rows = F.normalize(table(ids).float(), dim=-1)  # (block, D)
        cosines, nearest = (soft @ rows.T).topk(min(count, len(rows)), -1)
        best.append((ids[nearest], cosines))
    ids, cosines = (torch.cat(parts, -1) for parts in zip(*best, strict=True))
    cosines, order = cosines.topk(min(count, cosines.shape[-1]), -1)
    return ids.gather(-1, order), cosines


class Corpus:
    """The language model's hidden states on captions at its middle layer, one row per token.

    texts: captions. Each is read after the label style prompt, without a video.
    """

    def __init__(self, captioner, texts):
        self.captioner, self.tokenizer = captioner, captioner.tokenizer
        self.layer = captioner.lm.config.num_hidden_layers // 2
        prompt = self.tokenizer(STYLES["label"], add_special_tokens=False)["input_ids"]
        prompt = prompt if captioner.bos is None else [captioner.bos, *prompt]

        # captions of the same length need no padding
        by_length, self.texts = {}, list(texts)
        for n, text in enumerate(self.texts):
            tokens = self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            by_length.setdefault(len(tokens), []).append((n, tokens))

        # the hidden state and the caption of each token
        ids, states, self.text_of = [], [], []
        bar = tqdm(total=len(self.texts), unit="caption", desc="read captions", delay=1)
        with torch.inference_mode(), bar:
            for length, group in by_length.items():
                for start in range(0, len(group), CAPTIONS_AT_ONCE):
                    numbers, rows = zip(*group[start : start + CAPTIONS_AT_ONCE], strict=True)
                    inputs = torch.tensor([[*prompt, *r] for r in rows], device=captioner.device)
                    out = captioner.run_lm(input_ids=inputs, output_hidden_states=True)
                    middle = out.hidden_states[self.layer][:, len(prompt) :]
                    states.append(middle.flatten(0, 1).float())
                    ids += [token for row in rows for token in row]
                    self.text_of += [n for n in numbers for _ in range(length)]
                    bar.update(len(rows))
        states = torch.cat(states)  # (M, D)
        self.states = F.normalize(states - states.mean(0), dim=-1)
        ids = torch.tensor(ids, device=captioner.device)
        self.tokens, self.token_of = ids.unique(return_inverse=True)  # (U,), (M,)

    def nearest(self, soft, count):
        """Find the tokens nearest to each soft prompt (B, Q, D) at the middle layer.

        Returns (ids, cosines, rows of the corpus), each (B, Q, count). A token's cosine is that of its
        most similar row. All states of a layer share a large common component, so the mean over a clip's
        queries and the mean over the corpus are subtracted.
        """
        inputs = self.captioner.embedded(soft)
        out = self.captioner.run_lm(inputs_embeds=inputs, output_hidden_states=True)
        states = out.hidden_states[self.layer][:, -soft.shape[1] :].float()  # (B, Q, D)
        states = F.normalize(states - states.mean(1, keepdim=True), dim=-1)
        found = []
        for queries in states:  # one clip at a time, which takes Q x M floats
            cosines = queries @ self.states.T  # (Q, M)
            best = cosines.new_full((len(queries), len(self.tokens)), -torch.inf)
            best.scatter_reduce_(1, self.token_of.expand_as(cosines), cosines, "amax")  # (Q, U)
            value, token = best.topk(min(count, len(self.tokens)), -1)  # (Q, count)
            rows = [
                cosines.where(self.token_of == t[:, None], -2).argmax(-1) for t in token.unbind(-1)
            ]
            found.append((self.tokens[token], value, torch.stack(rows, -1)))
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def table(self, soft, count):
        """List the `count` nearest tokens of each query of one clip (1, Q, D), best first.

        Returns a dict per query: {"tokens": [[text, cosine]], "context": [[text, cosine, a caption with
        that token]]}.
        """
        with torch.inference_mode():
            ids, cosines = nearest_tokens(self.captioner.lm, soft, count)
            near, similar, rows = self.nearest(soft, count)
        table = []
        for query in range(soft.shape[1]):
            captions = [self.texts[self.text_of[row]] for row in rows[0, query].tolist()]
            by_embedding = decode_each(self.tokenizer, ids[0, query]), cosines[0, query].tolist()
            in_context = decode_each(self.tokenizer, near[0, query]), similar[0, query].tolist()
            tokens = [[t, round(c, 3)] for t, c in zip(*by_embedding, strict=True)]
            context = [[t, round(c, 3), s] for t, c, s in zip(*in_context, captions, strict=True)]
            table.append({"tokens": tokens, "context": context})
        return table


def decode_each(tokenizer, ids):
    """Decode each of n token ids on its own. Returns n stripped strings."""
    return [text.strip() for text in tokenizer.batch_decode([[i] for i in ids.tolist()])]


def match_words(tokens, caption):
    """Return (the words of a caption that start with one of the tokens' texts, all its words).

    Tokens and words of fewer than `MIN_LETTERS` letters are ignored. In scripts without spaces, every
    character is a word, which is found if it is in one of the tokens.
    """
    parts = pieces(caption.lower())
    characters = {part for part in parts if is_unspaced(part)}
    found = re.findall(rf"[\w{MARKS}]+", " ".join(p for p in parts if p not in characters))
    words = {word for word in found if len(word) >= MIN_LETTERS}
    starts = tuple({t.lower() for t in tokens if len(t) >= MIN_LETTERS})
    matched = {word for word in words if word.startswith(starts)}
    return matched | {c for c in characters if any(c in t for t in tokens)}, words | characters


def draw(table, title, columns=5):
    """Draw the result of `Corpus.table`, one row per query. Returns PNG bytes.

    Nearest tokens by embedding are on the left, those in context on the right. Darker cells are nearer.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.4 + 0.24 * len(table)), layout="constrained")
    light = ListedColormap(colormaps["Blues"](range(0, 144)))  # keeps black text legible
    names = {"tokens": "by input embedding", "context": "in context, at the middle layer"}
    for panel, (part, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        cells = list(zip_longest(*(row[part][:columns] for row in table), fillvalue=["", 0.0]))
        values = [[cell[1] for cell in row] for row in zip(*cells, strict=True)]  # (Q, columns)
        image = panel.imshow(values, cmap=light, aspect="auto", vmin=0)
        for x, column in enumerate(cells):
            for y, (text, *_) in enumerate(column):
                text = "".join(c if c.isprintable() else "?" for c in text[:14])
                text, family = for_matplotlib(text)
                panel.text(x, y, text, ha="center", va="center", fontsize=8, family=family)
        panel.set(xlabel=f"nearest tokens {name}", ylabel="query", yticks=range(len(table)))
        panel.set_xticks(range(len(cells)), [str(n + 1) for n in range(len(cells))])
        panel.tick_params(labelsize=7)
        figure.colorbar(image, ax=panel, label="cosine")
    title, family = for_matplotlib(title)
    figure.suptitle(title, wrap=True, family=family)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
