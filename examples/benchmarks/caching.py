"""Caching against the encoders alone: `python examples/benchmarks/caching.py`.

JPEG pairs of target and reference, some of whose references are the same picture, are made in a temporary folder.
cache-latents' work (reading, resizing, encoding each distinct picture once, writing) is done in turn with encoding the
distinct pictures, in batches of the same size, from memory; cache-text's with encoding the distinct captions. The share
is that of the encoders' own time: 1 is as fast as they are.

Options: --pairs n (16), --side pixels (192), --rounds n (5), --batch-size n (2), --workers n (1), --device cuda.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import T5Config

from kontext.data.encode import Loaded, chunks, encode_latents, encode_texts, jobs_of, load
from kontext.data.images import scale_pixels
from kontext.data.items import Skips
from kontext.data.plan import Entry, plan_blocks
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig

SHARED = 4  # pairs with the same reference
CAPTIONS = 2  # pairs with the same caption
DATASET = """
[general]
resolution = {side}
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
image_directory = "{folder}/after"
control_directory = "{folder}/before"
cache_directory = "{folder}/cache"
no_resize_control = true
"""


def write_pairs(folder: Path, pairs: int, side: int) -> Path:
    """Smooth random pictures, which JPEG shrinks as it does photographs."""
    for number in range(pairs):
        for name, seed in (("after", number), ("before", 1000 + number // SHARED)):
            colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            path = folder / name / f"{number:03d}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=95)
        (folder / "after" / f"{number:03d}.txt").write_text(f"edit number {number // CAPTIONS}")
    config = folder / "dataset.toml"
    config.write_text(DATASET.format(side=side, folder=folder))
    return config


def picture_encoder(device: str) -> Callable[[Tensor], Tensor]:
    """The published autoencoder at a quarter of its width, with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Autoencoder(AutoencoderConfig(3, 32, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159))
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda images: model.encode(images.to(device)))


def text_encoder(device: str) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """T5's layers at an eighth of its width, on 512 tokens."""
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        d_model=512, d_kv=64, d_ff=1280, num_layers=2, num_heads=8, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config).requires_grad_(False).eval().to(device)

    @torch.inference_mode()
    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[hash(text) % 32_000] * 512 for text in captions], device=device)
        out = model(ids).last_hidden_state
        return out, out[:, 0]

    return encode


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(name: str, count: int, whole: Callable[[], object], alone: Callable[[], object], rounds: int) -> str:
    alone(), whole()
    pairs = [(timed(alone), timed(whole)) for _ in range(rounds)]
    share = statistics.median(a / w for a, w in pairs)
    rates = (count / statistics.median(pair[i] for pair in pairs) for i in (1, 0))
    return f"| {name} | {next(rates):.2f} | {next(rates):.2f} | {share:.2f} |"


def distinct(entries: Sequence[Entry]) -> list[Loaded]:
    found = [load(job) for entry in entries for job in jobs_of(entry)]
    return list({each.identity: each for each in found}.values())


def measure(entries: Sequence[Entry], options: argparse.Namespace) -> list[str]:
    size, device = options.batch_size, options.device
    encode, read = picture_encoder(device), text_encoder(device)
    pictures, captions = distinct(entries), list(dict.fromkeys(entry.item.caption for entry in entries))

    def latents() -> None:
        settings = {"encoder": "e", "batch_size": size, "workers": options.workers, "skips": Skips()}
        assert len(list(encode_latents(entries, encode, **settings))) == len(entries)

    def latents_alone() -> None:
        for some in chunks(pictures, size):
            encode(scale_pixels(torch.stack([each.pixels for each in some]))).cpu()

    def texts() -> None:
        assert len(list(encode_texts(entries, read, encoder="e", batch_size=size))) == len(entries)

    def texts_alone() -> None:
        for some in chunks(captions, size):
            read(some)[0].cpu()

    side, count = f"{options.side}x{options.side}", len(entries)
    return [
        row(
            f"pairs, {side}, {len(pictures)} distinct pictures", count, latents, latents_alone, options.rounds
        ),
        row(f"captions, {len(captions)} distinct", count, texts, texts_alone, options.rounds),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("pairs", 16), ("side", 192), ("rounds", 5), ("batch-size", 2), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        blocks = plan_blocks(write_pairs(Path(folder), options.pairs, options.side), Skips())
        lines = measure([entry for block in blocks for entry in block.entries], options)
    print(
        f"\nCaching, {torch.get_num_threads()} threads, {options.workers} reading, batches of {options.batch_size}\n"
    )
    print("| | items/s | encoders alone | share |\n|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
