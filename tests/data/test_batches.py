import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from kontext.data.batches import Batch, Batches, command, open_batches
from kontext.data.cache import read_latents, read_text
from kontext.data.encode import encode_latents, encode_texts
from kontext.data.items import Skips
from kontext.data.plan import plan_blocks
from kontext.errors import UserError
from tests.data.folders import dataset_file, pairs, picture, shrink


def fill(path: Path, encoder: str = "e") -> None:
    """Fill the caches; the embeddings tell the captions apart."""
    entries = [entry for block in plan_blocks(path, Skips()) for entry in block.entries]
    list(encode_latents(entries, shrink, encoder=encoder, batch_size=2, workers=0, skips=Skips()))

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor([float(sum(map(ord, caption))) for caption in captions])
        return values[:, None, None].expand(-1, 3, 2), values[:, None]

    list(encode_texts(entries, encode, encoder=encoder, batch_size=2))


def mixed(root: Path) -> Path:
    """Two blocks: pairs of two sizes in batches of 2, text-to-image repeated three times in batches of 4."""
    for index in range(7):
        size = (64, 64) if index < 4 else (32, 128)
        picture(root / "img" / f"p{index}.png", size, index)
        picture(root / "ctl" / f"p{index}.png", size, 50 + index)
        (root / "img" / f"p{index}.txt").write_text(f"edit {index}")
    for index in range(3):
        picture(root / "alone" / f"t{index}.png", (64, 64), 90 + index)
        (root / "alone" / f"t{index}.txt").write_text(f"scene {index}")
    path = dataset_file(root, control_directory=root / "ctl", batch_size=2)
    block = f'\n[[datasets]]\nimage_directory = "{root / "alone"}"\nbatch_size = 4\nnum_repeats = 3\n'
    path.write_text(path.read_text() + block)
    return path


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = mixed(tmp_path)
    fill(path)
    return path


def batches_of(path: Path, seed: int = 1) -> Batches:
    return open_batches(path, seed=seed, skips=Skips())


def test_validation_blocks_are_cached_but_never_trained_on(filled: Path, tmp_path: Path) -> None:
    before = keys_of(batches_of(filled), 0)
    assert open_batches(filled, seed=1, skips=Skips(), part="validation").sizes(0) == []
    picture(tmp_path / "held" / "v.png", (64, 64), 9)
    (tmp_path / "held" / "v.txt").write_text("held out")
    filled.write_text(filled.read_text() + f'\n[[validation]]\nimage_directory = "{tmp_path / "held"}"\n')
    with pytest.raises(UserError, match="1 of 1 latents must be encoded"):
        open_batches(filled, seed=1, skips=Skips(), part="validation")
    fill(filled)
    assert keys_of(open_batches(filled, seed=1, skips=Skips(), part="validation"), 0) == [("v",)]
    assert keys_of(batches_of(filled), 0) == before


def keys_of(batches: Batches, epoch: int) -> list[tuple[str, ...]]:
    return [batches.load(epoch, index).keys for index in range(len(batches.sizes(epoch)))]


def test_an_epoch_shows_every_item_as_often_as_it_is_repeated(filled: Path) -> None:
    batches = batches_of(filled)
    expected = {f"p{i}": 1 for i in range(7)} | {f"t{i}": 3 for i in range(3)}
    for epoch in range(3):
        keys = keys_of(batches, epoch)
        assert Counter(key for batch in keys for key in batch) == expected
        assert [len(batch) for batch in keys] == batches.sizes(epoch)
        assert sorted(batches.sizes(epoch)) == [1, 1, 2, 2, 2, 4, 4]
    assert batches.items_per_epoch == 16


def test_batches_hold_the_cached_tensors_of_one_kind(filled: Path) -> None:
    batches = batches_of(filled)
    for index, entries in enumerate(batches.order(0)):
        batch = batches.load(0, index)
        assert isinstance(batch, Batch) and batch.keys == tuple(entry.item.key for entry in entries)
        assert len({entry.sizes for entry in entries}) == 1
        assert len(batch.references) == (1 if batch.keys[0].startswith("p") else 0)
        for i, entry in enumerate(entries):
            latents, text = read_latents(entry.latents), read_text(entry.text)
            assert torch.equal(batch.latents[i], latents.target)
            assert all(
                torch.equal(a[i], b) for a, b in zip(batch.references, latents.references, strict=True)
            )
            assert torch.equal(batch.txt[i], text.txt) and torch.equal(batch.vector[i], text.vector)
            assert text.vector.item() == sum(map(ord, entry.item.caption))


def test_order_depends_on_seed_and_epoch_alone(filled: Path) -> None:
    batches = batches_of(filled)
    first, second = keys_of(batches, 0), keys_of(batches, 1)
    assert first != second
    assert keys_of(batches_of(filled), 1) == second, "without the epoch before"
    assert keys_of(batches, 0) == first
    assert keys_of(batches_of(filled, seed=2), 0) != first
    assert batches_of(filled).load(1, 3).keys == second[3], "one batch out of the middle"


def test_some_batches_go_without_references(filled: Path, tmp_path: Path) -> None:
    """Nothing else of training changes, caches least of all, and validation always has its references."""
    held = f'\n[[validation]]\nimage_directory = "{tmp_path / "ctl"}"\ncontrol_directory = "{tmp_path / "img"}"\n'
    for index in range(7):
        (tmp_path / "ctl" / f"p{index}.txt").write_text("back")
    plain = batches_of(filled)
    filled.write_text(filled.read_text().replace("[general]", "[general]\ncontrol_dropout_rate = 0.4") + held)
    batches = batches_of(filled)
    alone, count = 0, 0
    for epoch in range(12):
        for index, size in enumerate(plain.sizes(epoch)):
            before, after = plain.load(epoch, index), batches.load(epoch, index)
            assert before.keys == after.keys and torch.equal(before.latents, after.latents)
            count += len(before.references)
            alone += len(before.references) - len(after.references)
            assert len(after.keys) == size and len(after.references) in (0, len(before.references))
            assert all(map(torch.equal, before.references, after.references))
    assert alone / count == pytest.approx(0.4, abs=0.15)
    fill(filled)
    validation = open_batches(filled, seed=0, skips=Skips(), part="validation")
    assert all(len(validation.load(0, i).references) == 1 for i in range(len(validation.sizes(0))))


def test_items_change_partners_between_epochs(filled: Path) -> None:
    batches = batches_of(filled)
    seen = {frozenset(keys) for epoch in range(8) for keys in keys_of(batches, epoch) if set(keys) <= SQUARE}
    assert len(seen) == 6  # all pairs of four items


SQUARE = {"p0", "p1", "p2", "p3"}


def test_worker_processes_change_nothing(filled: Path) -> None:
    batches = batches_of(filled)
    indices = [(0, index) for index in range(7)]

    class Loading(torch.utils.data.Dataset[Batch]):
        def __getitem__(self, place: tuple[int, int]) -> Batch:
            return batches.load(*place)

    loader = DataLoader(Loading(), batch_size=None, sampler=indices, num_workers=2)
    for batch, place in zip(loader, indices, strict=True):
        direct = batches.load(*place)
        assert batch.keys == direct.keys and torch.equal(batch.latents, direct.latents)
    assert keys_of(pickle.loads(pickle.dumps(batches)), 5) == keys_of(batches, 5)


def test_missing_caches_tell_the_commands(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab")
    with pytest.raises(UserError) as error:
        open_batches(path, seed=0, skips=Skips(), encoders={"vae": Path("my ae.safetensors")})
    message = str(error.value)
    assert "2 of 2 latents must be encoded (2 new)" in message
    assert f"`kontext cache-latents --dataset-config {path} --vae 'my ae.safetensors'`" in message
    assert "--text-encoder1 TEXT_ENCODER1 --text-encoder2 TEXT_ENCODER2" in message
    assert command("text", Path("d.toml"), {"text_encoder1": Path("t5"), "text_encoder2": Path("clip")}) == (
        "kontext cache-text --dataset-config d.toml --text-encoder1 t5 --text-encoder2 clip"
    )
    tokenizers = {"tokenizer1": Path("words"), "tokenizer2": None}
    assert command("text", Path("d.toml"), tokenizers) == (
        "kontext cache-text --dataset-config d.toml --text-encoder1 TEXT_ENCODER1 --text-encoder2 TEXT_ENCODER2 "
        "--tokenizer1 words"
    )


def test_stale_caches_are_an_error_not_fewer_items(filled: Path, tmp_path: Path) -> None:
    picture(tmp_path / "img" / "p1.png", (64, 64), 77)
    with pytest.raises(UserError, match=r"1 of 10 latents must be encoded \(1 picture edited\)"):
        batches_of(filled)
    fill(filled)
    (tmp_path / "img" / "p1.txt").write_text("new words")
    (tmp_path / "cache" / "p2_fk_te.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"2 of 10 text embeddings must be encoded \(1 caption edited, 1 new\)"
    ):
        batches_of(filled)


def test_what_lies_in_the_cache_folder_adds_nothing(filled: Path, tmp_path: Path) -> None:
    for ending in ("_0064x0064_fk.safetensors", "_fk_te.safetensors"):
        source = tmp_path / "cache" / f"p0{ending}"
        (tmp_path / "cache" / f"extra{ending}").write_bytes(source.read_bytes())
    assert batches_of(filled).items_per_epoch == 16


def test_pictures_that_caching_skipped_are_skipped_again(tmp_path: Path) -> None:
    path = pairs(tmp_path, "abc")
    damaged = tmp_path / "img" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    fill(path)
    skips = Skips()
    batches = open_batches(path, seed=0, skips=skips)
    assert sorted(keys_of(batches, 0)) == [("a",), ("c",)]
    assert [row.name for row in skips.rows] == [str(damaged)]
    with pytest.raises(UserError, match="--strict"):
        open_batches(path, seed=0, skips=Skips(strict=True))


def test_caches_of_two_encoders_do_not_mix(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab")
    fill(path, "old")
    entries = plan_blocks(path, Skips())[0].entries
    list(encode_latents(entries[:1], shrink, encoder="new", batch_size=1, workers=0, skips=Skips()))
    with pytest.raises(UserError, match="the latents were made with 2 different encoders or settings: run"):
        batches_of(path)


def test_several_references_keep_their_order(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab", size=(64, 64))
    for name in "ab":
        picture(tmp_path / "ctl" / f"{name}_0.png", (64, 64), 200)
        picture(tmp_path / "ctl" / f"{name}_1.png", (32, 48), 300)
    path = dataset_file(tmp_path, control_directory=tmp_path / "ctl", no_resize_control=True, batch_size=2)
    fill(path)
    batch = batches_of(path).load(0, 0)
    assert [tuple(each.shape) for each in batch.references] == [(2, 3, 8, 8), (2, 3, 8, 8), (2, 3, 6, 4)]
    assert torch.equal(batch.references[1][0], batch.references[1][1])
    assert not torch.equal(batch.references[0][0], batch.references[0][1])
