"""A folder of 2,000 drawings of 64x64 pixels in four classes, by which `--preset auto` is shown.

python -m tests.benchmarks.drawings drawings
hf-diffusion train ddpm --data drawings --output runs/drawings --max_train_minutes 20
"""

import colorsys
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw


Colour = tuple[int, int, int]
OF_A_CLASS, SIDE = 500, 64
# Drawn at four times the size, which smooths edges.
S = 4 * SIDE


class Sketcher:
    """Draws things that differ in place, size and colours, by one seed."""

    def __init__(self, seed: int):
        random_numbers = random.Random(seed)
        self.within, self.random, self.choice = random_numbers.uniform, random_numbers.random, random_numbers.choice
        self.integer = random_numbers.randint

    def colour(self, hue: float | None = None, saturation: float | None = None, value: float | None = None) -> Colour:
        """Of what is not given, bright ones."""
        hue = self.random() if hue is None else hue
        saturation = self.within(0.5, 1) if saturation is None else saturation
        value = self.within(0.6, 1) if value is None else value
        red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
        return int(255 * red), int(255 * green), int(255 * blue)

    def ground(self, d: ImageDraw.ImageDraw, hue: tuple, saturation: tuple | float, value: tuple | float) -> None:
        """All of the image in one colour; pairs are ranges."""
        chosen = [self.within(*x) if isinstance(x, tuple) else x for x in (hue, saturation, value)]
        d.rectangle((0, 0, S, S), fill=self.colour(*chosen))

    def fish(self, d: ImageDraw.ImageDraw) -> None:
        self.ground(d, (0.5, 0.62), (0.3, 0.7), (0.6, 0.95))
        x, y, w, h = (S * self.within(*ends) for ends in ((0.42, 0.55), (0.35, 0.65), (0.22, 0.3), (0.13, 0.22)))
        skin, side = self.colour(self.within(-0.1, 0.2)), self.choice((-1, 1))
        d.polygon([(x - side * w * 0.7, y), *((x - side * w * 1.6, y + k * h) for k in (-1, 1))], fill=skin)
        d.ellipse((x - w, y - h, x + w, y + h), fill=skin)
        disc(d, x + side * w * 0.55, y - h * 0.4, 9, 9, "white")
        disc(d, x + side * w * 0.55, y - h * 0.4, 4, 4, "black")

    def flower(self, d: ImageDraw.ImageDraw) -> None:
        self.ground(d, (0.5, 0.6), 0.25, 1)
        d.rectangle((0, S * 0.8, S, S), fill=self.colour(0.33, 0.7, self.within(0.4, 0.6)))
        x, y, petals = S * self.within(0.35, 0.65), S * self.within(0.3, 0.45), self.integer(5, 8)
        r, petal, start = S * self.within(0.09, 0.13), self.colour(), self.random() * 6
        d.line((x, y, x + self.within(-20, 20), S * 0.85), fill=(40, 130, 50), width=10)
        for i in range(petals):
            angle = start + 2 * math.pi * i / petals
            disc(d, x + 1.3 * r * math.cos(angle), y + 1.3 * r * math.sin(angle), r, r, petal)
        disc(d, x, y, r * 0.8, r * 0.8, (250, 210, 60))

    def house(self, d: ImageDraw.ImageDraw) -> None:
        self.ground(d, (0.52, 0.62), (0.2, 0.6), (0.7, 1))
        d.rectangle((0, S * 0.75, S, S), fill=self.colour(0.3, 0.6, self.within(0.5, 0.75)))
        x, w, top, bottom = (S * self.within(*ends) for ends in ((0.4, 0.6), (0.2, 0.3), (0.45, 0.55), (0.8, 0.9)))
        wall = self.colour(None, self.within(0.1, 0.5), self.within(0.75, 1))
        d.rectangle((x - w, top, x + w, bottom), fill=wall)
        ridge = (x, top - S * self.within(0.15, 0.25))
        roof = self.colour(self.within(-0.05, 0.05), 0.7, self.within(0.5, 0.8))
        d.polygon([(x - w * 1.2, top), (x + w * 1.2, top), ridge], fill=roof)
        d.rectangle((x - 12, bottom - 50, x + 12, bottom), fill=(90, 60, 40))
        for k in (-1, 1):
            d.rectangle((x + k * w * 0.6 - 14, top + 20, x + k * w * 0.6 + 14, top + 48), fill=(255, 240, 150))

    def face(self, d: ImageDraw.ImageDraw) -> None:
        d.rectangle((0, 0, S, S), fill=self.colour())
        x, y, r = (S * self.within(*ends) for ends in ((0.45, 0.55), (0.45, 0.55), (0.28, 0.36)))
        hair = self.colour(self.within(0.03, 0.12), self.within(0.3, 0.9), self.within(0.1, 0.8))
        d.ellipse((x - r * 1.05, y - r * 1.3, x + r * 1.05, y + r * 0.6), fill=hair)
        skin = self.colour(self.within(0.05, 0.09), self.within(0.25, 0.55), self.within(0.65, 1))
        disc(d, x, y, r, r, skin)
        for k in (-1, 1):
            disc(d, x + k * r * 0.38, y - r * 0.15, 16, 12, "white")
            disc(d, x + k * r * 0.38, y - r * 0.15, 7, 7, (30, 30, 60))
        smile, mouth = self.within(0.15, 0.35) * r, y + r * 0.45
        d.arc((x - r * 0.5, mouth - smile, x + r * 0.5, mouth + smile), 0, 180, fill=(170, 40, 50), width=9)


def disc(d: ImageDraw.ImageDraw, x: float, y: float, width: float, height: float, fill: Colour | str) -> None:
    """An ellipse around (x, y), of half axes `width` and `height`."""
    d.ellipse((x - width, y - height, x + width, y + height), fill=fill)


def main(folder: str) -> None:
    """Write the drawings, a folder for each class."""
    sketcher = Sketcher(0)
    for draw in (sketcher.fish, sketcher.flower, sketcher.house, sketcher.face):
        of_class = Path(folder) / draw.__name__
        of_class.mkdir(parents=True, exist_ok=True)
        for i in range(OF_A_CLASS):
            image = Image.new("RGB", (S, S))
            draw(ImageDraw.Draw(image))
            image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(of_class / f"{i:04d}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
