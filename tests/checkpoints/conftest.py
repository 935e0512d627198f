"""What models are tried with."""

from types import SimpleNamespace

import pytest
import torch

from kontext.model.latents import position_ids
from tests import tiny


@pytest.fixture(scope="module")
def inputs():
    """Two samples: a 4x6 target, a 4x4 reference, text of 5 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return SimpleNamespace(
        img=draw(2, 40, 64),
        img_ids=torch.cat((position_ids(4, 6), position_ids(4, 4, index=1))),
        txt=draw(2, 5, tiny.CONTEXT_WIDTH),
        txt_ids=torch.zeros(5, 3),
        t=torch.tensor([0.9, 0.25]),
        vector=draw(2, tiny.VECTOR_WIDTH),
        guidance=torch.tensor([2.5, 1.0]),
    )
