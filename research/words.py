"""Do the soft prompts look like words? Their nearest tokens, by input embedding and in context.

Shapes: B clips, Q queries, D width and V vocabulary of the language model, M tokens of a corpus, of which
U are distinct. Prefixes were read by input embedding by Mokady et al. 2021 (arXiv:2111.09734); but the
layers behind the first see hidden states, so each query's state is also compared with those of words.
"""

import io
import re
from itertools import zip_longest

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset import STYLES

CAPTIONS_AT_ONCE = 32
VOCABULARY_BLOCK = 1 << 15  # rows compared at a time: 200 MB of Qwen2's embeddings in float32
SHORTEST = 3  # letters of a piece of a word that counts as found


def nearest_tokens(lm, soft, count):
    """Input embeddings most like each soft prompt (B, Q, D): (ids, cosines), both (B, Q, count)."""
    table = lm.get_input_embeddings()  # called below: some layers scale their weight
    soft, best = F.normalize(soft.float(), dim=-1), []
    vocabulary = torch.arange(table.num_embeddings, device=table.weight.device)
    for ids in vocabulary.split(VOCABULARY_BLOCK):
        rows = F.normalize(table(ids).float(), dim=-1)  # (block, D)
        cosines, nearest = (soft @ rows.T).topk(min(count, len(rows)), -1)
        best.append((ids[nearest], cosines))
    ids, cosines = (torch.cat(parts, -1) for parts in zip(*best, strict=True))
    cosines, order = cosines.topk(min(count, cosines.shape[-1]), -1)
    return ids.gather(-1, order), cosines


class Corpus:
    """Hidden states of the language model over captions, at its middle layer, a row a token.

    texts: captions in label style, each read behind the style's prompt and without a video.
    """

    def __init__(self, captioner, texts):
        self.captioner, self.tokenizer = captioner, captioner.tokenizer
        self.layer = captioner.lm.config.num_hidden_layers // 2
        prompt = self.tokenizer(STYLES["label"], add_special_tokens=False)["input_ids"]
        prompt = prompt if captioner.bos is None else [captioner.bos, *prompt]
        by_length, self.texts = {}, list(texts)  # texts of one length need no padding
        for n, text in enumerate(self.texts):
            tokens = self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            by_length.setdefault(len(tokens), []).append((n, tokens))
        ids, states, self.text_of = [], [], []
        bar = tqdm(total=len(self.texts), unit="caption", desc="read captions", delay=1)
        with torch.inference_mode(), bar:
            for length, group in by_length.items():
                for start in range(0, len(group), CAPTIONS_AT_ONCE):
                    numbers, rows = zip(*group[start : start + CAPTIONS_AT_ONCE], strict=True)
                    read = torch.tensor([[*prompt, *row] for row in rows], device=captioner.device)
                    out = captioner.run_lm(input_ids=read, output_hidden_states=True)
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
        """Tokens of the corpus most like each soft prompt (B, Q, D) at the middle layer.

        (ids, cosines, rows), each (B, Q, count): a token's cosine is that of the most similar of its
        rows. The states of each clip are less their mean and those of the corpus less theirs, since all
        states of a layer share a large common part.
        """
        rows = self.captioner.embedded(soft)
        out = self.captioner.run_lm(inputs_embeds=rows, output_hidden_states=True)
        states = out.hidden_states[self.layer][:, -soft.shape[1] :].float()  # (B, Q, D)
        states = F.normalize(states - states.mean(1, keepdim=True), dim=-1)
        found = []
        for queries in states:  # a clip at a time: Q x M floats
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
        """Of each query of one clip (1, Q, D): {"tokens": [[text, cosine]], "context": [[text, cosine,
        caption it stands in]]}, `count` of each, best first."""
        with torch.inference_mode():
            ids, cosines = nearest_tokens(self.captioner.lm, soft, count)
            near, likeness, rows = self.nearest(soft, count)
        table = []
        for query in range(soft.shape[1]):
            said = spoken(self.tokenizer, ids[0, query]), cosines[0, query].tolist()
            captions = [self.texts[self.text_of[row]] for row in rows[0, query].tolist()]
            meant = spoken(self.tokenizer, near[0, query]), likeness[0, query].tolist(), captions
            table.append(
                {
                    "tokens": [[t, round(c, 3)] for t, c in zip(*said, strict=True)],
                    "context": [[t, round(c, 3), text] for t, c, text in zip(*meant, strict=True)],
                }
            )
        return table


def spoken(tokenizer, ids):
    """What tokens (n,) say, without the white space around them; n strings."""
    return [text.strip() for text in tokenizer.batch_decode([[i] for i in ids.tolist()])]


def words_found(tokens, caption):
    """(the words of a caption that one of some token texts begins, all its words). A piece of fewer than
    `SHORTEST` letters begins too many to count, and so do shorter words."""
    words = {word for word in re.findall(r"\w+", caption.lower()) if len(word) >= SHORTEST}
    pieces = tuple({t.lower() for t in tokens if len(t) >= SHORTEST})
    return {word for word in words if word.startswith(pieces)}, words


def draw(table, title, columns=5):
    """The bytes of a PNG: a row a query, left its nearest tokens by embedding, right in context; the
    darker, the nearer. table: of `Corpus.table`."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.4 + 0.24 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    light = ListedColormap(colormaps["Blues"](range(0, 144)))  # black letters stay legible on it
    names = {"tokens": "by input embedding", "context": "in context, at the middle layer"}
    for panel, (part, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        cells = list(zip_longest(*(row[part][:columns] for row in table), fillvalue=["", 0.0]))
        values = [[cell[1] for cell in row] for row in zip(*cells, strict=True)]  # (Q, columns)
        shown = panel.imshow(values, cmap=light, aspect="auto", vmin=0)
        for x, column in enumerate(cells):
            for y, (text, *_) in enumerate(column):
                text = "".join(c if c.isprintable() else "?" for c in text[:14])
                text = text.replace("$", r"\$")  # between two of them is no mathematics
                panel.text(x, y, text, ha="center", va="center", fontsize=8)
        panel.set(xlabel=f"nearest tokens {name}", ylabel="query", yticks=range(len(table)))
        panel.set_xticks(range(len(cells)), [str(n + 1) for n in range(len(cells))])
        panel.tick_params(labelsize=7)
        figure.colorbar(shown, ax=panel, label="cosine")
    figure.suptitle(title.replace("$", r"\$"), wrap=True)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
