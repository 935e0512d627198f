"""What the options of `kontext train` say about the network, and about weights to start from."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from kontext.checkpoints import empty_transformer
from kontext.commands import train_whole
from kontext.errors import UserError
from kontext.generation.parts import Loras
from kontext.lora.adapter import DEFAULT_EXCLUDE, linears
from kontext.lora.limit import Limit
from kontext.lora.linear import AdapterLinear
from kontext.lora.patterns import idle_patterns
from kontext.options.train import Train
from kontext.training.arguments import parse_arguments
from kontext.training.network import MEANINGLESS, Network, network_of

# What sd-scripts and musubi-tuner call these networks in their files.
NETWORK_MODULES = {"lora": "networks.lora_flux", "loha": "networks.loha", "lokr": "networks.lokr"}


def network(options: Train) -> Network:
    """Raises UserError for bad --network-args, and for --dim-from-weights without weights."""
    if options.dim_from_weights and options.network_weights is None:
        raise UserError("--dim-from-weights needs --network-weights, the adapter whose ranks are meant.")
    arguments = parse_arguments(options.network_args, "--network-args")
    if options.dim_from_weights and "rank_patterns" in arguments:
        raise UserError(
            "--dim-from-weights takes all ranks from --network-weights: leave out rank_patterns of --network-args."
        )
    return network_of(
        options.network_dim, options.network_alpha, options.network_dropout, arguments, options.network_module
    )


def remarks(options: Train, network: Network) -> Iterator[str]:
    """A sentence for each of --network-args that does nothing."""
    given = parse_arguments(options.network_args, "--network-args")
    if ignored := [key for key in MEANINGLESS if key in given]:
        yield f"--network-args: {', '.join(ignored)} left out: there are no convolutions here, and nothing more to tell."
    if (network.include_patterns or network.exclude_patterns) and not options.show_timesteps:
        model = empty_transformer(options.dit)
        whole = train_whole.is_whole(options)
        names = (
            {name.rpartition(".")[0] for name, _ in model.named_parameters()}
            if whole
            else dict(linears(model))
        )
        always = () if whole else DEFAULT_EXCLUDE
        yield from idle_patterns(names, network.include_patterns, network.exclude_patterns, always=always)


def limit(options: Train, modules: Mapping[str, AdapterLinear]) -> Limit | None:
    """The limit that --scale-weight-norms sets, if `check_limit` lets it."""
    return None if options.scale_weight_norms is None else Limit(modules, options.scale_weight_norms)


def check_limit(options: Train, network: Network, optimizer: type[Optimizer]) -> None:
    """Raises UserError where --scale-weight-norms has nothing to scale."""
    if options.scale_weight_norms is None:
        return
    if network.kind == "dora":
        raise UserError(
            "--scale-weight-norms: a DoRA learns the lengths of a weight's rows, and adds nothing to it whose norm could be "
            "limited. Leave it out, or leave out dora of --network-args."
        )
    if hasattr(optimizer, "eval"):
        raise UserError(
            f"--scale-weight-norms: {options.optimizer_type} keeps two sets of weights, of which only one would be "
            "scaled. Take another optimizer."
        )


def base_loras(options: Train) -> Loras:
    """What is merged into the transformer before training. Raises UserError for a wrong number of strengths."""
    count, strengths = len(options.base_weights), options.base_weights_multiplier
    if len(strengths) not in (1, count):
        raise UserError(
            f"--base-weights-multiplier: {len(strengths)} strengths for {count} files of --base-weights. Give one for "
            "each, or a single one for all."
        )
    spread = strengths if len(strengths) == count else strengths * count
    return Loras(tuple(options.base_weights), tuple(spread), merge=True)


def beginnings(options: Train) -> dict[str, Any]:
    """What a run was built on beside the transformer, where it was."""
    found: dict[str, Any] = {"dim_from_weights": True} if options.dim_from_weights else {}
    if options.base_weights:
        found["base_weights"] = [path.name for path in options.base_weights]
        found["base_weights_multiplier"] = options.base_weights_multiplier
    return found
