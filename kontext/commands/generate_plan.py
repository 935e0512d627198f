"""What `kontext generate` needs memory for, and `--dry-run`: what it would make, shown without making it."""

from collections.abc import Sequence
from itertools import count

import torch

from kontext import console
from kontext.checkpoints import empty_transformer, load_clip_tokenizer, load_t5_tokenizer
from kontext.commands.memory_table import show_memory
from kontext.commands.model_sizes import PictureModels, picture_models, text_of, transformer_weights, vae_of
from kontext.commands.models import model_runtime, quantization
from kontext.commands.picture_needs import Sizes, largest
from kontext.device import precision_of
from kontext.generation.parts import Loras
from kontext.generation.request import Request
from kontext.lora.report import read_adapters
from kontext.memory.choice import Setup
from kontext.memory.estimate import CONTEXT
from kontext.memory.needs import PictureNeeds, Pictures, in_strips
from kontext.model.transformer import TransformerConfig
from kontext.options.generate import Generate
from kontext.quant import restores_strips


def read_needs(
    options: Generate, requests: Sequence[Request], sizes: Sequence[Sizes], loras: Loras, device: torch.device
) -> PictureNeeds:
    """From headers of files. Raises UserError for any that is missing, incomplete, of another kind or does not fit."""
    assert options.dit is not None
    config = empty_transformer(options.dit).config
    read_adapters(loras.paths, config)
    attached = loras.attach or quantization(options, device) is not None
    itemsize = precision_of(options.dtype, device).computing.itemsize
    return needs(
        options,
        config,
        picture_models(options),
        largest(requests, sizes, text=options.t5_max_length, itemsize=itemsize),
        device=device,
        adapter=sum(path.stat().st_size for path in loras.paths if path.is_file()) if attached else 0,
    )


def needs(
    options: Generate,
    config: TransformerConfig,
    models: PictureModels,
    pictures: Pictures,
    *,
    device: torch.device,
    adapter: int = 0,
) -> PictureNeeds:
    """adapter: bytes of LoRAs beside the weights."""
    precision = precision_of(options.dtype, device)
    strips = restores_strips(device, precision.computing)
    mode = quantization(options, device)
    return PictureNeeds(
        weights=transformer_weights(config, precision, mode, strips=strips and not options.compile),
        pictures=pictures,
        vae=vae_of(options, models, device),
        text=text_of(options, models.text, precision, strips=strips),
        adapter=adapter,
        keep=options.interactive,
        context=CONTEXT if device.type == "cuda" else 0,
    )


def asked(options: Generate, device: torch.device) -> Setup:
    """The setup that the options ask for. Says what on this device is not as asked."""
    return Setup(model_runtime(options, device, dtype=options.dtype, keep=options.interactive).placement)


def dry_run(
    options: Generate,
    requests: Sequence[Request],
    sizes: Sequence[Sizes],
    needed: PictureNeeds,
    device: torch.device,
) -> None:
    """Raises UserError for tokenizers that would fail."""
    assert options.text_encoder1 and options.text_encoder2
    load_t5_tokenizer(options.tokenizer1, options.text_encoder1)
    load_clip_tokenizer(options.tokenizer2, options.text_encoder2)
    setup = asked(options, device)
    columns = ("picture", "prompt", "size", "references", "steps", "seed")
    rows = [_row(*each) for each in zip(count(1), requests, sizes, strict=False)]
    console.table("Pictures", columns, rows, asked=True)
    show_memory(in_strips(needed, options.vae_tiling == "on").estimate(setup))
    console.say("Dry run: nothing was found that would fail. No picture has been made.")


def _row(number: int, request: Request, sizes: Sizes) -> tuple[object, ...]:
    output, *references = (f"{width}x{height}" for width, height in sizes)
    seed = "" if request.seed is None else str(request.seed)
    return number, request.prompt, output, ", ".join(references), request.steps, seed
