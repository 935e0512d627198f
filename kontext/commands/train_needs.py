"""How much memory `kontext train` needs, as its options say."""

from dataclasses import dataclass, replace

import torch

from kontext.commands import train_values as values
from kontext.commands import train_whole
from kontext.commands.model_sizes import PictureModels, picture_models, text_of, transformer_weights, vae_of
from kontext.commands.models import quantization
from kontext.commands.picture_needs import largest, picture_sizes
from kontext.data.batches import Batches, Group
from kontext.data.cache import Header, read_header
from kontext.device import Precision, precision_of
from kontext.generation.request import Request
from kontext.memory.choice import Setup
from kontext.memory.estimate import CONTEXT, Trained, Work
from kontext.memory.modulation import trains_modulation
from kontext.memory.needs import Pictures, TrainingNeeds
from kontext.model.latents import PIXELS_PER_TOKEN
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.options.train import Train
from kontext.quant import restores_strips
from kontext.training import trained as kinds
from kontext.training.ahead import WINDOW
from kontext.training.arguments import parse_arguments
from kontext.training.footprint import optimizer_bytes
from kontext.training.prompts import read_sample_prompts
from kontext.training.team import Team


@dataclass(frozen=True)
class Outline:
    """A run without its weights: the transformer's sizes, what is trained of it (on the meta device), the samples.

    processes: how many share what is trained, and the optimizer's state.
    """

    config: TransformerConfig
    trained: kinds.Trained
    samples: tuple[Request, ...]
    needs: TrainingNeeds
    processes: int


def outline(
    options: Train, transformer: Transformer, trained: kinds.Trained, batches: Batches, team: Team, seed: int
) -> Outline:
    """From headers of files. Raises UserError for any that is missing, incomplete or of another kind.

    transformer, trained: on the meta device.
    """
    samples, models = (), None
    if options.sample_prompts is not None:
        samples = tuple(read_sample_prompts(options.sample_prompts, values.sample_request(seed)))
        models = picture_models(options)
    processes = team.size if train_whole.is_split(options, team) else 1
    needed = needs(
        options,
        transformer.config,
        trained_sizes(options, trained, team.device, processes),
        largest_work(options, batches, team.device),
        device=team.device,
        whole_modulation=trains_modulation(transformer),
        pictures=_pictures(options, samples, team.device),
        models=models,
    )
    return Outline(transformer.config, trained, samples, needed, processes)


def _pictures(options: Train, samples: tuple[Request, ...], device: torch.device) -> Pictures | None:
    if not samples:
        return None
    text, itemsize = options.t5_max_length, _precision(options, device).computing.itemsize
    return largest(samples, picture_sizes(samples), text=text, itemsize=itemsize)


def needs(
    options: Train,
    config: TransformerConfig,
    trained: Trained,
    work: Work,
    *,
    device: torch.device,
    whole_modulation: bool = False,
    pictures: Pictures | None = None,
    models: PictureModels | None = None,
) -> TrainingNeeds:
    """whole_modulation: as in TrainingNeeds. pictures, models: of the sample pictures, if there are any."""
    precision = _precision(options, device)
    frozen = (
        Precision(precision.computing, precision.computing) if train_whole.is_whole(options) else precision
    )
    strips = restores_strips(device, precision.computing)
    mode = quantization(options, device)
    return TrainingNeeds(
        weights=transformer_weights(config, frozen, mode, strips=strips and not options.compile),
        trained=trained,
        work=work,
        ahead=WINDOW,
        whole_modulation=whole_modulation,
        pictures=pictures,
        vae=models and vae_of(options, models, device),
        text=models and text_of(options, models.text, precision, strips=strips),
        context=CONTEXT if device.type == "cuda" else 0,
    )


def _precision(options: Train, device: torch.device) -> Precision:
    return precision_of(values.precision(options), device)


def asked(options: Train, team: Team) -> Setup:
    """The setup that the options ask for."""
    mix = values.mix(options)
    return Setup(values.runtime(options, team).placement, mix.policy, mix.count)


def trained_sizes(
    options: Train, trained: kinds.Trained, device: torch.device, processes: int = 1
) -> Trained:
    """Of what is learned, its tensors being on any device, also the meta device. processes: how many share it."""
    parameters = trained.parameters
    optimizer = optimizer_bytes(
        options.optimizer_type,
        [tuple(parameter.shape) for parameter in parameters.values()],
        arguments=parse_arguments(options.optimizer_args, "--optimizer-args"),
        device=device,
    )
    numbers = sum(parameter.numel() for parameter in parameters.values())
    itemsize = next(iter(parameters.values())).element_size()
    common = Trained(
        numbers // processes, optimizer // processes, itemsize, averaged=options.ema_decay is not None
    )
    if isinstance(trained, kinds.Adapters):
        adapters = trained.adapters.values()
        dense = max(each.dense * each.base.out_features * each.base.in_features for each in adapters)
        return replace(
            common,
            ranks=sum(adapter.rank for adapter in adapters),
            outputs=any(adapter.keeps_output for adapter in adapters),
            scratch=dense * _precision(options, device).computing.itemsize,
            units=max(adapter.units for adapter in adapters),
        )
    plain = numbers * _precision(options, device).computing.itemsize
    return replace(
        common, replaces=plain, rounded=plain if itemsize * numbers != plain or processes > 1 else 0
    )


def largest_work(options: Train, batches: Batches, device: torch.device) -> Work:
    """The batch of the most tokens."""
    itemsize = _precision(options, device).computing.itemsize
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
