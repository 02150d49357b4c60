"""Move the objects and hands of a clip of the tabletop world. Needs numpy only.

For units and axes, see worlds/tabletop_layout.py. Paths are written as functions of the progress t of an
action, which goes from 0 to 1. A hand arrives at about t = 0.35.
"""

from dataclasses import dataclass, field

import numpy as np

from worlds.ssv2_files import RATE
from worlds.tabletop_layout import (
    Scene,
    X,
    Y,
    Z,
    about,
    heading,
    in_front,
    lay_out,
    multiply,
    put,
    rotate,
    top,
)

FRAMES = (16, 24)  # per clip
GRAVITY = 9.81
TIP = 0.03  # from the middle of a pinch to the tips of the fingers
WIDEST = 0.085  # of an object that a hand can grasp across
NEVER = (2, 3)  # a time after the end


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
class Take:
    """The motion of a clip, without its appearance."""

    t: np.ndarray  # (F,) progress of the action
    scene: Scene
    rng: np.random.Generator
    hands: list = field(default_factory=list)


# ---- timing --------------------------------------------------------------------------------


def ease(t, start, end):
    """Go smoothly from 0 at `start` to 1 at `end`."""
    s = np.clip((t - start) / (end - start), 0, 1)
    return s * s * (3 - 2 * s)


def falling(t, start, end):
    """Go from 0 at `start` to 1 at `end` with constant acceleration."""
    return np.clip((t - start) / (end - start), 0, 1) ** 2


# ---- hands ---------------------------------------------------------------------------------


def sideways(take, from_left=None):
    """Sample the direction of a hand. It comes from a free side, or else from the front."""
    scene, rng = take.scene, take.rng
    if from_left is None:
        from_left = scene.side > 0 if scene.beside else rng.random() < 0.5
    blocked = scene.beside and from_left == (scene.side < 0)
    angle = rng.uniform(0.75, 1.05) if blocked else rng.uniform(0.0, 0.6)
    return angle if from_left else np.pi - angle


def entry(yaw):
    """Return where a hand comes from, relative to its goal: an offset (3,) that is out of the picture."""
    return -0.62 * heading(yaw) - 0.12 * Y + 0.2 * Z


def reach_in(t, yaw, point, arrive, leave, gap, pitch=0.4, roll=0.0, opened=0.03):
    """Return a hand that enters, is at `point` (F, 3) from `arrive` to `leave`, and goes away again.

    gap: between thumb and fingers while it holds. opened: how much farther it opens before and after.
    leave: (start, end); if both are after 1, it stays.
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


def hold(take, thing, path, yaw, arrive, leave=NEVER):
    """Add a hand that grasps `thing`, whose centre is at `path` (F, 3)."""
    offset, gap, pitch, roll = grasp(thing, yaw)
    take.hands.append(reach_in(take.t, yaw, path + offset, arrive, leave, gap, pitch, roll))


def carry_in(take, thing, path, yaw, arrive, leave):
    """Add a hand that brings `thing` to `path` (F, 3) and goes away without it. Returns the whole path."""
    away = (1 - ease(take.t, *arrive))[:, None] * entry(yaw)
    offset, gap, pitch, roll = grasp(thing, yaw)
    hand = reach_in(take.t, yaw, path + offset, arrive, leave, gap, pitch, roll)
    hand.gap = gap + 0.03 * ease(take.t, leave[0] - 0.05, leave[0])
    take.hands.append(hand)
    return path + away


# ---- actions: each moves `a` and `b`, and adds hands -----------------------------------------


def move(thing, t, offset, start, end):
    """Return the path (F, 3) of a smooth move by `offset` (3,)."""
    return thing.centre + ease(t, start, end)[:, None] * offset


def push(take, a, sign):
    distance = min(take.rng.uniform(0.11, 0.14), take.scene.room(a, sign))
    a.centre = shove(take, a, sign, distance * ease(take.t, 0.35, 0.85), NEVER)


def shove(take, a, sign, travel, leave):
    """Add a hand that pushes `a` along x by `travel` (F,), while that grows. Returns a's path."""
    yaw = sideways(take, sign > 0)
    height = np.clip(a.half[2], 0.025, 0.06) - a.half[2]
    contact = a.centre - X * sign * (a.reach(0) + 0.012) + height * Z
    path = a.centre + travel[:, None] * sign * X
    point = contact - TIP * heading(yaw) + np.maximum.accumulate(travel)[:, None] * sign * X
    take.hands.append(reach_in(take.t, yaw, point, (0, 0.33), leave, 0.004, opened=0.0))
    return path


def lift(take, a, sign):
    """Bring `a` in and move it up (sign 1) or down (-1)."""
    yaw, middle, angle = sideways(take), take.scene.middle, in_front(take.scene.side)
    a.centre = a.centre + heading(angle) * (a.extent(angle) + middle.extent(angle) + 0.02)
    start, room = take.rng.uniform(0.075, 0.095), 0.27 - 2 * a.half[2]
    change = np.clip(room - start, 0.07, 0.11) if sign > 0 else -start
    path = move(a, take.t, change * Z, 0.45, 0.85) + start * Z
    a.centre = carry_in(take, a, path, yaw, (0, 0.38), NEVER)


def slide(take, a, sign):
    """Move `a` towards the camera (sign -1) or away from it (1)."""
    yaw = sideways(take)
    path = move(a, take.t, sign * take.rng.uniform(0.1, 0.13) * Y, 0.38, 0.85)
    hold(take, a, path, yaw, (0, 0.33))
    a.centre = path


def tip(take, a):
    angle = (np.pi if take.scene.side > 0 else 0) + take.rng.uniform(-0.4, 0.4)
    d, reach, t = heading(angle), a.reach(angle), take.t
    edge = a.centre + a.extent(angle) * d - a.half[2] * Z
    turn = about(np.cross(Z, d), np.pi / 2 * falling(t, 0.42, 0.62))
    yaw = sideways(take, take.scene.side < 0)
    contact = a.centre - (reach + 0.012) * d + 0.6 * a.half[2] * Z - TIP * heading(yaw)
    point = contact + (0.05 * ease(t, 0.36, 0.55))[:, None] * d
    take.hands.append(reach_in(t, yaw, point, (0, 0.36), (0.62, 1), 0.004, opened=0.0))
    a.centre = edge + rotate(turn, a.centre - edge)
    a.turn = multiply(turn, a.turn)


def flip(take, a):
    yaw, t = sideways(take), take.t
    up = ease(t, 0.3, 0.45) - ease(t, 0.68, 0.82)
    clear = np.hypot(a.radius, a.half[2]) - a.half[2] + 0.03
    path = a.centre + (up * clear)[:, None] * Z
    angle = np.pi * ease(t, 0.4, 0.73)
    side = path - heading(yaw) * (a.reach(yaw) - 0.012)
    gap = min(2 * a.reach(yaw + np.pi / 2), 0.05)
    take.hands.append(reach_in(t, yaw, side, (0, 0.3), (0.85, 1.1), gap, 0.0, angle))
    a.centre, a.turn = path, multiply(about(heading(yaw), angle), a.turn)


def pick(take, a, really):
    """Pick `a` up, or only pretend to."""
    yaw = sideways(take)
    path = move(a, take.t, take.rng.uniform(0.1, 0.14) * Z, 0.45, 0.8)
    hold(take, a, path, yaw, (0, 0.36))
    if really:
        a.centre = path
    else:
        take.hands[-1].gap += 0.02


def roll(take, a):
    sign, t = -take.scene.side, take.t
    s = np.clip((t - 0.36) / 0.55, 0, 1)
    distance = min(take.rng.uniform(0.13, 0.17), take.scene.room(a, sign))
    travel = distance * s * (2 - s)  # slows down
    shove(take, a, sign, np.minimum(travel, 0.03), (0.5, 0.9))
    along = sign * (X if a.is_round else heading(a.yaw))  # at right angles to what lies along y
    a.centre = a.centre + travel[:, None] * along
    axis = np.cross(Z, along)
    a.turn = multiply(about(axis, travel / a.half[2]), a.turn)


def uncover(take, a):
    cover, yaw, t = take.scene.middle, sideways(take), take.t
    path = move(cover, t, 0.13 * Z, 0.38, 0.65)
    away = ease(t, 0.62, 0.95)[:, None] * entry(yaw)
    hold(take, cover, path + away, yaw, (0, 0.34))
    cover.centre = path + away


def between(a, b):
    """Return (the horizontal direction (3,) from a to b, the gap between them)."""
    x, y, _ = b.centre - a.centre
    angle = np.arctan2(y, x)
    return heading(angle), np.hypot(x, y) - a.extent(angle) - b.extent(angle)


def approach(take, a, b, sign):
    """Move `a` closer to `b` (sign 1) or away from it (-1)."""
    d, gap = between(a, b)
    distance = gap - 0.005 if sign > 0 else -take.rng.uniform(0.09, 0.12)
    path = move(a, take.t, distance * d, 0.38, 0.85)
    hold(take, a, path, sideways(take, take.scene.side > 0), (0, 0.33))
    a.centre = path


def both(take, a, b, sign):
    """Move `a` and `b` closer to each other (sign 1) or away from each other (-1)."""
    d, gap = between(a, b)
    distance = gap / 2 - 0.004 if sign > 0 else -take.rng.uniform(0.06, 0.08)
    for thing, along in ((a, d), (b, -d)):
        path = move(thing, take.t, distance * along, 0.38, 0.85)
        hold(take, thing, path, sideways(take, (thing is a) == (take.scene.side > 0)), (0, 0.33))
        thing.centre = path


def onto(take, a, b):
    yaw = sideways(take)
    put(a, *b.centre[:2], top(b))
    height = take.rng.uniform(0.06, 0.09) * (1 - ease(take.t, 0.42, 0.62))
    a.centre = carry_in(take, a, a.centre + height[:, None] * Z, yaw, (0, 0.4), (0.68, 1))


def drop(take, a, b):
    yaw, t = sideways(take), take.t
    put(a, *b.centre[:2], top(b))
    height = min(take.rng.uniform(0.1, 0.14), max(0.26 - top(b) - 2 * a.half[2], 0.06))
    seconds = np.sqrt(2 * height / GRAVITY)
    end = 0.5 + seconds * RATE / (len(t) - 1)
    bounce = np.clip((t - end) / 0.12, 0, 1)
    z = height * (1 - falling(t, 0.5, end)) + 0.06 * bounce * (1 - bounce)
    held = np.repeat((a.centre + height * Z)[None], len(t), 0)
    held = carry_in(take, a, held, yaw, (0, 0.4), (0.75, 1.2))
    take.hands[-1].gap += 0.04 * ease(t, 0.46, 0.52)
    a.centre = held + (z - height)[:, None] * Z


def cover(take, a, b):
    yaw = sideways(take)
    put(b, *a.centre[:2])
    height = (2 * a.half[2] + 0.03) * (1 - ease(take.t, 0.42, 0.64))
    b.centre = carry_in(take, b, b.centre + height[:, None] * Z, yaw, (0, 0.42), (0.7, 1.05))


def place(take, a, b, sign):
    """Put `a` behind `b` (sign 1) or in front of it (-1)."""
    yaw = sideways(take)
    put(a, b.centre[0], b.centre[1] + sign * (b.extent(np.pi / 2) + a.extent(np.pi / 2) + 0.015))
    height = (0.11 if sign > 0 else 0.07) * (1 - ease(take.t, 0.4, 0.64))
    a.centre = carry_in(take, a, a.centre + height[:, None] * Z, yaw, (0, 0.4), (0.7, 1))


def off(take, a, b):
    put(a, *b.centre[:2], top(b))
    sign, t, fall = -take.scene.side, take.t, top(b)
    edge = b.extent(0) + 0.5 * a.extent(0)  # where it begins to fall
    s = np.clip((t - 0.36) / 0.34, 0, 1)
    travel = (b.extent(0) + a.extent(0) + 0.02) * (s * (0.4 + 0.6 * s))
    path = shove(take, a, sign, travel, (0.72, 1.05))
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
    """Return (things, hands) of a planned clip, in each frame. Depends only on (seed, id)."""
    rng = np.random.default_rng([seed, int(clip["id"])])
    frames = rng.integers(FRAMES[0], FRAMES[1] + 1)
    lead, tail = rng.uniform(0, 0.08, 2)
    t = np.clip((np.linspace(0, 1, frames) - lead) / (1 - lead - tail), 0, 1)
    take = Take(t, lay_out(clip, rng), rng)
    motion, *values = MOTIONS[clip["action"]]
    motion(take, *take.scene.actors, *values)
    things = [*take.scene.actors, *take.scene.others]
    for thing in things:
        thing.centre = np.broadcast_to(thing.centre, (frames, 3))
        thing.turn = np.broadcast_to(thing.turn, (frames, 4))
    return things, take.hands
