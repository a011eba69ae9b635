"""Hand-written gradients: the caller's tensors are left alone, second derivatives raise."""

import math
import threading

import pytest
import torch

from oasis_attn import UserError
from oasis_attn.ops import depth_mix, null_attention


def tensors(*shape, count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)
    ]


def attention(query, key, value, **keywords):
    return null_attention(query, key, value, is_causal=True, **keywords)


def mix(backend, *sources):
    evidence = [source[..., 0].sigmoid() for source in sources]
    query = torch.linspace(-1, 1, sources[0].shape[-1], dtype=sources[0].dtype)
    return depth_mix(
        sources, query, null_evidence=evidence, beta=0.5, normalizer="softmax1", backend=backend
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (2, 16, 64, 256)])  # the second goes by halves
def test_threads_that_share_a_graph_get_the_same_and_change_nothing(shape, dtype):
    inputs = tensors(*shape, dtype=dtype)
    output = attention(*inputs, backend="cpu_flash")
    given = [torch.randn_like(x) for x in output]
    given[0][0, 0] = 0
    before = [x.detach().clone() for x in (*output, *given, *inputs)]
    expected = torch.autograd.grad(output, inputs, given, retain_graph=True)
    wrong = []

    def work():
        for _ in range(3):
            grads = torch.autograd.grad(output, inputs, given, retain_graph=True)
            if not all(map(torch.equal, grads, expected)):
                wrong.append(grads)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(map(torch.equal, (*output, *given, *inputs), before))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e10, 1e30])
def test_a_zero_gradient_of_the_output_leaves_that_of_the_null(size):
    inputs = tensors(2, 2, 6, 4, dtype=torch.float32)
    given = torch.zeros(2, 2, 6, 4), torch.full((2, 2, 6), size)
    flash, naive = (
        torch.autograd.grad(attention(*inputs, backend=backend), inputs, given)
        for backend in ("cpu_flash", "naive")
    )
    for got, wanted in zip(flash, naive, strict=True):
        torch.testing.assert_close(got / size, wanted / size, rtol=1e-5, atol=1e-6)
    assert given[0].eq(0).all()


def test_halves_of_the_batch_are_one_gradient():
    inputs = tensors(3, 4, 700, 64, dtype=torch.float32)
    mask = torch.rand(3, 1, 700, 700, generator=torch.Generator().manual_seed(1)) > 0.3
    for keywords in ({}, {"attn_mask": mask}, {"attn_mask": mask[:1]}):
        results = []
        for backend in ("cpu_flash", "naive"):
            out, null = attention(*inputs, backend=backend, **keywords)
            results.append(torch.autograd.grad(out.square().sum() + null.sum(), inputs))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fill", [-1e9, -1e4, torch.finfo(torch.float32).min])
def test_a_row_of_large_negative_numbers_with_the_null_off(fill):
    inputs = tensors(2, 2, 6, 4, dtype=torch.float32)
    mask = torch.zeros(6, 6)
    mask[2] = fill
    results = []
    for backend in ("cpu_flash", "naive"):
        out, _ = null_attention(*inputs, attn_mask=mask, null_logit=-math.inf, backend=backend)
        if backend == "cpu_flash":
            with pytest.warns(UserWarning, match="-inf instead of large negative numbers"):
                grads = torch.autograd.grad(out.square().sum(), inputs)
        else:
            grads = torch.autograd.grad(out.square().sum(), inputs)
        results.append((out, *grads))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


CALLS = {
    "attention": lambda *x: attention(*x, backend="cpu_flash"),
    "depth": lambda *x: mix("fused", *x),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_raises(name):
    call = CALLS[name]
    inputs = tensors(2, 2, 3, 4) if name == "attention" else tensors(2, 3, 4)
    out, second = call(*inputs)
    (gradient,) = torch.autograd.grad(
        out.square().sum() + second.sum(), inputs[0], create_graph=True
    )
    with pytest.raises(UserError, match="backend='naive'"):
        torch.autograd.grad(gradient.square().sum(), inputs[0])
    with pytest.raises(UserError, match="second derivative"):
        torch.autograd.gradgradcheck(call, inputs)
    with pytest.raises(UserError, match="second derivative"):
        torch.autograd.functional.hessian(lambda x: call(x, *inputs[1:])[0].sum(), inputs[0])


def test_a_second_derivative_of_the_plain_forms_is_right():
    assert torch.autograd.gradgradcheck(
        lambda *x: attention(*x, backend="naive"), tensors(1, 1, 3, 2)
    )
    assert torch.autograd.gradgradcheck(lambda *x: mix("naive", *x), tensors(1, 2, 3))


@pytest.mark.parametrize("name", CALLS)
def test_vmap_and_gradients_of_each_sample(name):
    call = CALLS[name]
    inputs = tensors(3, 2, 2, 3, 4) if name == "attention" else tensors(3, 2, 3, 4)
    inputs = [x.detach() for x in inputs]

    def loss(*entry):
        out, second = call(*entry)
        return out.square().sum() + second[..., 0].sum()

    everything = tuple(range(len(inputs)))
    mapped = [*torch.vmap(call)(*inputs), *torch.vmap(torch.func.grad(loss, everything))(*inputs)]
    for index in range(3):
        entry = [x[index].clone().requires_grad_() for x in inputs]
        expected = [*call(*entry), *torch.autograd.grad(loss(*entry), entry)]
        for got, wanted in zip(mapped, expected, strict=True):
            torch.testing.assert_close(got[index], wanted.detach(), rtol=0, atol=1e-12)
