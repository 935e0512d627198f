"""Groups of `kontext train` that say what is trained and how: network, noise levels, optimizer, length."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from kontext.options.base import Options, option

NETWORKS = {
    "networks.lora_flux": "lora",
    "networks.lora": "lora",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
}


def _network(value: Any) -> Any:
    return NETWORKS.get(value, value) if isinstance(value, str) else value


def _pair(words: list[str]) -> list[str]:
    for word in words:
        if not word.partition("=")[1] or not word.partition("=")[0].strip():
            raise ValueError(f"{word!r} is not of the form key=value.")
    return words


Pairs = Annotated[list[str], AfterValidator(_pair)]


class Network(Options):
    """Network"""

    network_module: Annotated[Literal["lora", "loha", "lokr", "none"], BeforeValidator(_network)] = option(
        "What is trained: lora (networks.lora_flux means the same), loha or lokr (networks.loha, networks.lokr); a DoRA "
        "is lora with --network-args dora=true. none: no adapter, but the weights of the transformer itself; the result has "
        "the layout of --dit.",
        default="lora",
    )
    network_dim: int = option("Rank of the LoRA.", default=16, ge=1)
    network_alpha: float | None = option(
        "Alpha of the LoRA, which acts with strength alpha/rank. Without it: the rank.", default=None, gt=0
    )
    network_dropout: float = option(
        "Dropout between the two factors of a LoRA, and on what a LoHa or LoKr adds.", default=0.0, ge=0, lt=1
    )
    network_args: Pairs = option(
        "Further settings as key=value: rank_dropout, module_dropout, include_patterns, exclude_patterns (a regex, or "
        "a list of them in Python's spelling), loraplus_lr_ratio, dora (dora_wd means the same), factor (of lokr), "
        "rank_patterns and lr_patterns: the rank (at the same alpha/rank) and the learning rate of some modules, as "
        "regex=number or a list of that, such as rank_patterns=['double_blocks.*=32', 'single_blocks.*=8']; the first "
        "that matches a whole name counts. With --network-module none: include_patterns (alone: train only what matches), "
        "exclude_patterns and lr_patterns.",
        default=[],
    )
    network_weights: Path | None = option(
        "Adapter file to start from, in any format that generate reads.", default=None
    )
    dim_from_weights: bool = option(
        "Take the modules, ranks, alphas and LoKr's factors from --network-weights instead of --network-dim, --network-alpha "
        "and --network-args.",
        default=False,
    )
    base_weights: list[Path] = option(
        "Adapter files to merge into the transformer before training.", default=[]
    )
    base_weights_multiplier: list[float] = option(
        "One strength per file of --base-weights, or one for all.", default=[1.0]
    )


class Noise(Options):
    """Noise levels"""

    timestep_sampling: Literal[
        "sigma", "uniform", "sigmoid", "shift", "flux_shift", "logsnr", "qinglong_flux"
    ] = option(
        "How noise levels are drawn. flux_shift depends on the size of the picture.", default="flux_shift"
    )
    sigmoid_scale: float = option("Width of sigmoid, shift and flux_shift.", default=1.0, gt=0)
    discrete_flow_shift: float = option("Shift of the levels for shift and sigma.", default=1.0, gt=0)
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = option(
        "cosmap and sigma_sqrt weight the loss by level; logit_normal and mode shape the sampling of sigma.",
        default="none",
    )
    logit_mean: float = option("Mean of logsnr, and of sigma with logit_normal.", default=0.0)
    logit_std: float = option("Spread of logsnr, and of sigma with logit_normal.", default=1.0, gt=0)
    mode_scale: float = option("Strength of sigma with mode.", default=1.29, ge=-1, le=1.75)
    min_timestep: int = option("Lowest level that is trained, in thousandths.", default=0, ge=0, le=999)
    max_timestep: int = option("Highest level that is trained, in thousandths.", default=1000, ge=1, le=1000)
    preserve_distribution_shape: bool = option(
        "With a limited range: cut the distribution off there instead of squeezing it in.", default=False
    )
    num_timestep_buckets: int | None = option(
        "Draw the levels of an epoch evenly from this many equal shares of the distribution.",
        default=None,
        ge=2,
    )
    show_timesteps: Literal["image", "console"] | None = option(
        "Show how the levels are spread for the dataset's sizes and what each counts, and exit: as <output-name>-timesteps.png "
        "in the output folder, or as a table.",
        default=None,
    )
    guidance_scale: float = option("Guidance that the model is told in training.", default=1.0, ge=0)


class Optimization(Options):
    """Optimizer"""

    optimizer_type: str = option(
        "adamw, adamw8bit, pagedadamw8bit, lion8bit, adafactor, prodigy, adamwschedulefree, sgd, or module.Class "
        "(of torch.optim: Class).",
        default="adamw",
    )
    optimizer_args: Pairs = option("Its arguments as key=value, such as weight_decay=0.01.", default=[])
    learning_rate: float = option("Learning rate.", default=1e-4, gt=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "rex",
    ] = option("How the learning rate changes.", default="constant")  # fmt: skip
    lr_scheduler_type: str | None = option(
        "A scheduler of torch's kind instead, as module.Class, or Class alone of torch's own, such as OneCycleLR; it begins "
        "after the warmup.",
        default=None,
    )
    lr_scheduler_args: Pairs = option(
        "Arguments of the scheduler as key=value, by transformers' names, such as min_lr=1e-6, num_cycles=2, lr_end=1e-6, "
        "decay_type=linear, or those of --lr-scheduler-type. They win over the options below.",
        default=[],
    )
    lr_warmup_steps: float = option(
        "Steps over which the learning rate rises from 0; below 1: a share of all steps.", default=0, ge=0
    )
    lr_decay_steps: float = option(
        "Steps over which warmup_stable_decay falls at the end; below 1: a share of all steps.",
        default=0,
        ge=0,
    )
    lr_scheduler_num_cycles: int = option("Restarts of cosine_with_restarts.", default=1, ge=1)
    lr_scheduler_power: float = option("Power of polynomial.", default=1.0, gt=0)
    lr_scheduler_timescale: int | None = option(
        "Time scale of inverse_sqrt in steps. Without it: the warmup.", default=None, ge=1
    )
    lr_scheduler_min_lr_ratio: float = option(
        "Floor of cosine_with_min_lr, warmup_stable_decay and rex, as a share of the learning rate.",
        default=0.0,
        ge=0,
        le=1,
    )
    ema_decay: float | None = option(
        "Keep a moving average of the LoRA's weights too, with this decay (such as 0.99; in step n at most (1+n)/(10+n)), "
        "and save it beside as <output-name>-ema. Sample pictures and validation show the weights in training.",
        default=None,
        gt=0,
        lt=1,
    )
    max_grad_norm: float = option("Gradients are clipped to this norm; 0: not at all.", default=1.0, ge=0)
    scale_weight_norms: float | None = option(
        "Max-norm regularisation: after every step, scale the factors of each module of the LoRA, LoHa or LoKr such that "
        "what it adds to its weight has at most this norm (1 is a good start).",
        default=None,
        gt=0,
    )


class Length(Options):
    """Length and batches"""

    max_train_steps: int = option("Optimizer steps of the run.", default=1600, ge=1)
    max_train_epochs: int | None = option("Epochs of the run, instead of steps.", default=None, ge=1)
    gradient_accumulation_steps: int = option("Batches per optimizer step.", default=1, ge=1)
    max_data_loader_n_workers: int = option(
        "Processes that load batches; 0: none of their own.", default=2, ge=0
    )
    persistent_data_loader_workers: bool = option(
        "Keep the loading processes from epoch to epoch, so that no epoch waits for its first batch.",
        default=True,
    )
    ddp_timeout: float = option(
        "Of several processes: minutes that one waits for another that has not ended but does not come, such as one that "
        "writes a whole model.",
        default=360,
        gt=0,
    )


class Memory(Options):
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        "fp16 and bf16 stand for --dtype float16 and bfloat16. What is trained and its optimizer are float32. "
        "Without it: what accelerate launch was given.",
        default=None,
    )
    full_bf16: bool = option(
        "With --network-module none: keep the trained weights in bfloat16 too, instead of float32. Half the memory, but "
        "updates below about 0.4 % of a weight are lost to rounding.",
        default=False,
    )
    checkpointing: str | None = option(
        "What blocks compute again in the backward pass, to keep less: none, only elementwise passes (nine tensors of "
        "tokens x width are kept); selective, all but the attention (two); whole, everything (one). selective:20 is for "
        "20 blocks, and none for the rest; whole:20 for 20, and selective for the rest. auto: as little as the GPU's free "
        "memory allows. By default none, or whole with --gradient-checkpointing.",
        default=None,
        pattern=r"^(none|auto|(selective|whole)(:\d+)?)$",
        form="none, auto, selective or whole, or one of the last two with a number of blocks such as selective:20",
    )
    gradient_checkpointing: bool = option("The same as --checkpointing whole.", default=False)
    gradient_checkpointing_cpu_offload: bool = option(
        "With --checkpointing whole, which it implies: keep the inputs of the blocks in host memory.",
        default=False,
    )
