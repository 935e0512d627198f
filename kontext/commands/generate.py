"""`kontext generate`: make or edit pictures, one, from a file of prompts, or as they are typed in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kontext import __version__
from kontext.backends import attention_backend
from kontext.checkpoints import open_source, transformer_config
from kontext.checkpoints.recognise import Kind
from kontext.commands import budget, generate_plan
from kontext.commands.conversing import converse
from kontext.commands.merge import merge_into_checkpoint
from kontext.commands.models import model_files, model_runtime
from kontext.commands.picture_needs import picture_sizes
from kontext.commands.recalling import recall, run_settings
from kontext.console import say, table
from kontext.device import resolve_device
from kontext.errors import UserError
from kontext.generation.batch import run_batch
from kontext.generation.outputs import Writer, read_latent
from kontext.generation.parts import Loras, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.prompt_files import read_prompt_file
from kontext.generation.request import Request
from kontext.lora.files import read_adapter
from kontext.lora.merge import spread
from kontext.options.base import flag_name, need
from kontext.options.generate import Generate
from kontext.processes import Processes, joined


def run(options: Generate) -> None:
    """Do what the options ask for, together with the other processes of the launch."""
    if options.from_image is not None:
        options = recall(options, options.from_image)
    _check_mode(options)
    with joined() as crew:
        if options.save_merged_model is not None:
            out = options.save_merged_model
            crew.first(lambda: _merge(options, out))
        elif options.interactive and crew.size > 1:
            raise UserError("--interactive talks to one process; start it without a launcher.")
        else:
            _generate(options, crew)


def _generate(options: Generate, crew: Processes) -> None:
    base = _request(options)
    requests = crew.first(lambda: _requests(options, base))  # seeds that were not given are drawn in it
    changing = options.interactive or any(request.multipliers is not None for request in requests)
    loras = _loras(options, attach=changing or options.lora_attach)
    writer = _writer(options, loras, crew)
    if options.latent_path:
        need(options, "vae", because="to decode latents (--latent-path)")
        kontext = Kontext(model_files(options), _runtime(options), loras)
        _decode(kontext, options.latent_path, writer, crew)
        return
    _check_models(options)
    if options.dry_run or options.vram_budget:
        device, sizes = resolve_device(options.device), picture_sizes(requests)
        needs = generate_plan.read_needs(options, requests, sizes, loras, device)
        options = budget.for_pictures(options, needs, device)
        if options.dry_run:
            return generate_plan.dry_run(options, requests, sizes, needs, device)
        writer = _writer(options, loras, crew)  # which notes what was chosen
    kontext = Kontext(model_files(options), _runtime(options), loras)
    if options.interactive:
        converse(kontext, base, writer, options.images_per_prompt)
    else:
        _make(kontext, requests, writer, crew)


def _requests(options: Generate, base: Request) -> list[Request]:
    lines = read_prompt_file(options.from_file, base) if options.from_file else [base]
    return [copy for request in lines for copy in request.copies(options.images_per_prompt)]


def _check_mode(options: Generate) -> None:
    """Raise UserError unless exactly one way to ask for something is used."""
    sources = ("from_file", "from_image", "interactive", "latent_path", "save_merged_model")
    used = [flag_name(name) for name in sources if getattr(options, name)]
    if len(used) > 1:
        raise UserError(f"{' and '.join(used)} cannot be used together; give one of them.")
    for name in ("latent_path", "save_merged_model"):
        if options.dry_run and getattr(options, name):
            raise UserError(
                f"--dry-run is for making pictures; with {flag_name(name)} there is nothing to try first."
            )
    if options.latent_path and options.output_type == "latent":
        raise UserError("--latent-path makes pictures; leave out --output-type latent.")
    _check_references(options)
    if not used:
        need(options, "prompt", because="to make a picture (or --from-file, --interactive, --latent-path)")


def _check_references(options: Generate) -> None:
    """Raise UserError for options of references that exclude each other or would do nothing."""
    if options.no_resize_control and options.control_resize == "crop":
        raise UserError("--control-resize crop and --no-resize-control exclude each other; leave one out.")
    if options.mask_blur and options.mask is None:
        raise UserError("--mask-blur needs --mask, whose edge it blurs.")
    if options.output_type == "latent" and (options.restore_size or options.grid):
        raise UserError("--restore-size and --grid work on pictures, not on --output-type latent.")
    if options.grid and not (options.control_image or options.from_file or options.interactive):
        raise UserError("--grid needs a reference (--control-image) to show beside the result.")
    for name in ("restore_size", "mask", "grid", "strength", "images_per_prompt", "preview"):
        if options.latent_path and getattr(options, name) != Generate.model_fields[name].default:
            raise UserError(f"{flag_name(name)} cannot be used with --latent-path, which only decodes.")


def _merge(options: Generate, out: Path) -> None:
    """What `kontext merge` does, in place of making pictures."""
    need(options, "dit", because="as the checkpoint to merge into")
    merge_into_checkpoint(
        options.dit,
        options.lora_weight,
        options.lora_multiplier,
        out,
        include_patterns=options.include_patterns,
        exclude_patterns=options.exclude_patterns,
        device=resolve_device(options.device),
    )


def _check_models(options: Generate) -> None:
    """Raise UserError for a missing or wrong file now, not after minutes of work with the other models."""
    kinds: dict[str, Kind] = {"dit": "transformer", "text_encoder1": "T5", "text_encoder2": "CLIP"}
    if options.output_type != "latent" or options.preview:
        kinds["vae"] = "autoencoder"
    need(options, *kinds, because="to make a picture")
    sources = {name: open_source(getattr(options, name), kind) for name, kind in kinds.items()}
    for path in options.lora_weight:
        read_adapter(path, transformer_config(sources["dit"]))
    attention_backend(options.attn_mode)


def _loras(options: Generate, *, attach: bool) -> Loras:
    """attach: strengths will change between pictures. Raises UserError when strengths and files do not go together."""
    return Loras(
        paths=tuple(options.lora_weight),
        multipliers=tuple(spread(options.lora_multiplier, len(options.lora_weight))),
        include_patterns=tuple(options.include_patterns),
        exclude_patterns=tuple(options.exclude_patterns),
        attach=attach,
    )


def _runtime(options: Generate) -> Runtime:
    device = resolve_device(options.device)
    found = model_runtime(options, device, dtype=options.dtype, keep=options.interactive)
    return replace(found, step_cache=options.step_cache)


def _request(options: Generate) -> Request:
    """The options as a request; prompt lines change parts of it."""
    height, width = options.image_size or (None, None)
    return Request(
        prompt=options.prompt or "",
        references=tuple(options.control_image),
        width=width,
        height=height,
        seed=options.seed,
        steps=options.infer_steps,
        guidance=options.embedded_cfg_scale,
        flow_shift=options.flow_shift or None,
        sampler=options.sampler,
        schedule=options.schedule,
        noise_layout=options.noise_layout,
        negative_prompt=options.negative_prompt,
        true_cfg_scale=options.true_cfg_scale,
        resize_references=not options.no_resize_control,
        crop_references=options.control_resize == "crop",
        stitch=options.stitch,
        placement=options.control_placement,
        restore_size=options.restore_size,
        mask=options.mask,
        mask_blur=options.mask_blur,
        strength=options.strength,
    )


def _writer(options: Generate, loras: Loras, crew: Processes) -> Writer:
    """Where results go, with the settings that hold for the whole run. Raises UserError for a bad folder."""
    common = {"software": f"kontext {__version__}"} | run_settings(options, loras)
    if options.dit is not None:
        common["dit"] = options.dit.name
    if options.lora_weight:
        common["lora_weight"] = "\n".join(path.name for path in options.lora_weight)
        common["lora_multiplier"] = " ".join(map(str, loras.multipliers))
    writer = Writer(
        options.save_path,
        pictures=options.output_type != "latent",
        latents=options.output_type != "images",
        name=options.output_name,
        format=options.output_format,
        grid=options.grid,
        preview=options.preview or 0,
        metadata=not options.no_metadata,
        common=common,
        crew=crew,
    )
    writer.prepare()
    return writer


def _decode(kontext: Kontext, paths: Sequence[Path], writer: Writer, crew: Processes) -> None:
    """Pictures from latent files, each named after its file and carrying its settings."""
    files = [read_latent(path) for path in paths]
    for number, (path, file) in crew.share(list(enumerate(zip(paths, files, strict=True), 1))):
        stem = writer.stem(number, len(paths), file.seed, path.stem)
        writer.save_picture(stem, kontext.decode(file.latent), file.settings)


def _make(kontext: Kontext, requests: Sequence[Request], writer: Writer, crew: Processes) -> None:
    """All pictures; then, if some failed, a table that says why, and the error that sets the exit code."""
    failures = run_batch(kontext, requests, writer, crew)
    if failures and len(requests) == 1:
        raise failures[0].error
    parts = crew.gather([(f.number, f.prompt, str(f.error).splitlines()[0]) for f in failures])
    rows = sorted(row for part in parts for row in part)
    if not crew.leads:
        return
    if rows:
        table("Not made", ("item", "prompt", "why"), rows)
        raise UserError(f"{len(rows)} of {len(requests)} pictures could not be made.")
    if crew.size > 1:
        say(f"All {len(requests)} pictures are in {writer.folder}.")
