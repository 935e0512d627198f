"""Groups of `kontext train` that say what leaves a run beside its weights: logs, metadata, uploads."""

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from kontext.options.base import Options, option


class Logs(Options):
    """Logs"""

    logging_dir: Path | None = option("Folder for logs; given alone it means TensorBoard.", default=None)
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        "Write logs for TensorBoard, for Weights & Biases, or for both.", default=None
    )
    log_prefix: str = option("Put before the name of the log folder, which is the time.", default="")
    log_tracker_name: str = option(
        "Name of the project in Weights & Biases, and of the folder for TensorBoard.", default="kontext"
    )
    log_tracker_config: Path | None = option(
        "TOML file with further arguments of the loggers, in a table per logger: of [wandb] those of wandb.init, of "
        "[tensorboard] those of SummaryWriter.",
        default=None,
    )
    log_config: bool = option(
        "Log the options of the run too, but for tokens and keys.",
        default=True,
    )
    wandb_run_name: str | None = option("Name of the run in Weights & Biases.", default=None)
    wandb_api_key: SecretStr | None = option(
        "Key for Weights & Biases; never shown or written. Others on the machine can read a command line: better set "
        "WANDB_API_KEY, or log in with wandb login.",
        default=None,
    )
    no_report: bool = option(
        "Leave out the report of the run, <output-name>.html, and its history, <output-name>.history.jsonl.",
        default=False,
    )


class Metadata(Options):
    """Metadata"""

    training_comment: str | None = option("A remark that is written into the LoRA file.", default=None)
    no_metadata: bool = option(
        "Leave training settings out of the LoRA file, but for what programs need to read it.", default=False
    )
    metadata_time: bool = option(
        "Write the times of training into the LoRA file. Two equal runs then differ in these.", default=False
    )
    metadata_title: str | None = option("Title. Without it: the output name.", default=None)
    metadata_author: str | None = option("Author.", default=None)
    metadata_description: str | None = option("Description.", default=None)
    metadata_license: str | None = option("License.", default=None)
    metadata_tags: str | None = option("Tags, separated by commas.", default=None)
    metadata_reso: str | None = option(
        "Resolution as WIDTHxHEIGHT. Without it: that of the dataset.", default=None
    )
    metadata_arch: str | None = option(
        "Architecture. Without it: flux-1-dev/lora, or flux-1-dev with --network-module none.", default=None
    )


class Upload(Options):
    """Hugging Face"""

    huggingface_repo_id: str | None = option(
        "Repository OWNER/NAME on the Hugging Face hub to which everything saved is uploaded, while training goes on. It "
        "is made if there is none. An upload that fails is told and ends nothing.",
        default=None,
        pattern=r"^[^/\s]+/[^/\s]+$",
        form="OWNER/NAME",
    )
    huggingface_repo_type: Literal["model", "dataset", "space"] = option(
        "Type of the repository.", default="model"
    )
    huggingface_path_in_repo: str | None = option(
        "Folder in the repository. Without it: its top.", default=None
    )
    huggingface_token: SecretStr | None = option(
        "Token for the hub; never shown or written. Others on the machine can read a command line: better set HF_TOKEN, "
        "or log in with hf auth login.",
        default=None,
    )
    huggingface_repo_visibility: Literal["private", "public"] = option(
        "Who may see the repository, if it is made.", default="private"
    )
    save_state_to_huggingface: bool = option("Upload states too.", default=False)
    resume_from_huggingface: bool = option(
        "--resume names a state on the hub: OWNER/NAME/PATH[:REVISION[:TYPE]].", default=False
    )
    async_upload: bool = option(
        "Upload while training goes on; the end waits. --no-async-upload has a save wait until it is uploaded.",
        default=True,
    )
