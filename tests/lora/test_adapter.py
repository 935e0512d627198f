import math

import pytest
import torch
from torch import nn

from kontext.errors import UserError
from kontext.lora.adapter import LoraLinear, attach, targets
from kontext.model.transformer import FLUX
from tests.lora.models import make_transformer, meta_transformer, relative_error


def trained(rank: int = 4, alpha: float = 2.0, **options: float) -> LoraLinear:
    """A LoRA around a linear of 6 to 10, with an up that is no longer zero."""
    torch.manual_seed(0)
    module = LoraLinear(nn.Linear(6, 10), rank=rank, alpha=alpha, **options)
    nn.init.normal_(module.lora_down.weight)
    nn.init.normal_(module.lora_up.weight)
    return module


def test_forward_is_base_plus_scaled_product():
    module = trained()
    x = torch.randn(3, 5, 6)
    weight = module.base.weight + 2.0 / 4 * module.lora_up.weight @ module.lora_down.weight
    expected = x @ weight.T + module.base.bias
    torch.testing.assert_close(module(x), expected)


def test_only_the_adapter_learns():
    module = trained()
    module(torch.randn(2, 6)).sum().backward()
    learned = {name for name, p in module.named_parameters() if p.grad is not None}
    assert learned == {"lora_down.weight", "lora_up.weight"}


def test_masters_stay_float32_and_the_result_has_the_input_type():
    base = nn.Linear(6, 10).to(torch.bfloat16)
    module = LoraLinear(base, rank=2, alpha=1.0)
    assert module.lora_down.weight.dtype == module.lora_up.weight.dtype == torch.float32
    assert module(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_new_adapter_changes_nothing():
    model = make_transformer()
    layer = model.double_blocks[0].img_attn.qkv
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    modules = attach(model, rank=3, alpha=3.0, seed=1)
    assert torch.equal(modules["double_blocks.0.img_attn.qkv"](x), expected)


def test_first_weights_follow_the_seed_and_kaiming_bounds():
    def downs(seed: int) -> list[torch.Tensor]:
        modules = attach(make_transformer(), rank=8, alpha=1.0, seed=seed)
        return [m.lora_down.weight for m in modules.values()]

    first = downs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, downs(1), strict=True))
    assert not torch.equal(first[0], downs(2)[0])
    bound = 1 / math.sqrt(first[0].shape[1])
    assert 0.9 * bound < first[0].abs().max() <= bound
    assert first[0].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_attached_model_sees_the_adapters():
    model = make_transformer()
    modules = attach(model, rank=2, alpha=1.0, seed=0)
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(modules)
    assert all(".lora_" in name for name in trainable)


def test_the_real_model_has_228_targets():
    model = meta_transformer()
    names = targets(model)
    assert len(names) == 228
    assert len(attach(model, rank=1, alpha=1.0, seed=0)) == 228
    doubles = [n for n in names if n.startswith("double_blocks.7.")]
    suffixes = [f"{s}_{m}" for s in ("img", "txt") for m in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    assert sorted(doubles) == sorted(f"double_blocks.7.{s}" for s in suffixes)
    assert [n for n in names if n.startswith("single_blocks.37.")] == [
        "single_blocks.37.linear1",
        "single_blocks.37.linear2",
    ]
    assert FLUX.double_blocks * 8 + FLUX.single_blocks * 2 == 228


def test_exclude_patterns_add_to_the_default_exclusion():
    model = meta_transformer()
    names = targets(model, exclude_patterns=[r".*mlp\.0"])
    assert len(names) == 228 - 2 * 19
    assert not any("mod" in name for name in names)


def test_include_patterns_rescue_what_is_excluded():
    model = meta_transformer()
    names = targets(
        model, include_patterns=[r".*img_mod\.lin", r"img_in"], exclude_patterns=[r"single_blocks\..*"]
    )
    assert len(names) == 8 * 19 + 19 + 1
    assert names[0] == "img_in"
    only = targets(model, include_patterns=[r"single_blocks\.3\.linear2"], exclude_patterns=[".*"])
    assert only == ["single_blocks.3.linear2"]


def test_patterns_match_whole_names():
    assert len(targets(meta_transformer(), exclude_patterns=["double_blocks"])) == 228


def test_bad_patterns_are_explained():
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        targets(meta_transformer(), exclude_patterns=["("])
    with pytest.raises(UserError, match="No layer is left to train"):
        targets(meta_transformer(), exclude_patterns=[".*"])


def test_dropout_keeps_the_mean_and_stops_in_eval():
    module = trained(dropout=0.5)
    x = torch.randn(1, 6).expand(20000, 6)
    clean = module.eval()(x)[0]
    noisy = module.train()(x)
    assert noisy.std(0).min() > 0
    assert relative_error(noisy.mean(0), clean) < 0.05


def test_rank_dropout_drops_whole_ranks_of_a_sample():
    module = trained(rank=1, alpha=1.0, rank_dropout=0.25)
    x = torch.randn(1, 7, 6).expand(4000, 7, 6)
    change = module.train()(x) - module.base(x)
    full = (module.eval()(x) - module.base(x))[0]
    dropped = (change.abs() < 1e-6).all(-1).all(-1)
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(change[~dropped][0], full / 0.75)


def test_module_dropout_skips_the_adapter():
    module = trained(module_dropout=0.5)
    x = torch.randn(1, 6)
    base, full = module.base(x), module.eval()(x)
    module.train()
    outcomes = [module(x) for _ in range(100)]
    skipped = sum(torch.equal(y, base) for y in outcomes)
    assert 25 < skipped < 75
    assert all(torch.equal(y, base) or torch.equal(y, full) for y in outcomes)


def test_dropouts_follow_the_global_seed():
    module = trained(dropout=0.5, rank_dropout=0.5, module_dropout=0.5).train()
    x = torch.randn(4, 3, 6)

    def run() -> torch.Tensor:
        torch.manual_seed(7)
        return torch.stack([module(x) for _ in range(5)])

    assert torch.equal(run(), run())
