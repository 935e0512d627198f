"""Products of 8-bit numbers: what GPUs do at twice the rate of 16 bits, or more.

A frozen weight W (out, in) = s_w * W_q has one scale per row (out, 1). Activations are rounded on the fly, with one
scale per token: X = s_x * X_q.

    forward   Y  = s_x * (X_q W_q^T) * s_w^T
    backward  dX = dY W = (dY * s_w^T) W_q      the scale of the weight's rows lies along the sum, where no product
                                                takes one; folded into dY before dY is rounded, it needs none

so that one set of values serves both directions. Relative error of a product with normal weights and activations:
0.037 in fp8, 0.012 in int8, forward and backward alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext.quant.values import FP8, INT8_MAX

LEAST_ROWS = 32  # cuBLAS multiplies whole numbers from 17 rows on


def multiply(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x W^T + b. x (n, in) of any float type, also the result's (n, out).

    weight (out, in) fp8 or int8; scale (out, 1) or None for ones; bias (out,) or None. Sizes are multiples of 16.
    """
    rows, by_row = round_rows(x, weight.dtype)
    return _product(rows, weight.t(), by_row, scale, bias, x.dtype)


def multiply_back(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The gradient (n, in) of `multiply`'s x, of the gradient (n, out) of its result."""
    rows, by_row = round_rows(gradient if scale is None else gradient * scale.view(-1), weight.dtype)
    return _product(rows, weight, by_row, None, None, gradient.dtype)


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` multiplies numbers of this 8-bit type, with a scale per row.

    Asked of the device itself: fp8 needs compute capability 8.9 (RTX 40, H100), and torch came to it card by card. A CPU
    multiplies both, but whole numbers one by one, several times slower than floats.
    """
    if device.type == "cpu":
        return dtype == FP8
    x, weight = (
        torch.ones(LEAST_ROWS, 32, device=device, dtype=torch.bfloat16),
        torch.ones(16, 32, device=device),
    )
    try:
        out = multiply(x, weight.to(dtype), None, None)
    except (RuntimeError, ValueError):
        return False
    return bool((out == 32).all())


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (n, k) in 8 bits, and float32 scales (n, 1) such that the largest value of each row uses the whole range.

    Floats are written out here: torch's compiler takes those of a module for inputs, and fails at their second use.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    if dtype == FP8:
        scale = (largest.float() / torch.finfo(FP8).max).clamp_(min=1e-30)
        return torch.div(x, scale, out=x.new_empty(x.shape, dtype=FP8)), scale
    return _whole_rows(x, largest)


def _whole_rows(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The same in whole numbers. bfloat16 is divided as it is, in less memory than float32; its range holds every scale."""
    wide = torch.promote_types(x.dtype, torch.bfloat16)
    scale = (largest.to(wide) / INT8_MAX).clamp_(min=1e-30)
    values = (x / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values.to(torch.int8).contiguous(), scale.float()


def _product(
    rows: Tensor,
    columns: Tensor,
    by_row: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """by_row * (rows @ columns) * by_column + bias: rows (n, k), columns (k, m), by_row (n, 1), by_column (m, 1)."""
    if rows.is_cuda or torch.compiler.is_compiling():
        # tensor cores want the summed axis of both to be the inner one: W is turned for dX, 6 ms a step
        columns = columns.t().contiguous().t()
    if rows.dtype == FP8:
        return _fp8_product(rows, columns, by_row, by_column, bias, dtype)
    return _scaled(_whole_product(rows, columns), by_row, by_column, bias, dtype)


def _scaled(
    sums: Tensor, by_row: Tensor, by_column: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """by_row * sums * by_column + bias in `dtype`, of sums (n, m) in int32. A GPU takes a pass for each scale, no more."""
    out = by_row.new_empty(sums.shape, dtype=dtype)
    if by_column is not None:
        sums, by_row = sums * by_row, by_column.float().view(1, -1)
    if bias is None:
        return torch.mul(sums, by_row, out=out)
    return torch.addcmul(bias.float(), sums, by_row, out=out)


def _whole_product(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns in int32."""
    missing = LEAST_ROWS - len(rows)
    if missing <= 0:
        return torch._int_mm(rows, columns)
    return torch._int_mm(F.pad(rows, (0, 0, 0, missing)), columns)[: len(rows)]


def _fp8_product(
    rows: Tensor,
    columns: Tensor,
    by_row: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """CUDA writes bfloat16 alone when rows have scales; what is lost is small beside 8 bits."""
    written = torch.bfloat16 if rows.is_cuda else dtype
    ones = by_row.new_ones(1, columns.shape[1])
    out = torch._scaled_mm(
        rows,
        columns,
        scale_a=by_row,
        scale_b=ones if by_column is None else by_column.float().view(1, -1),
        bias=None if bias is None else bias.to(written),
        out_dtype=written,
        use_fast_accum=True,
    )
    return out.to(dtype)
