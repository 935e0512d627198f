"""Options of `kontext generate`."""

from pathlib import Path
from typing import Literal

from kontext.options.base import Options, option, optional
from kontext.options.shared import Adapters, Common, Dit, Encoders, Planning, Swapping, Vae


class Picture(Options):
    """Picture"""

    prompt: str | None = option("The instruction, or the description of a picture.", default=None)
    negative_prompt: str | None = option(
        "What to steer away from; counts with --true-cfg-scale over 1.", default=None
    )
    image_size: tuple[int, int] | None = option(
        "Height and width of the output in pixels. Without it: the first reference's size, else 1024 1024.",
        default=None,
    )


class References(Options):
    """References"""

    control_image: list[Path] = option(
        "Reference picture to edit. Several may be given.", default=[], aliases=("control_image_path",)
    )
    control_resize: Literal["stretch", "crop"] = option(
        "How a reference comes to Kontext's nearest preferred size: stretch as BFL and diffusers do, or scale and crop "
        "the centre as musubi-tuner and ComfyUI do.",
        default="stretch",
    )
    no_resize_control: bool = option(
        "Crop references to multiples of 16 pixels, instead of resizing them to Kontext's nearest preferred size.",
        default=False,
    )
    restore_size: bool = option(
        "Return the picture at the first reference's own size (Lanczos).", default=False
    )
    control_placement: Literal["offset", "index"] = option(
        "Where several references lie: offset beside each other as ComfyUI does, index each on a layer of its own, "
        "for models trained so.",
        default="offset",
    )
    stitch: bool = option(
        "Make one wide reference of several: side by side, at the height of the first.", default=False
    )


class Inpainting(Options):
    """Part of a picture"""

    mask: Path | None = option(
        "Picture of the first reference's size: white is edited, black stays, and is pasted back exactly.",
        default=None,
    )
    mask_blur: float = option(
        "Blur of the mask's edge, in pixels of the reference.", default=0.0, ge=0, le=1000
    )
    strength: float = option(
        "Start from the first reference, noised this far, instead of from noise (1): less changes, fewer steps are done.",
        default=1.0,
        gt=0,
        le=1,
    )


class Sampling(Options):
    """Sampling"""

    infer_steps: int = option("Denoising steps.", default=25, ge=1)
    embedded_cfg_scale: float = option("Guidance scale that the model reads.", default=2.5, ge=0)
    true_cfg_scale: float = option(
        "Guidance by a second pass with the negative prompt; doubles the time when over 1.", default=1.0, ge=1
    )
    sampler: Literal["euler", "heun", "dpmpp_2m"] = option(
        "heun is more exact for twice the time, dpmpp_2m more exact with smooth edits for the same time.",
        default="euler",
    )
    schedule: Literal["flux", "simple", "beta"] = option(
        "Where the steps lie: flux by the resolution, simple and beta as in ComfyUI with its fixed shift of exp(1.15).",
        default="flux",
    )
    noise_layout: Literal["latent", "packed"] = option(
        "How the noise of a seed is drawn: latent as in diffusers and ComfyUI, packed as in musubi-tuner.",
        default="latent",
    )
    flow_shift: float | None = option(
        "Fixed shift of the noise levels. Without it, or with 0: the schedule's own.",
        default=None,
        ge=0,
    )
    step_cache: float = option(
        "Skip all blocks but the first at steps where what the first adds has changed by less than this share (such as "
        "0.08) since the last full step: faster, and another picture. 0: never.",
        default=0.0,
        ge=0,
        lt=1,
    )


class Loras(Options):
    """LoRA"""

    lycoris: bool = option(
        "Accepted for old command lines: LyCORIS files are recognised with or without it.", default=False
    )
    lora_attach: bool = option(
        "Keep LoRAs beside the weights instead of merging them in: some percent slower, exact in any precision. "
        "Always so with weights in 8 or 4 bits, and where strengths change between pictures.",
        default=False,
    )
    save_merged_model: Path | None = option(
        "Write the transformer with the LoRA files merged into it to this file, and stop.", default=None
    )


class Output(Options):
    """Output"""

    save_path: Path = option("Folder for the results.", default=Path("outputs"))
    output_name: str | None = option(
        "File name without ending. Without it: time and seed. Several results are numbered.",
        default=None,
        pattern=r"^[^/\\]+$",
        form="a name without slashes",
    )
    output_type: Literal["images", "latent", "latent_images"] = option(
        "Write pictures, latents as .safetensors, or both.", default="images"
    )
    output_format: Literal["png", "jpg", "webp"] = option(
        "Format of the pictures; jpg and webp at quality 95.", default="png"
    )
    grid: bool = option(
        "Also write a picture of references and result side by side, as <name>_grid.", default=False
    )
    preview: int | None = option(
        "Look at a picture in the making: every so many steps, a rough colour picture of where it is going is written "
        "as <name>_preview.png. The finished picture takes its place; after an interrupt, or where only latents are "
        "saved, it stays.",
        default=None,
        ge=1,
    )
    no_metadata: bool = option("Keep prompt and settings out of the files.", default=False)


class Source(Options):
    """Several pictures"""

    from_file: Path | None = option(
        "Several prompts. A text file has one per line, which may set --w --h --d (seed) --s (steps) --g (guidance) --fs (shift) "
        "--ci (reference) --n (negative) --l (true cfg) --m (LoRA strengths), and by their names what else is of one picture: "
        "--sampler, --schedule, --noise-layout, --mask, --mask-blur, --strength, --control-resize, --control-placement, "
        "--no-resize-control, --stitch, --restore-size. A .jsonl file has an object per line, a .toml file [[pictures]], with "
        "prompt and the names of these options.",
        default=None,
    )
    from_image: Path | None = option(
        "Repeat a picture from the settings that it carries; options that are given win. Models must be given.",
        default=None,
    )
    images_per_prompt: int = option(
        "Pictures of each prompt, with seeds counted up; as many at a time as the memory holds.",
        default=1,
        ge=1,
        le=10_000,
    )
    interactive: bool = option("Read prompt lines from the keyboard; models stay loaded.", default=False)
    latent_path: list[Path] = option("Decode these latent files, without the transformer.", default=[])


class Generate(
    Picture,
    References,
    Inpainting,
    Source,
    Sampling,
    Output,
    Adapters,
    Loras,
    Dit,
    Swapping,
    Vae,
    Encoders,
    Planning,
    Common,
):
    """Make or edit pictures."""

    dit: Path | None = optional(Dit, "dit")

    def weights(self) -> tuple[Path, ...]:
        if self.save_merged_model is not None:
            return ()
        encoders = (self.text_encoder1, self.text_encoder2, self.dit)
        loaded = (self.vae, *(() if self.latent_path else encoders))
        return tuple(path for path in loaded if path is not None)
