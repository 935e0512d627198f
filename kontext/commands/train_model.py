"""The transformer of a run, and what of it is trained."""

from kontext import console
from kontext.commands import train_values, train_whole
from kontext.device import resolve_dtype
from kontext.generation.pipeline import Kontext
from kontext.lora.files import load_weights
from kontext.lora.report import read_adapters
from kontext.memory.casting import compute_in
from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from kontext.model.transformer import Transformer
from kontext.options.train import Train
from kontext.training.network import Network, build
from kontext.training.seeds import seed_of
from kontext.training.trained import Adapters, Trained, Weights, thaw


def model(options: Train, kontext: Kontext, network: Network, seed: int) -> tuple[Transformer, Trained]:
    """The transformer and what is trained of it: load, attach or thaw, remake, place, recompute, in this order."""
    transformer = kontext.transformer()
    if train_whole.is_whole(options):
        trained: Trained = _weights(options, kontext, network, transformer)
    else:
        trained = _adapters(options, kontext, network, transformer, seed)
    policy = train_values.policy(options, kontext.runtime.device)
    remake_blocks(transformer, policy)
    kontext.runtime.placement.apply(transformer, kontext.runtime.device)
    recompute_blocks(transformer, policy)
    return transformer, trained


def _weights(options: Train, kontext: Kontext, network: Network, transformer: Transformer) -> Weights:
    runtime = kontext.runtime
    parameters = thaw(transformer, network, stored=runtime.weights or runtime.dtype, rest=runtime.dtype)
    compute_in(transformer, parameters, runtime.dtype)
    return Weights(parameters, train_whole.layout(options))


def _adapters(
    options: Train, kontext: Kontext, network: Network, transformer: Transformer, seed: int
) -> Adapters:
    device = kontext.runtime.device
    given = [] if options.network_weights is None else [options.network_weights]
    files = read_adapters(given, transformer.config)
    like = files[0] if options.dim_from_weights else None
    modules = build(transformer, network, seed=seed_of("network", seed), device=device, like=like)
    for file in files:
        missing = load_weights(modules, file)
        console.say(f"Starting from {options.network_weights}: {len(modules) - len(missing)} modules.")
        if missing:
            console.warn(
                f"{options.network_weights} says nothing of {len(missing)} modules, such as {missing[0]}."
            )
    return Adapters(modules, resolve_dtype(options.save_precision or "float32"))
