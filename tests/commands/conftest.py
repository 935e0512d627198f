"""Commands on the small models."""

import pytest

from kontext.cli import main
from tests.training.dataset import cached_dataset


@pytest.fixture(scope="session")
def cached(tmp_path_factory, tiny_files):
    """A dataset with filled caches (`tests.training.dataset.Cached`). Treat the files as read-only."""
    return cached_dataset(tmp_path_factory.mktemp("edits"), tiny_files)


@pytest.fixture
def models(tiny_files):
    return {
        "--dit": tiny_files.dit,
        "--vae": tiny_files.vae,
        "--text-encoder1": tiny_files.t5,
        "--text-encoder2": tiny_files.clip,
        "--tokenizer1": tiny_files.t5_tokenizer,
        "--tokenizer2": tiny_files.clip_tokenizer,
    }


@pytest.fixture
def generate(models, tmp_path, capsys):
    """Run the command on the small models; `out` is the folder of results, None for an option leaves it out."""

    def run(*more, out=tmp_path / "out", size=(64, 64), **changes):
        options = models | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
        given += ["--device", "cpu", "--dtype", "float32", "--t5-max-length", "16", "--infer-steps", "2"]
        given += ["--image-size", *map(str, size)] if size else []
        code = main(["generate", *given, "--save-path", str(out), *map(str, more)])
        return code, " ".join(capsys.readouterr().err.split())

    run.models = models
    return run
