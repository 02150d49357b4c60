"""Lay out a clip of the tabletop world: where each object is in the first frame. Needs numpy only.

x points to the right, y away from the camera, z up; the table is z = 0; lengths are in metres. An object
is placed by the centre of its bounding box. A quaternion is (w, x, y, z).
"""

from dataclasses import dataclass

import numpy as np

from worlds.tabletop_plan import BY_KEYWORD, COVERS, NOUNS, TRAINING, covers

SEAT = {"plate": 0.4}  # height on which things stand, relative to the carrier's height
OPENING_DOWN = {"hat": 1.0, "bowl": 0.4, "bucket": 0.5}  # probability
BROUGHT = {"up", "down", "onto", "drop", "behind", "front"}  # a hand brings the first object
PAIRED = {"closer", "away", "meet", "part"}  # the second object stands beside the first one
EDGE = 0.31  # largest x at which an object is in the picture
X, Y, Z = np.eye(3)


@dataclass
class Thing:
    """An object of a clip: where it is in each frame."""

    name: str
    half: np.ndarray  # half the extents (3,) of its bounding box, in its pose but before yaw
    yaw: float
    scale: float
    centre: np.ndarray  # (3,) in the first frame, then (F, 3)
    turn: np.ndarray  # quaternion (4,) in the first frame, then (F, 4)

    @property
    def is_round(self):
        return "round" in NOUNS[self.name].kinds and abs(self.half[0] - self.half[1]) < 1e-6

    @property
    def radius(self):
        """The radius of a circle around the footprint."""
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
class Scene:
    """The objects of a clip in the first frame."""

    actors: list  # those of the template, in its order
    middle: Thing  # the one that stands in the middle
    others: list  # those that are not in the template
    beside: bool  # True if one of `others` stands beside `middle`
    side: int  # 1 if there may be an object to the right of `middle`, -1 if to its left

    def room(self, thing, sign):
        """Return how far `thing` can go to the right (sign 1) or left (-1)."""
        limits = [EDGE - sign * thing.centre[0] - thing.extent(0)]
        for other in self.others:
            x, y, _ = other.centre - thing.centre
            if sign * x > 0 and abs(y) < thing.extent(np.pi / 2) + other.extent(np.pi / 2):
                limits.append(sign * x - thing.extent(0) - other.extent(0) - 0.01)
        return max(min(limits), 0.05)


# ---- rotations -----------------------------------------------------------------------------


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


def heading(angle):
    """Return the horizontal unit vector (3,) of an angle."""
    return np.array([np.cos(angle), np.sin(angle), 0.0])


# ---- single objects ------------------------------------------------------------------------


def spawn(name, rng, pose=None):
    """Return an object at the origin. pose: standing, lying or inverted; sampled if None."""
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
    centre = np.array([0, 0, half[2]])
    return Thing(name, half, yaw, scale, centre, multiply(about(Z, yaw), turn))


def put(thing, x, y, base=0.0):
    """Place an object at a height of `base`. Returns it."""
    thing.centre = np.array([x, y, base + thing.half[2]])
    return thing


def top(thing):
    """Return the height at which something stands on `thing`."""
    height = 2 * thing.half[2]
    return thing.centre[2] - height / 2 + height * SEAT.get(thing.name, 1)


def pose_of(action, place, name):
    """Return the pose in which an action needs the object at `place` in its template, or None."""
    if action == "roll":
        return "lying" if "lie" in NOUNS[name].kinds else "standing"
    if action in ("tip", "flip") or "carry" in BY_KEYWORD[action].roles[place]:
        return "standing"
    return "inverted" if (action, place) == ("cover", 1) else None


# ---- the table -----------------------------------------------------------------------------


class Extras:
    """Sample objects that are not in the template, each noun once."""

    def __init__(self, taken, rng):
        self.names, self.rng = sorted(set(TRAINING) - set(taken)), rng

    def draw(self, allowed=lambda name: True, pose=None):
        name = str(self.rng.choice([n for n in self.names if allowed(n)]))
        self.names.remove(name)
        return spawn(name, self.rng, pose=pose)


def lay_out(clip, rng):
    """Place the objects of a planned clip. Returns a Scene.

    All actions share one distribution of places, so that the first frame says little about the action: an
    object stands in the middle, in half of the clips another one stands beside it, and up to two stand in
    the corners. The objects of the template take the first two places unless a hand brings them or they
    are covered. Other objects take the rest.
    """
    action, names = clip["action"], clip["objects"]
    extras = Extras(names, rng)
    actors = [spawn(name, rng, pose=pose_of(action, i, name)) for i, name in enumerate(names)]
    side = rng.choice((-1, 1))
    middle, others = choose_middle(action, actors, extras)
    beside = actors[1] if action in PAIRED else extras.draw()
    accompanied = rng.random() < 0.5 and action not in PAIRED
    if accompanied:
        others.append(beside)

    distance = max(rng.uniform(0.19, 0.22), middle.radius + beside.radius + 0.09)
    x = rng.uniform(-0.03, 0.03) - side * min(distance / 2, 0.1)
    y, slope = rng.uniform(-0.05, 0.03), rng.uniform(-0.2, 0.2)
    for actor in (*actors, middle):
        put(actor, x, y)
    put(beside, x + side * distance * np.cos(slope), y + distance * np.sin(slope))

    corners = rng.integers(3)
    if action == "off":  # two objects stand in the middle already
        corners = max(corners - 1, 0)
    placed = [middle, beside]
    if corners == 2 and rng.random() < 0.3:  # one on top of the other
        carrier = extras.draw(lambda name: "carry" in NOUNS[name].kinds, "standing")
        if put_in_corner(carrier, placed, side, rng):
            rider = extras.draw(lambda name: "small" in NOUNS[name].kinds)
            others += [carrier, put(rider, *carrier.centre[:2], top(carrier))]
    else:
        for _ in range(corners):
            thing = extras.draw()
            if put_in_corner(thing, placed, side, rng):
                placed.append(thing)
                others.append(thing)
    return Scene(actors, middle, others, accompanied, side)


def choose_middle(action, actors, extras):
    """Return the object that stands in the middle, and [it] if it is not in the template, else []."""
    if action == "uncover":
        hidden = actors[0].name
        middle = extras.draw(lambda name: name in COVERS and covers(name, hidden), "inverted")
    elif action in ("up", "down"):
        middle = extras.draw(lambda name: NOUNS[name].size[0] <= 0.13)
    else:
        return actors[1 if action in BROUGHT | {"off"} else 0], []
    return middle, [middle]


def in_front(side):
    """Return the direction from the middle to the place where an object is moved up or down."""
    return -np.pi / 4 if side > 0 else -3 * np.pi / 4


def put_in_corner(thing, placed, side, rng):
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
