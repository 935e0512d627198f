"""Options of `kontext train`."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from kontext.options.base import Options, option
from kontext.options.shared import Common, DatasetFile, Dit, Encoders, Planning, Precision, Swapping, Vae
from kontext.options.train_how import Length, Memory, Network, Noise, Optimization
from kontext.options.train_out import Logs, Metadata, Upload


def _float(value: Any) -> Any:
    return "float32" if value == "float" else value


class Saving(Options):
    """Saving"""

    output_dir: Path = option("Folder for the LoRA, states and samples.")
    output_name: str = option(
        "Name of the LoRA file, without ending.", pattern=r"^[^/\\]+$", form="a name without slashes"
    )
    save_precision: Annotated[Precision | None, BeforeValidator(_float)] = option(
        "Precision of the LoRA file. Without it: float32; with --network-module none that of --dit.",
        default=None,
    )
    save_every_n_epochs: int | None = option("Save the LoRA every n epochs.", default=None, ge=1)
    save_every_n_steps: int | None = option("Save the LoRA every n steps.", default=None, ge=1)
    save_last_n_epochs: int | None = option(
        "Of those saved by epoch, keep the last n and delete older ones.", default=None, ge=1
    )
    save_last_n_steps: int | None = option(
        "Of those saved by step, keep those of the last n steps and delete older ones.", default=None, ge=1
    )
    save_last_n_epochs_state: int | None = option(
        "The same for states by epoch. Without it: as for the LoRA.", default=None, ge=1
    )
    save_last_n_steps_state: int | None = option(
        "The same for states by step. Without it: as for the LoRA.", default=None, ge=1
    )
    save_state: bool = option(
        "With each save and at the end, save a state from which training can go on. Ctrl-C and SIGTERM always do.",
        default=False,
    )
    save_state_on_train_end: bool = option("Save a state at the end.", default=False)
    resume: Path | None = option(
        "Go on from a state folder; auto: from the last complete one of this output name, if there is any.",
        default=None,
    )


class Samples(Options):
    """Sample pictures"""

    sample_prompts: Path | None = option(
        "Prompts of the sample pictures: .txt (one per line, with --w --h --d --s --g --fs --ci), .toml or .json.",
        default=None,
    )
    sample_every_n_steps: int | None = option("Make samples every n steps.", default=None, ge=1)
    sample_every_n_epochs: int | None = option("Make samples every n epochs.", default=None, ge=1)
    sample_at_first: bool = option("Make samples before the first step.", default=False)


class Validating(Options):
    """Validation"""

    validate_every_n_steps: int | None = option(
        "Compute the loss on the [[validation]] datasets every n steps.", default=None, ge=1
    )
    validate_every_n_epochs: int | None = option(
        "The same every n epochs. Without either: each epoch. The adapter of the lowest loss is kept as "
        "<output-name>-best.safetensors.",
        default=None,
        ge=1,
    )


class Train(
    Saving,
    Network,
    Length,
    Optimization,
    Noise,
    Memory,
    Samples,
    Validating,
    Logs,
    Metadata,
    Upload,
    DatasetFile,
    Dit,
    Swapping,
    Vae,
    Encoders,
    Planning,
    Common,
):
    """Train a LoRA."""

    def weights(self) -> tuple[Path, ...]:
        if self.show_timesteps:
            return ()
        for_samples = (self.vae, self.text_encoder1, self.text_encoder2) if self.sample_prompts else ()
        return (*(path for path in for_samples if path is not None), self.dit)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_timestep >= self.max_timestep:
            raise ValueError("--min-timestep must be less than --max-timestep.")
        if self.log_with in ("tensorboard", "all") and self.logging_dir is None:
            raise ValueError(f"--log-with {self.log_with} needs --logging-dir, the folder to write to.")
        if self.resume_from_huggingface and self.resume is None:
            raise ValueError("--resume-from-huggingface needs --resume OWNER/NAME/PATH[:REVISION[:TYPE]].")
        if (self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first) and (
            self.sample_prompts is None
        ):
            raise ValueError("Sample pictures need --sample-prompts, the file with their prompts.")
        if self.sample_prompts is not None and None in (self.vae, self.text_encoder1, self.text_encoder2):
            raise ValueError("--sample-prompts needs --vae, --text-encoder1 and --text-encoder2 too.")
        if self.compile and (self.checkpointing or "").startswith(("selective", "whole:")):
            raise ValueError(
                f"--checkpointing {self.checkpointing} does not go with --compile: use whole or none."
            )
        whole = self.gradient_checkpointing or self.gradient_checkpointing_cpu_offload
        if whole and self.checkpointing not in (None, "auto", "whole"):
            given = "--gradient-checkpointing" + "-cpu-offload" * self.gradient_checkpointing_cpu_offload
            raise ValueError(
                f"--checkpointing {self.checkpointing} and {given} say different things: leave one out."
            )
        return self
