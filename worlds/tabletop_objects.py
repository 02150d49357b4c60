"""The objects of the tabletop world. Needs numpy only.

Their units do not matter: `build` scales an object to its size in worlds/tabletop_plan.py.
"""

import numpy as np

from worlds.tabletop_plan import NOUNS
from worlds.tabletop_shapes import (
    PAINT,
    Part,
    arc,
    box,
    cylinder,
    ellipsoid,
    grid_faces,
    lathe,
    lying,
    moved,
    torus,
    tube,
)

WHITE, BLACK, GREY = (0.95, 0.95, 0.93), (0.08, 0.08, 0.09), (0.62, 0.63, 0.65)
YELLOW, ORANGE, GREEN = (0.98, 0.83, 0.12), (0.95, 0.5, 0.1), (0.2, 0.55, 0.2)
RED, BROWN, WOOD = (0.8, 0.1, 0.1), (0.36, 0.22, 0.12), (0.72, 0.5, 0.28)
CRUST = (0.78, 0.5, 0.25)
PLAIN = (1.0, 1.0, 1.0)  # under a texture


def book():
    return [
        box((0, 0, 0), (16, 11, 0.4), PAINT),
        box((0, 0, 3.0), (16, 11, 3.45), PAINT),
        box((3, 7, 3.4), (13, 9, 3.5), (0.98, 0.95, 0.85)),
        box((5.5, 1.8, 3.4), (10.5, 5.4, 3.5), (0.98, 0.85, 0.4)),
        box((0, 0, 0.3), (0.5, 11, 3.2), PAINT),
        box((0.4, 0.3, 0.4), (15.6, 10.7, 3.0), WHITE),
    ]


def cardboard():
    return [
        box((0, 0, 0), (14, 11, 9), PLAIN, "cardboard"),
        box((5.8, -0.05, -0.03), (8.2, 11.05, 9.05), (0.85, 0.72, 0.45)),
    ]


def cereal():
    return [box((0, 0, 0), (12, 5, 17), PLAIN, "cereal")]


def milk():
    roof = np.array(
        [(0, 0, 13), (8, 0, 13), (8, 8, 13), (0, 8, 13), (0, 4, 16.2), (8, 4, 16.2)], float
    )
    faces = np.array([(0, 1, 5), (0, 5, 4), (2, 3, 4), (2, 4, 5), (1, 2, 5), (3, 0, 4)])
    return [
        box((0, 0, 0), (8, 8, 13), PLAIN, "milk"),
        Part(roof, faces, np.zeros((6, 2)), (0.25, 0.45, 0.85), None),
        box((0, 3.6, 15.2), (8, 4.4, 17), WHITE),
    ]


def bottle():
    glass = [(0, 0), (3.4, 0), (3.5, 0.4), (3.5, 11), (3.1, 13), (1.4, 16), (1.3, 18.5), (0, 18.5)]
    return [
        lathe(glass, (0.1, 0.42, 0.2)),
        lathe([(3.55, 3), (3.55, 9)], PLAIN, "label"),
        cylinder(1.5, 18.2, 20, RED),
    ]


def can():
    return [
        lathe([(0, 0), (2.8, 0), (3.3, 0.6), (3.3, 0.7)], GREY),
        lathe([(3.3, 0.6), (3.3, 10.2)], PLAIN, "can"),
        lathe([(3.3, 10.2), (2.8, 11), (2.6, 11), (2.6, 10.7), (0, 10.7)], GREY),
    ]


def thermos():
    return [
        cylinder(4, 0, 1.6, GREY),
        lathe([(3.8, 1.6), (3.8, 13.5), (3.0, 15)], PAINT),
        lathe([(3.1, 14.6), (3.1, 19.4), (2.8, 20), (0, 20)], GREY),
        lathe([(3.9, 13), (3.9, 13.8), (3.3, 14.9)], GREY),
    ]


def candle():
    return [
        lathe([(0, 0), (3, 0), (3, 9), (2.6, 9.2), (0, 8.8)], PAINT),
        cylinder(0.25, 8.8, 10, BLACK),
        lathe([(0, 9.6), (0.8, 10.5), (0.55, 11.8), (0, 13)], (1.0, 0.75, 0.2)),
    ]


def mug():
    return [
        lathe([(0, 0), (4.2, 0), (4.5, 0.4), (4.5, 9), (4.1, 9), (4.0, 0.8), (0, 0.8)], PAINT),
        tube(arc((4.4, 0, 4.6), 2.7, -80, 80), 0.65, PAINT),
    ]


def bowl():
    outside = [(0, 0), (3.4, 0), (3.6, 0.5), (6, 2.6), (8, 5.6), (8.5, 8)]
    inside = [(8.1, 8), (7.6, 5.8), (5.7, 3.1), (3, 1.2), (0, 1)]
    return [lathe(outside, PAINT), lathe([(8.5, 8), *inside], WHITE)]


def plate():
    return [
        lathe([(0, 0), (5.5, 0), (6, 0.4), (9.5, 2.2), (9.4, 2.5), (6, 1.1), (0, 0.9)], WHITE),
        lathe([(9.2, 2.52), (8.2, 2.12)], PAINT),
        lathe([(8.2, 2.0), (9.4, 2.62)], PAINT),
    ]


def hat():  # lies on its crown, with the opening up, as a bowl does
    crown = [(0, 0.6), (4, 0), (6.3, 0.3), (7.2, 2), (7.5, 8.8), (10.6, 10.2), (11, 11)]
    lining = [(11, 11), (10.4, 10.6), (7.3, 9.3), (6.8, 2), (0, 1.2)]
    return [
        lathe(crown, PAINT),
        lathe(lining, PAINT),
        lathe([(7.45, 6), (7.65, 8.9)], BLACK),
    ]


def bucket():
    wall = [(0, 0), (5.6, 0), (8, 12.6), (8.5, 12.6), (8.5, 14), (7.8, 14), (5.3, 0.8), (0, 0.8)]
    angle = np.radians(np.linspace(180, 360, 13))
    bail = np.stack([8.2 * np.cos(angle), 8.3 * np.sin(angle), 12 + 5 * np.sin(angle)], 1)
    return [lathe(wall, PAINT), tube(bail, 0.3, GREY, sides=6)]


def bread():
    angle = np.radians(np.linspace(-20, 200, 14))
    outline = np.concatenate(
        [[(-5.6, 0), (5.6, 0)], np.stack([6.3 * np.cos(angle), 8 + 4 * np.sin(angle)], 1)]
    )
    ring = np.concatenate([outline, outline[:1]])
    n = len(ring)
    rings = [np.insert(ring * s, 1, y, axis=1) for s, y in ((1, 0), (1, 11))]
    uv = np.stack(np.meshgrid(np.linspace(0, 2, n), (0, 1)), -1).reshape(-1, 2)
    crust = Part(np.concatenate(rings), grid_faces(2, n)[:, ::-1], uv, CRUST, "bread")
    ends = []
    for y, flip in ((0, 1), (11, -1)):
        fan = np.insert(np.concatenate([outline, [(0, 5)]]), 1, y, axis=1)
        k = len(outline)
        faces = np.array([(i, (i + 1) % k, k)[::flip] for i in range(k)])
        ends.append(Part(fan, faces, fan[:, [0, 2]] / 12, (0.97, 0.86, 0.62), "bread"))
    return [crust, *ends]


def lemon():
    profile = [(0, -4.5), (0.7, -4.3), (0.9, -3.7), (2.4, -2.7), (3.4, -1), (3.5, 0.3), (3.2, 1.6)]
    profile += [(2.2, 3), (1.0, 3.7), (0.7, 4.3), (0, 4.5)]
    return [lying(lathe(profile, (1.0, 0.9, 0.15), "peel"), "y")]


def apple():
    flesh = [(0, 0.5), (1.2, 0), (2.6, 0.7), (3.8, 3), (4, 4.6), (3.5, 6.3), (2.2, 7.1), (0.9, 6.9)]
    return [
        lathe([*flesh, (0, 6.0)], (0.82, 0.12, 0.1), "apple"),
        cylinder(0.22, 6, 8, BROWN),
        ellipsoid((1.1, 0.5, 0.15), (1.1, 0, 7.5), GREEN),
    ]


def ball():
    return [ellipsoid((5, 5, 5), (0, 0, 0), PLAIN, "ball")]


def banana():
    angle = np.radians(np.linspace(20, 160, 13))
    points = np.stack([9 * np.cos(angle), 9 * np.sin(angle), np.zeros(13)], 1)
    radii = [0.5, 0.8, 1.4, 1.8, 2, 2, 2, 2, 2, 1.8, 1.5, 1.0, 0.6]
    ends = [tube(points[i], radii[i.start or -2], BROWN) for i in (slice(0, 2), slice(-2, None))]
    ends = [end._replace(vertices=end.vertices * (1.02, 1.02, 1.0)) for end in ends]
    return [tube(points, radii, YELLOW), *ends]


def donut():
    dough = torus(3.2, 1.8, (0.8, 0.55, 0.28))
    icing = torus(3.2, 1.85, PAINT, "sprinkles")
    heights = icing.vertices[icing.faces][:, :, 2].mean(1)
    return [dough, icing._replace(faces=icing.faces[heights > 0.1])]


def hammer():
    return [
        tube([(0, 0, 0), (6, 0, 0), (17, 0, 0)], [1.2, 1.1, 0.8], WOOD),
        lying(moved(cylinder(1.5, -4.6, -1.2, GREY), (0, 17.5, 0)), "y"),
        box((16.3, -1.4, -1.2), (18.7, 2, 1.2), GREY),
        tube([(17.5, 1.6, 0), (17.3, 3.4, 0), (16.2, 4.8, 0)], [1.1, 0.9, 0.2], GREY),
    ]


def dice():
    return [box((0, 0, 0), (6, 6, 6), PLAIN, "dice")]


def remote():
    return [box((0, 0, 0), (17, 5, 2.2), PLAIN, "remote")]


def phone():
    return [box((0, 0, 0), (15, 7.5, 1.2), PLAIN, "phone")]


def teapot():
    body = [(0, 0), (3.6, 0), (5.6, 2.2), (6, 4.6), (5.2, 7.4), (3.4, 9.2), (3.2, 9.4)]
    return [
        lathe(body, PAINT),
        lathe([(3.6, 9.1), (3, 10), (1, 10.6), (0.6, 10.9), (1, 11.6), (0, 12.2)], PAINT),
        tube([(5, 0, 3.2), (8, 0, 4.6), (9.3, 0, 7.5), (11, 0, 9)], [1.5, 1.1, 0.8, 0.6], PAINT),
        tube(arc((-5.2, 0, 5.3), 3.3, 80, 280), 0.6, PAINT),
    ]


def car():
    wheels = [(x, y) for x in (3.2, 11.6) for y in (0.1, 6.7)]
    return [
        box((0, 0.6, 1.2), (15, 7.4, 3.9), PAINT),
        box((3.4, 1.1, 3.9), (11.4, 6.9, 6.3), (0.55, 0.75, 0.85)),
        box((3.8, 1.0, 6.0), (11.0, 7.0, 6.6), PAINT),
        *(lying(moved(cylinder(1.6, y, y + 1.2, BLACK), (1.6, x, 0)), "y") for x, y in wheels),
        *(box((14.8, y, 2.2), (15.1, y + 1.2, 3.2), YELLOW) for y in (1.2, 5.6)),
    ]


def duck():
    return [
        ellipsoid((5.5, 4.3, 3.6), (0, 0, 3.5), YELLOW),
        ellipsoid((2.2, 2.4, 1.8), (-5, 0, 5.2), YELLOW),
        ellipsoid((3.1, 3.0, 3.0), (3.2, 0, 8.4), YELLOW),
        ellipsoid((1.7, 1.3, 0.6), (6.5, 0, 8), ORANGE),
        *(ellipsoid((0.5, 0.5, 0.6), (5.3, y, 9.3), BLACK) for y in (-1.8, 1.8)),
        *(ellipsoid((2.8, 0.9, 1.8), (-1, y, 4.4), (0.93, 0.74, 0.1)) for y in (-4, 4)),
    ]


def lamp():
    return [
        lathe([(0, 0), (4.2, 0), (4.2, 0.8), (1, 1.6), (0.6, 2), (0.6, 12), (0, 12)], BLACK),
        lathe([(6.5, 11), (3.8, 21), (0, 21)], PAINT),
        lathe([(3.6, 20.5), (6.3, 11)], (1.0, 0.95, 0.7)),
    ]


def carrot():
    root = [(0, -11), (0.5, -10), (1.2, -6), (1.8, -1), (2.2, 3), (1.9, 4.4), (0, 4.6)]
    leaves = [
        tube([(4.3, 0, 0), (7, y, z), (9, 1.5 * y, 1.5 * z)], [0.35, 0.8, 0.2], GREEN, sides=6)
        for y, z in ((-1, 0.3), (0, 1), (1, -0.2), (0.5, 0.4))
    ]
    return [lying(lathe(root, (0.95, 0.45, 0.08)), "x"), *leaves]


def pear():
    flesh = [(0, 0.2), (1.6, 0), (3.3, 1), (4, 3), (3.6, 5), (2.4, 7), (1.9, 8.6), (1.2, 9.8)]
    return [lathe([*flesh, (0, 10)], (0.72, 0.78, 0.2)), cylinder(0.25, 9.8, 11.4, BROWN)]


def clock():
    face = lathe([(0, -3.02), (4.3, -3.02)], PLAIN, "clock")
    x, y = face.vertices[:, 0] / 8.6 + 0.5, face.vertices[:, 1] / 8.6 + 0.5
    face = face._replace(uv=np.stack([y, x], 1), faces=face.faces)
    case = lathe([(0, -2.9), (4.3, -2.9), (4.4, -3.3), (5, -3.3), (5, 2.5), (0, 2.5)], PAINT)
    return [
        moved(lying(case, "y"), (0, 0, 6)),
        moved(lying(face, "y"), (0, 0, 6)),
        *(ellipsoid((2, 1.8, 1.6), (x, 0, 11.2), GREY) for x in (-3, 3)),
        *(tube([(x, 0, 0.4), (x * 0.7, 0, 2.2)], 0.6, GREY) for x in (-4, 4)),
        tube([(-1.2, 0, 12.6), (0, 0, 13), (1.2, 0, 12.6)], 0.4, GREY),
    ]


def teddy():
    fur, light = (0.6, 0.38, 0.18), (0.85, 0.66, 0.42)
    return [
        ellipsoid((3.6, 3.0, 4.0), (0, 0, 4.4), fur),
        ellipsoid((2.4, 1.2, 2.6), (0, -2.2, 4.4), light),
        ellipsoid((3.3, 2.9, 3.0), (0, -0.3, 10.6), fur),
        ellipsoid((1.5, 1.2, 1.2), (0, -2.8, 10), light),
        ellipsoid((0.6, 0.4, 0.45), (0, -3.9, 10.4), BLACK),
        *(ellipsoid((0.4, 0.3, 0.45), (x, -2.9, 11.5), BLACK) for x in (-1.2, 1.2)),
        *(ellipsoid((1.3, 0.8, 1.3), (x, 0, 13.2), fur) for x in (-2.6, 2.6)),
        *(ellipsoid((1.2, 1.4, 2.5), (x, -1.2, 5.8), fur) for x in (-4, 4)),
        *(ellipsoid((1.6, 3, 1.6), (x, -2.8, 1.6), fur) for x in (-2.4, 2.4)),
        *(ellipsoid((1.1, 0.3, 1.1), (x, -5.6, 1.7), light) for x in (-2.4, 2.4)),
    ]


def cake():
    cherries = np.radians(np.arange(0, 360, 45))
    return [
        cylinder(8, 0, 2.6, (0.55, 0.32, 0.15)),
        cylinder(8, 2.6, 3.6, WHITE),
        cylinder(8, 3.6, 6, (0.55, 0.32, 0.15)),
        lathe([(8.1, 4.8), (8.2, 6.4), (7.8, 6.9), (0, 6.9)], (0.98, 0.75, 0.82)),
        *(
            ellipsoid((0.9, 0.9, 0.9), (6.6 * np.cos(a), 6.6 * np.sin(a), 7.1), RED)
            for a in cherries
        ),
    ]


def pan():
    wall = [(0, 0), (6.2, 0), (8, 3.6), (7.7, 3.8), (6, 0.6), (0, 0.6)]
    return [
        lathe(wall, (0.13, 0.13, 0.14)),
        tube([(7.6, 0, 3), (11, 0, 3.6), (18, 0, 3.4)], [0.6, 0.8, 1.0], BROWN),
    ]


SHAPES = {
    "book": book,
    "box": cardboard,
    "cereal box": cereal,
    "milk carton": milk,
    "bottle": bottle,
    "can": can,
    "thermos": thermos,
    "candle": candle,
    "mug": mug,
    "bowl": bowl,
    "plate": plate,
    "hat": hat,
    "bucket": bucket,
    "bread": bread,
    "lemon": lemon,
    "apple": apple,
    "ball": ball,
    "banana": banana,
    "donut": donut,
    "hammer": hammer,
    "dice": dice,
    "remote control": remote,
    "phone": phone,
    "teapot": teapot,
    "toy car": car,
    "duck": duck,
    "lamp": lamp,
    "carrot": carrot,
    "pear": pear,
    "alarm clock": clock,
    "teddy bear": teddy,
    "cake": cake,
    "frying pan": pan,
}


def build(name):
    """Return the parts of an object at its nominal size. The origin is the centre of its bounding box."""
    parts = SHAPES[name]()
    every = np.concatenate([p.vertices for p in parts])
    low, high = every.min(0), every.max(0)
    scale = np.array(NOUNS[name].size) / (high - low)
    return [p._replace(vertices=(p.vertices - (low + high) / 2) * scale) for p in parts]
