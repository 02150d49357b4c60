"""Write a tiny Something-Something-V2: clips, labels, paraphrases, and two tiny models.

    python toy_ssv2.py data/toy

For machines without the dataset, the weights or a GPU: with `--encoder data/toy/encoder` and
`--lm data/toy/lm` the real scripts run on it unchanged. Plain coloured shapes move over a grey
ground; only the motion tells the action, so one frame is not enough. It is a tiny world and
claims nothing about SSv2. About 100 s on two idle cores (est.) and 47 MB at the defaults:

    videos/       <id>.webm, VP9, 12 frames/s, 64x64, 18-28 frames
    labels/       train, validation, test, labels (.json) and test-answers.csv as SSv2 has them, and
                  validation_pairs    two-object clips; the two objects never met in training
                  validation_objects  colour-shape combinations that training never shows
    paraphrases/  ten shards of whole sentences for training, one file for validation
    encoder/      a V-JEPA 2 with random weights
    lm/           a Qwen2 that has learned, from text alone, to turn keywords into captions. Without
                  that, no prefix could steer a frozen language model.

Everything is a pure function of the flags. A second run keeps what is finished.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cli import UserError, note, parser, run, whole
from dataset import STYLES, TEST, TRAIN, VALIDATION, encode_caption, read_json, write_json

WORLD = 1  # raise it when the same flags would give other files
SIZE, RATE = 64, 12  # pixels; frames per second, as SSv2
FRAMES = (18, 28)  # above the 16 that the encoder takes, so that sampling is real
PAIRS, OBJECTS = "validation_pairs", "validation_objects"
COLOURS = {  # all brighter than the ground: a shape's contrast has one sign, whatever its colour
    "red": (255, 40, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 240, 50),
    "green": (30, 200, 60),
    "cyan": (60, 235, 240),
    "blue": (60, 90, 255),
    "purple": (165, 50, 225),
    "pink": (255, 150, 205),
    "brown": (140, 85, 40),
    "white": (250, 250, 250),
}
SHAPES = ("disc", "bar", "pole", "cross", "ladder", "fence")
SUBJECTS = ("A hand", "Someone", "A person")

# One action in three lines: the keyword that stands for it in the language model's lessons, and its
# template; what follows each of SUBJECTS; sentences of their own. {a} and {b} are the objects in
# the template's order.
TABLE = """
    right | Moving [something] over to the right side
        moves {a} rightwards | takes {a} to the right
        {a} travels to the right | {a} is taken rightwards
    left | Moving [something] over to the left side
        moves {a} leftwards | takes {a} to the left
        {a} travels to the left | {a} is taken leftwards
    up | Raising [something] slowly towards the top
        raises {a} slowly | lifts {a} to the top
        {a} rises slowly | {a} is lifted to the top
    down | Lowering [something] slowly towards the bottom
        lowers {a} slowly | brings {a} down to the bottom
        {a} sinks slowly | {a} is brought down to the bottom
    drop | [Something] falling fast and bouncing off the floor
        drops {a} on the floor | lets {a} fall and bounce
        {a} hits the floor and bounces | {a} is dropped and bounces
    clockwise | Swinging [something] round in a clockwise circle
        swings {a} round clockwise | leads {a} along a clockwise circle
        {a} circles clockwise | {a} is swung round clockwise
    anticlockwise | Swinging [something] round in an anticlockwise circle
        swings {a} round anticlockwise | leads {a} along an anticlockwise circle
        {a} circles anticlockwise | {a} is swung round anticlockwise
    near | Bringing the camera nearer until [something] looks big
        brings the camera nearer to {a} | zooms in on {a}
        {a} grows in the picture | the camera comes up to {a}
    far | Taking the camera back until [something] looks small
        takes the camera back from {a} | zooms out from {a}
        {a} shrinks in the picture | the camera goes back from {a}
    sham | Pretending to shift [something] sideways and bringing it back
        pretends to shift {a} sideways | only makes as if to shift {a}
        {a} goes sideways and comes back | {a} is shifted but put back
    feint | Pretending to lift [something] and setting it down again
        pretends to lift {a} | only makes as if to lift {a}
        {a} goes up and comes down again | {a} is lifted but set down again
    against | Moving [something] right up against [something]
        moves {a} up against {b} | takes {a} to where {b} stands
        {a} comes to rest beside {b} | {a} is moved up against {b}
    leave | Moving [something] well away from a waiting [something]
        moves {a} far away from {b} | takes {a} away and leaves {b} waiting
        {a} leaves {b} behind | {a} is moved far away from {b}
    together | Bringing [something] and [something] together in the middle
        brings {a} and {b} together | makes {a} and {b} meet
        {a} and {b} meet in the middle | {a} and {b} are brought together
    apart | Drawing [something] and [something] apart to both sides
        draws {a} and {b} apart | makes {a} and {b} part
        {a} and {b} part in the middle | {a} and {b} are drawn apart
    knock | Knocking [something] out of its place with [something]
        knocks {a} away with {b} | lets {b} bump into {a}
        {a} is knocked away by {b} | {b} strikes {a}
    cover | Sliding [something] on top of [something] to hide it
        slides {a} on top of {b} | hides {b} under {a}
        {a} slides over {b} | {b} is hidden under {a}
"""
Action = namedtuple("Action", "keyword template acts events")
ROWS = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
ACTIONS = tuple(Action(*ROWS[i], *ROWS[i + 1 : i + 3]) for i in range(0, len(ROWS), 3))
SINGLE = [a for a in ACTIONS if a.template.count("[") == 1]
DOUBLE = [a for a in ACTIONS if a.template.count("[") == 2]


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("output", help="folder for the toy world")
    group = p.add_argument_group("world")
    group.add_argument("--clips", type=whole(50), default=4000, help="clips for training")
    group.add_argument("--seed", type=whole(0), default=0, help="seed of every random choice")
    group.add_argument(
        "--old-names", action="store_true", help="something-something-v2-train.json and so on"
    )
    group = p.add_argument_group("language model")
    group.add_argument("--lm-steps", type=whole(1), default=800, help="steps of batch 32")
    group = p.add_argument_group("machine")
    group.add_argument(
        "--workers", type=whole(1), default=2, help="worker processes that write clips"
    )
    return p.parse_args(argv)


# ---- what happens in each clip, and in which words -----------------------------------------


def deck(rng, cards):
    """Deal `cards` for ever, reshuffled after each round: everything occurs about equally often."""
    while True:
        yield from rng.sample(cards, len(cards))


def divide_objects(seed):
    """Return what training may show: (objects, held-out objects, pairs, held-out pairs).

    An object is "colour shape"; one shape of each colour is held out. A pair is a frozenset.
    """
    rng = random.Random(f"objects:{seed}")
    shapes = deck(rng, SHAPES)
    unseen = [f"{colour} {next(shapes)}" for colour in rng.sample(list(COLOURS), len(COLOURS))]
    objects = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in unseen]
    pairs = [frozenset(p) for p in itertools.combinations(objects, 2)]
    rng.shuffle(pairs)
    return objects, unseen, set(pairs[len(pairs) // 5 :]), set(pairs[: len(pairs) // 5])


def plan(clips, seed):
    """Decide every clip: a list of {"id", "split", "action" (keyword), "objects" (names)}."""
    objects, unseen, pairs, unseen_pairs = divide_objects(seed)
    few = max(32, clips // 24)
    splits = {  # split: clips, actions, objects, pairs that may meet
        TRAIN: (clips, ACTIONS, objects, pairs),
        VALIDATION: (max(64, clips // 16), ACTIONS, objects, pairs),
        PAIRS: (few, DOUBLE, objects, unseen_pairs),
        OBJECTS: (few, ACTIONS, unseen, {frozenset(p) for p in itertools.combinations(unseen, 2)}),
        TEST: (max(32, clips // 60), ACTIONS, objects, pairs),
    }
    total = sum(count for count, *_ in splits.values())
    ids = iter(random.Random(f"ids:{seed}").sample(range(1, 220_848 + 4 * total), total))
    out = []
    for split, (count, actions, names, allowed) in splits.items():
        rng = random.Random(f"{split}:{seed}")
        action_deck, object_deck = deck(rng, actions), deck(rng, names)
        for _ in range(count):
            action, chosen = next(action_deck), [next(object_deck)]
            if action in DOUBLE:
                partners = [n for n in names if frozenset((chosen[0], n)) in allowed]
                chosen.append(rng.choice(partners))
                rng.shuffle(chosen)
            out.append(
                {"id": str(next(ids)), "split": split, "action": action.keyword, "objects": chosen}
            )
    return out


def action_of(clip):
    return next(a for a in ACTIONS if a.keyword == clip["action"])


def label_of(clip):
    """SSv2's label: the template in lower case, its brackets filled."""
    text = action_of(clip).template.lower()
    for name in clip["objects"]:
        text = text.replace("[something]", name, 1)
    return text


def sentences_of(clip):
    """Every admissible paraphrase of the clip: eight sentences."""
    action = action_of(clip)
    names = {k: f"the {name}" for k, name in zip("ab", clip["objects"], strict=False)}
    texts = [f"{subject} {act}" for subject in SUBJECTS for act in action.acts]
    texts = [text.format(**names) for text in (*texts, *action.events)]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def paraphrases_of(clip, seed):
    """The sentences that the clip gets: 4 to 8, one clip in ten 1 to 3."""
    rng = random.Random(f"paraphrases:{seed}:{clip['id']}")
    count = rng.randint(1, 3) if rng.random() < 0.1 else rng.randint(4, 8)
    return rng.sample(sentences_of(clip), count)


def write_labels(folder, clips, old_names):
    prefix = "something-something-v2-" if old_names else ""
    bare = {a.keyword: a.template.replace("[", "").replace("]", "") for a in ACTIONS}
    for split in dict.fromkeys(c["split"] for c in clips):
        records = [
            {
                "id": c["id"],
                "label": label_of(c),
                "template": action_of(c).template,
                "placeholders": c["objects"],
            }
            for c in clips
            if c["split"] == split
        ]
        if split == TEST:
            records = [{"id": r["id"]} for r in records]
        write_json(folder / f"{prefix}{split}.json", records)
    ordered = sorted(bare.values(), key=str.lower)
    write_json(folder / f"{prefix}labels.json", {text: str(i) for i, text in enumerate(ordered)})
    rows = [f"{c['id']};{bare[c['action']]}\n" for c in clips if c["split"] == TEST]
    (folder / "test-answers.csv").write_text("".join(rows))


def write_paraphrases(folder, clips, seed):
    def shard(name, some):
        write_json(
            folder / f"ssv2_paraphrase_{name}.json",
            {c["id"]: paraphrases_of(c, seed) for c in some},
        )

    train = [c for c in clips if c["split"] == TRAIN]
    for i in range(10):
        shard(f"train_{i}", train[i::10])
    shard(VALIDATION, [c for c in clips if c["split"] == VALIDATION])


# ---- clips ---------------------------------------------------------------------------------


def motion(action, frames, rng):
    """Paths of a clip's objects: centres (objects, frames, 2) in x, y and radii (objects, frames).

    Where things start has one distribution for all one-object actions and one for all two-object
    actions: the first frame gives nothing away.
    """
    import numpy as np

    lead, tail = rng.uniform(0.03, 0.12, 2)
    t = np.clip((np.linspace(0, 1, frames) - lead) / (1 - lead - tail), 0, 1)  # (frames,)
    ease, there_and_back = t * t * (3 - 2 * t), np.sin(np.pi * t)
    still = np.zeros(frames)
    if action in {a.keyword for a in SINGLE}:
        x, y, r = rng.uniform(27, 37), rng.uniform(24, 34), rng.uniform(12, 13.5)
        far, back = rng.uniform(22, 26), rng.uniform(15, 18)
        floor = 63 - r
        fall = np.clip((t - 0.2) / 0.3, 0, 1) ** 2 * (floor - y)
        bounce = np.clip((t - 0.5) / 0.35, 0, 1)
        turn = {"clockwise": 1, "anticlockwise": -1}.get(action, 0) * 2 * np.pi * ease
        start = rng.uniform(-0.3, 0.3) - np.pi / 2  # from the top of the circle
        dx, dy, zoom = {
            "right": (far * ease, still, still),
            "left": (-far * ease, still, still),
            "up": (still, -far * ease, still),
            "down": (still, far * ease, still),
            "drop": (still, fall - 0.7 * (floor - y) * 4 * bounce * (1 - bounce), still),
            "near": (still, still, 0.9 * ease),
            "far": (still, still, -0.6 * ease),
            "sham": (back * there_and_back * rng.choice((-1, 1)), still, still),
            "feint": (still, -back * there_and_back, still),
        }.get(action, (13 * (np.cos(start + turn) - np.cos(start)), None, still))
        if dy is None:
            dy = 13 * (np.sin(start + turn) - np.sin(start))
        return np.stack([x + dx, y + dy], -1)[None], (r * (1 + zoom))[None]
    angle, half = rng.uniform(-0.15, 0.15), rng.uniform(15.5, 16.5)
    axis = np.array([np.cos(angle), np.sin(angle)])  # the object on the left is named first
    middle = rng.uniform((31, 28), (33, 36))
    r = rng.uniform(10, 11, 2)
    gap = 2 * half - r.sum()
    hit, flight = np.clip(t / 0.45, 0, 1), np.clip((t - 0.45) / 0.45, 0, 1)
    a, b = {  # steps of both along the axis, which points from the first to the second
        "against": (gap * ease, still),
        "leave": (-18 * ease, still),
        "together": ((half - 6) * ease, -(half - 6) * ease),
        "apart": (-12 * ease, 12 * ease),
        "knock": (-22 * flight * (2 - flight), -gap * hit),
        "cover": (2 * half * ease, still),
    }[action]
    centres = np.stack([(a - half)[:, None] * axis, (b + half)[:, None] * axis]) + middle
    return centres, np.repeat(r[:, None], frames, 1)


def signed_distance(shape, x, y):
    """Distance in pixels from the outline of a shape of radius 1, negative inside, scaled by x, y."""
    import numpy as np

    if shape in ("pole", "fence"):
        x, y, shape = y, x, {"pole": "bar", "fence": "ladder"}[shape]
    ax, ay = np.abs(x), np.abs(y)
    if shape == "disc":
        return np.sqrt(x * x + y * y) - 1
    if shape == "bar":
        return np.maximum(ax - 1.1, ay - 0.36)
    if shape == "ladder":  # three rungs
        return np.maximum(ax - 0.95, np.minimum(ay, np.abs(ay - 0.74)) - 0.22)
    u, v = np.abs(x + y) * 0.707, np.abs(x - y) * 0.707
    return np.maximum(np.minimum(u, v) - 0.24, np.maximum(u, v) - 1.1)  # cross


def render(clip, seed):
    """Draw one clip: uint8 (frames, SIZE, SIZE, 3), antialiased, a function of (seed, id)."""
    import numpy as np

    rng = np.random.default_rng([seed, int(clip["id"])])
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    centres, radii = motion(clip["action"], frames, rng)
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    slope = rng.uniform(-0.2, 0.2, 2)
    ground = rng.uniform(15, 40) + slope[0] * (axis - 32) + slope[1] * (axis - 32)[:, None]
    ground = (ground + rng.normal(0, 3, (SIZE, SIZE))).astype(np.float32)
    video = np.repeat(ground[None], frames, 0)[None].repeat(3, 0)  # (3, frames, SIZE, SIZE)
    for name, path, radius in reversed(list(zip(clip["objects"], centres, radii, strict=True))):
        colour, shape = name.split()
        path, radius = path.astype(np.float32), radius.astype(np.float32)[:, None]
        x = ((axis - path[:, :1]) / radius)[:, None, :]
        y = ((axis - path[:, 1:]) / radius)[:, :, None]
        distance = signed_distance(shape, x, y) * radius[..., None]  # (frames, SIZE, SIZE)
        cover = np.clip(0.5 - distance, 0, 1)
        for plane, value in zip(video, COLOURS[colour], strict=True):
            plane += cover * (np.float32(value) - plane)
    light = rng.uniform(0.92, 1.06) + rng.uniform(-0.03, 0.03) * np.linspace(-1, 1, frames)
    video *= light.astype(np.float32)[:, None, None]
    return np.clip(video, 0, 255, out=video).astype(np.uint8).transpose(1, 2, 3, 0).copy()


def write_video(path, video):
    """Encode frames as VP9 in webm. The same frames give the same bytes."""
    import av

    temporary = path.with_name(f".{path.name}.tmp")
    speed = {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "threads": "1"}
    with av.open(
        str(temporary), "w", format="webm", options={"fflags": "+bitexact"}
    ) as container:  # without bitexact the container gets a random id
        stream = container.add_stream("libvpx-vp9", rate=RATE, options=speed)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(temporary, path)


def write_clips(folder, clips, seed):
    """Runs in a worker: render and encode a few clips. Returns their number."""
    for clip in clips:
        write_video(Path(folder) / f"{clip['id']}.webm", render(clip, seed))
    return len(clips)


def ignore_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business


# ---- models --------------------------------------------------------------------------------


def write_encoder(folder, seed):
    """A V-JEPA 2 with random weights: 16 frames of 64x64 become 8 x 4 x 4 tokens of width 192."""
    import torch
    from transformers import VJEPA2Config, VJEPA2Model

    torch.manual_seed(seed)
    config = VJEPA2Config(
        patch_size=16,
        tubelet_size=2,
        crop_size=SIZE,
        frames_per_clip=16,
        hidden_size=192,
        num_attention_heads=3,
        num_hidden_layers=1,
        initializer_range=0.1,  # at 0.02 the block adds next to nothing to the patches
        pred_hidden_size=48,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )
    VJEPA2Model(config).save_pretrained(folder)


def train_tokenizer(folder, clips):
    """A byte-level BPE learned through Qwen2's own pre-tokenizer, which AutoTokenizer puts back."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, Qwen2Tokenizer

    blank = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,  # enough for each word to become one token; the text has no more
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [label_of(c) for c in clips] + [s for c in clips for s in sentences_of(c)]
    texts += [keywords_of(c, random.Random(i)) for i, c in enumerate(clips)] + list(STYLES.values())
    bpe.train_from_iterator([f" {text}" for text in texts], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    Qwen2Tokenizer(vocab=learned["vocab"], merges=merges).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def keywords_of(clip, rng):
    """What the soft prompts must learn to imitate: one word each for the action and for colour and
    shape of the objects, the second object in capitals; any order, each word one to three times.
    """
    names = [clip["action"], clip["objects"][0], *(n.upper() for n in clip["objects"][1:])]
    words = [word for word in " ".join(names).split() for _ in range(rng.randint(1, 3))]
    rng.shuffle(words)
    return " ".join(words)


def draw_lessons(count, seed, objects, pairs):
    """Random (action, objects) for the language model, all different."""
    rng, pairs = random.Random(f"lessons:{seed}"), sorted(sorted(p) for p in pairs)
    lessons = {}
    for _ in range(count):
        action = rng.choice(ACTIONS)
        chosen = rng.sample(rng.choice(pairs), 2) if action in DOUBLE else [rng.choice(objects)]
        lessons[action.keyword, *chosen] = {"action": action.keyword, "objects": chosen}
    return list(lessons.values())


def build_lm(tokenizer, seed):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

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


def pretrain_lm(model, tokenizer, lessons, steps, seed, progress, lr=2e-3):
    """Teach `<keywords><style prompt> <caption><eos>`, loss on the caption. Returns the final loss.

    Noise on the keywords' embeddings makes the model take vectors that are near a word for it.
    """
    import torch
    import torch.nn.functional as F

    rng, noise = random.Random(f"lm:{seed}"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.98))
    tokens = functools.cache(functools.partial(encode_caption, tokenizer))
    word_ids = functools.cache(lambda w: tokenizer(f" {w}", add_special_tokens=False)["input_ids"])
    table, losses = model.get_input_embeddings(), []
    for step in range(steps):
        rows = []
        for clip in rng.choices(lessons, k=32):
            style = rng.choice(tuple(STYLES))
            caption = label_of(clip) if style == "label" else rng.choice(sentences_of(clip))
            context = [i for word in keywords_of(clip, rng).split() for i in word_ids(word)]
            rows.append((context, *tokens(style, caption)))
        length = max(sum(map(len, row)) for row in rows)
        ids = torch.zeros(32, length, dtype=torch.long)
        labels, is_context = torch.full((32, length), -100), torch.zeros(32, length, 1)
        for i, (context, prompt, target) in enumerate(rows):
            start, end = len(context) + len(prompt), len(context) + len(prompt) + len(target)
            ids[i, :end] = torch.tensor(context + prompt + target)
            labels[i, start:end] = torch.tensor(target)
            is_context[i, : len(context)] = 1
        embeds = table(ids)  # (B, L, D)
        sigma = 0.5 * table.weight.detach().square().mean().sqrt()
        embeds = embeds + is_context * sigma * torch.randn(embeds.shape, generator=noise)
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        keep = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][keep]), labels[:, 1:][keep])
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


def check_lm(model, tokenizer, lessons, seed):
    """Share of contexts from which greedy decoding gives the label, and an admissible sentence."""
    rng, right = random.Random(f"check:{seed}"), {}
    for style in STYLES:
        rows = []
        for clip in lessons:
            words = tokenizer(" " + keywords_of(clip, rng), add_special_tokens=False)["input_ids"]
            rows.append(words + encode_caption(tokenizer, style, "")[0])
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=40, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        allowed = (lambda clip: [label_of(clip)]) if style == "label" else sentences_of
        hits = sum(t.strip() in allowed(c) for t, c in zip(texts, lessons, strict=True))
        right[style] = hits / len(lessons)
    return right


def write_lm(folder, args, progress):
    """Train tokenizer and language model. The held-out objects and pairs are not in its lessons."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the weights depend on it
    objects, unseen, pairs, unseen_pairs = divide_objects(args.seed)
    lessons = draw_lessons(6000, args.seed, objects, pairs)
    tokenizer = train_tokenizer(folder, lessons)
    model = build_lm(tokenizer, args.seed)
    loss = pretrain_lm(model, tokenizer, lessons, args.lm_steps, args.seed, progress)
    model.eval().save_pretrained(folder)
    tests = {
        "unseen pairs": draw_lessons(150, args.seed, objects, unseen_pairs),
        "unseen objects": draw_lessons(
            150, args.seed, unseen, map(frozenset, itertools.combinations(unseen, 2))
        ),
    }
    text = []
    for name, some in tests.items():
        share = check_lm(model, tokenizer, some, args.seed)
        text.append(f"{name}: {share['label']:.1%} of labels, {share['sentence']:.1%} of sentences")
    return f"LM: final loss {loss:.3f}; from keywords it writes right, {'; '.join(text)}"


# ---- the folder ----------------------------------------------------------------------------


def claim(root, settings):
    """Mark `root` as a world of these settings. Raises UserError if it is anything else."""
    done, started = root / "toy.json", root / ".toy-started.json"
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file, not a folder")
    marker = next((m for m in (done, started) if m.is_file()), None)
    if marker is None:
        if root.exists() and any(root.iterdir()):
            raise UserError(f"{root} is not empty and no toy world. Name another folder.")
        root.mkdir(parents=True, exist_ok=True)
        write_json(started, settings)
        return
    there = read_json(marker, "toy world")
    there = there if isinstance(there, dict) else {}
    for key in settings:
        if there.get(key) != settings[key]:
            raise UserError(
                f"{root} holds a toy world made with {key} = {there.get(key)!r}, but"
                f" {settings[key]!r} is asked for. Use the same flags, delete the folder, or name"
                " another."
            )


def part(root, name, fill):
    """Let `fill(folder)` make `root/name` in one step; an existing one is kept. Returns its result."""
    if (root / name).is_dir():
        note(f"{name}/ is finished and kept")
        return None
    temporary = root / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    result = fill(temporary)
    os.replace(temporary, root / name)
    return result


def start_clips(pool, folder, clips, seed, bar):
    """Hand the missing clips to the workers in small batches. Returns the futures."""
    folder.mkdir(exist_ok=True)
    have = {entry.name for entry in os.scandir(folder)}
    missing = [c for c in clips if f"{c['id']}.webm" not in have]
    bar.update(len(clips) - len(missing))
    bar.initial = bar.n  # or the kept clips would count as speed
    if len(missing) < len(clips):
        note(f"videos/: {len(clips) - len(missing)} finished clips are kept")

    def count(future):
        if not future.cancelled() and not future.exception():
            bar.update(future.result())

    futures = []
    for start in range(0, len(missing), 20):
        futures.append(pool.submit(write_clips, str(folder), missing[start : start + 20], seed))
        futures[-1].add_done_callback(count)
    return futures


def main(argv=None):
    args = parse_args(argv)
    from tqdm import tqdm

    root = Path(args.output)
    settings = {"world": WORLD, "clips": args.clips, "seed": args.seed}
    settings |= {"old_names": args.old_names, "lm_steps": args.lm_steps}
    claim(root, settings)
    clips = plan(args.clips, args.seed)
    part(root, "labels", lambda folder: write_labels(folder, clips, args.old_names))
    part(root, "paraphrases", lambda folder: write_paraphrases(folder, clips, args.seed))
    interval = 0.2 if os.isatty(2) else 15
    pool = ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=ignore_interrupt
    )
    with tqdm(total=len(clips), desc="clips", unit=" clips", mininterval=interval) as bar:
        try:
            futures = start_clips(pool, root / "videos", clips, args.seed, bar)
            part(root, "encoder", lambda folder: write_encoder(folder, args.seed))
            lm = part(root, "lm", lambda folder: write_lm(folder, args, bar.set_postfix_str))
            for future in futures:
                future.result()
        except OSError as error:  # a full disk, mostly
            raise UserError(f"cannot write to {root}: {error}", code=1) from None
        finally:
            pool.shutdown(cancel_futures=True)
    if lm:
        print(lm)
    write_json(root / "toy.json", settings)
    (root / ".toy-started.json").unlink(missing_ok=True)
    counts = Counter(c["split"] for c in clips)
    print(f"{root}: {', '.join(f'{n} clips {split}' for split, n in counts.items())}")


if __name__ == "__main__":
    run(main)
