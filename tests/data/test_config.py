import json
from pathlib import Path

import pytest

from kontext.data.buckets import SizeRules
from kontext.data.config import load_datasets, read_dataset_file
from kontext.errors import UserError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the files below are relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("img", "ctl", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "items.jsonl").touch()


def write(text: str, name: str = "data.toml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def test_block_overrides_general_and_both_override_defaults() -> None:
    first, second = load_datasets(
        write(
            """
            [general]
            resolution = [640, 480]
            enable_bucket = true
            bucket_no_upscale = true
            batch_size = 3
            [[datasets]]
            image_directory = "img"
            control_directory = "ctl"
            control_resolution = 512
            no_resize_control = true
            num_repeats = 5
            [[datasets]]
            image_jsonl_file = "items.jsonl"
            cache_directory = "cache"
            resolution = 768
            enable_bucket = false
            caption_extension = "caption"
            """
        )
    )
    assert first.size_rules == SizeRules((640, 480), True, True, True, (512, 512))
    assert (first.batch_size, first.num_repeats, first.caption_extension) == (3, 5, (".txt",))
    assert first.cache_folder == first.source == Path("img")
    assert second.size_rules == SizeRules((768, 768), False, True, False, None)
    assert (second.source, second.cache_folder) == (Path("items.jsonl"), Path("cache"))
    assert second.caption_extension == (".caption",)


def test_json_means_the_same() -> None:
    block = {"image_directory": "img", "resolution": [256, 128], "enable_bucket": True}
    (dataset,) = load_datasets(write(json.dumps({"datasets": [block]}), "data.json"))
    assert dataset.resolution == (256, 128) and dataset.enable_bucket


def test_without_resolution_a_megapixel_in_buckets() -> None:
    (dataset,) = load_datasets(write('[[datasets]]\nimage_directory = "img"'))
    assert dataset.resolution == (1024, 1024) and dataset.enable_bucket


def test_one_bucket_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    path = write('[[datasets]]\nimage_directory = "img"\nresolution = [100, 70]')
    (dataset,) = read_dataset_file(path, tell=True).training
    assert not dataset.enable_bucket
    shown = capfd.readouterr().err
    assert "100x70 is rounded down to 96x64" in shown and "cropped to 96x64" in shown


@pytest.mark.parametrize("old", ["flux_kontext_no_resize_control", "qwen_image_edit_no_resize_control"])
@pytest.mark.parametrize("table", ["[general]\n{}\n[[datasets]]", "[[datasets]]\n{}"])
def test_old_names(old: str, table: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = table.format(f"{old} = true\nqwen_image_edit_control_resolution = 320")
    (dataset,) = load_datasets(write(f'{text}\nimage_directory = "img"\ncontrol_directory = "ctl"'))
    assert dataset.no_resize_control and dataset.control_resolution == (320, 320)
    assert f"{old} is the old name of no_resize_control" in capfd.readouterr().err


BLOCK = '[[datasets]]\nimage_directory = "img"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BLOCK + "resolutoin = 512", r"\[\[datasets\]\]: unknown key resolutoin. Did you mean resolution?"),
        (
            "[general]\nbatchsize = 2\n" + BLOCK,
            r"\[general\]: unknown key batchsize. Did you mean batch_size?",
        ),
        ("[[dataset]]\nx = 1", "unknown table dataset. Did you mean datasets?"),
        (BLOCK + "zzz = 1", "unknown key zzz. Known are .*, resolution"),
        (BLOCK + "fp_1f_no_post = true", "belongs to FramePack"),
        (BLOCK + "target_frames = [1]", "belongs to video models"),
        (BLOCK + "multiple_target = true", "multiple_target is for other models"),
        ('[general]\nimage_directory = "img"\n' + BLOCK, "belongs into a .*block"),
        (BLOCK + "batch_size = 0", "batch_size = 0: input should be greater than or equal to 1"),
        (BLOCK + 'resolution = "large"', "resolution = 'large': input should be"),
        (BLOCK + "resolution = [512]", "resolution"),
        (BLOCK + "resolution = 15", "15x15 is too small"),
        ("[general]\nresolution = 512", "there is no dataset in it"),
        ('[datasets]\nimage_directory = "img"', "double brackets"),
        ("[[datasets]]\nresolution = 512", "either image_directory or image_jsonl_file"),
        (BLOCK + 'image_jsonl_file = "items.jsonl"', "either image_directory or image_jsonl_file"),
        ('[[datasets]]\nimage_jsonl_file = "items.jsonl"', "needs a cache_directory"),
        (
            '[[datasets]]\nimage_jsonl_file = "items.jsonl"\ncache_directory = "c"\ncontrol_directory = "ctl"',
            "references are named in its lines",
        ),
        (
            '[[datasets]]\nimage_directory = "gone"',
            "gone does not exist. Paths are relative to the working dir",
        ),
        ('[[datasets]]\nimage_directory = "items.jsonl"', "is not a folder"),
        ('[[datasets]]\nimage_jsonl_file = "img"\ncache_directory = "c"', "is not a file"),
        (BLOCK + 'control_directory = "img"', "each target would be its own reference"),
        (
            BLOCK + BLOCK,
            r"\[\[datasets\]\] number 1 and \[\[datasets\]\] number 2 would both keep their caches in img",
        ),
        (
            BLOCK + '[[validation]]\nimage_directory = "img"',
            r": \[\[datasets\]\] and \[\[validation\]\] would both keep their caches in img",
        ),
        (
            BLOCK + '[[validation]]\nimage_directory = "other"\nnope = 1',
            r"\[\[validation\]\]: unknown key nope",
        ),
        (BLOCK + '[validation]\nimage_directory = "other"', "double brackets"),
        (BLOCK + 'cache_directory = "./other"\n[[datasets]]\nimage_directory = "other"', "number 2 would"),
        ("[general", "data.toml: "),
    ],
)
def test_bad_files(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_datasets(write(text))
    assert str(error.value).startswith("data.toml")


def test_number_of_the_block_is_told() -> None:
    with pytest.raises(UserError, match=r"\[\[datasets\]\] number 2: unknown key nope"):
        load_datasets(write(BLOCK + '[[datasets]]\nimage_directory = "other"\nnope = 1'))


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.toml", "no such dataset file"), ("img", "is a folder"), ("d.yaml", "ends in .toml")],
)
def test_bad_paths(name: str, message: str) -> None:
    if name == "d.yaml":
        write("", name)
    with pytest.raises(UserError, match=message):
        load_datasets(Path(name))


def test_bad_json() -> None:
    for text in ("{", "[]"):
        with pytest.raises(UserError, match=r"data\.json: "):
            load_datasets(write(text, "data.json"))


def test_validation_blocks_are_apart_and_take_what_general_gives() -> None:
    general = "[general]\nbatch_size = 3\n"
    path = write(general + BLOCK + '[[validation]]\nimage_directory = "other"\nresolution = 512')
    file = read_dataset_file(path)
    assert load_datasets(path) == file.training and [d.image_directory for d in file.training] == [
        Path("img")
    ]
    (held_out,) = file.validation
    assert held_out.image_directory == Path("other") and held_out.batch_size == 3
    assert held_out.resolution == (512, 512)
