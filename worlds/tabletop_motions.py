"""Lay out a clip of the tabletop world and move its objects and hands. Needs numpy only.

x points to the right, y away from the camera, z up; the table is z = 0; lengths are in metres. An object
is placed by the centre of its bounding box. A quaternion is (w, x, y, z).
"""

from dataclasses import dataclass, field

import numpy as np

from worlds.ssv2_files import RATE
from worlds.tabletop_plan import BY_KEYWORD, COVERS, NOUNS, TRAINING, covers

FRAMES = (16, 24)  # per clip
GRAVITY = 9.81
TIP = 0.03  # from the middle of a pinch to the tips of the fingers
EDGE = 0.31  # largest x at which an object is in the picture
WIDEST = 0.085  # that a hand can grasp across
SEAT = {"plate": 0.4}  # height on which things stand, relative to the carrier's height
ENTERS = {"up", "down", "onto", "drop", "behind", "front"}  # a hand brings the first object
OPENING_DOWN = {"hat": 0.85, "bowl": 0.4, "bucket": 0.5}  # probability
X, Y, Z = np.eye(3)


@dataclass
class Thing:
    """An object of a clip: where it is in each frame."""

    name: str
    half: (
        np.ndarray
    )  # half the extents (3,) of its bounding box, as it lies on the table, before yaw
    yaw: float
    scale: float
    centre: np.ndarray  # (3,) in the first frame, then (F, 3)
    turn: np.ndarray  # quaternion (4,) in the first frame, then (F, 4)

    @property
    def is_round(self):
        return "round" in NOUNS[self.name].kinds and abs(self.half[0] - self.half[1]) < 1e-6

    @property
    def radius(self):
        """Of a circle around the footprint."""
        return self.half[0] if self.is_round else np.hypot(*self.half[:2])

    def extent(self, angle):
        """Return how far the object extends from its centre in a horizontal direction."""
        if self.is_round:
            return self.half[0]
        return self.half[0] * abs(np.cos(angle - self.yaw)) + self.half[1] * abs(
            np.sin(angle - self.yaw)
        )

    def reach(self, angle):
        """Return the distance from the centre to the side, along a ray in a horizontal direction."""
        if self.is_round:
            return self.half[0]
        c, s = abs(np.cos(angle - self.yaw)), abs(np.sin(angle - self.yaw))
        return min(self.half[0] / max(c, 1e-6), self.half[1] / max(s, 1e-6))


@dataclass
class Hand:
    """A hand: its pinch point, the direction of its fingers, and how wide it is open, in each frame."""

    point: np.ndarray  # (F, 3)
    yaw: float  # horizontal direction from wrist to finger tips
    pitch: float  # downwards
    roll: np.ndarray  # (F,) about the fingers' direction
    gap: np.ndarray  # (F,) between thumb and fingers

    def turn(self):
        """Return the quaternions (F, 4)."""
        base = multiply(about(Z, self.yaw), about(Y, self.pitch))
        return multiply(base, about(X, self.roll))


@dataclass
class Clip:
    """What a clip shows, without its looks."""

    t: np.ndarray  # (F,) progress of the action, from 0 to 1
    things: list = field(default_factory=list)
    hands: list = field(default_factory=list)


# ---- quaternions and timing ----------------------------------------------------------------


def about(axis, angle):
    """Return the quaternion (..., 4) of a rotation about a unit axis (3,) by angles (...)."""
    half = np.asarray(angle)[..., None] / 2
    return np.concatenate([np.cos(half), np.sin(half) * axis], -1)


def multiply(a, b):
    """Multiply quaternions (..., 4): first b, then a."""
    aw, av, bw, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    w = aw * bw - (av * bv).sum(-1, keepdims=True)
    return np.concatenate([w, aw * bv + bw * av + np.cross(av, bv)], -1)


def rotate(q, v):
    """Rotate vectors (..., 3) by quaternions (..., 4)."""
    w, u = q[..., :1], q[..., 1:]
    return v + 2 * np.cross(u, np.cross(u, v) + w * v)


def ease(t, start, end):
    """Go smoothly from 0 at `start` to 1 at `end`."""
    s = np.clip((t - start) / (end - start), 0, 1)
    return s * s * (3 - 2 * s)


def falling(t, start, end):
    """Go from 0 at `start` to 1 at `end` with constant acceleration."""
    return np.clip((t - start) / (end - start), 0, 1) ** 2


def heading(angle):
    """Return the horizontal unit vector (3,) of an angle."""
    return np.array([np.cos(angle), np.sin(angle), 0.0])


# ---- layout --------------------------------------------------------------------------------


def spawn(name, rng, x=0.0, y=0.0, base=0.0, pose=None):
    """Place an object. pose: standing, lying or inverted; sampled if None."""
    kinds, lies, inverted = NOUNS[name].kinds, rng.random() < 0.35, rng.random()
    yaw, scale = rng.uniform(-1, 1), rng.uniform(0.92, 1.08)
    if pose is None:
        pose = "lying" if lies and "lie" in kinds else "standing"
        pose = "inverted" if "cover" in kinds and inverted < OPENING_DOWN[name] else pose
    half = np.array(NOUNS[name].size) * scale / 2
    turn = about(Z, 0.0)
    if pose == "lying":  # along y, so that it can roll sideways
        half, turn, yaw = half[[0, 2, 1]], about(X, np.pi / 2), yaw / 2
    if pose == "inverted":
        turn = about(X, np.pi)
    centre = np.array([x, y, base + half[2]])
    return Thing(name, half, yaw, scale, centre, multiply(about(Z, yaw), turn))


def put(thing, x, y, base=0.0):
    thing.centre = np.array([x, y, base + thing.half[2]])
    return thing


def top(thing):
    """Return the height at which something stands on `thing`."""
    height = 2 * thing.half[2]
    return thing.centre[2] - height / 2 + height * SEAT.get(thing.name, 1)


def pose_of(action, place):
    """Return the pose that an action needs of an object in its template, or None."""
    if action == "roll":
        return "rolling"
    if action in ("tip", "flip") or "carry" in BY_KEYWORD[action].roles[place]:
        return "standing"
    return "inverted" if (action, place) == ("cover", 1) else None


def lay_out(clip, rng):
    """Place the objects of a clip. Returns (first, second, others, side).

    All actions share one distribution of places in the first frame: an object stands near the middle, in
    half of the clips another one stands beside it (on `side`: 1 is right, -1 left), and up to two stand in
    the corners. The first and second object of the template take the first places unless a hand brings
    them; objects that are not in the template take the others.
    """
    action, names = clip["action"], clip["objects"]
    taken, pool = set(names), sorted(TRAINING)
    actors = []
    for place, name in enumerate(names):
        pose = pose_of(action, place)
        if pose == "rolling":
            pose = "lying" if "lie" in NOUNS[name].kinds else "standing"
        actors.append(spawn(name, rng, pose=pose))
    x, y = rng.uniform(-0.03, 0.03), rng.uniform(-0.05, 0.03)
    side, slope = rng.choice((-1, 1)), rng.uniform(-0.2, 0.2)
    distance, paired, corners = rng.uniform(0.19, 0.22), rng.random() < 0.5, rng.integers(3)
    stacked = rng.random() < 0.3
    corners -= action == "off" and corners > 0  # two objects stand in the middle

    def extra(allowed=lambda name: True, pose=None):
        name = rng.choice([n for n in pool if n not in taken and allowed(n)])
        taken.add(name)
        return spawn(name, rng, pose=pose)

    # who stands in the middle, and who beside it
    others = []
    if action == "uncover":
        middle = extra(lambda name: name in COVERS and covers(name, names[0]), "inverted")
        others.append(middle)
    elif action in ("up", "down"):
        middle = extra(lambda name: NOUNS[name].size[0] <= 0.13)
        others.append(middle)
    else:
        middle = actors[-1] if action in ENTERS else actors[0]
        middle = actors[1] if action == "off" else middle
    if action in ("closer", "away", "meet", "part"):
        beside = actors[1]
    else:
        beside = extra()
        if paired:
            others.append(beside)
    distance = max(distance, middle.radius + beside.radius + 0.09)
    x -= side * min(distance / 2, 0.1)
    put(middle, x, y)
    put(beside, x + side * distance * np.cos(slope), y + distance * np.sin(slope))
    for actor in actors:
        if actor not in (middle, beside):
            put(actor, x, y)

    # the corners
    if corners == 2 and stacked:
        carrier = extra(lambda name: "carry" in NOUNS[name].kinds, "standing")
        if in_corner(carrier, [middle, beside], side, rng):
            others.append(carrier)
            rider = extra(lambda name: "small" in NOUNS[name].kinds)
            others.append(put(rider, *carrier.centre[:2], top(carrier)))
    else:
        for _ in range(corners):
            thing = extra()
            if in_corner(thing, [middle, beside, *others], side, rng):
                others.append(thing)
    return actors, middle, others, side


def in_front(side):
    """Return the direction from the middle to the place where an object is moved up or down."""
    return -np.pi / 4 if side > 0 else -3 * np.pi / 4


def in_corner(thing, placed, side, rng):
    """Place `thing` clear of the row and column in which the action takes place. Returns success."""
    x, y, r = *placed[0].centre[:2], placed[0].radius + thing.radius
    free = placed[0].centre[:2] + (placed[0].radius + 0.08) * heading(in_front(side))[:2]
    for _ in range(40):
        back = rng.random() < 0.7
        place = (
            rng.uniform(-0.28, 0.28),
            rng.uniform(0.1, 0.26) if back else rng.uniform(-0.2, -0.1),
        )
        clear = all(
            np.hypot(*(place - p.centre[:2])) > thing.radius + p.radius + 0.015 for p in placed
        )
        clear = clear and np.hypot(*(place - free)) > thing.radius + 0.08
        if clear and abs(place[0] - x) > r + 0.01 and abs(place[1] - y) > 0.8 * r:
            put(thing, *place)
            return True
    return False


@dataclass
class Scene:
    """Surroundings of an action."""

    middle: Thing  # which stands in the middle in the first frame
    others: list  # that are not in the template
    side: int  # 1 if there may be an object to the right of `middle`, -1 if to its left

    def room(self, thing, sign):
        """Return how far `thing` can go to the right (sign 1) or left (-1)."""
        limits = [EDGE - sign * thing.centre[0] - thing.extent(0)]
        for other in self.others:
            x, y, _ = other.centre - thing.centre
            if sign * x > 0 and abs(y) < thing.extent(np.pi / 2) + other.extent(np.pi / 2):
                limits.append(sign * x - thing.extent(0) - other.extent(0) - 0.01)
        return max(min(limits), 0.05)


# ---- hands ---------------------------------------------------------------------------------


def sideways(rng, from_left):
    """Sample the direction of a hand that comes from the left or right, and a little from the front."""
    angle = rng.uniform(0.0, 0.6)
    return angle if from_left else np.pi - angle


def entry(yaw):
    """Return where a hand comes from (3,), seen from where it goes to: outside of the picture."""
    return np.array([-0.62 * np.sign(np.cos(yaw)), -0.2, 0.22])


def reach_in(t, yaw, point, arrive, leave, gap, pitch=0.4, roll=0.0, opened=0.03):
    """Return a hand that enters, is at `point` (F, 3) from `arrive` to `leave`, and goes away again.

    gap: between thumb and fingers while it holds. opened: how much farther it opens before and after.
    leave: (start, end); after 1 it stays.
    """
    away = 1 - ease(t, *arrive) + ease(t, *leave)
    loose = np.clip(away * 12, 0, 1)
    roll = np.broadcast_to(roll, t.shape)
    return Hand(point + away[:, None] * entry(yaw), yaw, pitch, roll, gap + opened * loose)


def grasp(thing, yaw):
    """Return (offset from the object's centre, gap, pitch, roll) of a hand that grasps it."""
    across, half = 2 * thing.reach(yaw + np.pi / 2), thing.half[2]
    if across <= WIDEST:  # fingers behind it and the thumb in front, for a left and a right hand
        roll = 0.0 if np.cos(yaw) > 0 else np.pi
        return Z * max(half - 0.02, 0.03 - half), across, 1.0, roll
    edge = -heading(yaw) * (thing.reach(yaw) - 0.01)
    if half < 0.03:  # flat: the thumb is below it
        return edge, 2 * half, 0.25, np.pi / 2
    return edge + Z * (half - 0.01), 0.015, 0.9, np.pi / 2


NEVER = (2, 3)  # a time after the end


def hold(clip, thing, path, yaw, arrive, leave=NEVER):
    """Add a hand that grasps `thing`, whose centre is at `path` (F, 3)."""
    offset, gap, pitch, roll = grasp(thing, yaw)
    clip.hands.append(reach_in(clip.t, yaw, path + offset, arrive, leave, gap, pitch, roll))


def carry_in(clip, thing, path, yaw, arrive, leave):
    """Add a hand that brings `thing` to `path` (F, 3) and goes away without it. Returns the whole path."""
    away = (1 - ease(clip.t, *arrive))[:, None] * entry(yaw)
    offset, gap, pitch, roll = grasp(thing, yaw)
    hand = reach_in(clip.t, yaw, path + offset, arrive, leave, gap, pitch, roll)
    hand.gap = gap + 0.03 * ease(clip.t, leave[0] - 0.05, leave[0])
    clip.hands.append(hand)
    return path + away


# ---- actions: each moves `a` and `b`, and adds hands -----------------------------------------


def still(thing, t):
    return np.repeat(thing.centre[None], len(t), 0)


def move(thing, t, offset, start, end):
    """Return the path (F, 3) of a smooth move by `offset` (3,)."""
    return thing.centre + ease(t, start, end)[:, None] * offset


def push(clip, a, b, scene, rng, sign):
    distance = min(rng.uniform(0.11, 0.14), scene.room(a, sign))
    a.centre = shove(clip, a, sign, distance * ease(clip.t, 0.35, 0.85), rng, NEVER)


def shove(clip, a, sign, travel, rng, leave, yaw=None):
    """Add a hand that pushes `a` along x by `travel` (F,), for as long as it grows. Returns a's path."""
    yaw = sideways(rng, sign > 0) if yaw is None else yaw
    height = np.clip(a.half[2], 0.025, 0.06) - a.half[2]
    contact = a.centre - X * sign * (a.reach(0) + 0.012) + height * Z
    path = a.centre + travel[:, None] * sign * X
    point = contact - TIP * heading(yaw) + np.maximum.accumulate(travel)[:, None] * sign * X
    clip.hands.append(reach_in(clip.t, yaw, point, (0, 0.33), leave, 0.004, opened=0.0))
    return path


def lift(clip, a, b, scene, rng, sign):
    """Bring `a` in and move it up (sign 1) or down (-1)."""
    yaw, middle = sideways(rng, rng.random() < 0.5), scene.middle
    angle = in_front(scene.side)
    a.centre = a.centre + heading(angle) * (a.extent(angle) + middle.extent(angle) + 0.02)
    start, room = rng.uniform(0.075, 0.095), 0.27 - 2 * a.half[2]
    change = np.clip(room - start, 0.07, 0.11) if sign > 0 else -start
    path = move(a, clip.t, change * Z, 0.45, 0.85) + start * Z
    a.centre = carry_in(clip, a, path, yaw, (0, 0.38), NEVER)


def slide(clip, a, b, scene, rng, sign):
    """Move `a` towards the camera (sign -1) or away from it (1)."""
    yaw = sideways(rng, rng.random() < 0.5)
    path = move(a, clip.t, sign * rng.uniform(0.1, 0.13) * Y, 0.38, 0.85)
    hold(clip, a, path, yaw, (0, 0.33))
    a.centre = path


def tip(clip, a, b, scene, rng):
    angle = (np.pi if scene.side > 0 else 0) + rng.uniform(-0.4, 0.4)
    d, reach, t = heading(angle), a.reach(angle), clip.t
    edge = a.centre + a.extent(angle) * d - a.half[2] * Z
    turn = about(np.cross(Z, d), np.pi / 2 * falling(t, 0.42, 0.62))
    yaw = sideways(rng, scene.side < 0)
    contact = a.centre - (reach + 0.012) * d + 0.6 * a.half[2] * Z - TIP * heading(yaw)
    point = contact + (0.05 * ease(t, 0.36, 0.55))[:, None] * d
    clip.hands.append(reach_in(t, yaw, point, (0, 0.36), (0.62, 1), 0.004, opened=0.0))
    a.centre = edge + rotate(turn, a.centre - edge)
    a.turn = multiply(turn, a.turn)


def flip(clip, a, b, scene, rng):
    yaw, t = sideways(rng, rng.random() < 0.5), clip.t
    up = ease(t, 0.3, 0.45) - ease(t, 0.68, 0.82)
    clear = np.hypot(a.radius, a.half[2]) - a.half[2] + 0.03
    path = a.centre + (up * clear)[:, None] * Z
    angle = np.pi * ease(t, 0.4, 0.73)
    across = 2 * a.reach(yaw + np.pi / 2)
    offset = -heading(yaw) * (a.reach(yaw) - 0.012)
    gap = min(across, 0.05)
    hand = reach_in(t, yaw, path + offset, (0, 0.3), (0.85, 1.1), gap, 0.0, angle)
    clip.hands.append(hand)
    a.centre, a.turn = path, multiply(about(heading(yaw), angle), a.turn)


def pick(clip, a, b, scene, rng, really):
    """Pick `a` up, or only pretend to."""
    yaw = sideways(rng, rng.random() < 0.5)
    path = move(a, clip.t, rng.uniform(0.1, 0.14) * Z, 0.45, 0.8)
    hold(clip, a, path, yaw, (0, 0.36))
    a.centre = path if really else still(a, clip.t)
    if not really:
        clip.hands[-1].gap = clip.hands[-1].gap + 0.02


def roll(clip, a, b, scene, rng):
    sign, t = -scene.side, clip.t
    s = np.clip((t - 0.36) / 0.55, 0, 1)
    distance = min(rng.uniform(0.13, 0.17), scene.room(a, sign))
    travel = distance * s * (2 - s)  # slows down
    start = a.centre
    a.centre = shove(clip, a, sign, np.minimum(travel, 0.03), rng, (0.5, 0.9))
    axis = multiply(about(Z, a.yaw), np.array([0, *Y]))[1:] if "lie" in NOUNS[a.name].kinds else Y
    along = np.cross(axis, Z) if "lie" in NOUNS[a.name].kinds else X
    a.centre = start + travel[:, None] * sign * along
    axis = np.cross(Z, along * sign)
    a.turn = multiply(about(axis, travel / a.half[2]), a.turn)


def uncover(clip, a, b, scene, rng):
    cover, yaw, t = scene.middle, sideways(rng, rng.random() < 0.5), clip.t
    path = move(cover, t, 0.13 * Z, 0.38, 0.65)
    away = ease(t, 0.62, 0.95)[:, None] * entry(yaw)
    hold(clip, cover, path + away, yaw, (0, 0.34))
    cover.centre = path + away


def approach(clip, a, b, scene, rng, sign):
    """Move `a` closer to `b` (sign 1) or away from it (-1)."""
    d = b.centre - a.centre
    angle = np.arctan2(d[1], d[0])
    gap = np.hypot(*d[:2]) - a.extent(angle) - b.extent(angle)
    d = d * [1, 1, 0] / np.hypot(*d[:2])
    distance = gap - 0.005 if sign > 0 else -rng.uniform(0.09, 0.12)
    path = move(a, clip.t, distance * d, 0.38, 0.85)
    hold(clip, a, path, sideways(rng, scene.side > 0), (0, 0.33))
    a.centre = path


def both(clip, a, b, scene, rng, sign):
    """Move `a` and `b` closer to each other (sign 1) or away from each other (-1)."""
    d = b.centre - a.centre
    angle = np.arctan2(d[1], d[0])
    gap = np.hypot(*d[:2]) - a.extent(angle) - b.extent(angle)
    d = d * [1, 1, 0] / np.hypot(*d[:2])
    distance = gap / 2 - 0.004 if sign > 0 else -rng.uniform(0.06, 0.08)
    for thing, along in ((a, d), (b, -d)):
        path = move(thing, clip.t, distance * along, 0.38, 0.85)
        hold(clip, thing, path, sideways(rng, (thing is a) == (scene.side > 0)), (0, 0.33))
        thing.centre = path


def onto(clip, a, b, scene, rng):
    yaw = sideways(rng, rng.random() < 0.5)
    put(a, *b.centre[:2], top(b))
    height = rng.uniform(0.06, 0.09) * (1 - ease(clip.t, 0.42, 0.62))
    a.centre = carry_in(clip, a, a.centre + height[:, None] * Z, yaw, (0, 0.4), (0.68, 1))


def drop(clip, a, b, scene, rng):
    yaw, t = sideways(rng, rng.random() < 0.5), clip.t
    put(a, *b.centre[:2], top(b))
    height = min(rng.uniform(0.1, 0.14), max(0.26 - top(b) - 2 * a.half[2], 0.06))
    seconds = np.sqrt(2 * height / GRAVITY)
    end = 0.5 + seconds * RATE / (len(t) - 1)
    bounce = np.clip((t - end) / 0.12, 0, 1)
    z = height * (1 - falling(t, 0.5, end)) + 0.06 * bounce * (1 - bounce)
    held = carry_in(
        clip, a, a.centre + height * np.ones_like(t)[:, None] * Z, yaw, (0, 0.4), (0.75, 1.2)
    )
    hand = clip.hands[-1]
    hand.gap = hand.gap + 0.04 * ease(t, 0.46, 0.52)
    a.centre = held + (z - height)[:, None] * Z


def cover(clip, a, b, scene, rng):
    yaw = sideways(rng, rng.random() < 0.5)
    put(b, *a.centre[:2])
    height = (2 * a.half[2] + 0.03) * (1 - ease(clip.t, 0.42, 0.64))
    b.centre = carry_in(clip, b, b.centre + height[:, None] * Z, yaw, (0, 0.42), (0.7, 1.05))


def place(clip, a, b, scene, rng, sign):
    """Put `a` behind `b` (sign 1) or in front of it (-1)."""
    yaw = sideways(rng, rng.random() < 0.5)
    put(a, b.centre[0], b.centre[1] + sign * (b.extent(np.pi / 2) + a.extent(np.pi / 2) + 0.015))
    height = (0.11 if sign > 0 else 0.07) * (1 - ease(clip.t, 0.4, 0.64))
    a.centre = carry_in(clip, a, a.centre + height[:, None] * Z, yaw, (0, 0.4), (0.7, 1))


def off(clip, a, b, scene, rng):
    put(a, *b.centre[:2], top(b))
    sign, t, fall = -scene.side, clip.t, top(b)
    edge = b.reach(0) + 0.005
    s = np.clip((t - 0.36) / 0.34, 0, 1)
    travel = (edge + a.reach(0) + 0.01) * (s * (0.4 + 0.6 * s))
    path = shove(clip, a, sign, travel, rng, (0.72, 1.05))
    begin = t[np.argmax(travel > edge)]
    z = fall * falling(t, begin, begin + np.sqrt(2 * fall / GRAVITY) * RATE / (len(t) - 1) + 0.04)
    a.centre = path - z[:, None] * Z


MOTIONS = {
    "push right": (push, 1),
    "push left": (push, -1),
    "up": (lift, 1),
    "down": (lift, -1),
    "near": (slide, -1),
    "far": (slide, 1),
    "tip": (tip,),
    "flip": (flip,),
    "pick": (pick, True),
    "pretend": (pick, False),
    "roll": (roll,),
    "uncover": (uncover,),
    "closer": (approach, 1),
    "away": (approach, -1),
    "onto": (onto,),
    "off": (off,),
    "drop": (drop,),
    "cover": (cover,),
    "behind": (place, 1),
    "front": (place, -1),
    "meet": (both, 1),
    "part": (both, -1),
}


def animate(clip, seed):
    """Return a Clip with the things and hands of a planned clip. Depends only on (seed, id)."""
    rng = np.random.default_rng([seed, int(clip["id"])])
    frames = rng.integers(FRAMES[0], FRAMES[1] + 1)
    lead, tail = rng.uniform(0, 0.08, 2)
    t = np.clip((np.linspace(0, 1, frames) - lead) / (1 - lead - tail), 0, 1)
    (a, *rest), middle, others, side = lay_out(clip, rng)
    b = rest[0] if rest else None
    things = [a, *rest, *others]
    result, scene = Clip(t), Scene(middle, others, side)
    motion, *values = MOTIONS[clip["action"]]
    motion(result, a, b, scene, rng, *values)
    for thing in things:
        thing.centre = np.broadcast_to(thing.centre, (frames, 3))
        thing.turn = np.broadcast_to(thing.turn, (frames, 4))
    result.things = things
    return result
