"""Matrix products of training through oneDNN: the same losses and gradients as torch's own."""

from __future__ import annotations

import copy
import platform

import pytest
import torch

from steerkit.models import products
from steerkit.models.kernels import missing, set_kernels
from steerkit.models.products import fast_products, plain_products
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"oneDNN's linear layers: {missing()}")


@pytest.fixture
def counted(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the products that oneDNN computed; every size is sent to it."""
    shapes: list[tuple[int, ...]] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(
        products, "multiply", lambda rows, *rest: (shapes.append(tuple(rows.shape)), multiply(rows, *rest))[1]
    )
    return shapes


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 45).reshape(2, 20)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_gradients_are_those_of_float64(kind: str, counted) -> None:
    model = tiny_model(kind).train()
    set_kernels(model, "onednn")
    with fast_products(model) as chosen:
        found = gradients(model)
    assert chosen == "onednn" and len(counted) > 30
    truth = gradients(copy.deepcopy(model).double())
    plain = gradients(model)
    assert found.keys() == truth.keys()
    for name, one in truth.items():
        limit = 4 * float((plain[name] - one).norm() / one.norm()) + 1e-6
        assert float((found[name] - one).norm() / one.norm()) < limit, name


def test_every_form_of_a_product_is_torch_s(counted) -> None:
    model = tiny_model()
    set_kernels(model, "onednn")
    a, b, c, d = torch.randn(7, 5), torch.randn(5, 6), torch.randn(6), torch.randn(7, 6)
    expected = [a @ b, a @ b, torch.addmm(c, a, b), d + a @ b, torch.addmm(d, a, b), torch.addmm(c, a, b, alpha=2)]
    with fast_products(model), torch.no_grad():
        out = torch.empty(7, 6)
        torch.mm(a, b, out=out)
        found = [a @ b, out, torch.addmm(c, a, b), d.clone().addmm_(a, b), torch.addmm(d, a, b)]
        found.append(torch.addmm(c, a, b, alpha=2))
        turned = a.t().contiguous().t() @ b.t().contiguous().t()
    for one, other in zip([*found, turned], [*expected, a @ b], strict=True):
        torch.testing.assert_close(one, other)
    assert len(counted) == 5


def test_other_types_small_products_and_single_rows_stay_with_torch(monkeypatch, counted) -> None:
    model = tiny_model()
    set_kernels(model, "onednn")
    with fast_products(model):
        torch.randn(4, 4).double() @ torch.randn(4, 4).double()
        torch.randn(1, 4) @ torch.randn(4, 4)
        monkeypatch.setattr(products, "SMALL", 1000)
        torch.randn(4, 4) @ torch.randn(4, 4)
    assert not counted


def test_inside_plain_products_and_with_torch_s_kernels_nothing_is_sent(counted) -> None:
    model = tiny_model()
    a = torch.randn(4, 4)
    with fast_products(model) as chosen:
        assert chosen == "torch"
        a @ a
    set_kernels(model, "onednn")
    with plain_products(), fast_products(model):
        with plain_products():
            a @ a
        assert not counted
        a @ a
    assert len(counted) == 1
    a @ a
    assert len(counted) == 1


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch) -> None:
    assert products.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(products.ctypes, "CDLL", lambda _: object())
    assert products.keep_freed_memory.__wrapped__() is False
