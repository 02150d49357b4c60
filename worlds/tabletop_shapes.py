"""Shapes from which worlds/tabletop_objects.py builds objects: lathes, tubes, boxes and ellipsoids."""

from collections import namedtuple

import numpy as np

# vertices (V, 3), faces (T, 3), texture coordinates (V, 2), colour (r, g, b) or PAINT, texture or None
Part = namedtuple("Part", "vertices faces uv colour texture")
PAINT = "paint"  # a colour that is sampled in each clip
SEGMENTS = 20


def grid_faces(rows, columns):
    """Return the faces (T, 3) of a grid of vertices, row by row."""
    i = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = (x.ravel() for x in (i[:-1, :-1], i[:-1, 1:], i[1:, :-1], i[1:, 1:]))
    return np.concatenate([np.stack([a, b, d], 1), np.stack([a, d, c], 1)])


def lathe(profile, colour, texture=None, segments=SEGMENTS):
    """Turn a profile [(r, z), ...], from bottom to top on the outside, about the z axis."""
    r, z = np.array(profile, float).T
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    vertices = np.stack(
        [
            r[:, None] * np.cos(angle),
            r[:, None] * np.sin(angle),
            np.repeat(z[:, None], segments + 1, 1),
        ],
        -1,
    )
    length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(r), np.diff(z)))])
    uv = np.stack(np.meshgrid(angle / (2 * np.pi), length / length[-1]), -1)
    faces = grid_faces(len(r), segments + 1)
    return Part(vertices.reshape(-1, 3), faces, uv.reshape(-1, 2), colour, texture)


def cylinder(radius, low, high, colour, texture=None, x=0.0, y=0.0):
    part = lathe([(0, low), (radius, low), (radius, high), (0, high)], colour, texture)
    return moved(part, (x, y, 0))


def ellipsoid(radii, centre, colour, texture=None):
    angle = np.linspace(-np.pi / 2, np.pi / 2, 12)
    part = lathe(np.stack([np.cos(angle), np.sin(angle)], 1), colour, texture)
    return part._replace(vertices=part.vertices * radii + centre)


def tube(points, radii, colour, texture=None, sides=10):
    """Sweep a circle along points (N, 3) that do not run along z. radii: one, or one per point."""
    points = np.array(points, float)
    radii = np.broadcast_to(radii, len(points))
    along = np.gradient(points, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    aside = np.cross(along, (0.02, 0.03, 1.0))
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    up = np.cross(aside, along)
    angle = np.linspace(0, 2 * np.pi, sides + 1)[:, None]
    rings = [
        p + r * (np.cos(angle) * a + np.sin(angle) * u)
        for p, r, a, u in zip(points, radii, aside, up, strict=True)
    ]
    rings = [np.repeat(points[:1], sides + 1, 0), *rings, np.repeat(points[-1:], sides + 1, 0)]
    uv = np.stack(
        np.meshgrid(np.linspace(0, 1, sides + 1), np.linspace(0, 1, len(rings))), -1
    ).reshape(-1, 2)
    faces = grid_faces(len(rings), sides + 1)[:, ::-1]
    return Part(np.concatenate(rings), faces, uv, colour, texture)


def arc(centre, radius, start, end, count=9):
    """Return points (count, 3) of an arc in the x-z plane. Angles in degrees from x towards z."""
    angle = np.radians(np.linspace(start, end, count))
    points = np.stack([np.cos(angle), np.zeros(count), np.sin(angle)], 1)
    return np.array(centre, float) + radius * points


def torus(radius, thickness, colour, texture=None):
    angle = np.linspace(0, 2 * np.pi, SEGMENTS + 1)
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], 1) * radius
    part = tube(ring, thickness, colour, texture)
    closed = part.faces[(part.faces >= 11).all(1) & (part.faces < len(part.vertices) - 11).all(1)]
    return part._replace(faces=closed)


# corners of the faces of a box, counter-clockwise from outside: front, back, left, right, top, bottom
CORNERS = (
    ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1)),
    ((1, 1, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1)),
    ((0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)),
    ((1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)),
    ((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)),
    ((0, 1, 0), (1, 1, 0), (1, 0, 0), (0, 0, 0)),
)


def box(low, high, colour, texture=None):
    """A box between two corners (3,). Its texture has six squares side by side, one for each face."""
    low, high = np.array(low, float), np.array(high, float)
    vertices = (low + (high - low) * np.array(CORNERS)).reshape(-1, 3)
    square = np.array([(0.03, 0.01), (0.97, 0.01), (0.97, 0.99), (0.03, 0.99)])
    uv = np.concatenate([(square + np.array((i, 0))) / (6, 1) for i in range(6)])
    faces = np.concatenate([np.array([(0, 1, 2), (0, 2, 3)]) + 4 * i for i in range(6)])
    return Part(vertices, faces, uv, colour, texture)


def moved(part, offset):
    return part._replace(vertices=part.vertices + np.array(offset, float))


def lying(part, axis):
    """Turn a part so that its z axis becomes the x or y axis."""
    x, y, z = part.vertices.T
    turned = np.stack({"x": (z, x, y), "y": (y, z, x)}[axis], 1)
    return part._replace(vertices=turned)
