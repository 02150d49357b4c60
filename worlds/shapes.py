"""Plan the toy world: actions, objects, the contents of each clip, labels and paraphrases."""

import itertools
import random
from collections import namedtuple

from dataset import TEST, TRAIN, VALIDATION
from worlds.ssv2_files import fill

PAIRS, OBJECTS = "validation_pairs", "validation_objects"  # the two harder validation splits
COLOURS = {  # all brighter than the background, so that contrast has the same sign for all
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

# Three lines per action: its keyword in the language model's training data, and its template; verb
# phrases that follow one of SUBJECTS; complete sentences. {a} and {b} are the objects in the
# template's order.
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


def deck(rng, cards):
    """Yield `cards` endlessly, reshuffled in each round, so that all are about equally frequent."""
    while True:
        yield from rng.sample(cards, len(cards))


def divide_objects(seed):
    """Return (objects, held-out objects, pairs, held-out pairs). Held-out ones are not in training.

    An object is "colour shape", and one shape of each colour is held out. A pair is a frozenset.
    """
    rng = random.Random(f"objects:{seed}")
    shapes = deck(rng, SHAPES)
    unseen = [f"{colour} {next(shapes)}" for colour in rng.sample(list(COLOURS), len(COLOURS))]
    objects = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in unseen]
    pairs = [frozenset(p) for p in itertools.combinations(objects, 2)]
    rng.shuffle(pairs)
    return objects, unseen, set(pairs[len(pairs) // 5 :]), set(pairs[: len(pairs) // 5])


def plan(clips, seed):
    """Plan all clips. Returns a list of {"id", "split", "action" (keyword), "objects" (names)}."""
    objects, unseen, pairs, unseen_pairs = divide_objects(seed)
    few = max(32, clips // 24)
    splits = {  # split: clips, actions, objects, allowed pairs
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
    """Return the label as in SSv2: the template in lower case with the objects filled in."""
    return fill(action_of(clip).template, clip["objects"])


def sentences_of(clip):
    """Return all eight correct paraphrases of the clip."""
    action = action_of(clip)
    names = {k: f"the {name}" for k, name in zip("ab", clip["objects"], strict=False)}
    texts = [f"{subject} {act}" for subject in SUBJECTS for act in action.acts]
    texts = [text.format(**names) for text in (*texts, *action.events)]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def paraphrases_of(clip, seed):
    """Sample the clip's paraphrases: 4 to 8, but only 1 to 3 for one clip in ten."""
    rng = random.Random(f"paraphrases:{seed}:{clip['id']}")
    count = rng.randint(1, 3) if rng.random() < 0.1 else rng.randint(4, 8)
    return rng.sample(sentences_of(clip), count)
