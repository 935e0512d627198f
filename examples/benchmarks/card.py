"""What a card can do, measured on the spot: rates of products, attention and copies, times and memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext.memory.choice import operations
from kontext.memory.estimate import CONTEXT, Work
from kontext.model.transformer import TransformerConfig
from kontext.quant.products import multiply, round_rows, supported
from kontext.quant.values import FP8

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured: a transformer, tokens of its text and along each side of target and reference, LoRA's rank."""

    config: TransformerConfig
    text: int
    side: int
    rank: int

    @property
    def tokens(self) -> int:
        return self.text + 2 * self.side**2

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """The shape of queries: (1, heads, tokens, channels)."""
        return 1, self.config.heads, self.tokens, self.config.width // self.config.heads


@dataclass(frozen=True)
class Rates:
    """Floating-point operations and bytes a second; None for what the card cannot do.

    gemm: products in the compute type; gemm8: fp8 products alone; gemm8_cast: with both activations' rounding;
    attention, attention_back: of scaled_dot_product_attention; from_host: of pinned memory; copy: read and written.
    """

    gemm: float
    gemm8: float | None
    gemm8_cast: float | None
    attention: float
    attention_back: float
    from_host: float
    copy: float

    def forward_seconds(self, sizes: Sizes) -> float:
        """What one forward pass takes if products and attention run at these rates and nothing else takes time."""
        linear, attention = operations(sizes.config, Work(1, sizes.tokens, 2))
        return linear / self.gemm + attention / self.attention

    def training_seconds(self, sizes: Sizes) -> float:
        """The same of a step of LoRA training that computes nothing twice: no gradients of frozen weights."""
        linear, attention = operations(sizes.config, Work(1, sizes.tokens, 2))
        return 2 * linear / self.gemm + attention / self.attention + 2.5 * attention / self.attention_back

    def named(self) -> dict[str, float | None]:
        return asdict(self)


def seconds(run: Run, device: torch.device, *, repeats: int = 5, warmup: int = 2) -> float:
    """The median time of a run, by CUDA events, where runs follow each other without waiting; one run on a CPU."""
    if device.type != "cuda":
        return _timed(run)
    for _ in range(warmup):
        run()
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    pairs = zip(events[:-1], events[1:], strict=True)
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairs)


def _timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def clear(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak(run: Run, device: torch.device) -> float | None:
    """The most gigabytes that tensors take during a run, those that are there before included; None off the GPU."""
    clear(device)
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def fits(run: Run, device: torch.device) -> bool:
    """Whether a run finds the memory that it wants."""
    try:
        run()
        return True
    except torch.OutOfMemoryError:
        pass
    clear(device)  # behind the handler: within it the error still holds what the run had
    return False


@contextmanager
def small_card(gigabytes: float, device: torch.device) -> Iterator[None]:
    """Within, only as much memory can be had as a card of so many GiB leaves beside CUDA's own."""
    if device.type != "cuda":
        yield
        return
    clear(device)
    number = torch.cuda.current_device() if device.index is None else device.index  # a share is of a number
    total = torch.cuda.get_device_properties(number).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget(gigabytes) / total), number)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, number)
        clear(device)


def budget(gigabytes: float) -> int:
    """Bytes that a card of so many GiB has for tensors."""
    return int(gigabytes * 2**30) - CONTEXT


def measure_rates(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Rates:
    """At the shapes of the transformer's largest products and of its attention."""
    config, tokens = sizes.config, sizes.tokens
    x = torch.randn(tokens, config.width, device=device).to(dtype)
    weight = torch.randn(config.mlp_width, config.width, device=device).to(dtype)
    work = 2 * tokens * config.width * config.mlp_width
    gemm = work / seconds(lambda: F.linear(x, weight), device, repeats=20)
    gemm8, gemm8_cast = _eight_bit_rates(x, weight, work, device)
    attention, attention_back = _attention_rates(sizes, device, dtype)
    from_host, copy = _copy_rates(device)
    return Rates(gemm, gemm8, gemm8_cast, attention, attention_back, from_host, copy)


def _eight_bit_rates(
    x: Tensor, weight: Tensor, work: int, device: torch.device
) -> tuple[float | None, float | None]:
    if not supported(device, FP8):
        return None, None
    rows, by_row = round_rows(x, FP8)
    values, scale = round_rows(weight, FP8)
    alone = partial_product(rows, values, by_row, scale, x.dtype)
    whole = seconds(lambda: multiply(x, values, scale, None), device, repeats=10)
    return work / seconds(alone, device, repeats=10), work / whole


def partial_product(rows: Tensor, values: Tensor, by_row: Tensor, scale: Tensor, dtype: torch.dtype) -> Run:
    """The fp8 product of numbers that are rounded already; float32 results are made from bfloat16's."""
    out = torch.bfloat16 if dtype == torch.float32 else dtype
    return lambda: torch._scaled_mm(
        rows, values.t(), scale_a=by_row, scale_b=scale.t(), out_dtype=out, use_fast_accum=True
    )


def _attention_rates(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    q, k, v = (torch.randn(sizes.heads, device=device).to(dtype).requires_grad_() for _ in range(3))
    work = 4 * sizes.tokens**2 * sizes.config.width

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    with torch.no_grad():
        forward = seconds(attend, device, repeats=10)
    gradient = torch.randn_like(attend())
    both = seconds(lambda: torch.autograd.grad(attend(), (q, k, v), gradient), device, repeats=5)
    return work / forward, 2.5 * work / max(both - forward, 1e-9)


def _copy_rates(device: torch.device, size: int = 2**28) -> tuple[float, float]:
    size = size if device.type == "cuda" else 2**22
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    from_host = seconds(lambda: here.copy_(host, non_blocking=True), device)
    return size / from_host, 2 * size / seconds(lambda: there.copy_(here), device)
