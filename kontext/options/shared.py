"""Groups of options that several commands share."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator, model_validator

from kontext.options.base import Options, flag_name, option

SHORT_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def long_precision(value: Any) -> Any:
    """fp32, bf16 and fp16 by their long names."""
    return SHORT_PRECISIONS.get(value, value) if isinstance(value, str) else value


def _device_name(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N (the GPU's number), not '{value}'.")
    return value


Precision = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(long_precision)]


def _short_attention(value: Any) -> Any:
    return "sage" if value == "sageattn" else value


Attention = Annotated[
    Literal["sdpa", "torch", "flash", "flash3", "sage", "xformers"], BeforeValidator(_short_attention)
]


def _number_or_text(value: Any) -> Any:
    """A text that is a number as that number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Multiplier = Annotated[float | str, BeforeValidator(_number_or_text)]
Seed = Annotated[int, Ge(0), Lt(2**63)]


class Common(Options):
    """General"""

    device: Annotated[str, AfterValidator(_device_name)] = option(
        "Where to compute: auto takes the GPU when there is one, else the CPU. A GPU is named cuda or cuda:N.",
        default="auto",
    )
    dtype: Precision = option("Precision of the models' weights and arithmetic.", default="bfloat16")
    seed: Seed | None = option("Random seed; without it a new one is drawn and shown.", default=None)
    config_file: Path | None = option(
        "TOML file with options of this command. What the command line gives wins.",
        default=None,
        command_line_only=True,
    )
    print_config: bool = option(
        "Print the options as resolved, in TOML that --config-file reads, and exit.",
        default=False,
        command_line_only=True,
    )
    debug: bool = option("Show the traceback of an error.", default=False, command_line_only=True)


WEIGHTS = (("fp8_fast", "fp8_scaled", "fp8"), ("int8_fast", "int8"), ("nf4",))
"""Options for weights in few bits, by form: those of one form go together, and the first that is given counts."""


class Dit(Options):
    """Transformer (DiT)"""

    dit: Path = option("Weights of the transformer: a .safetensors file or a diffusers folder.")
    fp8: bool = option(
        "Keep the weights of the blocks in 8 bits (plain cast).", default=False, aliases=("fp8_base",)
    )
    fp8_scaled: bool = option(
        "Keep the weights of the blocks in 8 bits, with a scale for each 64 inputs: closer to the original than --fp8.",
        default=False,
    )
    fp8_fast: bool = option(
        "Also multiply in 8 bits, in training both ways: faster on RTX 40, H100 and later, less exact. Elsewhere it is "
        "the same as --fp8-scaled.",
        default=False,
    )
    int8: bool = option(
        "Keep the weights of the blocks as whole numbers of 8 bits, with a scale for each 64 inputs: the closest of all.",
        default=False,
    )
    int8_fast: bool = option(
        "Also multiply whole numbers, in training both ways: faster from RTX 20 and A100 on. Large outliers cost it more "
        "than --fp8-fast.",
        default=False,
    )
    nf4: bool = option(
        "Keep the weights of the blocks in 4 bits: half the memory of 8 bits, four times the error of fp8.",
        default=False,
    )
    attn_mode: Attention = option(
        "Attention kernel: sdpa (also called torch) is PyTorch's own; the others need their package "
        "(flash-attn, flash-attn 3, sageattention, xformers) and a GPU.",
        default="sdpa",
        flags={
            "sdpa": "sdpa",
            "flash_attn": "flash",
            "flash3": "flash3",
            "sage_attn": "sage",
            "xformers": "xformers",
        },
    )
    split_attn: bool = option(
        "Attend for some tokens at a time: less memory with kernels that hold all scores at once (PyTorch's without a fused "
        "kernel), the same to rounding. It has no use with the others.",
        default=False,
    )
    compile: bool = option(
        "Compile the blocks: fewer passes over memory, the same to rounding. The first step takes a minute longer; "
        "kernels are kept for later runs. It needs triton on a GPU, a C++ compiler on a CPU.",
        default=False,
    )

    @model_validator(mode="after")
    def _one_form_of_weights(self) -> Self:
        forms = [[name for name in names if getattr(self, name)] for names in WEIGHTS]
        first = [flag_name(names[0]) for names in forms if names]
        if len(first) > 1:
            raise ValueError(f"{' and '.join(first)} exclude each other: weights are kept in one form.")
        return self


class Swapping(Options):
    """Weights on the host"""

    blocks_to_swap: Annotated[str, BeforeValidator(str)] = option(
        "Keep the weights of N // 2 double and (N - N // 2) * 2 + 1 single blocks in host memory and stream them to "
        "the GPU ahead of use (max: of all blocks). The result is the same to the bit.",
        default="0",
        pattern=r"^(\d+|max)$",
        form="a whole number from 0 or max",
    )
    modulation: Literal["auto", "resident"] = option(
        "Where the weights of the blocks' modulation live, a quarter of the model: auto keeps them in host memory when "
        "they need not be on the GPU, resident never.",
        default="auto",
    )


class Planning(Options):
    """Planning"""

    vram_budget: Annotated[str, BeforeValidator(str)] | None = option(
        "GiB of GPU memory to stay within, or auto: what is free. Chooses what is not given: modulation on the host, "
        "streamed blocks, and in training what is computed again; never weights in fewer bits.",
        default=None,
        pattern=r"^(auto|\d+(\.\d+)?)$",
        form="a number of GiB or auto",
    )
    dry_run: bool = option(
        "Try everything that can fail later, show what will be done and the memory it takes, and stop. No weights are "
        "loaded.",
        default=False,
        command_line_only=True,
    )


class Adapters(Options):
    """LoRA"""

    lora_weight: list[Path] = option("LoRA files to apply.", default=[])
    lora_multiplier: list[Multiplier] = option(
        "One strength per LoRA file, or one for all. Blocks may have factors of their own: "
        "1.0:double=0.5,single=1.2,single3-10=0.8.",
        default=[1.0],
    )
    include_patterns: list[str] = option(
        "Apply a LoRA only to modules that match one of these regexes.", default=[]
    )
    exclude_patterns: list[str] = option("Leave out modules that match one of these regexes.", default=[])


class Vae(Options):
    """Autoencoder (VAE)"""

    vae: Path | None = option(
        "Weights of the autoencoder: a .safetensors file or a diffusers folder.",
        default=None,
        aliases=("ae",),
    )
    vae_dtype: Precision = option("Precision of the autoencoder.", default="float32")
    vae_tiling: Literal["auto", "on", "off"] = option(
        "Work on pictures in strips of rows: half the memory, the same result to rounding, and no seams. auto: when a GPU's "
        "memory is short.",
        default="auto",
    )


class Encoders(Options):
    """Text encoders"""

    text_encoder1: Path | None = option(
        "T5-XXL weights: a .safetensors file or a Hugging Face folder.", default=None, aliases=("t5",)
    )
    text_encoder2: Path | None = option(
        "CLIP-L weights: a .safetensors file or a Hugging Face folder.", default=None, aliases=("clip_l",)
    )
    tokenizer1: Path | None = option(
        "Folder of the T5 tokenizer. Without it: a folder beside the weights, else google/t5-v1_1-xxl from the hub.",
        default=None,
    )
    tokenizer2: Path | None = option(
        "Folder of the CLIP tokenizer. Without it: a folder beside the weights, "
        "else openai/clip-vit-large-patch14 from the hub.",
        default=None,
    )
    t5_max_length: int = option("Tokens that T5 reads; shorter texts are padded.", default=512, ge=1, le=512)
    fp8_t5: bool = option("Keep the weights of T5 in 8 bits.", default=False)


class DatasetFile(Options):
    """Dataset"""

    dataset_config: Path = option("TOML file that lists the pictures, captions and references.")
    strict: bool = option(
        "Stop at the first unreadable picture instead of listing all at the end.", default=False
    )
