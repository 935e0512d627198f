"""From a request to a picture: frame (references, size), condition (text), denoise, decode.

Each stage takes what the one before returns, so that a batch can run stage by stage and hold one large model at
a time. Latents are (1, C, h, w) with h and w an eighth of the pixels, and wait on the CPU between stages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext.console import notice
from kontext.data.images import Size, to_image, to_tensor
from kontext.denoiser import Conditioning
from kontext.device import resolve_device, told_precision
from kontext.errors import UserError
from kontext.generation.colours import Colours, fit_colours
from kontext.generation.cut import say_cut
from kontext.generation.denoising import OnStep, check_finite, denoise
from kontext.generation.inpaint import Canvas, check_canvas, latent_area, open_mask, paste
from kontext.generation.parts import (
    Loras,
    ModelFiles,
    Part,
    Runtime,
    TextEncoders,
    open_autoencoder,
    open_text_encoders,
    open_transformer,
)
from kontext.generation.references import Opened, at_size, open_references, prepare, restore
from kontext.generation.request import Reference, Request
from kontext.generation.sizes import output_size
from kontext.generation.stages import Conditioned, Framed, Text
from kontext.lora.merge import spread
from kontext.lora.strength import Multiplier, Strength, as_strength
from kontext.model.autoencoder import Autoencoder
from kontext.model.latents import LATENT_FACTOR
from kontext.model.text import encode_clip, encode_t5
from kontext.model.transformer import Transformer

T5_LIMIT = 512


class Kontext:
    """Makes and edits pictures. Models load when they are first needed; `Kontext.load` is the door for programs."""

    def __init__(self, files: ModelFiles, runtime: Runtime, loras: Loras | None = None) -> None:
        self.runtime = runtime
        self.loras = loras or Loras()
        self._strengths = self._own_strengths()
        self._attached: list[Strength] | None = None  # the strengths that attached LoRAs go by
        self.autoencoder = Part(lambda: open_autoencoder(files, runtime))
        self.text_encoders = Part(lambda: self._load_text_encoders(files))
        self.transformer = Part(lambda: self._load_transformer(files))
        self._texts: dict[str, Text] = {}
        self._colours: Colours | None = None

    @classmethod
    def load(
        cls,
        *,
        dit: Path | str,
        vae: Path | str,
        text_encoder1: Path | str,
        text_encoder2: Path | str,
        loras: Mapping[Path | str, Multiplier] | None = None,
        device: str = "auto",
        dtype: str = "bfloat16",
    ) -> "Kontext":
        """The door for programs: from files, with LoRAs and their strengths; models stay loaded between pictures.

        Tokenizers are looked for beside the text encoders. For other choices make a ModelFiles and a Runtime.
        """
        files = ModelFiles(Path(dit), Path(vae), Path(text_encoder1), Path(text_encoder2))
        where = resolve_device(device)
        precision = told_precision(dtype, where)
        runtime = Runtime(where, precision.computing, precision.kept, keep=True)
        weights = {Path(path): strength for path, strength in (loras or {}).items()}
        return cls(files, runtime, Loras(tuple(weights), tuple(weights.values())))

    def edit(self, image: Reference | str | None, prompt: str, **settings: object) -> Image.Image:
        """One picture from a reference (a path or a PIL image; None: from the prompt alone).

        `settings` are fields of Request: seed, width, height, steps, guidance, ...
        """
        reference = Path(image) if isinstance(image, str) else image
        references = () if reference is None else (reference,)
        return self.picture(Request(prompt, references=references, **settings))

    def picture(self, request: Request) -> Image.Image:
        """One picture, each model let go after its use unless the runtime keeps it."""
        conditioned = self.condition(self.frame(request))
        self.release(self.text_encoders)
        latent = self.denoise(conditioned)
        self.release(self.transformer)
        return self.finish(conditioned.framed, latent)

    def release(self, part: Part) -> None:
        """Free a model after its stage, unless the runtime keeps models loaded."""
        if not self.runtime.keep:
            part.free()

    @torch.no_grad()
    def frame(self, request: Request) -> Framed:
        """Choose the seed and the output's size, and encode the references (posterior mean).

        Raises UserError for an unreadable reference, a size under 16 pixels, a wrong number of LoRA strengths and
        settings that need a reference where there is none.
        """
        self._strengths_for(request)
        _check(request)
        opened = open_references(request)
        mask = open_mask(request, opened[0]) if opened else None
        images = [prepare(each, request) for each in opened]
        first = images[0].size if images else None
        width, height = output_size(request.width, request.height, first)
        asked = (request.width or width, request.height or height)
        if asked != (width, height):
            notice(
                f"The output size {asked[0]}x{asked[1]} is rounded down to {width}x{height} (multiples of 16)."
            )
        references = tuple(self._encode(image) for image in images)
        canvas = None
        if request.uses_canvas:
            same = images[0].size == (width, height)
            latent = references[0] if same else self._encode_at(opened[0], (width, height), request)
            canvas = Canvas(latent, latent_area(mask, (width, height), request))
        return Framed(request.seeded(), width, height, references, canvas)

    def _encode_at(self, opened: Opened, size: Size, request: Request) -> Tensor:
        notice(
            f"{opened.name}: brought to the output's size, {size[0]}x{size[1]}, as the picture that is changed."
        )
        return self._encode(at_size(opened.image, size, request))

    def _encode(self, image: Image.Image) -> Tensor:
        model = self._autoencoder_at_work()
        pixels = to_tensor(image)[None].to(self.runtime.device, self.runtime.vae_dtype)
        return model.encode(pixels).float().cpu()

    def condition(self, framed: Framed) -> Conditioned:
        """Encode the prompts. A text that was encoded before is not encoded again."""
        request = framed.request
        negative = None
        if request.uses_negative:
            negative = self._conditioning(framed, request.negative_prompt)
        return Conditioned(framed, self._conditioning(framed, request.prompt), negative)

    def _conditioning(self, framed: Framed, prompt: str) -> Conditioning:
        if prompt not in self._texts:
            self._texts[prompt] = self._read(prompt)
        text = self._texts[prompt]
        request = framed.request
        return Conditioning(text.txt, text.vector, framed.references, request.guidance, request.placement)

    @torch.no_grad()
    def _read(self, prompt: str) -> Text:
        parts = self.text_encoders()
        length, clip_length = self.runtime.t5_max_length, parts.clip.config.length
        more = "." if length == T5_LIMIT else f"; --t5-max-length {T5_LIMIT} reads more."
        say_cut("T5", parts.t5_tokenizer, prompt, length, more)
        say_cut(
            "CLIP",
            parts.clip_tokenizer,
            prompt,
            clip_length,
            ", which T5 still reads if it is not cut there.",
        )
        txt = encode_t5(parts.t5, parts.t5_tokenizer, [prompt], max_length=length)
        return Text(txt.cpu(), encode_clip(parts.clip, parts.clip_tokenizer, [prompt]).cpu())

    def _own_strengths(self) -> tuple[Strength, ...]:
        return tuple(spread(self.loras.multipliers, len(self.loras.paths)))

    def _strengths_for(self, request: Request) -> tuple[Strength, ...]:
        count = len(self.loras.paths)
        if request.multipliers is not None and len(request.multipliers) != count:
            raise UserError(
                f"{len(request.multipliers)} LoRA strengths are given, but there are {count} LoRA files."
            )
        if request.multipliers is None:
            return self._own_strengths()
        return tuple(as_strength(multiplier) for multiplier in request.multipliers)

    def transformer_for(self, request: Request) -> Transformer:
        """The transformer with the LoRAs at the request's strengths, ready to compute.

        Merged LoRAs that change are loaded anew.
        """
        strengths = self._strengths_for(request)
        if strengths != self._strengths:
            self._strengths = strengths
            if self._attached is None:
                self.transformer.free()
            else:
                self._attached[:] = strengths
        model = self.transformer()
        self.runtime.placement.apply(model, self.runtime.device)
        return model

    def _autoencoder_at_work(self) -> Autoencoder:
        return self.autoencoder().to(self.runtime.device)

    def _make_room(self) -> None:
        """Let the autoencoder, which is needed before and after the larger models, wait on the host meanwhile."""
        if self.autoencoder.loaded and not self.runtime.keep:
            self.autoencoder().cpu()

    def _load_text_encoders(self, files: ModelFiles) -> TextEncoders:
        self._make_room()
        return open_text_encoders(files, self.runtime)

    def _load_transformer(self, files: ModelFiles) -> Transformer:
        self._make_room()
        model, self._attached = open_transformer(files, self.runtime, self.loras, self._strengths)
        return model

    def denoise(
        self, conditioned: Conditioned, on_step: OnStep | None = None, *, seeds: Sequence[int] = ()
    ) -> Tensor:
        """The finished latent (1, C, h, w), float32 on the CPU; or, of several seeds, (B, C, h, w) in one batch.

        Raises UserError at the first step that leaves NaN or infinite values.
        """
        request = conditioned.framed.request
        assert request.seed is not None
        return denoise(
            self.transformer_for(request),
            conditioned,
            seeds or (request.seed,),
            device=self.runtime.device,
            dtype=self.runtime.dtype,
            on_step=on_step,
            step_cache=self.runtime.step_cache,
        )

    def finish(self, framed: Framed, latent: Tensor) -> Image.Image:
        """The finished latent of a request as the picture that was asked for."""
        picture, request = self.decode(latent), framed.request
        if not request.restore_size and request.mask is None:
            return picture
        first = open_references(request)[0]
        return paste(restore(picture, first) if request.restore_size else picture, first, request)

    def look(self, latent: Tensor) -> Image.Image:
        """About what a latent (1, C, h, w) decodes to, for next to nothing."""
        return self.colours().picture(latent, LATENT_FACTOR)

    def colours(self) -> Colours:
        """The colours of latents, learned from the autoencoder once."""
        if self._colours is None:
            self._colours = fit_colours(self._autoencoder_at_work())
        return self._colours

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Image.Image:
        """A latent (1, C, h, w) to an RGB picture.

        Raises UserError for a latent of another autoencoder, and when decoding yields NaN.
        """
        model, dtype = self._autoencoder_at_work(), self.runtime.vae_dtype
        channels = model.config.latent_channels
        if latent.shape[1] != channels:
            raise UserError(
                f"The latent has {latent.shape[1]} channels, but this autoencoder decodes {channels}."
            )
        pixels = model.decode(latent.to(self.runtime.device, dtype))[0]
        check_finite(pixels, "Decoding: the pixels became NaN or infinite", "--vae-dtype", dtype)
        return to_image(pixels)


def _check(request: Request) -> None:
    """Raise UserError for settings that have no meaning without a reference."""
    if request.restore_size and not request.references:
        raise UserError("--restore-size needs a reference (--control-image), whose size it restores.")
    check_canvas(request)
