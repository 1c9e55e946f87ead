"""Twelve scenes that are drawn, with captions, in the place of photographs.

Nobody has to license a picture that a program draws, and it is the same wherever it is drawn. The scenes show what a
network trained on photographs knows the parts of, with their light and grain, so that its vectors tell them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

SMOOTH = 3
"""Pixels drawn for the width of one that is kept, so that edges are smooth."""

SPLITS = ["train"] * 6 + ["dev"] * 2 + ["test"] * 4
"""Of the scenes, in their order."""


class Scene(NamedTuple):
    """What draws a picture, and what it shows."""

    draw: Callable[[], Image.Image]
    captions: tuple[str, ...]


class _Canvas:
    """A picture to draw on, in pixels of the one that :meth:`done` returns.

    Args:
        width: Of the picture.
        height: Likewise.
        stops: Heights from 0 to 1 and the colours of the background there.
        seed: Of all that is left to chance.
    """

    def __init__(self, width: int, height: int, stops: Sequence[tuple[float, Color]], seed: int):
        self.size = width, height
        self.rng = np.random.default_rng(seed)
        places, colors = zip(*stops, strict=True)
        at = np.linspace(0, 1, height * SMOOTH)
        column = np.stack([np.interp(at, places, channel) for channel in zip(*colors, strict=True)], 1)
        self.image = Image.fromarray(np.repeat(column[:, None], width * SMOOTH, 1).round().astype(np.uint8))

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def polygon(self, points: Points, color: Color) -> None:
        self.pen.polygon(_scaled(points), color)

    def ellipse(self, x: float, y: float, a: float, b: float, color: Color) -> None:
        """Around (x, y) with the half axes a and b."""
        self.pen.ellipse(_scaled([(x - a, y - b), (x + a, y + b)]), color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color, radius: float = 0) -> None:
        self.pen.rounded_rectangle(_scaled([(left, top), (right, bottom)]), radius * SMOOTH, color)

    def line(self, points: Points, color: Color, width: float = 1) -> None:
        self.pen.line(_scaled(points), color, max(1, round(width * SMOOTH)), "curve")

    def text(self, x: float, y: float, text: str, size: float, color: Color) -> None:
        self.pen.text((x * SMOOTH, y * SMOOTH), text, color, ImageFont.load_default(size * SMOOTH), "mm")

    def mask(self, points: Points, blur: float = 0) -> Image.Image:
        """White inside of a polygon."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(_scaled(points), 255)
        return mask.filter(ImageFilter.GaussianBlur(blur * SMOOTH)) if blur else mask

    def glaze(self, points: Points, color: Color, opacity: float, blur: float = 0) -> None:
        """Lay a colour over a polygon that may fade at its edge: shadows, light, mist."""
        mask = self.mask(points, blur).point(lambda value: value * opacity)
        self.image.paste(color, (0, 0), mask)

    def mottle(self, points: Points, cell: tuple[float, float], strength: float) -> None:
        """Make a polygon lighter and darker in spots of a size."""
        factors = 1 + strength * (2 * self.noise(cell) - 1)[..., None]
        pixels = (np.asarray(self.image) * factors).clip(0, 255).astype(np.uint8)
        self.image.paste(Image.fromarray(pixels), (0, 0), self.mask(points))

    def noise(self, cell: tuple[float, float]) -> np.ndarray:
        """Values from 0 to 1 for all pixels that change smoothly over a width and a height."""
        shape = [max(2, round(side / step)) for side, step in zip(self.size, cell, strict=True)]
        grid = Image.fromarray(self.rng.integers(0, 256, shape[::-1], np.uint8))
        return np.asarray(grid.resize(self.image.size, Image.Resampling.BICUBIC)) / 255

    def clouds(self, bottom: float, amount: float = 0.5) -> None:
        """White in the sky down to a height, less of it lower."""
        noise = sum(self.noise((80 / 2**i, 30 / 2**i)) / 2**i for i in range(4)) / 1.875
        fade = np.linspace(1, 1 - self.size[1] / bottom, self.image.height).clip(0, 1)[:, None]
        cover = ((noise - 1 + amount) * 4).clip(0, 0.9) * fade**0.5
        self.image.paste((250, 250, 252), (0, 0), Image.fromarray((255 * cover).astype(np.uint8)))

    def sphere(self, x: float, y: float, radius: float, color: Color, gloss: float, bumps: float = 0) -> None:
        """A ball in light from the upper left."""
        side = round(2 * radius * SMOOTH)
        across, down = np.meshgrid(*2 * [np.linspace(-1, 1, side)])
        height = np.sqrt((1 - across**2 - down**2).clip(0))
        light = -0.45 * across - 0.6 * down + 0.66 * height
        if bumps:
            light = light + bumps * (self.rng.random((side, side)) - 0.5)
        shine = gloss * np.exp(-((across + 0.36) ** 2 + (down + 0.42) ** 2) / 0.03)
        pixels = np.array(color) * (0.32 + 0.78 * light.clip(0, 1))[..., None] + 255 * shine[..., None]
        shaded = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if bumps:
            shaded = shaded.filter(ImageFilter.GaussianBlur(0.5 * SMOOTH))
        disc = Image.new("L", (side, side))
        ImageDraw.Draw(disc).ellipse((1, 1, side - 2, side - 2), 255)
        self.image.paste(shaded, (round((x - radius) * SMOOTH), round((y - radius) * SMOOTH)), disc)

    def grass(self, top: float, bottom: float, count: int, length: float, base: Color) -> None:
        """Blades between two heights, larger and brighter where they are nearer."""
        for y in np.sort(self.rng.uniform(top, bottom, count)):
            near = (y - top) / (bottom - top)
            x, lean, tall = self.rng.uniform(0, self.size[0]), self.rng.normal(), length * (0.3 + near)
            color = _lit(base, self.rng.uniform(0.6, 1.25) * (0.8 + 0.3 * near))
            self.line([(x, y), (x + lean * 0.15 * tall, y - tall)], color, 0.5 + near)

    def leaves(self, x: float, y: float, radius: float, color: Color, count: int = 300) -> None:
        """A crown of a tree: spots that are lighter at the upper left."""
        for _ in range(count):
            angle, out = self.rng.uniform(0, 2 * np.pi), radius * np.sqrt(self.rng.random())
            dx, dy = out * np.cos(angle), out * np.sin(angle)
            light = 0.85 - 0.3 * (dx + dy) / radius + self.rng.normal(0, 0.12)
            size = radius * self.rng.uniform(0.06, 0.16)
            self.ellipse(x + dx, y + dy, size, size * 0.8, _lit(color, light))

    def soften(self, top: float, bottom: float, blur: float) -> None:
        """Put a strip of the picture out of focus."""
        part = (0, round(top * SMOOTH), self.image.width, round(bottom * SMOOTH))
        self.image.paste(self.image.crop(part).filter(ImageFilter.GaussianBlur(blur * SMOOTH)), part[:2])

    def done(self, grain: float = 4) -> Image.Image:
        """The picture in its own size, with the grain of a photograph."""
        pixels = np.asarray(self.image.resize(self.size, Image.Resampling.LANCZOS), float)
        pixels += self.rng.normal(0, grain, (*pixels.shape[:2], 1))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _scaled(points: Points) -> list[tuple[float, float]]:
    return [(x * SMOOTH, y * SMOOTH) for x, y in points]


def _lit(color: Color, factor: float) -> Color:
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in color)
    return red, green, blue


def _area(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _round(x: float, y: float, a: float, b: float, start: float = 0, end: float = 360) -> Points:
    """Points of an ellipse between two angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 60))
    return list(zip(x + a * np.cos(angles), y + b * np.sin(angles), strict=True))


def _curve(points: Points, closed: bool = True) -> Points:
    """A smooth line through points (Catmull-Rom)."""
    p = np.array(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, 10, endpoint=False)[:, None]
    parts = [
        b + t * (c - a) / 2 + t**2 * (2 * a - 5 * b + 4 * c - d) / 2 + t**3 * (3 * b - a - 3 * c + d) / 2
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return [tuple(point) for point in np.concatenate([*parts, p[-2:-1]])]


def _ball() -> Image.Image:
    c = _Canvas(256, 192, [(0, (150, 195, 235)), (0.3, (205, 225, 235)), (0.35, (90, 130, 60)), (1, (60, 115, 35))], 1)
    for x in np.arange(-10, 270, 22):
        c.leaves(x, 48 + 8 * c.rng.random(), 24, (70, 105, 60), 120)
    c.soften(0, 75, 3)
    c.grass(66, 190, 5000, 12, (95, 160, 55))
    c.glaze(_round(140, 156, 58, 11), (15, 35, 10), 0.75, 4)
    c.sphere(128, 104, 54, (225, 25, 25), 0.75)
    c.glaze(_round(128, 146, 34, 10), (120, 60, 20), 0.35, 5)
    c.grass(158, 240, 1500, 16, (100, 170, 60))
    return c.done()


def _boat() -> Image.Image:
    sky = [(0, (70, 135, 210)), (0.56, (190, 220, 240)), (0.565, (45, 105, 150)), (1, (15, 65, 110))]
    c = _Canvas(192, 256, sky, 2)
    c.clouds(150, 0.55)
    c.polygon(_curve([(0, 144), (0, 138), (40, 132), (80, 139), (110, 144)]), (105, 130, 150))
    c.mottle(_area(0, 145, 192, 256), (14, 2), 0.22)
    c.mottle(_area(0, 145, 192, 200), (7, 1), 0.15)
    c.mottle(_area(0, 190, 192, 256), (26, 5), 0.25)
    c.glaze([(48, 196), (146, 196), (120, 250), (82, 250)], (225, 235, 240), 0.3, 6)
    c.polygon(_curve([(96, 22), (128, 90), (150, 166), (126, 170), (100, 168), (98, 90)]), (245, 243, 235))
    c.polygon(_curve([(91, 36), (70, 104), (38, 168), (62, 171), (88, 166), (92, 90)]), (232, 232, 228))
    c.glaze([(97, 30), (112, 80), (116, 168), (98, 168)], (150, 160, 175), 0.4, 4)
    c.glaze([(90, 50), (84, 110), (76, 168), (90, 166)], (140, 150, 170), 0.4, 4)
    for y in (70, 100, 130):
        c.line([(97, y), (118 + (y - 70) * 0.33, y + 4)], (205, 205, 200), 0.6)
    c.line([(94, 14), (94, 182)], (95, 70, 50), 2.5)
    c.line([(94, 171), (154, 174)], (95, 70, 50), 2.2)
    c.line([(94, 16), (28, 184)], (70, 70, 75), 0.5)
    c.polygon([(94, 12), (110, 16), (94, 21)], (210, 40, 40))
    c.polygon(_curve([(26, 180), (94, 186), (164, 178), (150, 204), (120, 210), (56, 208)]), (150, 30, 35))
    c.polygon(_curve([(26, 180), (94, 186), (164, 178), (162, 184), (94, 192), (29, 186)]), (245, 245, 240))
    c.polygon([(106, 184), (110, 176), (136, 175), (142, 181)], (225, 220, 205))
    c.glaze(_curve([(48, 202), (94, 204), (150, 200), (130, 214), (56, 214)]), (10, 30, 60), 0.5, 3)
    for _ in range(120):
        x, y = c.rng.uniform(30, 165), c.rng.normal(209, 2.5)
        c.line([(x, y), (x + c.rng.uniform(2, 9), y)], (225, 238, 245), 0.7)
    return c.done()


def _house() -> Image.Image:
    c = _Canvas(256, 208, [(0, (95, 160, 225)), (0.66, (205, 228, 240)), (0.68, (95, 140, 60)), (1, (75, 130, 45))], 3)
    c.clouds(130, 0.5)
    for x in np.arange(0, 260, 26):
        c.leaves(x, 132, 16, (70, 105, 70), 90)
    c.soften(105, 150, 1.5)
    c.grass(146, 212, 3000, 7, (100, 160, 60))
    c.glaze([(40, 172), (172, 172), (200, 186), (60, 186)], (20, 40, 10), 0.5, 4)
    c.box(128, 34, 144, 78, (150, 80, 62))
    c.box(125, 30, 147, 36, (120, 62, 50))
    c.box(42, 92, 162, 174, (238, 222, 190))
    c.mottle(_area(42, 92, 162, 174), (30, 1.5), 0.07)
    for y in range(97, 174, 6):
        c.line([(42, y), (162, y)], (212, 196, 164), 0.6)
    c.polygon([(28, 98), (102, 36), (176, 98)], (168, 62, 48))
    c.mottle([(28, 98), (102, 36), (176, 98)], (4, 4), 0.2)
    for y in range(46, 98, 6):
        half = (y - 36) * 74 / 62
        c.line([(102 - half, y), (102 + half, y)], (120, 42, 34), 0.8)
    c.glaze(_area(42, 98, 162, 106), (60, 40, 30), 0.5, 2)
    c.box(90, 122, 114, 174, (95, 58, 38))
    c.box(92, 125, 112, 172, (128, 80, 50))
    c.ellipse(109, 150, 1.6, 1.6, (230, 200, 90))
    for x in (54, 126):
        c.box(x - 2, 116, x + 26, 150, (250, 250, 248))
        c.box(x, 118, x + 24, 148, (85, 120, 150))
        c.glaze([(x, 118), (x + 16, 118), (x, 140)], (220, 235, 245), 0.6)
        c.line([(x + 12, 118), (x + 12, 148)], (250, 250, 248), 1.5)
        c.line([(x, 133), (x + 24, 133)], (250, 250, 248), 1.5)
        c.box(x - 3, 150, x + 27, 153, (240, 240, 235))
        c.leaves(x + 12, 170, 10, (80, 130, 60), 90)
    c.ellipse(102, 80, 8, 8, (250, 250, 248))
    c.ellipse(102, 80, 6, 6, (80, 112, 140))
    c.polygon([(92, 174), (112, 174), (140, 208), (80, 208)], (190, 178, 160))
    c.mottle([(92, 174), (112, 174), (140, 208), (80, 208)], (5, 3), 0.15)
    c.glaze(_round(218, 182, 36, 7), (20, 40, 10), 0.5, 3)
    c.polygon([(208, 182), (213, 110), (222, 110), (228, 182)], (98, 70, 48))
    c.mottle([(208, 182), (213, 110), (222, 110), (228, 182)], (2, 12), 0.3)
    for x, y, radius in ((200, 88, 28), (236, 92, 26), (218, 62, 32), (218, 94, 28)):
        c.leaves(x, y, radius, (75, 135, 50), 420)
    return c.done()


def _clock() -> Image.Image:
    c = _Canvas(224, 224, [(0, (196, 178, 150)), (1, (172, 152, 124))], 4)
    for x in range(0, 224, 28):
        c.glaze(_area(x, 0, x + 14, 224), (150, 125, 95), 0.25)
    c.mottle(_area(0, 0, 224, 224), (90, 90), 0.12)
    c.glaze(_round(120, 124, 94, 94), (50, 35, 20), 0.6, 6)
    c.ellipse(112, 112, 96, 96, (70, 42, 26))
    for step in range(12):
        c.ellipse(
            112 - step * 0.3, 112 - step * 0.3, 95 - step * 0.9, 95 - step * 0.9, (92 + 5 * step, 55 + 4 * step, 30)
        )
    c.ellipse(112, 112, 81, 81, (48, 32, 22))
    c.ellipse(112, 112, 79, 79, (246, 242, 230))
    c.glaze(_round(112, 112, 79, 79, 180, 300), (190, 180, 160), 0.35, 6)
    for minute in range(60):
        angle = np.radians(6 * minute)
        out, inner = 76, 69 if minute % 5 == 0 else 73
        ends = [(112 + r * np.sin(angle), 112 - r * np.cos(angle)) for r in (inner, out)]
        c.line(ends, (25, 25, 25), 2.4 if minute % 5 == 0 else 0.9)
    for hour in range(1, 13):
        angle = np.radians(30 * hour)
        c.text(112 + 58 * np.sin(angle), 112 - 58 * np.cos(angle), str(hour), 17, (25, 25, 25))
    for degrees, length, width in ((304, 40, 5), (60, 62, 3.4)):
        angle = np.radians(degrees)
        dx, dy = np.sin(angle), -np.cos(angle)
        ends = [(112 - 10 * dx, 112 - 10 * dy), (112 + length * dx, 112 + length * dy)]
        c.line(ends, (20, 20, 22), width)
    c.line([(112, 126), (112, 48)], (185, 30, 30), 1.2)
    c.ellipse(112, 112, 5, 5, (30, 30, 32))
    c.ellipse(111, 111, 2, 2, (190, 190, 190))
    c.glaze([(52, 70), (88, 40), (110, 40), (48, 104)], (255, 255, 255), 0.3, 5)
    return c.done()


def _zebra() -> Image.Image:
    c = _Canvas(
        256, 192, [(0, (150, 190, 225)), (0.36, (215, 222, 215)), (0.38, (190, 170, 105)), (1, (165, 140, 70))], 5
    )
    for x, size in ((20, 16), (52, 10), (228, 18), (205, 11)):
        c.line([(x, 74), (x, 60)], (90, 75, 55), 2)
        c.leaves(x, 54, size, (95, 110, 65), 120)
    c.soften(0, 80, 1.5)
    c.grass(72, 176, 3500, 9, (195, 170, 95))
    c.glaze(_round(136, 172, 76, 8), (70, 55, 20), 0.6, 4)
    black, white = (28, 25, 24), (238, 232, 220)

    def part(outline: Points, stripes: Sequence[Points], light: Color = white) -> None:
        mask = c.mask(outline)
        layer = Image.new("RGB", c.image.size, light)
        for stripe in stripes:
            ImageDraw.Draw(layer).polygon(_scaled(stripe), black)
        c.image.paste(layer, (0, 0), mask)

    def band(ends: Points, wide: float, narrow: float) -> Points:
        """A stripe along a line, thicker at its first end."""
        line = np.array(_curve(ends, closed=False))
        along = np.gradient(line, axis=0)
        side = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
        half = np.linspace(wide, narrow, len(line))[:, None] / 2
        return [tuple(point) for point in np.concatenate([line + half * side, (line - half * side)[::-1]])]

    def leg(points: Points, far: bool) -> None:
        (x0, y0), (x1, y1), (x2, y2) = points
        outline = _curve(
            [(x0 - 10, y0), (x0 + 10, y0), (x1 + 4.5, y1), (x2 + 3, y2 - 4), (x2 + 4, y2), (x2 - 5, y2)]
            + [(x2 - 3, y2 - 4), (x1 - 4.5, y1)]
        )
        heights = np.arange(y0 + 4, y2 - 8, 6.5)
        part(
            outline,
            [band([(x0 - 22, y - 3), (x1, y + 1), (x0 + 22, y - 3)], 3, 3) for y in heights],
            _lit(white, 0.72) if far else white,
        )
        c.polygon([(x2 - 5, y2), (x2 - 3.5, y2 - 5), (x2 + 3.5, y2 - 5), (x2 + 4.5, y2)], black)

    leg([(114, 108), (118, 138), (116, 170)], far=True)
    leg([(176, 104), (182, 138), (176, 169)], far=True)
    tail = [(197, 78), (208, 92), (210, 112), (207, 124)]
    part(band(tail, 5, 4), [band([(200, y), (214, y)], 2.5, 2.5) for y in range(82, 120, 6)])
    c.polygon(_curve([(205, 118), (213, 118), (213, 134), (208, 146), (204, 134)]), black)
    leg([(100, 108), (98, 138), (100, 175)], far=False)
    leg([(188, 100), (196, 136), (190, 174)], far=False)
    body = _curve(
        [(88, 66), (110, 67), (140, 70), (172, 62), (192, 68), (202, 86), (198, 108), (180, 120), (150, 127)]
        + [(118, 124), (96, 118), (84, 100)]
    )
    stripes = [
        band([(x, 60), (x - 2 + (x - 90) * 0.05, 92), (x + (x - 100) * 0.12, 124)], 6.5, 2.5)
        for x in range(90, 160, 10)
    ]
    for y in range(58, 128, 10):  # over the haunch they lie
        stripes.append(band([(160, y), (184, y + 3), (208, y + 17)], 5.5, 4))
    part(body, stripes)
    neck = _curve([(62, 30), (76, 32), (90, 48), (108, 68), (104, 96), (88, 104), (78, 88), (68, 66), (56, 50)])
    rungs = [(60 + 5.2 * i, 62 + 6.5 * i, 82 + 5 * i, 30 + 8 * i) for i in range(-2, 6)]
    part(neck, [band([(x1, y1), ((x0 + x1) / 2 + 2, (y0 + y1) / 2), (x0, y0)], 6, 4) for x0, y0, x1, y1 in rungs])
    mane = _curve([(64, 24), (72, 22), (86, 34), (100, 52), (108, 66), (98, 58), (86, 44), (74, 32)])
    part(mane, [band([(x, y - 12), (x - 8, y + 10)], 4.5, 4.5) for x, y in ((76, 30), (85, 38), (93, 47), (101, 57))])
    c.line(mane[12:45], black, 1.2)
    head = _curve([(70, 28), (58, 30), (44, 46), (30, 66), (27, 76), (33, 82), (44, 77), (56, 68), (70, 62), (76, 46)])
    faces = [
        band([(40 + 5 * i, 48 - 4.5 * i), (47 + 5.5 * i, 60 - 3 * i), (44 + 6 * i, 78 - 2 * i)], 3, 2)
        for i in range(6)
    ]
    part(head, faces)
    c.polygon(_curve([(33, 63), (27, 74), (32, 83), (41, 79), (42, 70)]), (45, 38, 36))
    c.ellipse(31.5, 73, 1.6, 2, (15, 12, 12))
    c.ellipse(55, 47, 3.2, 2.8, (15, 12, 12))
    c.ellipse(54.2, 46, 0.9, 0.9, (240, 240, 240))
    c.polygon(_curve([(64, 32), (62, 16), (68, 10), (74, 20), (73, 32)]), black)
    c.polygon(_curve([(66, 31), (65, 18), (68, 14), (71, 21), (71, 31)]), (210, 200, 190))
    c.glaze(_curve([(88, 112), (140, 120), (200, 104), (180, 126), (120, 130)]), (60, 45, 20), 0.45, 5)
    c.glaze(_curve([(90, 60), (140, 64), (196, 66), (180, 74), (110, 76)]), (255, 250, 235), 0.25, 4)
    c.grass(176, 205, 700, 12, (200, 172, 95))
    return c.done()


def _traffic_light() -> Image.Image:
    c = _Canvas(160, 256, [(0, (120, 170, 220)), (0.8, (215, 225, 230)), (1, (150, 150, 150))], 6)
    c.clouds(200, 0.45)
    for left, top, right, color in ((-4, 120, 46, (165, 140, 120)), (110, 90, 170, (150, 155, 165))):
        c.box(left, top, right, 256, color)
        for y in range(top + 8, 250, 16):
            for x in range(left + 6, right - 6, 12):
                c.box(x, y, x + 7, y + 10, (80, 95, 115))
    c.leaves(30, 216, 34, (70, 110, 60), 400)
    c.soften(0, 256, 2)
    c.box(75, 170, 85, 256, (85, 90, 92))
    c.glaze(_area(81, 170, 85, 256), (30, 30, 30), 0.5, 1)
    c.box(42, 14, 118, 194, (25, 27, 28), 10)
    c.box(46, 18, 114, 190, (48, 52, 50), 8)
    lamps = ((46, (245, 40, 30), True), (104, (150, 105, 20), False), (162, (20, 95, 60), False))
    for y, color, lit in lamps:
        c.ellipse(80, y, 26, 26, (20, 22, 22))
        c.ellipse(80, y, 23, 23, _lit(color, 0.9 if lit else 0.45))
        c.glaze(_round(80, y, 15, 15), _lit(color, 1.3 if lit else 0.8), 0.9, 5)
        if lit:
            c.glaze(_round(80, y, 9, 9), (255, 190, 160), 0.9, 5)
        c.polygon([*_round(80, y, 29, 29, 180, 360), *_round(80, y + 7, 28, 24, 360, 180)], (14, 15, 15))
    c.glaze(_round(80, 50, 40, 36), (255, 60, 40), 0.25, 10)
    return c.done()


def _pizza() -> Image.Image:
    c = _Canvas(256, 224, [(0, (120, 82, 52)), (1, (145, 100, 62))], 7)
    c.mottle(_area(0, 0, 256, 224), (120, 3), 0.25)
    for y in (54, 112, 170):
        c.line([(0, y), (256, y)], (80, 52, 32), 1.2)
    c.glaze(_round(134, 120, 100, 98), (30, 15, 5), 0.7, 5)
    crust = c.rng.normal(0, 1, 60).cumsum()
    crust = 97 + 0.6 * (crust - np.linspace(crust[0], crust[-1], 60))
    edge = [
        (128 + r * np.cos(a), 112 + r * np.sin(a)) for r, a in zip(crust, np.linspace(0, 2 * np.pi, 60), strict=True)
    ]
    c.polygon(edge, (196, 138, 72))
    c.mottle(edge, (9, 9), 0.3)
    c.glaze(_round(126, 110, 90, 90), (228, 176, 104), 0.6, 3)
    c.ellipse(128, 112, 84, 84, (188, 62, 28))
    c.mottle(_round(128, 112, 84, 84), (6, 6), 0.3)
    for _ in range(260):
        angle, out = c.rng.uniform(0, 2 * np.pi), 79 * np.sqrt(c.rng.random())
        x, y = 128 + out * np.cos(angle), 112 + out * np.sin(angle)
        shade = c.rng.uniform(0.9, 1.05)
        c.ellipse(x, y, c.rng.uniform(4, 11), c.rng.uniform(4, 9), _lit((245, 208, 118), shade))
    c.mottle(_round(128, 112, 82, 82), (5, 5), 0.16)
    c.mottle(_round(128, 112, 82, 82), (20, 20), 0.12)
    places = [(128, 108), (92, 70), (142, 56), (180, 84), (186, 130), (150, 166), (100, 160), (70, 120), (100, 112)]
    for x, y in [*places, (150, 96), (156, 132), (118, 80)]:
        c.glaze(_round(x + 1.5, y + 2, 14, 13.5), (90, 30, 10), 0.6, 1)
        c.ellipse(x, y, 13.5, 13, (140, 32, 22))
        c.ellipse(x, y, 12, 11.5, (188, 52, 36))
        for _ in range(14):
            dx, dy = c.rng.normal(0, 4.5, 2).clip(-8, 8)
            c.ellipse(x + dx, y + dy, 1.3, 1.1, (215, 105, 80))
        c.glaze(_round(x - 4, y - 4, 4, 3), (255, 200, 170), 0.5, 1.5)
    for x, y in ((112, 138), (166, 108), (110, 52), (60, 96), (132, 182), (172, 156), (82, 92), (140, 76)):
        c.ellipse(x, y, 6, 5.5, (35, 32, 38))
        c.ellipse(x, y, 2.6, 2.3, (232, 190, 110))
    for x, y, turn in ((120, 122, 0.4), (164, 70, 2.2), (84, 142, 1.2)):
        tip = (x + 15 * np.cos(turn), y + 15 * np.sin(turn))
        side = (6 * np.sin(turn), -6 * np.cos(turn))
        middle = ((x + tip[0]) / 2, (y + tip[1]) / 2)
        sides = [(middle[0] + s * side[0], middle[1] + s * side[1]) for s in (1, -1)]
        c.polygon(_curve([(x, y), sides[0], tip, sides[1]]), (50, 115, 45))
        c.line([(x, y), tip], (110, 165, 90), 0.8)
    for angle in np.radians([20, 80, 140]):
        dx, dy = 95 * np.cos(angle), 95 * np.sin(angle)
        c.line([(128 - dx, 112 - dy), (128 + dx, 112 + dy)], (125, 52, 24), 1.1)
    return c.done()


def _umbrella() -> Image.Image:
    c = _Canvas(208, 240, [(0, (125, 135, 148)), (0.7, (178, 184, 190)), (0.72, (92, 96, 102)), (1, (70, 74, 80))], 8)
    for x, top in ((0, 96), (34, 120), (150, 110), (182, 80)):
        c.box(x, top, x + 30, 172, (112, 120, 132))
        for y in range(top + 8, 164, 14):
            c.box(x + 6, y, x + 12, y + 7, (196, 186, 140))
            c.box(x + 18, y, x + 24, y + 7, (96, 104, 116))
    c.soften(0, 180, 2.5)
    c.mottle(_area(0, 174, 208, 240), (30, 3), 0.3)
    c.glaze(_round(108, 222, 74, 10), (30, 32, 40), 0.6, 5)
    c.line([(104, 30), (104, 190)], (60, 56, 54), 3)
    c.line([(103.3, 60), (103.3, 180)], (150, 146, 140), 0.8)
    c.line([(104, 178), (104, 200), *_round(91, 200, 13, 15, 0, 180), (78, 196)], (122, 72, 38), 6)
    ribs = [14, 40, 80, 128, 168, 194]
    dome = _round(104, 112, 90, 82, 180, 360)
    tints = [(150, 20, 28), (196, 28, 36), (222, 40, 46), (204, 32, 40), (158, 22, 30)]
    rim: list[tuple[float, float]] = []
    for left, right, tint in zip(ribs, ribs[1:], tints, strict=False):
        top, bottom = (104, 30), 112
        scallop = _round((left + right) / 2, bottom, (right - left) / 2, 9, 180, 360)
        rim += scallop
        outer = [
            _curve([top, (104 + (x - 104) * 0.62, 48), (104 + (x - 104) * 0.92, 78), (x, bottom)], closed=False)
            for x in (left, right)
        ]
        c.polygon([*outer[0], *scallop, *outer[1][::-1]], tint)
        c.line(outer[0], (110, 12, 20), 0.9)
    c.glaze([(60, 100), (70, 60), (100, 36), (96, 70), (88, 100)], (255, 150, 140), 0.35, 7)
    c.glaze([*dome[45:], (150, 104)], (60, 0, 10), 0.35, 6)
    c.glaze([*rim, *[(x, y + 6) for x, y in rim[::-1]]], (60, 8, 14), 0.7)
    c.line([(104, 20), (104, 32)], (50, 46, 44), 2.4)
    for x in ribs:
        c.ellipse(x, 113, 1.6, 1.6, (220, 220, 220))
    for _ in range(240):
        x, y = c.rng.uniform(0, 208), c.rng.uniform(-10, 235)
        tall = c.rng.uniform(6, 14)
        c.glaze([(x, y), (x + 0.7, y), (x - 1.3, y + tall), (x - 2, y + tall)], (225, 232, 240), 0.55)
    return c.done()


def _orange() -> Image.Image:
    c = _Canvas(
        256, 176, [(0, (205, 205, 200)), (0.5, (225, 222, 214)), (0.53, (150, 108, 72)), (1, (176, 130, 88))], 9
    )
    c.soften(70, 110, 3)
    c.mottle(_area(0, 95, 256, 176), (70, 2.5), 0.18)
    c.glaze(_round(106, 146, 70, 12), (50, 25, 8), 0.7, 5)
    c.sphere(92, 86, 62, (255, 140, 20), 0.45, bumps=0.5)
    c.glaze(_round(92, 140, 40, 10), (200, 90, 20), 0.4, 6)
    c.ellipse(96, 32, 4, 2.6, (90, 110, 50))
    leaf = _curve([(97, 31), (112, 14), (138, 10), (156, 18), (138, 30), (116, 34)])
    c.polygon(leaf, (55, 120, 45))
    c.glaze(leaf[:30], (120, 180, 90), 0.5, 3)
    c.line(_curve([(97, 31), (122, 22), (154, 18)], closed=False), (150, 195, 110), 1)
    c.glaze(_round(196, 158, 50, 8), (50, 25, 8), 0.7, 4)
    c.ellipse(198, 118, 45, 46, (226, 112, 14))
    c.ellipse(195, 117, 42, 44, (250, 150, 40))
    c.ellipse(194, 117, 39, 41, (253, 232, 196))
    for number in range(10):
        start = 36 * number + 4
        wedge = [(194, 117), *_round(194, 117, 36, 38, start, start + 28)]
        middle = np.radians(start + 14)
        wedge = [(x + 3.5 * np.cos(middle), y + 3.5 * np.sin(middle)) for x, y in wedge]
        wedge = [(194 + 0.93 * (x - 194), 117 + 0.93 * (y - 117)) for x, y in wedge]
        c.polygon(wedge, (252, 150, 28))
        c.mottle(wedge, (3, 3), 0.16)
        c.glaze([(194 + 0.8 * (x - 194), 117 + 0.8 * (y - 117)) for x, y in wedge[10:50]], (255, 196, 90), 0.45, 2)
    c.ellipse(194, 117, 3.5, 3.5, (255, 240, 212))
    return c.done()


def _bird() -> Image.Image:
    c = _Canvas(240, 200, [(0, (120, 178, 232)), (1, (214, 230, 240))], 10)
    c.clouds(240, 0.45)
    for x, y, radius in ((0, 196, 40), (40, 206, 34), (214, 204, 44), (250, 180, 40)):
        c.leaves(x, y, radius, (95, 140, 80), 250)
    c.soften(0, 200, 4)
    c.line(_curve([(-5, 50), (120, 60), (245, 52)], closed=False), (70, 74, 80), 1.4)
    tail = [(146, 128), (158, 124), (190, 176), (184, 182), (176, 180)]
    c.polygon(tail, (58, 78, 112))
    c.line([(152, 128), (182, 179)], (38, 52, 80), 1.2)
    c.line(_curve([(-5, 148), (120, 158), (245, 150)], closed=False), (40, 42, 46), 2.6)
    body = _curve(
        [(94, 50), (82, 56), (77, 68), (78, 82), (74, 100), (80, 124), (96, 142), (120, 148), (142, 142), (156, 126)]
        + [(150, 104), (132, 84), (120, 68), (110, 54)]
    )
    c.polygon(body, (84, 116, 168))
    chest = _curve(
        [(79, 76), (73, 100), (80, 126), (98, 143), (120, 147), (126, 136), (112, 116), (104, 92), (92, 78)]
    )
    mask = c.mask(body)
    breast = Image.new("RGB", c.image.size, (216, 112, 54))
    c.image.paste(breast, (0, 0), Image.composite(c.mask(chest, 2), Image.new("L", mask.size), mask))
    c.glaze(_curve([(96, 136), (116, 130), (144, 138), (122, 148)]), (245, 238, 228), 0.9, 3)
    c.mottle(body, (3, 5), 0.14)
    wing = _curve(
        [(112, 84), (104, 100), (110, 120), (128, 134), (150, 144), (172, 152), (158, 128), (146, 104), (130, 86)]
    )
    c.polygon(wing, (62, 92, 146))
    for step in range(5):
        start, end = (118 + 5 * step, 96 + 4 * step), (134 + 8 * step, 134 + 4 * step)
        c.line(_curve([start, (start[0] + 2, start[1] + 18), end], closed=False), (34, 50, 88), 1.4)
    c.glaze(_curve([(114, 88), (112, 100), (124, 112), (136, 104), (130, 90)]), (130, 164, 214), 0.6, 3)
    c.glaze(_curve([(86, 54), (96, 51), (108, 58), (104, 64), (90, 62)]), (150, 184, 228), 0.6, 3)
    c.polygon([(80, 62), (60, 69), (79, 73)], (52, 46, 44))
    c.line([(62, 69), (80, 68)], (120, 112, 104), 0.7)
    c.ellipse(90, 66, 4, 4, (16, 14, 14))
    c.ellipse(88.8, 64.6, 1.3, 1.3, (250, 250, 250))
    for x in (112, 124):
        c.line([(x + 2, 146), (x, 156)], (70, 56, 48), 2.2)
        for dx in (-5, 0, 5):
            c.line(_curve([(x, 154), (x + dx, 156), (x + dx, 161)], closed=False), (70, 56, 48), 1.8)
    return c.done()


def _bus() -> Image.Image:
    c = _Canvas(
        256, 176, [(0, (120, 175, 230)), (0.55, (214, 228, 236)), (0.62, (128, 150, 92)), (1, (110, 110, 112))], 11
    )
    c.clouds(110, 0.45)
    for x in np.arange(-6, 270, 24):
        c.leaves(x, 84 + 10 * c.rng.random(), 22, (72, 112, 64), 160)
    c.soften(0, 118, 2)
    c.polygon(_area(0, 118, 256, 176), (92, 93, 96))
    c.mottle(_area(0, 118, 256, 176), (4, 1.5), 0.14)
    c.polygon(_area(0, 116, 256, 120), (172, 170, 164))
    for x in range(-10, 256, 52):
        c.polygon([(x, 163), (x + 30, 163), (x + 28, 167), (x - 3, 167)], (232, 228, 214))
    c.glaze(_round(126, 145, 118, 8), (15, 15, 18), 0.75, 3)
    yellow = (246, 178, 16)
    c.box(14, 34, 206, 138, yellow, 9)
    c.polygon(_curve([(200, 88), (226, 90), (238, 100), (240, 120), (240, 138), (200, 138)]), yellow)
    c.polygon([(196, 86), (228, 90), (238, 100), (240, 138), (196, 138)], yellow)
    c.glaze(_area(16, 34, 204, 44), (255, 232, 150), 0.7, 3)
    c.glaze(_area(14, 122, 240, 138), (150, 90, 0), 0.45, 4)
    for y in (90, 104, 124):
        c.line([(15, y), (205, y)], (38, 34, 26), 2)
    c.line([(206, 118), (240, 118)], (38, 34, 26), 1.6)
    for x in range(24, 170, 25):
        c.box(x, 52, x + 20, 82, (36, 40, 46), 3)
        c.box(x + 1.5, 53.5, x + 18.5, 80.5, (84, 110, 130), 2)
        c.glaze([(x + 2, 54), (x + 12, 54), (x + 2, 74)], (212, 230, 240), 0.6)
        c.line([(x + 1, 66), (x + 19, 66)], (36, 40, 46), 1.4)
    c.box(176, 52, 204, 136, (38, 34, 26), 2)
    c.box(178, 54, 189, 134, (92, 118, 138), 1)
    c.box(191, 54, 202, 134, (92, 118, 138), 1)
    c.glaze([(178, 54), (189, 54), (178, 90)], (220, 235, 245), 0.5)
    c.polygon([(205, 52), (208, 52), (216, 86), (205, 86)], (70, 92, 112))
    c.text(98, 97, "SCHOOL BUS", 12, (30, 28, 24))
    c.ellipse(232, 112, 4, 5, (250, 248, 230))
    c.box(234, 128, 246, 135, (40, 40, 42), 2)
    c.box(8, 128, 16, 135, (40, 40, 42), 2)
    c.box(15, 110, 19, 118, (200, 30, 24))
    c.line([(222, 92), (228, 76)], (30, 30, 32), 1.6)
    c.box(224, 66, 232, 80, (36, 38, 42), 2)
    for x in (60, 218):
        c.ellipse(x, 138, 19, 19, (30, 26, 20))
        c.ellipse(x, 139, 16, 16, (24, 24, 26))
        c.ellipse(x, 139, 9, 9, (170, 172, 174))
        c.ellipse(x, 139, 5, 5, (90, 92, 96))
        for angle in np.radians(range(0, 360, 60)):
            c.ellipse(x + 7 * np.cos(angle), 139 + 7 * np.sin(angle), 0.9, 0.9, (70, 70, 74))
    return c.done()


def _mountain() -> Image.Image:
    c = _Canvas(
        256, 160, [(0, (60, 120, 200)), (0.6, (190, 214, 234)), (0.75, (90, 130, 160)), (1, (40, 80, 105))], 12
    )
    c.clouds(80, 0.42)

    def ridge(points: Points, rough: float) -> Points:
        line = np.array(points, float)
        for step in range(6):
            middle = (line[1:] + line[:-1]) / 2
            middle[:, 1] += c.rng.normal(0, rough / 1.8**step, len(middle))
            line = np.insert(line, range(1, len(line)), middle, 0)
        return [tuple(point) for point in line]

    c.polygon(
        [(0, 120), *ridge([(0, 74), (40, 58), (90, 84), (170, 80), (210, 54), (256, 70)], 4), (256, 120)],
        (140, 162, 188),
    )
    top = ridge([(10, 118), (58, 76), (90, 50), (124, 14), (150, 42), (178, 60), (214, 92), (250, 118)], 4)
    c.polygon(top, (96, 98, 110))
    c.mottle(top, (5, 9), 0.35)
    shade = ridge([(124, 14), (130, 44), (122, 70), (134, 92), (128, 118)], 4)
    lit = [*(point for point in top if point[0] <= 124), *shade]
    heights = np.arange(c.image.height)[:, None] / SMOOTH
    snow = 255 * ((74 - heights) / 34 + 1.6 * (c.noise((6, 14)) - 0.5) > 0)
    snow = Image.composite(Image.fromarray(snow.astype(np.uint8)), Image.new("L", c.image.size), c.mask(top))
    c.image.paste((206, 218, 236), (0, 0), snow)
    bright = Image.composite(snow, Image.new("L", c.image.size), c.mask(lit))
    c.image.paste((252, 252, 253), (0, 0), bright)
    dark = [*(point for point in top if point[0] >= 124), *shade[::-1]]
    c.glaze(dark, (40, 56, 92), 0.25)
    c.polygon(
        [(0, 122), *ridge([(0, 104), (70, 112), (150, 110), (200, 106), (256, 98)], 3), (256, 122)], (52, 76, 62)
    )
    c.mottle(_area(0, 98, 256, 122), (3, 6), 0.3)
    mirrored = c.image.crop((0, 20 * SMOOTH, c.image.width, 120 * SMOOTH)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirrored = mirrored.resize((c.image.width, 40 * SMOOTH)).filter(ImageFilter.GaussianBlur(2 * SMOOTH))
    water = Image.new("RGB", mirrored.size, (50, 90, 120))
    c.image.paste(Image.blend(mirrored, water, 0.35), (0, 120 * SMOOTH))
    c.mottle(_area(0, 120, 256, 160), (24, 1.5), 0.12)
    for x, foot, tall in ((12, 160, 84), (34, 164, 62), (226, 162, 70), (246, 166, 96), (208, 164, 46)):
        for step in range(9):
            y, half = foot - tall + tall * step / 9, 2 + tall * 0.022 * (step + 1)
            drop = tall / 5
            tint = _lit((30, 58, 42), c.rng.uniform(0.8, 1.2))
            c.polygon([(x, y), (x + half, y + drop), (x, y + drop * 0.8), (x - half, y + drop)], tint)
    return c.done()


SCENES: dict[str, Scene] = {
    "ball.png": Scene(
        _ball,
        (
            "a red ball lies on the grass",
            "a shiny ball in a green meadow",
            "somebody left a ball on the lawn",
            "one big red ball and a lot of grass",
            "a round red toy outdoors on a sunny day",
        ),
    ),
    "boat.png": Scene(
        _boat,
        (
            "a sailing boat on the blue sea",
            "a small sailboat with two white sails",
            "a boat with a red hull sails past the coast",
            "white sails of a yacht under a cloudy sky",
            "a ship in the wind on calm water",
        ),
    ),
    "house.png": Scene(
        _house,
        (
            "a house with a red roof beside a tree",
            "a small cottage in a green garden",
            "a path leads to a brown door of a house",
            "a home with two windows and a chimney",
            "a tall tree grows next to a country house",
        ),
    ),
    "clock.png": Scene(
        _clock,
        (
            "a round clock hangs on the wall",
            "a wall clock with a wooden frame",
            "the hands of a clock say ten minutes past ten",
            "a white clock face with black numbers",
            "an old clock with a thin red second hand",
        ),
    ),
    "zebra.png": Scene(
        _zebra,
        (
            "a zebra stands in dry grass",
            "a striped animal on a wide plain",
            "a black and white zebra seen from the side",
            "one zebra in a savanna under a pale sky",
            "a wild animal with stripes and a short mane",
        ),
    ),
    "traffic_light.png": Scene(
        _traffic_light,
        (
            "a traffic light shows red",
            "a red signal tells a driver to stop",
            "a stop light on a pole in the city",
            "three lamps of a traffic signal, only a red one is lit",
            "a street light for cars in front of buildings",
        ),
    ),
    "pizza.png": Scene(
        _pizza,
        (
            "a pizza with salami and olives",
            "a round pizza on a wooden table",
            "a whole pizza cut into six slices",
            "melted cheese and a little basil on a pizza",
            "a meal from an oven, seen from above",
        ),
    ),
    "umbrella.png": Scene(
        _umbrella,
        (
            "a red umbrella in the rain",
            "an open umbrella on a wet street",
            "a rainy day in a grey city",
            "a large umbrella with a wooden handle",
            "rain falls on a red umbrella",
        ),
    ),
    "orange.png": Scene(
        _orange,
        (
            "an orange and a half on a table",
            "a ripe orange with a green leaf",
            "a fruit cut in two beside a whole one",
            "a juicy slice of an orange",
            "a citrus fruit on a wooden board",
        ),
    ),
    "bird.png": Scene(
        _bird,
        (
            "a bird sits on a wire",
            "a small blue bird with an orange breast",
            "a songbird rests on a power line",
            "a bird with a long tail against a bright sky",
            "a little bird looks to the left from a cable",
        ),
    ),
    "bus.png": Scene(
        _bus,
        (
            "a yellow school bus on a road",
            "a bus drives past a row of trees",
            "a long yellow vehicle on a street",
            "a bus that takes children to a school",
            "an empty bus seen from the side",
        ),
    ),
    "mountain.png": Scene(
        _mountain,
        (
            "a mountain with snow on its peak",
            "a snowy mountain above a lake",
            "a high peak under a blue sky",
            "dark fir trees in front of a white mountain",
            "a cold lake in a valley of the alps",
        ),
    ),
}
"""Name of its file -> scene; the order tells the split."""


def write_scenes(folder: Path) -> Path:
    """All scenes as a data set of images with captions: six of train, two of dev, four of test.

    Args:
        folder: A new one; its name is the data set's.
    """
    (folder / "images").mkdir(parents=True)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for split, (name, scene) in zip(SPLITS, SCENES.items(), strict=True):
            scene.draw().save(folder / "images" / name)
            lines.write(json.dumps({"image": name, "split": split, "captions": scene.captions}) + "\n")
    return folder
