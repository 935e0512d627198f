"""A cached dataset on disk for runs through the command line."""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kontext.cli import main
from tests.tiny import TEXT_LENGTH, TinyFiles


@dataclass(frozen=True)
class Cached:
    """A dataset file with filled caches, and the words of the command line that name the models."""

    config: Path
    reference: Path
    models: list[str]


def cached_dataset(root: Path, files: TinyFiles) -> Cached:
    """Five edits of 64x64 and 96x64 pixels; two go into a batch."""
    rng = random.Random(0)
    for number in range(5):
        size = (64, 64) if number % 2 else (96, 64)
        for folder in ("after", "before"):
            picture = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
            picture.paste(tuple(rng.randrange(256) for _ in range(3)), (8, 8, 40, 40))
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"{number}.png")
        (root / "after" / f"{number}.txt").write_text("make the circle red" if number % 2 else "remove it")
    config = root / "dataset.toml"
    config.write_text(
        "[general]\nresolution = [80, 64]\nenable_bucket = true\nbucket_no_upscale = true\nbatch_size = 2\n"
        f"[[datasets]]\nimage_directory = '{root}/after'\ncontrol_directory = '{root}/before'\n"
        f"cache_directory = '{root}/cache'\n"
    )
    common = ["--dataset-config", str(config), "--device", "cpu", "--dtype", "float32"]
    encoders = [
        "--text-encoder1", str(files.t5), "--text-encoder2", str(files.clip), "--tokenizer1",
        str(files.t5_tokenizer), "--tokenizer2", str(files.clip_tokenizer), "--t5-max-length", str(TEXT_LENGTH),
    ]  # fmt: skip
    vae = ["--vae", str(files.vae)]
    assert main(["cache-latents", *common, *vae, "--num-workers", "0"]) == 0
    assert main(["cache-text", *common, *encoders]) == 0
    return Cached(config, root / "before" / "0.png", [*common, "--dit", str(files.dit), *vae, *encoders])
