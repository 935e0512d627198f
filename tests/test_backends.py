"""Attention backends: each package's own tensor order is respected, a missing package is one sentence."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from kontext.backends import attention_backend, cudnn_first, in_parts, use_attention
from kontext.errors import UserError
from kontext.model.transformer import Transformer, TransformerConfig
from tests.memory.live import Live

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


@pytest.mark.parametrize(
    ("capability", "first"), [((12, 0), "CUDNN_ATTENTION"), ((9, 0), None), ((8, 9), None)]
)
def test_the_kernel_that_torch_overlooks_comes_first_on_rtx_50(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attend, plain = attention_backend("sdpa", torch.device("cuda")), torch._C._get_sdp_priority_order()
    seen = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv: seen.append(torch._C._get_sdp_priority_order())
    )
    attend(Q, K, V)
    expected = [getattr(SDPBackend, first).value] if first else plain[:1]
    assert seen[0][:1] == expected and torch._C._get_sdp_priority_order() == plain


def test_the_kernel_that_comes_first_is_compiled_too():
    compiled = torch.compile(cudnn_first, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q, K, V), F.scaled_dot_product_attention(Q, K, V))


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


@pytest.mark.parametrize("scores", [1, 2 * 4 * 10 * 4 * 3, 10**9])
def test_parts_make_the_whole(monkeypatch, scores):
    """One query at a time, three (with a rest of one), and all: with their gradients."""
    monkeypatch.setattr("kontext.backends.SCORES", scores)
    lengths = []

    def attend(q, k, v):
        lengths.append(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v)

    found, expected = ([x.clone().requires_grad_() for x in (Q, K, V)] for _ in range(2))
    out, whole = in_parts(attend)(*found), F.scaled_dot_product_attention(*expected)
    torch.testing.assert_close(out, whole)
    assert lengths == {1: [1] * 10, 10**9: [10]}.get(scores, [3, 3, 3, 1])
    (out * Q).sum().backward(), (whole * Q).sum().backward()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_parts_spare_a_kernel_that_holds_all_scores(monkeypatch):
    """1024 queries and keys of 4 heads: 16 MB of scores at once, or 2 MB of them."""
    monkeypatch.setattr("kontext.backends.SCORES", 2**21)
    q, k, v = torch.randn(3, 1, 4, 1024, 8)

    def attend(q, k, v):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    peaks = []
    for each in (attend, in_parts(attend)):
        with Live() as live:
            each(q, k, v)
        peaks.append(live.peak)
    assert peaks[0] >= 2 * 2**24 and peaks[1] < 3 * 2**21
