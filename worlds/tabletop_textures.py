"""The textures of the tabletop world: photographs of surfaces from a package, and drawn ones."""

from pathlib import Path

import numpy as np

from worlds.assets import fetch

SIZE = 128  # of textures of objects, and of each of the six squares of a box
SURFACE = 192  # of tables and walls, before they are mirrored

# robosuite's pictures of surfaces. Its licence is MIT.
PACKAGE = ("robosuite", "1.5.2", "b9e02df55de8949739de6ba1d196d2ba59cf33c51a76efcfbe5c2f73cdcf99ce")
FOLDER = "robosuite/models/assets/textures/"
PICTURES = {
    "light-wood": "967be64bdb170d36283bc43c2ae5d525ec88f78bc837dc7d0efc9a28d68caad1",
    "dark-wood": "5da8dbf7af06ecd251840aceec25fedcfa98267041cea289b2829c982e008dc3",
    "wood-tiles": "18d87069529422d832559ce969858576dd46f83efc3dfd9e5ffbf26d740be123",
    "wood-varnished-panels": "67b48dc99b89004d98cb0811f170d39993e7e205cc8d5bd3d01a4be137e33a85",
    "gray-woodgrain": "b9e65c147f2683dbcfe6279b359db649aef0cb40ef8b1e3ed5ba6f29fab6b3d0",
    "ceramic": "beef464a2aa9143ba6a25a44adcbfd1f1aff16c5969edbf08019b61025388402",
    "gray-felt": "04c1b483f04be0bd3d26a42ca530c05244cf4b52c0ccb027dbb8fc2bee41ca05",
    "steel-brushed": "43f30e7a2d0e8085aa15f58623b1753a003f93e5fe336eeaf65c146f955a81d5",
    "blue-wood": "9b1eab21395a05d7463751f9075b16bc4fba8fd4be42938bda25ea634a345884",
    "green-wood": "e4fd42ec6dea58f46aa96fc1d78d57c52450a6497dcad887ae8e2ff8c4af3797",
    "red-wood": "d42411e594d6be26c4876ada623b163af6621402462b244d86eaf6e72aca6494",
    "clay": "0ea2ced7f0f07996292314e3f3f5df68c4d8c5b2cbf2180c899ed269906fdcd2",
    "cream-plaster": "5f989033f089158b2c8f0f1f7881f6922b018a5b154558b2edcc9f41a21ab983",
    "gray-plaster": "7ee7520ebf6118051ced809cb9754983e7537a40f8d5271d5cb2fabdd71c33bd",
    "light-gray-plaster": "d0bdaf13b44ab6ef3122451f6b3853e40bdf20bb9be7662649683ba525dfe191",
    "white-plaster": "a35c03edcef74c940400dd39e2384d05169d1d15ac247166b3b7a930acd70f03",
    "yellow-plaster": "7f98027e5dd4ad845a1a20f302b183c62b8e8fab54799634c5143c1dde0d0362",
    "light-gray-floor-tile": "a2aae4ba3b38c3ab9851eca9ad6e76cef9357ef75b3e9a4b280f694ca30acbc5",
    "white-bricks": "864e2bfb462939212c4141a060eb4c3f34c891b6909873797b08f8c4185433d1",
    "pink-plaster": "c6f8435c8aec555fa89ee72d472d652f31ce1afc0e07372e9857b0aa50f6e029",
    "steel-scratched": "7e22a111d516cc84addde9b2b18353d8a6ec521b9b79ec5e9c169e2d9000d3fe",
}

# validation_background uses the UNSEEN ones, the other splits the rest
TABLES = ("light-wood", "dark-wood", "wood-tiles", "wood-varnished-panels", "gray-woodgrain")
TABLES += ("ceramic", "gray-felt", "steel-brushed", "blue-wood", "red checks", "sand cloth")
UNSEEN_TABLES = ("green-wood", "red-wood", "clay", "blue checks", "violet stripes")
WALLS = ("cream-plaster", "gray-plaster", "light-gray-plaster", "white-plaster", "yellow-plaster")
WALLS += ("blue stripes", "light-gray-floor-tile", "green cloth")
UNSEEN_WALLS = ("white-bricks", "pink-plaster", "yellow dots", "steel-scratched")
DRAWN = {  # name: (kind of picture, colour)
    "red checks": ("checks", (190, 40, 45)),
    "blue checks": ("checks", (50, 80, 170)),
    "violet stripes": ("stripes", (130, 90, 160)),
    "blue stripes": ("stripes", (150, 180, 210)),
    "sand cloth": ("cloth", (205, 185, 150)),
    "green cloth": ("cloth", (140, 170, 140)),
    "yellow dots": ("dots", (235, 200, 90)),
}


# ---- surfaces ------------------------------------------------------------------------------


def fetch_pictures(folder):
    """Download the pictures of surfaces to `folder` unless they exist. Raises UserError."""
    files = {f"{name}.png": (f"{FOLDER}{name}.png", sha) for name, sha in PICTURES.items()}
    fetch(folder, *PACKAGE, files)


def read_picture(path, size):
    """Decode a picture and shrink its centre to uint8 (size, size, 3)."""
    import av

    with av.open(str(path)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    side = min(image.shape[:2])
    edges = np.linspace(0, side, size + 1).astype(int)
    image = np.add.reduceat(image[:side, :side].astype(np.float32), edges[:-1], 0)
    image = np.add.reduceat(image, edges[:-1], 1)
    area = np.diff(edges)[:, None] * np.diff(edges)
    return (image / area[..., None]).astype(np.uint8)


def draw_surface(kind, colour, size):
    """Draw a tablecloth or wallpaper: uint8 (size, size, 3)."""
    x, y = np.meshgrid(*2 * [np.arange(size) / size])
    colour, white = np.array(colour, float), np.array([240.0, 238, 232])
    if kind == "checks":
        share = ((x * 8 % 1 < 0.5).astype(float) + (y * 8 % 1 < 0.5)) / 2
    elif kind == "stripes":
        share = (x * 8 % 1 < 0.5).astype(float)
    elif kind == "dots":
        share = (np.hypot(x * 6 % 1 - 0.5, y * 6 % 1 - 0.5) < 0.25).astype(float)
    else:
        share = np.ones_like(x)
    image = white + share[..., None] * (colour - white)
    weave = np.random.default_rng(0).normal(0, 7, (size, size, 1))
    return np.clip(image + weave, 0, 255).astype(np.uint8)


def surface(name, folder):
    """Return the texture of a table or wall. It is mirrored, so that it can be repeated without seams."""
    if name in DRAWN:
        image = draw_surface(*DRAWN[name], SURFACE)
    else:
        image = read_picture(Path(folder) / f"{name}.png", SURFACE)
    image = np.concatenate([image, image[:, ::-1]], 1)
    return np.concatenate([image, image[::-1]])


# ---- objects -------------------------------------------------------------------------------


class Picture:
    """A texture to draw on. Coordinates go from 0 to 1, x to the right and y up."""

    def __init__(self, colour, width=1):
        self.pixels = np.empty((SIZE, SIZE * width, 3))
        self.pixels[:] = colour
        self.width = width

    def square(self, face):
        """Return one square of a box's six as a Picture that shares the pixels."""
        part = Picture(0)
        part.pixels = self.pixels[:, face * SIZE : (face + 1) * SIZE]
        return part

    def axes(self):
        rows, columns = self.pixels.shape[:2]
        y, x = np.mgrid[:rows, :columns]
        return (x + 0.5) / columns, (y + 0.5) / rows

    def box(self, x0, y0, x1, y1, colour):
        x, y = self.axes()
        self.pixels[(x >= x0) & (x < x1) & (y >= y0) & (y < y1)] = colour
        return self

    def disc(self, x0, y0, rx, colour, ry=None):
        x, y = self.axes()
        self.pixels[np.hypot((x - x0) / rx, (y - y0) / (ry or rx)) < 1] = colour
        return self

    def noise(self, amount, seed=0):
        rng = np.random.default_rng(seed)
        coarse = rng.normal(0, amount, (SIZE // 4, self.pixels.shape[1] // 4, 1))
        self.pixels += coarse.repeat(4, 0).repeat(4, 1)
        return self

    def lines(self, x0, y0, x1, y1, count, colour, seed=0):
        """Draw lines of text as bars of different lengths."""
        rng, step = np.random.default_rng(seed), (y1 - y0) / count
        for i in range(count):
            end = x0 + (x1 - x0) * rng.uniform(0.55, 1)
            self.box(x0, y0 + i * step, end, y0 + (i + 0.5) * step, colour)
        return self


FRONT, BACK, LEFT, RIGHT, TOP, BOTTOM = range(6)
DARK, PALE = (35, 35, 40), (245, 242, 235)


def draw_cardboard():
    image = Picture((178, 135, 88), 6).noise(4)
    for face in (FRONT, BACK, LEFT, RIGHT):
        image.square(face).box(0.62, 0.1, 0.92, 0.35, (240, 235, 225))
        image.square(face).lines(0.65, 0.14, 0.9, 0.32, 4, DARK, face)
    image.square(TOP).box(0, 0.49, 1, 0.51, (120, 85, 50))
    return image


def draw_cereal():
    image = Picture((235, 150, 20), 6)
    for face in (FRONT, BACK):
        side = image.square(face)
        side.box(0, 0.72, 1, 1, (200, 35, 30)).box(0.1, 0.8, 0.9, 0.92, PALE)
        side.disc(0.5, 0.3, 0.4, (60, 110, 190), 0.24).disc(0.5, 0.4, 0.38, PALE, 0.13)
        for i, x in enumerate(np.linspace(0.22, 0.78, 6)):
            side.disc(x, 0.41 + 0.05 * (i % 2), 0.07, (200, 130, 40), 0.05)
    for face in (LEFT, RIGHT):
        image.square(face).lines(0.15, 0.15, 0.85, 0.65, 8, PALE, face)
    return image


def draw_milk():
    image = Picture((246, 247, 250), 6)
    for face in (FRONT, BACK, LEFT, RIGHT):
        side = image.square(face)
        side.box(0, 0, 1, 0.28, (50, 110, 205)).disc(0.5, 0.28, 0.7, (50, 110, 205), 0.1)
        side.box(0.15, 0.62, 0.85, 0.8, (40, 80, 180)).box(0.2, 0.67, 0.8, 0.75, PALE)
        side.disc(0.3, 0.48, 0.09, DARK).disc(0.6, 0.45, 0.13, DARK, 0.08)
    return image


def draw_label():
    image = Picture((240, 230, 200))
    image.box(0, 0, 1, 0.1, (160, 30, 30)).box(0, 0.9, 1, 1, (160, 30, 30))
    for x in (0.25, 0.75):
        image.disc(x, 0.5, 0.13, (200, 150, 40), 0.3).disc(x, 0.5, 0.08, (150, 30, 30), 0.2)
    return image


def draw_can():
    image = Picture((205, 25, 30))
    x, y = image.axes()
    wave = 0.5 + 0.18 * np.sin(4 * np.pi * x)
    image.pixels[np.abs(y - wave) < 0.1] = PALE
    return image.box(0, 0.9, 1, 1, (190, 190, 195)).box(0, 0, 1, 0.06, (190, 190, 195))


def draw_ball():
    image = Picture(PALE)
    colours = ((220, 40, 40), PALE, (40, 90, 210), PALE, (245, 205, 40), PALE)
    for i, colour in enumerate(colours):
        image.box(i / 6, 0, (i + 1) / 6, 1, colour)
    return image.box(0, 0, 1, 0.06, PALE).box(0, 0.94, 1, 1, PALE)


def draw_dice():
    image = Picture((250, 250, 246), 6)
    spots = {1: "5", 2: "37", 3: "357", 4: "1379", 5: "13579", 6: "134679"}
    for face, count in enumerate((1, 6, 2, 5, 3, 4)):
        for spot in spots[count]:
            row, column = divmod(int(spot) - 1, 3)
            colour = (200, 30, 30) if count == 1 else DARK
            image.square(face).disc(0.22 + 0.28 * column, 0.22 + 0.28 * row, 0.11, colour)
    return image


def draw_remote():
    image = Picture((45, 45, 50), 6)
    top = image.square(TOP)
    for i, x in enumerate(np.linspace(0.1, 0.9, 6)):
        for j, y in enumerate((0.28, 0.72)):
            colour = (230, 50, 40) if (i, j) == (0, 1) else (235, 235, 240)
            top.box(x - 0.045, y - 0.16, x + 0.045, y + 0.16, colour)
    return image


def draw_phone():
    image = Picture((25, 25, 30), 6)
    top = image.square(TOP)
    top.box(0.06, 0.07, 0.94, 0.93, (70, 150, 220))
    for i, x in enumerate(np.linspace(0.16, 0.72, 5)):
        for j, y in enumerate((0.2, 0.4, 0.6, 0.8)):
            colour = ((240, 90, 80), (250, 210, 80), (120, 210, 120), PALE)[(i + 2 * j) % 4]
            top.box(x - 0.035, y - 0.06, x + 0.035, y + 0.06, colour)
    return image


def draw_clock():
    image = Picture((250, 249, 244))
    for hour in np.radians(np.arange(0, 360, 30)):
        image.disc(0.5 + 0.4 * np.cos(hour), 0.5 + 0.4 * np.sin(hour), 0.04, DARK)
    x, y = image.axes()
    for angle, length in ((0.6, 0.25), (2.2, 0.36)):
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        across = (x - 0.5) * np.sin(angle) - (y - 0.5) * np.cos(angle)
        image.pixels[(np.abs(across) < 0.025) & (along > 0) & (along < length)] = DARK
    return image


def draw_sprinkles():
    rng, image = np.random.default_rng(0), Picture((255, 255, 255))
    for colour in ((255, 255, 90), (90, 220, 255), (255, 120, 120), (255, 255, 255)) * 14:
        x, y = rng.uniform(0, 1, 2)
        image.box(x, y, x + 0.04, y + 0.04, colour)
    return image


DRAWINGS = {
    "cardboard": draw_cardboard,
    "cereal": draw_cereal,
    "milk": draw_milk,
    "label": draw_label,
    "can": draw_can,
    "ball": draw_ball,
    "dice": draw_dice,
    "remote": draw_remote,
    "phone": draw_phone,
    "clock": draw_clock,
    "sprinkles": draw_sprinkles,
    "bread": lambda: Picture((245, 245, 245)).noise(9),
    "peel": lambda: Picture((250, 250, 250)).noise(5),
    "apple": lambda: Picture((250, 250, 250)).noise(12, 1).box(0, 0.85, 1, 1, (255, 235, 150)),
}


def texture(name):
    """Return the texture of an object: uint8 (SIZE, SIZE or 6 * SIZE, 3). The first row is the bottom."""
    return np.clip(DRAWINGS[name]().pixels, 0, 255).astype(np.uint8)
