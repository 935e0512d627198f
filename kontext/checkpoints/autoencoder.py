"""The FLUX autoencoder from its file: BFL or diffusers layout, sizes read from the tensors' shapes."""

from pathlib import Path

import torch

from kontext.checkpoints.names import autoencoder_tensor
from kontext.checkpoints.reading import Origin, check, count, fill, stacked_shape
from kontext.checkpoints.source import Source, open_source
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig

SCALE, SHIFT = 0.3611, 0.1159  # FLUX.1's, where no config.json says otherwise


def load_autoencoder(path: Path | str, *, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    """Load an autoencoder, frozen and in evaluation mode.

    Raises UserError when the file is not a complete FLUX autoencoder.
    """
    source = open_source(path, "autoencoder")
    model, origins = _empty(source)
    fill(model, source, origins, device=device, dtype=lambda _: dtype)
    # Convolutions run up to 1.7 times as fast on channels that lie together.
    return model.to(memory_format=torch.channels_last)


def empty_autoencoder(path: Path | str) -> Autoencoder:
    """The autoencoder of a file on the meta device: complete, but for its numbers. Raises UserError as loading does."""
    return _empty(open_source(path, "autoencoder"))[0]


def _empty(source: Source) -> tuple[Autoencoder, dict[str, Origin]]:
    """The model, and where its tensors are in the file, which has all of them."""
    found = _bfl_names(source)
    with torch.device("meta"):
        model = Autoencoder(_config(source, found))
    origins = {name: found.get(name, Origin((name,))) for name in model.state_dict()}
    check(source, model, origins)
    return model, origins


def _bfl_names(source: Source) -> dict[str, Origin]:
    """{BFL name: the file's tensor}."""
    keys = source.keys()
    levels = count(keys, "encoder.down_blocks")
    return {autoencoder_tensor(key, levels) if levels else key: Origin((key,)) for key in keys}


def _config(source: Source, found: dict[str, Origin]) -> AutoencoderConfig:
    """Sizes from shapes; scale and shift of the latents from a config.json beside the file."""

    def shape(name: str) -> tuple[int, ...]:
        return stacked_shape(source, found.get(name, Origin((name,))))

    width, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = count(found, "encoder.down")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    shift = source.config.get("shift_factor")
    return AutoencoderConfig(
        in_channels=in_channels,
        width=width,
        multipliers=tuple(w // width for w in widths),
        res_blocks=count(found, "encoder.down.0.block"),
        latent_channels=shape("decoder.conv_in.weight")[1],
        scale=source.config.get("scaling_factor") or SCALE,
        shift=SHIFT if shift is None else shift,
    )
