"""3x3 convolutions with fewer products on a CPU, where an autoencoder takes as long as its products.

Four rows together need 6 products of a row of the kernel with a row of the map, instead of 12, and a map whose pixels
are doubled first needs 9 for each of its own pixels, instead of 36. The results are the same to rounding, whose errors
are at most a third larger. A GPU has better ways of its own, and 16-bit numbers no digits to spare.

B batch, C channels, H rows, W columns; x are feature maps (B, C, H, W), d rows of them, w kernels (C', C, 3, 3).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP_BYTES = (
    8 * 2**20
)  # of a map at a time, so that what is made on the way stays small, and near the processor
FEWEST_CHANNELS = 64  # with fewer, the sums take longer than the products that they save
FEWEST_PIXELS = 256  # with fewer, the sums of the kernels do
NEAR, FAR = 0.75, 1.5


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width."""

    scale = 1

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not is_cheaper(self, x):
            return self.whole(x)
        s = self.scale
        out = empty_like(x, self.out_channels, s * x.shape[2], s * x.shape[3])
        for top, bottom in _strips(x):
            self.rows(with_neighbours(x, top, bottom), out[:, :, s * top : s * bottom])
        return out

    def whole(self, x: Tensor) -> Tensor:
        """The convolution by its definition."""
        return super().forward(x)

    def rows(self, x: Tensor, out: Tensor) -> None:
        """All but the first and the last row of the convolution of x, into `out`."""
        fours = out.shape[2] // 4 * 4 if is_cheaper(self, x) else 0
        if fours:
            convolve_fours(x[:, :, : fours + 2], self.weight, self.bias, out[:, :, :fours])
        if fours < out.shape[2]:
            out[:, :, fours:] = F.conv2d(x[:, :, fours:], self.weight, self.bias, padding=(0, 1))


class DoublingConv3x3(Conv3x3):
    """A 3x3 convolution of a map of twice the height and width, in which each pixel is four equal ones."""

    scale = 2

    def whole(self, x: Tensor) -> Tensor:
        """The convolution by its definition."""
        return super().whole(_doubled(x))

    def rows(self, x: Tensor, out: Tensor) -> None:
        """What all but the first and the last row of x become, into `out`."""
        if is_cheaper(self, x):
            convolve_doubled(x, self.weight, self.bias, out)
        else:
            out.copy_(F.conv2d(_doubled(x)[:, :, 1:-1], self.weight, self.bias, padding=(0, 1)))


def is_cheaper(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether saving products saves time, and nobody asks for gradients, which results written in place lack."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS
        and x.shape[2] * x.shape[3] >= FEWEST_PIXELS
        and not (torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad))
    )


def with_neighbours(x: Tensor, top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of x with one more on each side, of zeros where x ends."""
    rows = x[:, :, max(top - 1, 0) : bottom + 1]
    first, last = top == 0, bottom == x.shape[2]
    return F.pad(rows, (0, 0, int(first), int(last))) if first or last else rows


def empty_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A map like x of other sizes, its channels lying together."""
    shape = (len(x), channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def convolve_fours(x: Tensor, w: Tensor, bias: Tensor, out: Tensor) -> None:
    """The convolution of x, which has a row more on each side than `out`, into out (B, C', 4 n, W).

    Winograd's F(4, 3) as in Lavin & Gray 2015 (arXiv 1509.09308), over rows alone: over columns too it would need fewer
    products still, but more sums and digits. Rows are taken as polynomials, whose values at 0, +-NEAR, +-FAR and
    infinity are multiplied; the usual points, 1 and 2, lose more digits.
    """
    d0, d1, d2, d3, d4, d5 = (x[:, :, i : i + out.shape[2] - 3 : 4] for i in range(6))
    k0, k1, k2, k3, k4, k5 = _row_kernels(w)
    near, far = NEAR**2, FAR**2
    even, odd = torch.sub(d4, d2, alpha=far), torch.sub(d3, d1, alpha=far)
    m1 = _along(torch.add(even, odd, alpha=NEAR), k1)
    m2 = _along(even.sub_(odd, alpha=NEAR), k2)
    even, odd = torch.sub(d4, d2, alpha=near), torch.sub(d3, d1, alpha=near)
    m3 = _along(torch.add(even, odd, alpha=FAR), k3)
    m4 = _along(even.sub_(odd, alpha=FAR), k4)
    m0 = _along(torch.sub(d4, d2, alpha=near + far).add_(d0, alpha=near * far), k0)
    m5 = _along(torch.sub(d5, d3, alpha=near + far).add_(d1, alpha=near * far), k5)
    near_even, near_odd, far_even, far_odd = m1 + m2, m1.sub_(m2), m3 + m4, m3.sub_(m4)
    torch.add(m0.add_(near_even), far_even, out=out[:, :, 0::4])
    torch.add(near_odd.mul_(NEAR), far_odd, alpha=FAR, out=out[:, :, 1::4])
    torch.add(near_even.mul_(near), far_even, alpha=far, out=out[:, :, 2::4])
    torch.add(m5.add_(near_odd, alpha=near), far_odd, alpha=FAR**3, out=out[:, :, 3::4])
    out.add_(bias[:, None, None])


def _row_kernels(w: Tensor) -> list[Tensor]:
    """The six kernels (C', C, 1, 3) of F(4, 3): the rows of w as a polynomial at 0, +-NEAR, +-FAR and infinity."""
    a, b, c = w.unbind(2)
    kernels = [a / (NEAR * FAR) ** 2]
    for point, other in ((NEAR, FAR), (FAR, NEAR)):
        weight = 2 * point**2 * (point**2 - other**2)
        even = torch.add(a, c, alpha=point**2).div_(weight)
        kernels += [torch.add(even, b, alpha=point / weight), torch.sub(even, b, alpha=point / weight)]
    return [kernel.unsqueeze(2) for kernel in (*kernels, c)]


def _along(rows: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(rows, kernel, padding=(0, 1))


def convolve_doubled(x: Tensor, w: Tensor, bias: Tensor, out: Tensor) -> None:
    """The convolution of x with its pixels doubled, into out (B, C', 2 H, 2 W); x is of H + 2 rows.

    Of the three pixels under a row of the kernel two are equal. With x the pixel that stands twice, the row's product
    is (w0 + w1 + w2) x - w0 (x - left) on x's left half, and ... + w2 (right - x) on its right half. In two dimensions
    there are differences down, across, and both, each shared by the halves on its two sides.
    """
    x = F.pad(x, (1, 1))
    inner = x[:, :, 1:-1]
    down, across = x[:, :, 1:] - x[:, :, :-1], inner[:, :, :, 1:] - inner[:, :, :, :-1]
    both = down[:, :, :, 1:] - down[:, :, :, :-1]
    height, width = inner.shape[2], inner.shape[3] - 2
    middle = _pixelwise(inner[:, :, :, 1:-1], w.sum((2, 3)), bias)
    sides = [_pixelwise(across[:, :, :, j : j + width], _sign(j) * w[:, :, :, 2 * j].sum(2)) for j in (0, 1)]
    for i in (0, 1):
        above = _pixelwise(down[:, :, i : i + height, 1:-1], _sign(i) * w[:, :, 2 * i].sum(2)).add_(middle)
        for j in (0, 1):
            corner = both[:, :, i : i + height, j : j + width]
            product = _pixelwise(corner, _sign(i) * _sign(j) * w[:, :, 2 * i, 2 * j])
            torch.add(product.add_(sides[j]), above, out=out[:, :, i::2, j::2])


def _sign(side: int) -> int:
    return 2 * side - 1


def _pixelwise(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, w[:, :, None, None], bias)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _strips(x: Tensor) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each strip, of fours of rows."""
    fours = STRIP_BYTES // (4 * x[:, :, :1].numel() * x.element_size())
    rows = 4 * max(1, fours)
    for top in range(0, x.shape[2], rows):
        yield top, min(top + rows, x.shape[2])
