"""How noise levels are spread in training, and how much each counts: as rows of a table and as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kontext.timesteps import Timesteps, levels, loss_weights

DRAWS = 20_000  # levels per size, at evenly spaced quantiles
BAR = 40  # characters
SIZE, EDGE = (1000, 480), 48  # pixels of the picture, and around its drawing
INK, GRID, BARS, LINE = "#333333", "#dddddd", "#4477aa", "#cc6622"


@dataclass(frozen=True)
class Spread:
    """N equal ranges of the levels 0..1: shares (N,) of the items, adding up to 1; weights (N,), the mean factor of the
    loss there, 0 where no item comes.
    """

    shares: Tensor
    weights: Tensor

    @property
    def edges(self) -> list[float]:
        """The N + 1 ends of the ranges."""
        return torch.linspace(0, 1, len(self.shares) + 1).tolist()


def spread(timesteps: Timesteps, items: Mapping[int, int], ranges: int) -> Spread:
    """items: how many an epoch has of each number of target tokens, which flux_shift goes by."""
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    shares, weighted = torch.zeros(ranges, dtype=torch.float64), torch.zeros(ranges, dtype=torch.float64)
    for tokens, count in items.items():
        t = levels(timesteps, u, tokens)
        place = (t * ranges).long().clamp(max=ranges - 1)
        part = count / sum(items.values()) / DRAWS
        shares += part * torch.bincount(place, minlength=ranges)
        weights = loss_weights(timesteps.weighting, t).double()
        weighted += part * torch.bincount(place, weights=weights, minlength=ranges)
    return Spread(shares, weighted / shares.clamp(min=part / 2))


def rows(found: Spread) -> list[tuple[str, str, str, str]]:
    """For a table: range in thousandths, bar, share, weight; the highest noise last."""
    scale = BAR / found.shares.max().item()
    edges = [round(1000 * edge) for edge in found.edges]
    return [
        (f"{low}-{high}", "█" * round(scale * share), f"{share:.2%}", f"{weight:.3g}" if share else "-")
        for low, high, share, weight in zip(
            edges, edges[1:], found.shares.tolist(), found.weights.tolist(), strict=False
        )
    ]


def picture(found: Spread) -> Image.Image:
    """Bars for the shares and a line for the weights, each up to its own highest value."""
    sheet = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    width, height = SIZE[0] - 2 * EDGE, SIZE[1] - 2 * EDGE
    for tick in range(0, 1001, 100):
        x = EDGE + width * tick / 1000
        draw.line((x, EDGE, x, EDGE + height), fill=GRID)
        draw.text((x, EDGE + height + 6), str(tick), fill=INK, anchor="ma")
    points = []
    for i, (share, weight) in enumerate(
        zip(found.shares / found.shares.max(), found.weights / found.weights.max(), strict=True)
    ):
        left, right = (EDGE + width * end for end in (found.edges[i], found.edges[i + 1]))
        draw.rectangle((left, EDGE + height * (1 - share.item()), right - 2, EDGE + height), fill=BARS)
        points.append(((left + right) / 2, EDGE + height * (1 - weight.item())))
    draw.line(points, fill=LINE, width=3)
    most, heaviest = found.shares.max().item(), found.weights.max().item()
    draw.text((EDGE, 12), f"share of the items, up to {most:.2%} per range", fill=BARS)
    draw.text(
        (SIZE[0] - EDGE, 12), f"weight of the loss (line), up to {heaviest:.3g}", fill=LINE, anchor="ra"
    )
    draw.text((SIZE[0] / 2, SIZE[1] - 8), "timestep: 0 is the picture, 1000 is noise", fill=INK, anchor="md")
    return sheet
