"""What `kontext merge` does when a LoRA comes out: combining, converting, extracting, averaging."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch

from kontext.checkpoints import open_source, transformer_config
from kontext.console import Progress, notice, progress, say, table
from kontext.errors import UserError
from kontext.files import save_tensors
from kontext.lora.adapter import targets
from kontext.lora.combine import Reduced, combine, extract
from kontext.lora.deltas import LowRank
from kontext.lora.ema import Decay, average, by_step
from kontext.lora.files import AdapterFile
from kontext.lora.formats import Format, format_lora
from kontext.lora.keys import Places
from kontext.lora.merge import plan_merge, spread
from kontext.lora.report import read_adapters
from kontext.lora.sizes import config_for
from kontext.lora.strength import Multiplier
from kontext.model.transformer import Transformer, TransformerConfig

ALMOST = 0.9999  # a kept share from which on nothing is said
STALE = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")


def combine_loras(
    loras: Sequence[Path],
    multipliers: Sequence[Multiplier],
    out: Path,
    *,
    include_patterns: Sequence[str],
    exclude_patterns: Sequence[str],
    rank: int | None,
    format: Format,
    dtype: torch.dtype | None,
) -> None:
    """Write the sum of `loras` as one, in any format; one alone is converted, or brought to another rank.

    rank: None adds the ranks up, exactly. dtype: None takes that of the files.
    """
    strengths = spread(multipliers, len(loras))
    config = config_for(loras)
    adapters = read_adapters(loras, config)
    plan = plan_merge(
        adapters, strengths, include_patterns=include_patterns, exclude_patterns=exclude_patterns
    )
    left_out = [name for name in plan if not name.endswith(".weight")]
    if left_out:
        notice(f"Changes of {len(left_out)} biases and norms are left out, such as {left_out[0]}.")
    weights = len(plan) - len(left_out)
    with progress("Combining", weights, unit="module") as bar:
        made = _collect(combine(plan, Places(config).shapes, rank), bar)
    parts = [f"{strength} * {path.name}" for strength, path in zip(strengths, loras, strict=True)]
    metadata = dict(adapters[0].metadata) if len(adapters) == 1 else {}
    _write(made, out, format, config, dtype or _dtype(adapters), metadata, " + ".join(parts))


def extract_lora(
    dit: Path,
    tuned: Path,
    out: Path,
    *,
    include_patterns: Sequence[str],
    exclude_patterns: Sequence[str],
    rank: int,
    format: Format,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Write the LoRA that makes `tuned` out of `dit`, as nearly as its rank allows."""
    base, other = open_source(dit, "transformer"), open_source(tuned, "transformer")
    config = transformer_config(base)
    with torch.device("meta"):
        model = Transformer(config)
    modules = targets(model, include_patterns=include_patterns, exclude_patterns=exclude_patterns)
    with progress("Extracting", len(modules), unit="module") as bar:
        made = _collect(extract(base, other, modules, rank, device), bar)
    if not made:
        raise UserError(f"{tuned} and {dit} do not differ in the layers that a LoRA changes.")
    _write(made, out, format, config, dtype or torch.float32, {}, f"{tuned.name} - {dit.name}")


def average_loras(loras: Sequence[Path], out: Path, decay: Decay, *, dtype: torch.dtype | None) -> None:
    """Write the average of checkpoints of one run; names and metadata are those of the last."""
    sources = by_step(loras)
    say("Averaging " + ", ".join(Path(source.path).name for source in sources))
    last = sources[-1]
    tensors = {key: mean.to(dtype or last.dtype(key)) for key, mean in average(sources, decay).items()}
    metadata = {key: value for key, value in last.metadata.items() if not key.startswith("sshs_")}
    names = ", ".join(Path(source.path).name for source in sources)
    save_tensors(out, tensors, {**metadata, "merged_from": f"average of {names}"})
    say(f"{out}: the average of {len(sources)} files.")


def _collect(made: Iterable[tuple[str, Reduced]], bar: Progress) -> dict[str, Reduced]:
    found = {}
    for module, reduced in made:
        found[module] = reduced
        bar.advance()
    return found


def _write(
    made: Mapping[str, Reduced],
    out: Path,
    format: Format,
    config: TransformerConfig,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    merged_from: str,
) -> None:
    changes = {module: reduced.change for module, reduced in made.items()}
    rank = _common(change.rank for change in changes.values())
    alpha = _common(change.rank * change.scale for change in changes.values())
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    kept |= {"merged_from": merged_from, "ss_network_dim": rank, "ss_network_alpha": alpha}
    magnitudes = {module: r.magnitude for module, r in made.items() if r.magnitude is not None}
    save_tensors(out, format_lora(changes, format, config, dtype, magnitudes), kept)
    rows = [(m, r.change.rank, f"{r.kept:.2%}") for m, r in made.items() if r.kept < ALMOST]
    if rows:
        table("Kept of the changes (squared norm)", ("module", "rank", "kept"), rows)
    say(f"{out}: {len(changes)} modules, {format} format, rank {rank.lower()}.")


def _common(values: Iterable[float]) -> str:
    """The value, where it is the same in all modules; else the word that kohya's tools use."""
    found = set(values)
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"


def _dtype(adapters: Iterable[AdapterFile]) -> torch.dtype:
    """The narrowest dtype that holds the factors of all files as they are; float32 for no plain LoRA."""
    changes = [d.change for adapter in adapters for deltas in adapter.deltas.values() for d in deltas]
    dtypes = [c.down.dtype if isinstance(c, LowRank) else torch.float32 for c in changes]
    return reduce(torch.promote_types, dtypes)
