"""The memory estimate as a table."""

from collections.abc import Iterator

from kontext import console
from kontext.memory.estimate import Estimate, Stage

GIBIBYTE, MEBIBYTE = 2**30, 2**20


def size(nbytes: float) -> str:
    """Bytes in words."""
    return f"{nbytes / GIBIBYTE:.2f} GiB" if nbytes >= GIBIBYTE else f"{nbytes / MEBIBYTE:.1f} MiB"


def show_memory(estimate: Estimate, always: str = "") -> None:
    """Every stage with its peak, and of the largest, and of that named `always`, what it is made of. On stdout."""
    rows = [(stage.name, size(stage.device + estimate.context), "") for stage in estimate.stages]
    for stage in estimate.stages:
        if stage.name in (always, estimate.largest.name):
            rows += _parts(stage, estimate.context)
    rows.append(("peak", size(estimate.peak), size(estimate.host) if estimate.host else ""))
    console.table("Memory, estimated", ("", "device", "host"), rows, asked=True)


def _parts(stage: Stage, context: int) -> Iterator[tuple[str, str, str]]:
    yield f"of which, in {stage.name}:", "", ""
    for part in stage.parts:
        if part.device or part.host:
            yield f"  {part.name}", size(part.device), size(part.host) if part.host else ""
    if context:
        yield "  CUDA context", size(context), ""
