"""A sheet of pictures: one column per method, one row per scene, labels above."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

CELL = 144
GAP = 8
LABEL = 24
PAPER = (250, 250, 248)
INK = (40, 40, 40)


def sheet(labels: list[str], rows: list[list[Image.Image]], notes: list[str] | None = None) -> Image.Image:
    """Pictures enlarged to CELL pixels (three times 48) under `labels`; `notes`, if given, stand below each column."""
    width = GAP + (CELL + GAP) * len(labels)
    height = LABEL + GAP + (CELL + GAP) * len(rows) + (LABEL if notes else 0)
    page = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for column in range(len(labels)):
        x = GAP + column * (CELL + GAP)
        for text, y in ((labels[column], GAP), (notes[column] if notes else "", height - LABEL)):
            pen.text((x + CELL / 2, y), text, INK, font, anchor="ma")
        for row, pictures in enumerate(rows):
            picture = pictures[column].resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(picture, (x, LABEL + GAP + row * (CELL + GAP)))
    return page
