"""Steps that are taken over: by the rule of the first block, each item for itself, and never without being asked."""

from dataclasses import replace

import pytest
import torch

from kontext.denoiser import Conditioning, Denoiser
from kontext.flow import schedule
from kontext.generation.parts import ModelFiles, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.step_cache import StepCache
from kontext.memory.streaming import stream_blocks
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.sampler import euler
from tests.generation.test_together import BASE
from tests.tiny import randomise

CONFIG = TransformerConfig(64, 64, 8, 8, 32, 2, 64, 2, 3, (4, 6, 6), 1e4, True)
SOME = 0.5  # of this random model's steps, whose first block changes far more than a trained one's, it skips some
STEPS = 12


def model():
    return randomise(Transformer(CONFIG), 0).requires_grad_(False)


def noise(*seeds):
    return torch.cat([torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(s)) for s in seeds])


def denoised(transformer, x, trunk=None):
    g = torch.Generator().manual_seed(1)
    given = Conditioning(torch.randn(1, 3, 8, generator=g), torch.randn(1, 8, generator=g), (noise(9),), 2.5)
    side = Denoiser(transformer, given)
    side.trunk = trunk or side.trunk
    return euler(side, x, schedule(STEPS, 6))


def cached(transformer, x, threshold):
    """Latents, and the cache that they were made with."""
    cache = StepCache(transformer, threshold)
    return denoised(transformer, x, cache), cache


def test_nothing_is_skipped_below_every_change():
    found, cache = cached(model(), noise(0, 1), 1e-9)
    torch.testing.assert_close(found, denoised(model(), noise(0, 1)), rtol=1e-5, atol=1e-5)
    assert (cache.passes, cache.skipped) == (2 * STEPS, 0)


def test_the_rule_by_hand():
    """Against the first block's residual, computed beside: mean |new - old| / mean |old| over the target's tokens."""
    transformer = model()
    cache = StepCache(transformer, SOME)
    old, expected, found = None, [], []

    def watch(img, txt, pe, mods, *, targets):
        nonlocal old
        added = (transformer.double_blocks[0](img, txt, mods.blocks[0], pe)[0] - img)[:, :targets]
        skip = old is not None and float((added - old).abs().mean() / old.abs().mean()) < SOME
        old = old if skip else added
        before = cache.skipped
        out = cache(img, txt, pe, mods, targets=targets)
        expected.append(skip)
        found.append(cache.skipped > before)
        return out

    denoised(transformer, noise(0), watch)
    assert found == expected and 0 < sum(found) < STEPS - 1


def test_what_is_taken_over_is_what_the_other_blocks_added(monkeypatch):
    """With nothing changing enough after the first step, all later ones add its rest to what the first block gives."""
    transformer, seen = model(), []
    cache = StepCache(transformer, 1e9)
    final = transformer.final_layer.forward

    def watch(img, txt, pe, mods, *, targets):
        first = transformer.double_blocks[0](img, txt, mods.blocks[0], pe)[0][:, :targets]
        whole = Transformer.rest(
            transformer, *transformer.first(img, txt, pe, mods), pe, mods, targets=targets
        )
        seen.append((first, whole))
        return cache(img, txt, pe, mods, targets=targets)

    given = []
    monkeypatch.setattr(transformer.final_layer, "forward", lambda x, vec: given.append(x) or final(x, vec))
    denoised(transformer, noise(0), watch)
    assert cache.skipped == STEPS - 1
    rest = seen[0][1] - seen[0][0]
    for (first, _), x in zip(seen, given, strict=True):
        torch.testing.assert_close(x, first + rest)


def test_items_decide_for_themselves():
    both, cache = cached(model(), noise(0, 1), SOME)
    alone = [cached(model(), noise(seed), SOME) for seed in (0, 1)]
    torch.testing.assert_close(both, torch.cat([latent for latent, _ in alone]), rtol=1e-5, atol=1e-5)
    assert cache.skipped == sum(each.skipped for _, each in alone) > 0


def test_with_streamed_blocks():
    streamed = model()
    stream_blocks(streamed, "max", torch.device("cpu"))
    with torch.no_grad():
        found, cache = cached(streamed, noise(0), SOME)
        assert torch.equal(found, cached(model(), noise(0), SOME)[0]) and cache.skipped


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({}, 3), ({"negative_prompt": "blue", "true_cfg_scale": 2.0, "sampler": "heun"}, 10)],
)
def test_in_a_picture(tiny_files, capsys, changes, passes):
    """Each side of true guidance has a cache of its own (its first pass is whole), and the skipped passes are told."""
    files = ModelFiles(
        tiny_files.dit, tiny_files.vae, tiny_files.t5, tiny_files.clip,
        tiny_files.t5_tokenizer, tiny_files.clip_tokenizer,
    )  # fmt: skip
    runtime = Runtime(torch.device("cpu"), torch.float32, t5_max_length=16, keep=True, step_cache=1e9)
    kontext = Kontext(files, runtime)
    conditioned = kontext.condition(kontext.frame(replace(BASE, **changes)))
    skipping = kontext.denoise(conditioned)
    sides = 2 if changes else 1
    assert f"{passes - sides} of {passes} passes were the first block alone" in capsys.readouterr().err
    kontext.runtime = replace(runtime, step_cache=0.0)
    assert not torch.equal(skipping, kontext.denoise(conditioned))
    assert "Step cache" not in capsys.readouterr().err
