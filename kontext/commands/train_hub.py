"""What `kontext train` has on the Hugging Face hub: where it uploads to, and a state to go on from."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from kontext import console
from kontext.errors import UserError
from kontext.options.train import Train
from kontext.training.average import beside
from kontext.training.names import Names
from kontext.training.state import FILE
from kontext.training.team import Team
from kontext.training.upload import Repository, Uploads


def _token(options: Train) -> str | None:
    """The token given; without one, the package looks for HF_TOKEN and a login."""
    return options.huggingface_token and options.huggingface_token.get_secret_value()


def uploads(options: Train, team: Team) -> AbstractContextManager[Uploads | None]:
    """What uploads, if that is asked for: in a team the leading process."""
    if options.huggingface_repo_id is None or not team.leads:
        return nullcontext()
    from huggingface_hub import HfApi

    repository = Repository(
        options.huggingface_repo_id,
        options.huggingface_repo_type,
        options.huggingface_path_in_repo or "",
        private=options.huggingface_repo_visibility == "private",
    )
    token = _token(options)
    return Uploads(HfApi(token=token), repository, token=token, beside=options.async_upload)


def written(options: Train, names: Names, uploads: Uploads | None) -> Callable[[Path], None]:
    """What is called with weights and states once they are written."""

    def send(path: Path) -> None:
        assert uploads is not None
        if path in set(names.states()):
            if options.save_state_to_huggingface:
                uploads.send(path)
            return
        for each in (path, beside(path)) if options.ema_decay else (path,):
            uploads.send(each)

    return (lambda path: None) if uploads is None else send


def fetched_state(options: Train) -> Path | None:
    """The folder of --resume; with --resume-from-huggingface a copy of the one on the hub.

    Raises UserError when there is none, or it cannot be had.
    """
    if options.resume is None or not options.resume_from_huggingface:
        return options.resume
    from huggingface_hub import hf_hub_download

    place, revision, kind = (*options.resume.as_posix().split(":"), "", "")[:3]
    owner, _, rest = place.partition("/")
    name, _, path = rest.partition("/")
    if not path:
        raise UserError(
            f"--resume {options.resume}: with --resume-from-huggingface it must be OWNER/NAME/PATH[:REVISION[:TYPE]]."
        )
    console.say(f"Fetching {place}")
    try:
        file = hf_hub_download(
            f"{owner}/{name}", f"{path.strip('/')}/{FILE}", revision=revision or None, repo_type=kind or None,
            token=_token(options),
        )  # fmt: skip
    except Exception as error:
        raise UserError(
            f"--resume {options.resume}: cannot be fetched ({_first_line(error, _token(options))})."
        ) from error
    return Path(file).parent


def _first_line(error: Exception, token: str | None) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.replace(token, "***") if token else line
