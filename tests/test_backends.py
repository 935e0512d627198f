"""Attention backends: each package's own tensor order is respected, a missing package is one sentence."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from kontext.backends import attention_backend, use_attention
from kontext.errors import UserError
from kontext.model.transformer import Transformer, TransformerConfig

Q, K, V = torch.randn(3, 2, 4, 10, 8, generator=torch.Generator().manual_seed(0)).unbind(0)


def tokens_first(q, k, v):
    """What flash-attn and xformers do: (B, L, H, D) in and out."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def install(monkeypatch, tmp_path, package, **functions):
    """Make `import package` find a module with `functions`."""
    name = package.partition(".")[0]
    (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in {name, package}:
        module = ModuleType(path)
        module.__spec__ = sys.__spec__
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, path, module)


@pytest.mark.parametrize(
    ("mode", "package", "functions"),
    [
        ("flash", "flash_attn", {"flash_attn_func": tokens_first}),
        (
            "flash3",
            "flash_attn_interface",
            {"flash_attn_func": lambda q, k, v: (tokens_first(q, k, v), None)},
        ),
        ("xformers", "xformers.ops", {"memory_efficient_attention": tokens_first}),
        ("sage", "sageattention", {"sageattn": F.scaled_dot_product_attention}),
    ],
)
def test_every_backend_sees_its_own_layout(monkeypatch, tmp_path, mode, package, functions):
    install(monkeypatch, tmp_path, package, **functions)
    torch.testing.assert_close(attention_backend(mode)(Q, K, V), F.scaled_dot_product_attention(Q, K, V))


@pytest.mark.parametrize("mode", ["flash", "flash3", "sage", "xformers"])
def test_missing_package_is_named(monkeypatch, mode):
    monkeypatch.setattr("kontext.backends.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--attn-mode {mode} needs the package .* not installed"):
        attention_backend(mode)


def test_backend_reaches_every_block():
    model = Transformer(TransformerConfig(16, 16, 8, 8, 32, 2, 64, 2, 3, (4, 6, 6), 1e4, False))
    calls = []

    def attend(q, k, v):
        calls.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v)

    use_attention(model, attend)
    model(
        torch.randn(1, 4, 16),
        torch.zeros(1, 4, 3),
        torch.randn(1, 2, 8),
        torch.zeros(1, 2, 3),
        torch.ones(1),
        torch.randn(1, 8),
    )
    assert len(calls) == 5
