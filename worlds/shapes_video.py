"""Render the clips of the toy world: the motion of the objects, and their pixels.

This is a module of its own because each worker that renders imports it, and toy_ssv2.py imports transformers.
"""

import numpy as np

from worlds.shapes import COLOURS, SINGLE

SIZE = 64  # pixels, height and width of the clips and of the encoder's input
FRAMES = (18, 28)  # per clip; more than the encoder's 16, so that sampling matters


def motion(action, frames, rng):
    """Compute the paths of a clip's objects.

    Returns centres (objects, frames, 2) as x, y and radii (objects, frames). All one-object actions share
    one distribution of initial positions, and all two-object actions share another, so that the action
    cannot be inferred from the first frame.
    """
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
    a, b = {  # displacement of both along the axis, which points from the first to the second
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
    """Compute the distance from points (x, y) to the outline of a shape of radius 1. Negative inside."""
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
    """Render one clip, antialiased: uint8 (frames, SIZE, SIZE, 3). Depends only on (seed, id)."""
    rng = np.random.default_rng([seed, int(clip["id"])])
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    centres, radii = motion(clip["action"], frames, rng)

    # a grey background with a gradient and noise
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    slope = rng.uniform(-0.2, 0.2, 2)
    background = rng.uniform(15, 40) + slope[0] * (axis - 32) + slope[1] * (axis - 32)[:, None]
    background = (background + rng.normal(0, 3, (SIZE, SIZE))).astype(np.float32)
    video = np.repeat(background[None], frames, 0)[None].repeat(3, 0)  # (3, frames, SIZE, SIZE)

    # the objects; the first one covers the second
    for name, path, radius in reversed(list(zip(clip["objects"], centres, radii, strict=True))):
        colour, shape = name.split()
        path, radius = path.astype(np.float32), radius.astype(np.float32)[:, None]
        x = ((axis - path[:, :1]) / radius)[:, None, :]
        y = ((axis - path[:, 1:]) / radius)[:, :, None]
        distance = signed_distance(shape, x, y) * radius[..., None]  # (frames, SIZE, SIZE)
        cover = np.clip(0.5 - distance, 0, 1)
        for plane, value in zip(video, COLOURS[colour], strict=True):
            plane += cover * (np.float32(value) - plane)

    # brightness that changes over time
    light = rng.uniform(0.92, 1.06) + rng.uniform(-0.03, 0.03) * np.linspace(-1, 1, frames)
    video *= light.astype(np.float32)[:, None, None]
    return np.clip(video, 0, 255, out=video).astype(np.uint8).transpose(1, 2, 3, 0).copy()
