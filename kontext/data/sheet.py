"""A contact sheet: what the model will see of each item, so that mixed-up pairs are seen before any training."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from kontext.data.images import cover, read_picture
from kontext.data.plan import Entry
from kontext.errors import UserError

CELL, TEXT_WIDTH, GAP, LINE = 192, 224, 12, 18
SHEET_WIDTH = 1600
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "msgothic.ttc")
INK, FAINT, MISSING = (20, 20, 20), (110, 110, 110), (200, 60, 60)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(entries: Sequence[Entry]) -> Image.Image:
    """One card per entry: target, references, name and caption; pictures cropped as they will be encoded."""
    cells = max(len(entry.sizes) for entry in entries)
    card = (cells * (CELL + GAP) + TEXT_WIDTH + GAP, CELL + LINE + GAP)
    columns = max(1, min(SHEET_WIDTH // card[0], len(entries)))
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (columns * card[0] + GAP, rows * card[1] + GAP), "white")
    for index, entry in enumerate(entries):
        row, column = divmod(index, columns)
        _draw_card(sheet, (GAP + column * card[0], GAP + row * card[1]), entry, cells)
    return sheet


def _draw_card(sheet: Image.Image, corner: tuple[int, int], entry: Entry, cells: int) -> None:
    draw, font, small = ImageDraw.Draw(sheet), _font(14), _font(11)
    left, top = corner
    for index, (path, size) in enumerate(zip(entry.sources, entry.sizes, strict=True)):
        x = left + index * (CELL + GAP)
        role = "target" if index == 0 else f"reference {index}" if len(entry.sizes) > 2 else "reference"
        try:
            picture = ImageOps.contain(cover(read_picture(path).image, size), (CELL, CELL))
        except UserError:
            draw.text((x, top), f"{role}: cannot be read", MISSING, font=small)
        else:
            sheet.paste(picture, (x, top))
            draw.text((x, top + picture.height + 2), f"{role} {size[0]}x{size[1]}", FAINT, font=small)
    x = left + cells * (CELL + GAP)
    lines = [
        *_wrap(entry.item.image.name, small, 1),
        *_wrap(entry.item.caption or "(empty caption)", font, 10),
    ]
    for number, line in enumerate(lines):
        draw.text((x, top + number * LINE), line, INK if number else FAINT, font=font if number else small)


def _font(size: int) -> Font:
    """The first font on this machine that knows more than Latin letters, else Pillow's own."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrap(text: str, font: Font, most: int) -> list[str]:
    """The text in lines of at most TEXT_WIDTH pixels, broken at spaces where there are any."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TEXT_WIDTH:
            lines[-1] = longer
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            if font.getlength(lines[-1] + letter) > TEXT_WIDTH:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "..."]
