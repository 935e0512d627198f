"""Procedural scenes of the small world: one coloured object on a coloured background, 48 by 48 pixels.

Everything here is a pure function of its arguments, and an `Edit` is a pure function of one seed. Training draws
its seeds below `HELD_OUT`, every measurement above it, so that no measured scene was ever trained on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIZE = 48
OVERSAMPLING = 4
MARGIN = 2
HELD_OUT = 1_000_000_000

Color = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Color] = {
    "red": (216, 52, 52),
    "orange": (242, 142, 44),
    "yellow": (248, 212, 76),
    "green": (62, 160, 88),
    "blue": (48, 104, 208),
    "purple": (138, 72, 184),
    "white": (244, 244, 240),
    "black": (34, 36, 44),
}
SIDES = ("left", "right", "top", "bottom")


def _regular(corners: int, phase: float, inner: float = 1.0) -> tuple[Point, ...]:
    """Corners of a regular polygon in the unit circle; every second one is pulled in to `inner`."""
    radii = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    angles = [phase + 2 * math.pi * i / corners for i in range(corners)]
    return tuple((r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True))


def _heart() -> tuple[Point, ...]:
    """The classic curve x = 16 sin^3 a, y = 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a, scaled into the unit circle."""
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return tuple(
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.1,
        )
        for a in angles
    )


SHAPES: dict[str, tuple[Point, ...]] = {
    "circle": _regular(48, 0.0),
    "square": _regular(4, math.pi / 4, 1.0),
    "triangle": _regular(3, 0.0),
    "star": _regular(10, 0.0, 0.45),
    "diamond": ((0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)),
    "heart": _heart(),
}


@dataclass(frozen=True)
class Scene:
    """One object: names of shape and colours, centre and radius in pixels. `shape` None is an empty scene."""

    shape: str | None
    color: str
    background: str
    x: float
    y: float
    radius: float

    def caption(self) -> str:
        """What a text-to-image prompt says of the scene: everything but place and size."""
        return f"a {self.color} {self.shape} on a {self.background} background"


@dataclass(frozen=True)
class Edit:
    """What an editing model learns from: `target` is `reference` after `instruction`. `kind` groups measurements."""

    kind: str
    reference: Scene
    instruction: str
    target: Scene


def outline(scene: Scene) -> list[Point]:
    """Corners of the object in oversampled pixels."""
    scale = OVERSAMPLING
    corners = SHAPES[scene.shape] if scene.shape else ()
    return [((scene.x + scene.radius * x) * scale, (scene.y + scene.radius * y) * scale) for x, y in corners]


def canvas(color: Color) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty oversampled picture and its pen; `finish` brings it to size."""
    image = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), color)
    return image, ImageDraw.Draw(image)


def finish(image: Image.Image) -> Image.Image:
    """Average the oversampled pixels: smooth edges, the same on every machine."""
    return image.reduce(OVERSAMPLING)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, SIZE by SIZE."""
    image, pen = canvas(COLORS[scene.background])
    if scene.shape:
        pen.polygon(outline(scene), fill=COLORS[scene.color])
    return finish(image)


def _fit(scene: Scene) -> Scene:
    """The same object moved inward until it lies inside the picture."""
    reach = scene.radius + MARGIN
    inside = [min(max(value, reach), SIZE - reach) for value in (scene.x, scene.y)]
    return replace(scene, x=inside[0], y=inside[1])


def random_scene(rng: random.Random, smallest: float = 7.5, largest: float = 13.5) -> Scene:
    """A scene with two different colours and an object wholly inside the picture."""
    color, background = rng.sample(list(COLORS), 2)
    radius = rng.uniform(smallest, largest)
    reach = radius + MARGIN
    x, y = (rng.uniform(reach, SIZE - reach) for _ in range(2))
    return Scene(rng.choice(list(SHAPES)), color, background, x, y, radius)


def _object_name(rng: random.Random, scene: Scene) -> str:
    return rng.choice(("it", "it", f"the {scene.shape}"))


def _recolor(rng: random.Random) -> Edit:
    scene = random_scene(rng)
    color = rng.choice([c for c in COLORS if c not in (scene.color, scene.background)])
    verb = rng.choice(("make", "paint", "turn"))
    return Edit("recolor", scene, f"{verb} {_object_name(rng, scene)} {color}", replace(scene, color=color))


def _background(rng: random.Random) -> Edit:
    scene = random_scene(rng)
    color = rng.choice([c for c in COLORS if c not in (scene.color, scene.background)])
    verb = rng.choice(("make", "paint", "turn"))
    return Edit("background", scene, f"{verb} the background {color}", replace(scene, background=color))


def _remove(rng: random.Random) -> Edit:
    scene = random_scene(rng)
    verb = rng.choice(("remove", "delete"))
    return Edit("remove", scene, f"{verb} {_object_name(rng, scene)}", replace(scene, shape=None))


def _reshape(rng: random.Random) -> Edit:
    scene = random_scene(rng)
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    words = rng.choice(("make {} a {}", "turn {} into a {}"))
    return Edit("reshape", scene, words.format(_object_name(rng, scene), shape), replace(scene, shape=shape))


def _resize(rng: random.Random) -> Edit:
    bigger = rng.random() < 0.5
    scene = random_scene(rng, 7.5, 10.5) if bigger else random_scene(rng, 11.5, 15.0)
    word = rng.choice(("bigger", "larger") if bigger else ("smaller",))
    target = _fit(replace(scene, radius=scene.radius * (1.5 if bigger else 0.6)))
    return Edit("resize", scene, f"make {_object_name(rng, scene)} {word}", target)


def _move(rng: random.Random) -> Edit:
    side = rng.choice(SIDES)
    scene = random_scene(rng, 7.5, 11.5)
    axis = "x" if side in ("left", "right") else "y"
    reach = scene.radius + MARGIN
    near, far = reach, SIZE - reach
    start = rng.uniform(near + 8, far) if side in ("left", "top") else rng.uniform(near, far - 8)
    end = near if side in ("left", "top") else far
    words = f"move {_object_name(rng, scene)} to the {side}"
    return Edit("move", replace(scene, **{axis: start}), words, replace(scene, **{axis: end}))


EDITS: dict[str, Callable[[random.Random], Edit]] = {
    "recolor": _recolor,
    "background": _background,
    "remove": _remove,
    "reshape": _reshape,
    "resize": _resize,
    "move": _move,
}


def edit(seed: int, kinds: tuple[str, ...] = tuple(EDITS)) -> Edit:
    """The edit number `seed`, its kind drawn from `kinds`."""
    rng = random.Random(seed)
    return EDITS[rng.choice(kinds)](rng)


def scene(seed: int) -> Scene:
    """The scene number `seed`, with no edit."""
    return random_scene(random.Random(seed))


def _any_color(rng: random.Random) -> Color:
    free = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    return rng.choice((*COLORS.values(), *(free for _ in COLORS)))


def clutter(seed: int) -> Image.Image:
    """A picture of random shapes, outlines, lines and grids in any colour: what the autoencoder must also carry."""
    rng = random.Random(seed)
    image, pen = canvas(_any_color(rng))
    edge = SIZE * OVERSAMPLING
    if rng.random() < 0.25:
        color, pitch = _any_color(rng), rng.choice((6, 8, 12)) * OVERSAMPLING
        for at in range(pitch // 2, edge, pitch):
            pen.line((0, at, edge, at), color, OVERSAMPLING)
            pen.line((at, 0, at, edge), color, OVERSAMPLING)
    for _ in range(rng.randrange(4)):
        corners = outline(random_scene(rng, 3.0, 18.0))
        if rng.random() < 0.6:
            pen.polygon(corners, _any_color(rng))
        else:
            pen.line((*corners, *corners[:2]), _any_color(rng), rng.randrange(4, 16), joint="curve")
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        ends = tuple(rng.randrange(edge) for _ in range(4))
        pen.line(ends, _any_color(rng), rng.randrange(4, 12))
    if rng.random() < 0.2:
        width = rng.randrange(1, 6) * OVERSAMPLING
        pen.rectangle((0, 0, edge - 1, edge - 1), outline=_any_color(rng), width=width)
    return finish(image)
