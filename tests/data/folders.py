"""Small datasets on disk for the tests of the data package."""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def picture(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """A picture of noise; equal seeds and sizes give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def pairs(root: Path, names: str = "abc", size: tuple[int, int] = (64, 48)) -> Path:
    """Targets `img/a.png` with captions and references `ctl/a.png`; the dataset file that lists them."""
    for seed, name in enumerate(names):
        picture(root / "img" / f"{name}.png", size, seed)
        picture(root / "ctl" / f"{name}.png", size, 100 + seed)
        (root / "img" / f"{name}.txt").write_text(f"make {name} red\n")
    return dataset_file(root, control_directory=root / "ctl")


def dataset_file(root: Path, general: str = "resolution = 64\nenable_bucket = true", **keys: object) -> Path:
    """A dataset file of one block: the folder `img`, caches in `cache`, and `keys` beside."""
    keys = {"image_directory": root / "img", "cache_directory": root / "cache", **keys}
    lines = [f"{name} = {_toml(value)}" for name, value in keys.items() if value is not None]
    path = root / "data.toml"
    path.write_text("\n".join(["[general]", general, "[[datasets]]", *lines]))
    return path


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | list) else f'"{value}"'


def shrink(images: Tensor) -> Tensor:
    """In place of an autoencoder: (B, 3, H, W) to (B, 3, H/8, W/8)."""
    return F.avg_pool2d(images, 8)
