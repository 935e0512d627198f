"""What generation leaves on the disk: names, pictures with their settings, latent files."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext.console import notice, say
from kontext.errors import UserError
from kontext.files import atomic_write, save_tensors
from kontext.generation.formats import FORMATS, save_picture
from kontext.generation.references import at_height, open_references, side_by_side
from kontext.generation.request import Request
from kontext.processes import ALONE, Processes

LATENT_KEY = "latent"
CHOICES = {
    "sampler": "sampler",
    "schedule": "schedule",
    "noise_layout": "noise_layout",
    "crop_references": "control_resize",
    "placement": "control_placement",
    "stitch": "stitch",
    "restore_size": "restore_size",
    "mask": "mask",
    "mask_blur": "mask_blur",
    "strength": "strength",
}
"""Fields of a request that are noted where they are not the default, with the names of their options."""
ENDINGS = (*FORMATS, "safetensors")


@dataclass(frozen=True)
class LatentFile:
    """A latent (1, C, h, w) read back, with the settings that were saved beside it (may be empty)."""

    latent: Tensor
    settings: Mapping[str, str]

    @property
    def seed(self) -> int:
        """The seed that made it; 0 when the file does not say, or says something else."""
        text = self.settings.get("seeds", "")
        return int(text) if text.isdecimal() else 0


def settings_of(request: Request, width: int, height: int) -> dict[str, str]:
    """The settings that make `request` again, as strings; the first six names are musubi-tuner's."""
    settings = {
        "seeds": str(request.seed),
        "prompt": request.prompt,
        "height": str(height),
        "width": str(width),
        "infer_steps": str(request.steps),
        "embedded_cfg_scale": str(request.guidance),
    }
    if request.flow_shift is not None:
        settings["flow_shift"] = str(request.flow_shift)
    for name, setting in CHOICES.items():
        value = getattr(request, name)
        if value != getattr(Request, name) and not isinstance(value, Image.Image):
            settings[setting] = _text(name, value)
    if request.uses_negative:
        settings |= {
            "negative_prompt": request.negative_prompt,
            "true_cfg_scale": str(request.true_cfg_scale),
        }
    paths = [str(reference) for reference in request.references if isinstance(reference, Path)]
    if paths:
        settings["control_image"] = "\n".join(paths)
        settings["no_resize_control"] = str(not request.resize_references).lower()
    if request.multipliers is not None:
        settings["lora_multiplier"] = " ".join(map(str, request.multipliers))
    return settings


def _text(name: str, value: object) -> str:
    if name == "crop_references":
        return "crop"
    return str(value).lower() if isinstance(value, bool) else str(value)


def save_latent(path: Path, latent: Tensor, settings: Mapping[str, str]) -> None:
    """Writes a latent (1, C, h, w) atomically as key `latent` of shape (C, h, w), float32, not packed."""
    save_tensors(path, {LATENT_KEY: latent[0].float().cpu().contiguous()}, dict(settings))


def read_latent(path: Path) -> LatentFile:
    """Reads a latent of shape (C, h, w); further axes of length 1, as musubi-tuner writes them, are dropped.

    Raises UserError for a file that is missing, not safetensors, without a latent, of another shape, not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            names, settings = list(file.keys()), file.metadata() or {}
            latent = file.get_tensor(LATENT_KEY) if LATENT_KEY in names else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable latent file (.safetensors): {error}") from error
    if latent is None:
        raise UserError(
            f"{path}: has no tensor named '{LATENT_KEY}'; it holds {', '.join(names[:4]) or 'none'}."
        )
    shape = tuple(latent.shape)
    latent = latent.float().squeeze()[None]
    if latent.dim() != 4 or 0 in shape:
        raise UserError(f"{path}: the latent's shape {shape} is not (channels, height/8, width/8).")
    if not torch.isfinite(latent).all():
        raise UserError(f"{path}: the latent holds NaN or infinite values; generate it again.")
    return LatentFile(latent, settings)


class Writer:
    """Saves what was asked for: pictures, latent files, or both, under one stem for each result.

    `name` fixes the stem, and files of earlier runs are replaced; without it the stem is `<time>_<seed>`, and no
    file is ever overwritten. `format` is an ending of formats.FORMATS. `grid` writes a second picture, of the references
    and the result side by side. `preview` is the number of steps between looks at a picture in the making, 0 for none;
    a look is replaced by the next one, and removed when its picture is saved. `common` are settings of the whole run
    (model, LoRA), to which each result adds its own; `metadata` False leaves all out.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pictures: bool = True,
        latents: bool = False,
        name: str | None = None,
        format: str = "png",
        grid: bool = False,
        preview: int = 0,
        metadata: bool = True,
        common: Mapping[str, str] | None = None,
        crew: Processes = ALONE,
    ) -> None:
        self.folder, self.name = folder, name
        self.format, self.grid, self.preview = format, grid, preview
        self.pictures, self.latents = pictures, latents
        self.metadata, self.common = metadata, dict(common or {})
        self.crew = crew
        self._used: set[str] = set()

    def prepare(self) -> None:
        """Make the folder, so that a run does not work for minutes only to fail when it saves.

        Raises UserError when it cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"{self.folder}: the output folder cannot be written ({error.strerror}); choose another --save-path."
            ) from error

    def stem(self, number: int, count: int, seed: int, *more: str) -> str:
        """The name, without ending, of result `number` (from 1) of `count`; `more` parts go behind the seed."""
        now = datetime.now()
        stem = "_".join(
            (f"{now:%Y%m%d-%H%M%S}-{self._moment(now.microsecond // 1000):03d}", str(seed), *more)
        )
        if self.name is not None:
            stem = self.name if count == 1 else f"{self.name}_{number:03d}"
        free, copies = stem, 1
        while free in self._used or (self.name is None and self._exists(free)):
            copies += 1
            free = f"{stem}_{copies}"
        self._used.add(free)
        return free

    def _moment(self, milliseconds: int) -> int:
        """The time as this process tells it: no two of them ever write the same one, and so the same name."""
        size = self.crew.size
        return min(milliseconds // size, 1000 // size - 1) * size + self.crew.rank

    def _exists(self, stem: str) -> bool:
        return any((self.folder / f"{stem}.{ending}").exists() for ending in ENDINGS)

    def save_picture(self, stem: str, picture: Image.Image, settings: Mapping[str, str]) -> None:
        """Write a picture and say where, if pictures are wanted."""
        if self.pictures:
            path = self.folder / f"{stem}.{self.format}"
            save_picture(path, picture, self._kept(settings))
            self._look_of(stem).unlink(missing_ok=True)
            say(f"{path}  {picture.width}x{picture.height}, seed {settings.get('seeds', 'unknown')}")

    def save_look(self, stem: str, look: Image.Image) -> None:
        """Write a look at a picture in the making, in place of an earlier one."""
        with atomic_write(self._look_of(stem)) as temporary:
            look.save(temporary, format="PNG", compress_level=1)

    def _look_of(self, stem: str) -> Path:
        return self.folder / f"{stem}_preview.png"

    def save_grid(self, stem: str, picture: Image.Image, request: Request) -> None:
        """Write references | result, all at the result's height, if that is wanted; says so if there is no reference."""
        if self.pictures and self.grid and not request.references:
            notice(f"{stem}: has no reference, so there is no grid of it.")
        elif self.pictures and self.grid:
            references = [at_height(opened.image, picture.height) for opened in open_references(request)]
            path = self.folder / f"{stem}_grid.{self.format}"
            save_picture(path, side_by_side([*references, picture]), {})
            say(f"{path}  references | result")

    def save_latent(self, stem: str, latent: Tensor, settings: Mapping[str, str]) -> None:
        """Write a latent file and say where, if latents are wanted."""
        if self.latents:
            path = self.folder / f"{stem}.safetensors"
            save_latent(path, latent, self._kept(settings))
            say(f"{path}  seed {settings.get('seeds', 'unknown')}")

    def _kept(self, settings: Mapping[str, str]) -> dict[str, str]:
        return {**self.common, **settings} if self.metadata else {}
