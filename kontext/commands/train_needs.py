"""How much memory `kontext train` needs, as its options say."""

from collections.abc import Sequence

import torch

from kontext.commands import train_values as values
from kontext.commands import train_whole
from kontext.commands.model_sizes import PictureModels, text_of, transformer_weights, vae_of
from kontext.commands.models import quantization
from kontext.commands.picture_needs import largest
from kontext.data.batches import Batches, Group
from kontext.data.cache import Header, read_header
from kontext.device import resolve_dtype
from kontext.generation.request import Request
from kontext.memory.choice import Setup
from kontext.memory.estimate import CONTEXT, Trained, Work
from kontext.memory.needs import TrainingNeeds
from kontext.model.latents import PIXELS_PER_TOKEN
from kontext.model.transformer import TransformerConfig
from kontext.options.train import Train
from kontext.training import trained as kinds
from kontext.training.ahead import WINDOW
from kontext.training.arguments import parse_arguments
from kontext.training.footprint import optimizer_bytes


def needs(
    options: Train,
    config: TransformerConfig,
    trained: Trained,
    work: Work,
    *,
    device: torch.device,
    models: PictureModels | None = None,
    samples: Sequence[Request] = (),
) -> TrainingNeeds:
    """models: of the sample pictures, if there are any."""
    dtype = resolve_dtype(values.precision(options))
    common = TrainingNeeds(
        weights=transformer_weights(config, itemsize=dtype.itemsize, mode=quantization(options, device)),
        trained=trained,
        work=work,
        ahead=WINDOW,
        context=CONTEXT if device.type == "cuda" else 0,
    )
    if models is None or not samples:
        return common
    return TrainingNeeds(
        **vars(common)
        | {
            "pictures": largest(samples, text=options.t5_max_length, itemsize=dtype.itemsize),
            "vae": vae_of(options, models),
            "text": text_of(options, models.text, dtype),
        }
    )


def asked(options: Train, device: torch.device) -> Setup:
    """The setup that the options ask for."""
    return Setup(values.runtime(options, device).placement, values.policy(options, device))


def trained_sizes(options: Train, trained: kinds.Trained, device: torch.device) -> Trained:
    """Of what is learned, its tensors being on any device, also the meta device."""
    parameters = trained.parameters
    optimizer = optimizer_bytes(
        options.optimizer_type,
        [tuple(parameter.shape) for parameter in parameters.values()],
        arguments=parse_arguments(options.optimizer_args, "--optimizer-args"),
        device=device,
    )
    numbers = sum(parameter.numel() for parameter in parameters.values())
    itemsize = next(iter(parameters.values())).element_size()
    averaged = options.ema_decay is not None
    if train_whole.is_whole(options):
        plain = numbers * resolve_dtype(values.precision(options)).itemsize
        rounded = 0 if plain == numbers * itemsize else plain
        return Trained(numbers, optimizer, itemsize, averaged=averaged, replaces=plain, rounded=rounded)
    assert isinstance(trained, kinds.Adapters)
    ranks = sum(adapter.rank for adapter in trained.adapters.values())
    return Trained(numbers, optimizer, itemsize, ranks, averaged)


def largest_work(options: Train, batches: Batches) -> Work:
    """The batch of the most tokens."""
    itemsize = resolve_dtype(values.precision(options)).itemsize
    found = [Work(rows(group), tokens(group), itemsize) for group in batches.groups]
    return max(found, key=lambda work: work.batch * work.tokens)


def rows(group: Group) -> int:
    """Items in the fullest batch of a group."""
    return min(group.batch_size, len(group.entries) * group.repeats)


def tokens(group: Group) -> int:
    """Of one item: text, target and references."""
    pictures = sum(
        (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN) for width, height in group.entries[0].sizes
    )
    return text_header(group).shapes["t5_vec"][0] + pictures


def text_header(group: Group) -> Header:
    """What the text cache of a group's first item says: all of a group have embeddings of one shape."""
    header = read_header(group.entries[0].text)
    assert header is not None, "it was read when the caches were checked"
    return header
