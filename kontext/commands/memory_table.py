"""The memory estimate as a table."""

from kontext import console
from kontext.memory.estimate import Estimate

GIBIBYTE, MEBIBYTE = 2**30, 2**20


def size(nbytes: float) -> str:
    """Bytes in words."""
    return f"{nbytes / GIBIBYTE:.2f} GiB" if nbytes >= GIBIBYTE else f"{nbytes / MEBIBYTE:.1f} MiB"


def show_memory(estimate: Estimate) -> None:
    """Every stage with its peak, and of the largest what it is made of. On stdout."""
    rows = [(stage.name, size(stage.device + estimate.context), "") for stage in estimate.stages]
    rows.append((f"of which, in {estimate.largest.name}:", "", ""))
    rows += [
        (f"  {part.name}", size(part.device), size(part.host) if part.host else "")
        for part in estimate.largest.parts
        if part.device or part.host
    ]
    if estimate.context:
        rows.append(("  CUDA context", size(estimate.context), ""))
    rows.append(("peak", size(estimate.peak), size(estimate.host) if estimate.host else ""))
    console.table("Memory, estimated", ("", "device", "host"), rows, asked=True)
