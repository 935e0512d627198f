"""What generation is made from: which files, in which precision, and models that come and go."""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from kontext.allocation import give_back_memory
from kontext.backends import attention_backend, in_parts, use_attention
from kontext.checkpoints import (
    load_autoencoder,
    load_clip,
    load_clip_tokenizer,
    load_t5,
    load_t5_tokenizer,
    load_transformer,
    open_source,
    tell_of_fp8,
    transformer_config,
)
from kontext.compiling import compile_blocks
from kontext.console import notice, say
from kontext.errors import UserError
from kontext.lora.branches import attach_adapters
from kontext.lora.merge import merging
from kontext.lora.report import read_adapters
from kontext.lora.strength import Multiplier, Strength
from kontext.memory.placement import Placement
from kontext.memory.tiling import Mode, tile
from kontext.model.autoencoder import Autoencoder
from kontext.model.transformer import Transformer
from kontext.quant import Mode as Rounding
from kontext.quant import ProductLinear, QuantisedLinear

T = TypeVar("T")


@dataclass(frozen=True)
class ModelFiles:
    """Where the models lie. A part that is not needed may be None."""

    dit: Path | None = None
    vae: Path | None = None
    text_encoder1: Path | None = None
    text_encoder2: Path | None = None
    tokenizer1: Path | None = None
    tokenizer2: Path | None = None


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute. `kept` is the precision of the large weights of transformer and T5, if not `dtype`;
    `weights` that of all weights of the transformer, which are to be trained. `keep` leaves models loaded between
    pictures instead of freeing each after use.

    `step_cache`: as in `denoising.denoise`. `placement` is for the transformer; who attaches adapters applies it then.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    kept: torch.dtype | None = None
    weights: torch.dtype | None = None
    vae_dtype: torch.dtype = torch.float32
    vae_tiling: Mode = "auto"
    quantization: Rounding | None = None
    attention: str = "sdpa"
    split_attention: bool = False
    compiled: bool = False
    fp8_t5: bool = False
    t5_max_length: int = 512
    keep: bool = False
    step_cache: float = 0.0
    placement: Placement = Placement()


@dataclass(frozen=True)
class Loras:
    """LoRA files, one multiplier for each, and regexes that choose modules by name.

    `attach` keeps them beside the weights instead of merging: slower by some percent, but multipliers can change
    between pictures without loading the transformer again. `merge` merges them even into weights that are then rounded
    to 8 bits; 4 bits take no merge.
    """

    paths: tuple[Path, ...] = ()
    multipliers: tuple[Multiplier, ...] = ()
    include_patterns: tuple[str, ...] = ()
    exclude_patterns: tuple[str, ...] = ()
    attach: bool = False
    merge: bool = False


@dataclass(frozen=True)
class TextEncoders:
    """T5 and CLIP with their tokenizers."""

    t5: Any
    t5_tokenizer: Any
    clip: Any
    clip_tokenizer: Any


class Part(Generic[T]):
    """A model that is loaded when it is first called for, and can be let go."""

    def __init__(self, load: Callable[[], T]) -> None:
        self._load = load
        self._model: T | None = None

    def __call__(self) -> T:
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def loaded(self) -> bool:
        return self._model is not None

    def free(self) -> None:
        """Let the model go and hand its memory back to the device and the system."""
        if self._model is None:
            return
        alive = weakref.ref(self._model)
        self._model = None
        if alive() is not None:  # something refers to it in a circle
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        give_back_memory()


def open_autoencoder(files: ModelFiles, runtime: Runtime) -> Autoencoder:
    """Load the autoencoder. Raises UserError when no file was given for it."""
    path = _given(files.vae, "vae")
    say(f"Loading the autoencoder: {path}")
    model = load_autoencoder(path, device=runtime.device, dtype=runtime.vae_dtype)
    return tile(model, runtime.vae_tiling)


def open_text_encoders(files: ModelFiles, runtime: Runtime) -> TextEncoders:
    """Load T5 and CLIP with their tokenizers, which are looked for first. Raises UserError for a missing part."""
    t5, clip = _given(files.text_encoder1, "text_encoder1"), _given(files.text_encoder2, "text_encoder2")
    say(f"Loading the text encoders: {t5}, {clip}")
    t5_tokenizer = load_t5_tokenizer(files.tokenizer1, t5)
    clip_tokenizer = load_clip_tokenizer(files.tokenizer2, clip)
    where = {"device": runtime.device, "dtype": runtime.dtype}
    return TextEncoders(
        load_t5(t5, kept=runtime.kept, fp8=runtime.fp8_t5, **where),
        t5_tokenizer,
        load_clip(clip, **where),
        clip_tokenizer,
    )


def open_transformer(
    files: ModelFiles, runtime: Runtime, loras: Loras, strengths: Sequence[Multiplier]
) -> tuple[Transformer, list[Strength] | None]:
    """Load the transformer with the LoRAs, each at its strength: merged in, or attached beside the weights.

    The second value is None after a merge; for attached LoRAs it holds their strengths, and a change of its
    elements works from the next step on. Weights in few bits get them attached unless `loras.merge`: rounding after a
    merge would bury most of what a LoRA adds.

    Raises UserError when no file was given for the transformer, for LoRAs that do not fit, and for a merge into 4 bits.
    """
    path = _given(files.dit, "dit")
    _check_merge(loras, runtime)
    say(f"Loading the transformer: {path}")
    source = open_source(path, "transformer")
    if runtime.quantization is None and runtime.weights is None:
        tell_of_fp8(source, runtime.kept or runtime.dtype, "--fp8")
    adapters = read_adapters(loras.paths, transformer_config(source))
    patterns = {"include_patterns": loras.include_patterns, "exclude_patterns": loras.exclude_patterns}
    attach = bool(adapters) and not loras.merge and (loras.attach or runtime.quantization is not None)
    edit = merging(adapters, strengths, **patterns) if adapters and not attach else None
    model = load_transformer(
        path,
        device=runtime.device,
        dtype=runtime.weights or runtime.dtype,
        kept=None if runtime.weights else runtime.kept,
        quantization=runtime.quantization,
        edit=edit,
        on_host=runtime.placement.on_host,
    )
    _tell_of_products(model, runtime, path)
    attend = attention_backend(runtime.attention, runtime.device)
    use_attention(model, in_parts(attend) if runtime.split_attention else attend)
    if runtime.compiled:
        compile_blocks(model, runtime.device)
    if not attach:
        return model, None
    return model, attach_adapters(model, adapters, strengths, device=runtime.device, **patterns).strengths


def _check_merge(loras: Loras, runtime: Runtime) -> None:
    if loras.merge and loras.paths and runtime.quantization == "nf4":
        raise UserError(
            f"{loras.paths[0]} cannot be merged into weights of 4 bits: rounding moves them several times further "
            "than a LoRA does. Attach it instead (--lora-attach, which generate does by itself), or use --fp8-scaled or "
            "--int8 in place of --nf4."
        )


def _tell_of_products(model: Transformer, runtime: Runtime, path: Path) -> None:
    """A notice of weights that are not multiplied in 8 bits although that was asked for."""
    if not (runtime.quantization or "").endswith("_fast"):
        return
    kinds = [type(module) for module in model.modules() if isinstance(module, QuantisedLinear)]
    if slow := kinds.count(QuantisedLinear):
        notice(
            f"{path}: {slow} of {slow + kinds.count(ProductLinear)} weights are not multiplied in 8 bits, for their sizes are no multiples of 16, "
            "or the file has scales for parts of their rows."
        )


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        raise UserError(f"--{name.replace('_', '-')} must be given to make a picture.")
    return path
