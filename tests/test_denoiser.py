"""The denoiser is the transformer on the right tokens; preparing levels ahead change nothing."""

from dataclasses import replace

import pytest
import torch

from kontext.denoiser import Conditioning, Denoiser, reference_ids, reference_offsets
from kontext.flow import schedule
from kontext.model.latents import pack, position_ids, unpack
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.sampler import euler

CONFIG = TransformerConfig(64, 64, 8, 8, 32, 2, 64, 2, 2, (4, 6, 6), 1e4, True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).requires_grad_(False)


def conditioning(references=1, batch=2):
    g = torch.Generator().manual_seed(1)
    latents = tuple(torch.randn(batch, 16, 4, 8 - 4 * i, generator=g) for i in range(references))
    return Conditioning(
        torch.randn(batch, 3, 8, generator=g), torch.randn(batch, 8, generator=g), latents, 2.5
    )


def test_equals_the_transformer_on_packed_tokens(model):
    given = conditioning(references=2)
    x, t = torch.randn(2, 16, 6, 4), torch.tensor([0.3, 0.8])
    # By hand: 3x2 target tokens, a 2x4 reference at the origin, then a 2x2 one; 2 + 2 > 2 + 4 is false: below.
    ids = torch.cat(
        (position_ids(3, 2), position_ids(2, 4, index=1), position_ids(2, 2, index=1, offset=(2, 0)))
    )
    tokens = torch.cat([pack(x), *map(pack, given.references)], 1)
    expected = model(
        tokens, ids[None], given.txt, torch.zeros(1, 3, 3), t, given.vector, torch.full((2,), 2.5)
    )[:, :6]
    torch.testing.assert_close(Denoiser(model, given)(x, t), unpack(expected, 6, 4))


def test_prepared_levels_change_no_digit(model):
    given, sigmas, x = conditioning(), schedule(5, 6), torch.randn(2, 16, 6, 4)
    prepared = Denoiser(model, given)
    prepared.prepare(sigmas[:-1])
    assert len(prepared.prepared) == 5
    assert torch.equal(euler(prepared, x, sigmas), euler(Denoiser(model, given), x, sigmas))


def test_offsets_follow_the_worked_example():
    """1024x1024, 832x1248 and 1248x832 pixels (width x height), in tokens of 16 pixels (rows, columns)."""
    assert reference_offsets([(64, 64), (78, 52), (52, 78)]) == [(0, 0), (0, 64), (78, 0)]


def test_equal_squares_stack_downwards():
    assert reference_offsets([(4, 4), (4, 4)]) == [(0, 0), (4, 0)]


def comfy_ids(sizes):
    """ComfyUI's rule as its code has it: latent sizes (height, width), offsets turned to tokens at the end."""
    h = w = 0
    ids = []
    for height, width in sizes:
        h_offset, w_offset = (0, w) if height + h > width + w else (h, 0)
        rows, columns = (height + 1) // 2, (width + 1) // 2
        top, left = (h_offset + 1) // 2, (w_offset + 1) // 2
        ids.append([[1, top + y, left + x] for y in range(rows) for x in range(columns)])
        h, w = max(h, height + h_offset), max(w, width + w_offset)
    return ids


def test_offsets_are_comfyuis_on_random_sizes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        count = int(torch.randint(1, 6, (), generator=generator))
        sizes = (2 * torch.randint(1, 12, (count, 2), generator=generator)).tolist()
        found = reference_ids(tuple(torch.zeros(1, 1, *size) for size in sizes))
        assert [ids.tolist() for ids in found] == comfy_ids(sizes)


def test_index_placement_puts_each_on_a_layer_of_its_own(model):
    given = conditioning(references=2)
    layers = replace(given, placement="index")
    found = reference_ids(layers.references, layers.placement)
    assert torch.equal(found[0], position_ids(2, 4, index=1))
    assert torch.equal(found[1], position_ids(2, 2, index=2))
    x, t = torch.randn(2, 16, 6, 4), torch.tensor([0.3, 0.8])
    beside, layered = (Denoiser(model, each)(x, t) for each in (given, layers))
    assert (beside - layered).abs().max() > 1e-4


@pytest.mark.parametrize("placement", ["offset", "index"])
def test_positions_are_made_where_they_are_wanted(placement):
    references = tuple(torch.zeros(1, 1, 4, 4) for _ in range(2))
    found = reference_ids(references, placement, device=torch.device("meta"))
    assert {ids.device.type for ids in found} == {"meta"}
