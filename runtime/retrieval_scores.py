"""Retrieval scores: ranks, recalls and the median rank. Shapes: n queries, m items, D width."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from runtime.errors import UserError
from runtime.files import read_json
from runtime.names import counted, first_few

RECALLS = {"R@1": 1, "R@5": 5, "R@10": 10}
NO_BRACKETS = str.maketrans("", "", "[]")
BLOCK = 512  # queries compared at a time: 512 x 25,000 similarities are 51 MB


def rank(scores, right):
    """Return the rank, from 1, of the best right item of each query. int64 (n,).

    scores: (n, m), larger is better. right: bool (n, m), at least one True per query. The rank is one more
    than the number of wrong items that are not worse, so ties and NaN count against the query. The other
    right items are ignored.
    """
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)  # NaN if one is NaN
    return 1 + (~(scores < best) & ~right).sum(1)


def ranks(queries, items, right):
    """Return `rank` for queries (n, D) and items (m, D), compared by dot products.

    right: n lists of indices of items.
    """
    found = []
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ items.T
        wanted = np.zeros(scores.shape, bool)
        for row, indices in zip(wanted, right[start : start + BLOCK], strict=True):
            row[indices] = True
        found.append(rank(scores, wanted))
    return np.concatenate(found)


def summary(found):
    """Return {"R@1", "R@5", "R@10", "median_rank"} of ranks (n,)."""
    recalls = {name: float((found <= k).mean()) for name, k in RECALLS.items()}
    return recalls | {"median_rank": float(np.median(found))}


def inverse(right, count):
    """Return, for each of `count` items, the list of queries for which it is right."""
    queries = [[] for _ in range(count)]
    for query, items in enumerate(right):
        for item in items:
            queries[item].append(query)
    return queries


@dataclass(frozen=True)
class Pairs:
    """Clips and texts to match. right: for each text, the indices of the clips that it describes."""

    records: list
    texts: list
    right: list

    @classmethod
    def of_labels(cls, records):
        """Use each distinct label as a text, which is right for all clips that have it."""
        clips = {}
        for n, record in enumerate(records):
            clips.setdefault(record["label"], []).append(n)
        return cls(records, [*clips], [*clips.values()])

    @classmethod
    def of_list(cls, path, records):
        """Read a list of {"image": file name or names, "caption": text} and use the clips it names.

        A caption that occurs more than once is one text. Brackets, as in "[something]", are removed.
        Raises UserError if the file is not such a list or names a clip that is not in `records`.
        """
        entries = read_json(path, "--lists")
        if not isinstance(entries, list) or not all(map(is_entry, entries)) or not entries:
            text = '--lists {} must be a JSON list of {{"image": file or files, "caption": text}}'
            raise UserError(text.format(path))
        known = {r["id"]: r for r in records}
        known |= {PurePosixPath(r["video"]).name: r for r in records if r["video"]}
        used, clips, missing = {}, {}, []
        for entry in entries:
            images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
            for name in (PurePosixPath(image).name for image in images):
                record = known.get(name) or known.get(PurePosixPath(name).stem)
                if record is None:
                    missing.append(name)
                    continue
                n = used.setdefault(record["id"], (len(used), record))[0]
                clips.setdefault(entry["caption"].translate(NO_BRACKETS), set()).add(n)
        if missing:
            clips = counted(len(missing), "clip")
            some = first_few(missing)
            raise UserError(
                f"--lists {path} has {clips} not in the split, or without features: {some}"
            )
        return cls([r for _, r in used.values()], [*clips], [sorted(c) for c in clips.values()])

    def ranks(self, clips, texts):
        """Rank vectors of clips (n, W) and texts (m, W). Returns {direction: ranks of the queries}."""
        return {
            "text_to_video": ranks(texts, clips, self.right),
            "video_to_text": ranks(clips, texts, inverse(self.right, len(clips))),
        }


def is_entry(value):
    """Return True for an entry of a retrieval list."""
    if not isinstance(value, dict) or not isinstance(value.get("caption"), str):
        return False
    image = value.get("image")
    names = image if isinstance(image, list) else [image]
    return bool(names) and bool(value["caption"].strip()) and all(isinstance(n, str) for n in names)
