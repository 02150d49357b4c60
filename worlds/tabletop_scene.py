"""Render clips of the tabletop world with MuJoCo. Poses are set in each frame; no physics is computed."""

import atexit
import functools
import os
import sys
from importlib.util import find_spec

import numpy as np

from runtime.errors import UserError
from worlds.ssv2_files import RATE
from worlds.tabletop_layout import X, Y, Z, about, multiply, rotate
from worlds.tabletop_motions import animate
from worlds.tabletop_objects import build
from worlds.tabletop_plan import BACKGROUND, NOUNS
from worlds.tabletop_shapes import PAINT, box
from worlds.tabletop_textures import (
    DRAWINGS,
    TABLES,
    UNSEEN_TABLES,
    UNSEEN_WALLS,
    WALLS,
    surface,
    texture,
)

WIDTH, HEIGHT = 160, 120
HIDDEN = 5  # group of geoms that are not drawn
AWAY = (0, 0, -9)  # where hidden bodies are
PAINTS = (
    *((205, 45, 40), (40, 90, 185), (60, 145, 70), (235, 190, 50), (235, 130, 45)),
    *((135, 75, 160), (240, 235, 225), (90, 175, 190), (225, 125, 160), (120, 80, 55)),
)
SKIN = ((236, 188, 160), (224, 172, 140), (198, 140, 105), (150, 100, 72), (105, 70, 52))
SLEEVES = (
    (60, 60, 70),
    (190, 190, 195),
    (50, 80, 140),
    (140, 50, 55),
    (70, 110, 80),
    (215, 190, 150),
)

# A hand: geoms of three bodies that move apart. In the frame of a hand the origin is between thumb and
# fingers, x is the direction of the fingers, and y points from the thumb to the fingers.
HAND = {
    "palm": [
        ("ellipsoid", (-0.088, 0, 0), None, (0.044, 0.026, 0.04), "skin"),
        ("capsule", (-0.125, 0, 0), (-0.24, 0, 0), 0.025, "skin"),
        ("capsule", (-0.215, 0, 0), (-0.85, 0, 0), 0.036, "sleeve"),
    ],
    "fingers": [
        ("capsule", (-0.07, 0.0, z), (-0.025, 0.017, z), 0.0095, "skin")
        for z in (-0.03, -0.01, 0.01, 0.03)
    ]
    + [
        ("capsule", (-0.025, 0.017, z), (x, 0.010, z), 0.0088, "skin")
        for z, x in ((-0.03, 0.008), (-0.01, 0.018), (0.01, 0.02), (0.03, 0.012))
    ],
    "thumb": [
        ("capsule", (-0.085, -0.005, 0), (-0.035, -0.02, 0), 0.0115, "skin"),
        ("capsule", (-0.035, -0.02, 0), (0.008, -0.011, 0), 0.0105, "skin"),
    ],
}


def load_mujoco():
    """Return the module mujoco. Raises UserError if it, or what it needs to render, is missing."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    if find_spec("mujoco") is None:
        raise UserError(
            "the package mujoco is not installed. Run: python -m pip install -e '.[tabletop]'"
        )
    try:
        import mujoco  # which loads the OpenGL library

        context = mujoco.GLContext(8, 8)
        context.make_current()
        empty = mujoco.MjModel.from_xml_string("<mujoco/>")
        mujoco.MjrContext(empty, mujoco.mjtFontScale.mjFONTSCALE_100).free()
        context.free()
    except Exception as error:  # its type depends on what is missing
        backend = os.environ.get("MUJOCO_GL", "")
        raise UserError(
            f"mujoco cannot render with MUJOCO_GL={backend} ({type(error).__name__}: {error});"
            " on Debian or Ubuntu run: apt-get install libegl1 libgl1-mesa-dri"
        ) from None
    return mujoco


# ---- model ---------------------------------------------------------------------------------


def add_texture(spec, mujoco, name, image):
    height, width = image.shape[:2]
    spec.add_texture(
        name=name,
        type=mujoco.mjtTexture.mjTEXTURE_2D,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,  # its pixels are set after compilation
        width=width,
        height=height,
        nchannel=3,
    )
    material = spec.add_material(name=name, specular=0.3, shininess=0.3)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def add_mesh(spec, mujoco, body, name, part):
    """Add a mesh and its geom, both called `name`."""
    spec.add_mesh(
        name=name,
        uservert=part.vertices.ravel().tolist(),
        userface=part.faces.ravel().tolist(),
        usertexcoord=part.uv.ravel().tolist(),
        inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL,
    )
    body.add_geom(
        name=name,
        type=mujoco.mjtGeom.mjGEOM_MESH,
        meshname=name,
        material=part.texture or "plain",
        contype=0,
        conaffinity=0,
        group=HIDDEN,
    )


def sheet(width, depth, texture, repeat):
    """Return a horizontal box, whose top is z = 0, with a repeated texture."""
    part = box((-width / 2, -depth / 2, -0.03), (width / 2, depth / 2, 0), PAINT, texture)
    return part._replace(uv=part.vertices[:, :2] * repeat)


def make_model(mujoco, folder):
    """Compile a model with all objects, two hands, all tables and walls, a light and a camera."""
    spec = mujoco.MjSpec()
    spec.visual.quality.shadowsize, spec.visual.quality.offsamples = 512, 0
    spec.visual.global_.offwidth, spec.visual.global_.offheight = WIDTH, HEIGHT
    spec.visual.map.znear, spec.visual.map.zfar = 0.1, 20
    spec.stat.extent, spec.stat.center = 1, (0, 0, 0)
    spec.add_material(name="plain", specular=0.3, shininess=0.4)
    images = {name: texture(name) for name in DRAWINGS}
    names = dict.fromkeys((*TABLES, *UNSEEN_TABLES, *WALLS, *UNSEEN_WALLS))
    images |= {name: surface(name, folder) for name in names}
    for name, image in images.items():
        add_texture(spec, mujoco, name, image)
    world = spec.worldbody
    add_mesh(spec, mujoco, world, "table", sheet(1.5, 1.3, TABLES[0], 1.4))
    wall = world.add_body(name="wall", pos=(0, 0.65, 0), quat=about(X, np.pi / 2))
    add_mesh(spec, mujoco, wall, "wall", sheet(4, 4, WALLS[0], 0.9))
    world.add_light(name="light", castshadow=True)
    world.add_camera(name="camera")
    for name in NOUNS:
        body = world.add_body(name=name, mocap=True, pos=AWAY)
        for i, part in enumerate(build(name)):
            add_mesh(spec, mujoco, body, f"{name}/{i}", part)
    kinds = {"capsule": mujoco.mjtGeom.mjGEOM_CAPSULE, "ellipsoid": mujoco.mjtGeom.mjGEOM_ELLIPSOID}
    for number in range(2):
        for part, geoms in HAND.items():
            body = world.add_body(name=f"{part}{number}", mocap=True, pos=AWAY)
            for i, (kind, start, end, size, colour) in enumerate(geoms):
                if kind == "ellipsoid":
                    shape = {"pos": start, "size": size}
                else:
                    shape = {"fromto": (*start, *end), "size": (size, 0, 0)}
                body.add_geom(
                    name=f"{part}{number}/{i}/{colour}",
                    type=kinds[kind],
                    contype=0,
                    conaffinity=0,
                    group=HIDDEN,
                    material="plain",
                    **shape,
                )
    model = spec.compile()
    for name, image in images.items():
        start = model.tex_adr[model.texture(name).id]
        model.tex_data[start : start + image.size] = image.ravel()
    return model


# ---- rendering -----------------------------------------------------------------------------


class Renderer:
    """Renderer of clips. Create one per process."""

    def __init__(self, folder):
        """folder: contains the pictures of surfaces. Raises UserError if MuJoCo cannot render."""
        self.mujoco = mujoco = load_mujoco()
        self.model = make_model(mujoco, folder)
        self.data = mujoco.MjData(self.model)
        self.gl = mujoco.GLContext(WIDTH, HEIGHT)
        self.gl.make_current()
        self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene = mujoco.MjvScene(self.model, maxgeom=500)
        self.options = mujoco.MjvOption()
        self.options.geomgroup[HIDDEN] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.camera.fixedcamid = 0
        self.vertices, self.positions = self.model.mesh_vert.copy(), self.model.geom_pos.copy()
        self.paints = {f"{n}/{i}": p.colour for n in NOUNS for i, p in enumerate(build(n))}

    def close(self):
        self.context.free()
        self.gl.free()

    def geoms(self, body):
        """Return the ids of a body's geoms."""
        number = self.model.body(body).id
        start = self.model.body_geomadr[number]
        return range(start, start + self.model.body_geomnum[number])

    def show(self, body, colour, scale=1.0):
        """Show a body. colour: function from the name of a geom to (r, g, b), from 0 to 1."""
        model = self.model
        for geom in self.geoms(body):
            model.geom_group[geom] = 0
            model.geom_rgba[geom] = (*colour(model.geom(geom).name), 1)
            mesh = model.geom_dataid[geom]
            if mesh >= 0:
                start = model.mesh_vertadr[mesh]
                rows = slice(start, start + model.mesh_vertnum[mesh])
                model.mesh_vert[rows] = self.vertices[rows] * scale
                model.geom_pos[geom] = self.positions[geom] * scale
                self.mujoco.mjr_uploadMesh(model, self.context, mesh)

    def place(self, body, position, turn):
        number = self.model.body(body).mocapid[0]
        self.data.mocap_pos[number], self.data.mocap_quat[number] = position, turn

    def dress(self, clip, things, hands, rng):
        """Choose surfaces, colours and light of a clip, and hide what it does not show."""
        model = self.model
        model.geom_group[:] = HIDDEN
        self.data.mocap_pos[:] = AWAY
        tables, walls = TABLES, WALLS
        if clip["split"] == BACKGROUND:
            tables, walls = UNSEEN_TABLES, UNSEEN_WALLS
        for name, names in (("table", tables), ("wall", walls)):
            geom = model.geom(name).id
            model.geom_group[geom] = 0
            model.geom_matid[geom] = model.material(str(rng.choice(names))).id
            model.geom_rgba[geom] = (*rng.uniform(0.8, 1.0) * rng.uniform(0.95, 1.0, 3), 1)

        for thing in things:
            paint = np.array(PAINTS[rng.integers(len(PAINTS))]) / 255 * rng.uniform(0.85, 1.05)
            tint = rng.uniform(0.9, 1.05, 3)

            def colour(name, paint=paint, tint=tint):
                colour = self.paints[name]
                return np.clip(paint if colour == PAINT else np.array(colour) * tint, 0, 1)

            self.show(thing.name, colour, thing.scale)
        skin, sleeve = SKIN[rng.integers(len(SKIN))], SLEEVES[rng.integers(len(SLEEVES))]
        for number in range(len(hands)):
            for part in HAND:
                self.show(
                    f"{part}{number}",
                    lambda name: np.array(skin if name.endswith("skin") else sleeve) / 255,
                )
        self.light(rng)

    def light(self, rng):
        """Sample the light of a clip."""
        model = self.model
        place = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.7, 0.2), rng.uniform(1.2, 1.7)])
        model.light_pos[0], model.light_dir[0] = place, -place / np.linalg.norm(place)
        strength = rng.uniform(0.55, 0.85)
        model.light_diffuse[0] = strength * np.array(
            [1, rng.uniform(0.93, 1), rng.uniform(0.82, 1)]
        )
        model.light_cutoff[0], model.light_specular[0] = 80, 0.2
        model.vis.headlight.ambient[:] = rng.uniform(0.4, 0.52)
        model.vis.headlight.diffuse[:] = rng.uniform(0.2, 0.32)
        model.vis.headlight.specular[:] = 0

    def aim(self, place, target, tilt):
        """Set the camera. place, target: (3,). tilt: about the line of sight."""
        back = (place - target) / np.linalg.norm(place - target)
        right = np.cross((0, 0, 1), back)
        right /= np.linalg.norm(right)
        turn = np.empty(4)
        self.mujoco.mju_mat2Quat(turn, np.stack([right, np.cross(back, right), back], 1).ravel())
        self.model.cam_pos[0] = place
        self.model.cam_quat[0] = multiply(turn, about(Z, tilt))

    def render(self, clip, seed):
        """Render a planned clip: uint8 (frames, HEIGHT, WIDTH, 3). Depends only on (seed, id)."""
        mujoco, (things, hands) = self.mujoco, animate(clip, seed)
        rng = np.random.default_rng([seed, int(clip["id"]), 1])
        self.dress(clip, things, hands, rng)
        frames, turns = len(things[0].centre), [hand.turn() for hand in hands]
        place, target, shake = film(rng, frames)
        self.model.cam_fovy[0] = rng.uniform(31, 34)
        video = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
        view = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        for f, image in enumerate(video):
            for thing in things:
                self.place(thing.name, thing.centre[f], thing.turn[f])
            for number, (hand, turn) in enumerate(zip(hands, turns, strict=True)):
                side = rotate(turn[f], Y) * max(hand.gap[f], 0) / 2
                self.place(f"palm{number}", hand.point[f], turn[f])
                self.place(f"fingers{number}", hand.point[f] + side, turn[f])
                self.place(f"thumb{number}", hand.point[f] - side, turn[f])
            self.aim(place + shake[f, :3], target + shake[f, 3:6], shake[f, 6])
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_camlight(self.model, self.data)
            mujoco.mjv_updateScene(
                self.model,
                self.data,
                self.options,
                None,
                self.camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self.scene,
            )
            mujoco.mjr_render(view, self.scene, self.context)
            mujoco.mjr_readPixels(image, None, view, self.context)
        return video[:, ::-1].copy()


def film(rng, frames):
    """Return the camera's place (3,), its target (3,) and its shake (frames, 7), for a hand-held camera."""
    side, height = rng.uniform(-0.2, 0.2), np.radians(rng.uniform(30, 43))
    target = np.array([rng.uniform(-0.015, 0.015), rng.uniform(0.0, 0.03), rng.uniform(0.04, 0.06)])
    way = np.array([np.sin(side) * np.cos(height), -np.cos(side) * np.cos(height), np.sin(height)])
    place = target + rng.uniform(0.82, 0.9) * way
    t = np.arange(frames)[:, None] / RATE  # seconds
    waves = [
        rng.normal(0, 1, 7) * np.sin(2 * np.pi * (rng.uniform(*band, 7) * t + rng.uniform(0, 1, 7)))
        for band in ((0.2, 0.6), (1, 2.5))
    ]
    size = np.array([0.004] * 3 + [0.003] * 3 + [0.005]) * rng.uniform(0.2, 1)
    return place, target, (waves[0] + 0.35 * waves[1]) * size


@functools.cache
def renderer(folder):
    """Return this process's Renderer."""
    made = Renderer(folder)
    atexit.register(made.close)  # otherwise OpenGL prints an error when Python exits
    return made


def render(folder, clip, seed):
    """Render one clip in this process, see `Renderer.render`."""
    return renderer(folder).render(clip, seed)
