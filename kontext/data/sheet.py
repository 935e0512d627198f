"""A contact sheet: what the model will see of each item, so that mixed-up pairs are seen before any training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

from kontext.data.encode import jobs_of, load
from kontext.data.plan import Entry
from kontext.errors import UserError

CELL, TEXT_WIDTH, GAP, LINE = 192, 224, 12, 18
SHEET_WIDTH = 1600
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "msgothic.ttc")
INK, FAINT, MISSING = (20, 20, 20), (110, 110, 110), (200, 60, 60)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Cell:
    """A picture of a card, None when it cannot be used, and what it is."""

    role: str
    picture: Image.Image | None


def contact_sheet(entries: Sequence[Entry]) -> Image.Image:
    """One card per entry: target, references, loss mask, name and caption; pictures cropped as they will be encoded."""
    cells = max(len(entry.sizes) + (entry.item.mask is not None) for entry in entries)
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
    for index, cell in enumerate(_cells_of(entry)):
        x = left + index * (CELL + GAP)
        if cell.picture is None:
            draw.text((x, top), f"{cell.role}: cannot be used", MISSING, font=small)
            continue
        picture = ImageOps.contain(cell.picture, (CELL, CELL))
        sheet.paste(picture, (x, top))
        size = f"{cell.picture.width}x{cell.picture.height}"
        draw.text((x, top + picture.height + 2), f"{cell.role} {size}", FAINT, font=small)
    x = left + cells * (CELL + GAP)
    lines = [
        *_wrap(entry.item.image.name, small, 1),
        *_wrap(entry.item.caption or "(empty caption)", font, 10),
    ]
    for number, line in enumerate(lines):
        draw.text((x, top + number * LINE), line, INK if number else FAINT, font=font if number else small)


def _cells_of(entry: Entry) -> Iterator[_Cell]:
    """Target, references, and the loss mask last, as fine as it is in the cache."""
    mask = None
    for index, job in enumerate(jobs_of(entry)):
        role = "target" if index == 0 else f"reference {index}" if len(entry.sizes) > 2 else "reference"
        try:
            loaded = load(job)
        except UserError:
            yield _Cell(role, None)
            continue
        yield _Cell(role, Image.fromarray(loaded.pixels.permute(1, 2, 0).numpy()))
        mask = mask or loaded.mask
    if mask is not None and mask.weights is not None:
        grey = Image.fromarray((mask.weights[0] * 255).round().byte().numpy())
        yield _Cell("loss mask", grey.resize(entry.target, Image.Resampling.NEAREST))


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
