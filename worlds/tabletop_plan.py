"""Plan the tabletop world: nouns, templates, what each clip shows, labels and paraphrases.

A clip depends only on (seed, split, index), so a larger world contains the clips of a smaller one.
"""

import random
from collections import namedtuple

from dataset import TEST, TRAIN, VALIDATION
from worlds.ssv2_files import fill

PAIRS, OBJECTS = "validation_pairs", "validation_objects"
BACKGROUND = "validation_background"
SPLITS = (TRAIN, VALIDATION, PAIRS, OBJECTS, BACKGROUND, TEST)
SUBJECTS = ("A hand", "Someone", "A person")
HELD_OUT = 6  # one in HELD_OUT combinations is reserved for validation_pairs

# Width, depth and height in cm, then what can be done with an object: it is `small` enough to be covered,
# put onto and behind something; it can `tip` over, `roll` as it stands, `lie` on its side (and roll),
# be turned upside down (`flip`), carry something (`carry`), `cover` a small thing, or `hide` it.
# `round`: its footprint is a circle.
TRAINING = """
    book             16  11   3.5  carry flip
    box              14  11   9    carry flip hide
    cereal box       12   5  17    tip flip hide
    milk carton       8   8  17    tip flip hide
    bottle            7   7  20    tip lie flip round
    can               7   7  11    small tip lie flip round
    thermos           8   8  20    tip lie flip round hide
    candle            6   6  13    small tip lie round
    mug              12   9   9    flip small
    bowl             17  17   8    flip cover round
    plate            19  19   2.5  carry round
    hat              22  22  11    cover round
    bucket           17  17  14    cover flip round hide
    bread            13  11  12    hide flip
    lemon             7   9   7    small roll
    apple             8   8   8    small roll round
    ball             10  10  10    roll round
    banana           18   8   4    small
    donut            10  10   4    small flip round
    hammer           20   9   3.5  small
    dice              6   6   6    small flip
    remote control   17   5   2.5  small flip
    phone            15   7.5 1.3  small flip
    teapot           20  13  12    flip hide
    toy car          15   8   6.5  small flip
    duck             13   9  10    small tip flip
    lamp             13  13  21    tip round
"""
UNSEEN = """
    carrot           18   4.5 4.5  small
    pear              8   8  11    small tip roll round
    alarm clock      11   6  14    tip flip hide
    teddy bear       11   9  15    tip flip hide small
    cake             16  16   8    carry round
    frying pan       26  16   4    flip
"""
Noun = namedtuple("Noun", "size kinds")  # size in metres


def parse_nouns(table):
    """Return {name: Noun} of a table as above."""
    nouns = {}
    for line in table.strip().splitlines():
        words = line.split()
        first = next(i for i, word in enumerate(words) if word[0].isdigit())
        size = tuple(float(word) / 100 for word in words[first : first + 3])
        nouns[" ".join(words[:first])] = Noun(size, frozenset(words[first + 3 :]))
    return nouns


TRAINING, UNSEEN = parse_nouns(TRAINING), parse_nouns(UNSEEN)
NOUNS = TRAINING | UNSEEN
COVERS = [name for name in TRAINING if "cover" in TRAINING[name].kinds]
INSIDE = {"hat": 0.66}  # width inside, relative to the width with the brim

# Three lines per action: its keyword, its template, and what each placeholder must be able to do (`any`,
# or one of several kinds); verb phrases that follow one of SUBJECTS; complete sentences. {a} and {b} are
# the objects in the template's order.
TABLE = """
    push right | Pushing [something] from left to right | any
        pushes {a} from left to right | pushes {a} to the right
        {a} is pushed from left to right | {a} slides to the right
    push left | Pushing [something] from right to left | any
        pushes {a} from right to left | pushes {a} to the left
        {a} is pushed from right to left | {a} slides to the left
    up | Moving [something] up | any
        moves {a} up | raises {a} in the air
        {a} is moved up | {a} rises in the air
    down | Moving [something] down | any
        moves {a} down | lowers {a} to the table
        {a} is moved down | {a} sinks to the table
    near | Moving [something] towards the camera | any
        moves {a} towards the camera | brings {a} closer to the camera
        {a} is moved towards the camera | {a} comes closer to the camera
    far | Moving [something] away from the camera | any
        moves {a} away from the camera | takes {a} farther from the camera
        {a} is moved away from the camera | {a} goes farther from the camera
    tip | Tipping [something] over | tip
        tips {a} over | knocks {a} over
        {a} is tipped over | {a} falls on its side
    flip | Turning [something] upside down | flip
        turns {a} upside down | flips {a} over and puts it down
        {a} is turned upside down | {a} is lifted and flipped over
    pick | Picking [something] up | any
        picks {a} up | takes {a} from the table
        {a} is picked up | {a} is taken from the table
    pretend | Pretending to pick [something] up | any
        pretends to pick {a} up | acts as if to pick {a} up
        {a} is touched but stays on the table | {a} is almost picked up
    roll | Rolling [something] on a flat surface | roll lie
        rolls {a} on a flat surface | makes {a} roll over the table
        {a} rolls on a flat surface | {a} is rolled over the table
    uncover | Uncovering [something] | small
        uncovers {a} | takes away what covers {a}
        {a} is uncovered | {a} comes into view
    closer | Moving [something] closer to [something] | any | any
        moves {a} closer to {b} | brings {a} near {b}
        {a} is moved closer to {b} | {a} comes closer to {b}
    away | Moving [something] away from [something] | any | any
        moves {a} away from {b} | takes {a} farther from {b}
        {a} is moved away from {b} | {a} leaves {b} behind
    onto | Putting [something] onto [something] | small | carry
        puts {a} onto {b} | places {a} on top of {b}
        {a} is put onto {b} | {a} is placed on top of {b}
    off | Pushing [something] off of [something] | small | carry
        pushes {a} off of {b} | shoves {a} off {b}
        {a} is pushed off of {b} | {a} falls off {b}
    drop | Dropping [something] onto [something] | small | carry
        drops {a} onto {b} | lets {a} fall onto {b}
        {a} is dropped onto {b} | {a} falls onto {b}
    cover | Covering [something] with [something] | small | cover
        covers {a} with {b} | puts {b} over {a}
        {a} is covered with {b} | {a} is hidden under {b}
    behind | Putting [something] behind [something] | small | hide carry
        puts {a} behind {b} | places {a} at the back of {b}
        {a} is put behind {b} | {a} is placed at the back of {b}
    front | Putting [something] in front of [something] | small | hide carry
        puts {a} in front of {b} | places {a} before {b}
        {a} is put in front of {b} | {a} is placed before {b}
    meet | Moving [something] and [something] closer to each other | any | any
        moves {a} and {b} closer to each other | brings {a} and {b} together
        {a} and {b} are moved closer to each other | {a} and {b} come together
    part | Moving [something] and [something] away from each other | any | any
        moves {a} and {b} away from each other | draws {a} and {b} apart
        {a} and {b} are moved away from each other | {a} and {b} are drawn apart
"""
Action = namedtuple("Action", "keyword template roles acts events")


def parse_actions(table):
    """Return [Action] of a table as above."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return [
        Action(keyword, template, tuple(frozenset(role.split()) for role in roles), acts, events)
        for (keyword, template, *roles), acts, events in zip(*[iter(rows)] * 3, strict=True)
    ]


ACTIONS = parse_actions(TABLE)
BY_KEYWORD = {action.keyword: action for action in ACTIONS}
TEMPLATES = {action.keyword: action.template for action in ACTIONS}


# ---- which objects -------------------------------------------------------------------------


def suits(name, role):
    """Return True if the noun can fill a placeholder."""
    return "any" in role or bool(NOUNS[name].kinds & role)


def fits(action, names):
    """Return True if the objects fit together: what is covered must be smaller than its cover."""
    if len(set(names)) < len(names):
        return False
    if action.keyword == "uncover":
        return any(covers(cover, names[0]) for cover in COVERS)
    return action.keyword != "cover" or covers(names[1], names[0])


def covers(cover, name):
    """Return True if `cover`, upside down, has room for `name` in any orientation."""
    (w, d, h), kinds = NOUNS[name]
    across = w if "round" in kinds else (w * w + d * d) ** 0.5
    width = NOUNS[cover].size[0] * INSIDE.get(cover, 0.92)
    return across < width and h < 0.92 * NOUNS[cover].size[2]


def combinations(action, names):
    """Return all tuples of objects among `names` for an action, in order."""
    found = [()]
    for role in action.roles:
        found = [(*c, name) for c in found for name in names if suits(name, role)]
    return [c for c in found if fits(action, c)]


def divide(seed):
    """Return {keyword: (combinations, held-out combinations)} of the training nouns.

    A pair of objects that is held out is held out in every action and in either order. For an action
    with one object, the combination of both is held out.
    """
    rng = random.Random(f"tabletop pairs:{seed}")
    names = sorted(TRAINING)
    pairs = [frozenset((a, b)) for a in names for b in names if a < b]
    unseen = set(rng.sample(pairs, len(pairs) // HELD_OUT))
    divided = {}
    for action in ACTIONS:
        every = combinations(action, names)
        if len(action.roles) == 1:
            held = set(rng.sample(every, max(1, len(every) // HELD_OUT)))
        else:
            held = {c for c in every if frozenset(c) in unseen}
        divided[action.keyword] = [c for c in every if c not in held], sorted(held)
    return divided


def available(split, seed):
    """Return {keyword: combinations} of a split. Actions without any are left out."""
    if split == OBJECTS:
        found = {a.keyword: combinations(a, sorted(NOUNS)) for a in ACTIONS}
        found = {k: [c for c in cs if set(c) & set(UNSEEN)] for k, cs in found.items()}
    else:
        found = {k: both[split == PAIRS] for k, both in divide(seed).items()}
    return {keyword: cs for keyword, cs in found.items() if cs}


# ---- clips ---------------------------------------------------------------------------------


def sizes(clips):
    """Return {split: number of clips} for a number of training clips."""
    validation, few = min(300, max(50, clips // 7)), min(200, max(len(ACTIONS), clips // 10))
    return dict(zip(SPLITS, (clips, validation, few, few, few, few), strict=True))


def plan(counts, seed):
    """Plan all clips. counts: {split: number of clips}.

    Returns a list of {"id", "split", "action" (keyword), "objects" (names)}.
    """
    clips = []
    for split, count in counts.items():
        choices, start = available(split, seed), (SPLITS.index(split) + 1) * 1_000_000
        for index in range(count):
            keyword = dealt(sorted(choices), index, f"action:{split}:{seed}")
            names = balanced(choices[keyword], index, f"objects:{split}:{keyword}:{seed}")
            clip = {"id": str(start + index), "split": split}
            clips.append(clip | {"action": keyword, "objects": list(names)})
    return clips


def dealt(cards, index, seed):
    """Return the card at `index` of an endless deck, which is reshuffled in each round."""
    turn, place = divmod(index, len(cards))
    return random.Random(f"{seed}:{turn}").sample(cards, len(cards))[place]


def balanced(choices, index, seed):
    """Sample a combination: the first object uniformly, then the second uniformly given the first."""
    rng = random.Random(f"{seed}:{index}")
    for place in range(len(choices[0])):
        name = rng.choice(sorted({c[place] for c in choices}))
        choices = [c for c in choices if c[place] == name]
    return choices[0]


# ---- texts ---------------------------------------------------------------------------------


def label_of(clip):
    return fill(TEMPLATES[clip["action"]], clip["objects"])


def sentences_of(clip):
    """Return all correct paraphrases of the clip."""
    action = BY_KEYWORD[clip["action"]]
    names = {k: f"the {name}" for k, name in zip("ab", clip["objects"], strict=False)}
    texts = [f"{subject} {act}" for subject in SUBJECTS for act in action.acts]
    texts = [text.format(**names) for text in (*texts, *action.events)]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def paraphrases_of(clip, seed):
    """Sample 4 to 8 paraphrases of the clip."""
    rng = random.Random(f"paraphrases:{seed}:{clip['id']}")
    return rng.sample(sentences_of(clip), rng.randint(4, 8))
