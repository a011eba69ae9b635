"""The Triton kernels of the depth mix against the passes that PyTorch makes.

With a GPU they run there, else in Triton's interpreter: in a process of its own, because what makes
Triton interpret must be set before it is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from oasis_attn.ops.depth_mix import (
    AutogradMixer,
    Routers,
    TwoPhaseMixer,
    autograd,
    depth_mix,
    passes,
)
from oasis_attn.ops.depth_mix.autograd import depth_weights
from oasis_attn.ops.depth_mix.triton_mixer import TritonMixer

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
if INTERPRETED:
    TOLERANCE[torch.bfloat16] = 3e-2  # it truncates where a GPU rounds

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
runs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="no GPU: see the interpreter")


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run the kernels")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


CASES = [
    {},
    {"normalizer": "softmax1"},
    {"normalizer": "softmax1", "mix_scale": "sum", "block_size": 3},
    {"mix_scale": "rms", "block_size": 2},
    {"normalizer": "softmax1", "signal": False, "block_size": 4},
    {"mix_scale": "sum", "block_size": 100},
]


@pytest.fixture(scope="module")
def kernels():
    from oasis_attn.ops.depth_mix import triton_kernels

    if not INTERPRETED:
        yield triton_kernels
        return
    from triton.runtime import interpreter

    def patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
        original(tensor, scope)  # and the bound of a loop, which NumPy 2.4 refuses to convert
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        yield triton_kernels


def use(kernels_for, patch):
    for module in (autograd, passes):
        patch.setattr(module, "kernels_for", kernels_for)


@pytest.fixture
def no_kernels(monkeypatch):
    """What PyTorch computes without them."""
    use(lambda _: None, monkeypatch)


@pytest.fixture
def used(kernels, monkeypatch):
    """The kernels are used wherever they fit, on this device; the number of times it did."""
    times = []

    def kernels_for(sources):
        if not kernels.fits(sources):
            return None
        times.append(len(sources))
        return kernels

    use(kernels_for, monkeypatch)
    return times


def draw(*shape, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(shape, dtype=wide).to(DEVICE, dtype)


def close(got, wanted, dtype):
    """Relative to the largest element; None where None is wanted."""
    assert (got is None) == (wanted is None)
    if got is not None:
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        scale = wanted.abs().max().clamp(min=1e-3)
        error = (got.double() - wanted.double()).abs().max() / scale.double()
        assert error <= TOLERANCE[dtype]


SHAPES = [(1, 3, 8), (2, 5, 16), (7, 2, 96), (30, 2, 129), (4, 11, 40)]


@runs_kernels
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("S", "T", "D"), SHAPES)
@pytest.mark.parametrize("first", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_sum_and_gradients(kernels, S, T, D, first, mixed):
    if mixed and first != torch.float32:
        pytest.skip("an embedding in float32 with branches in bfloat16 is the one mix there is")
    torch.manual_seed(0)
    rest = torch.bfloat16 if mixed and S > 1 else first
    wide = torch.float64 if first == torch.float64 else torch.float32
    sources = [draw(1, T, D, dtype=first if i == 0 else rest) for i in range(S)]
    sources = [x if x.data_ptr() % 16 == 0 else x.clone() for x in sources]
    assert kernels.fits(sources)
    weights = draw(1, T, S + 1, dtype=wide)[..., :-1]  # as Softmax1 leaves them
    close(kernels.weighted_sum(sources, weights, first),
          passes.weighted_sum(sources, weights, first), first)  # fmt: skip
    grad = draw(1, 1, D, dtype=first).expand(1, T, D)
    wide_grad = grad.to(wide)
    close(kernels.sum_gradients(sources, wide_grad, None, [], []),
          passes.row_products(sources, wide_grad), first)  # fmt: skip
    needed = [i % 3 != 1 for i in range(S)]
    onto = [torch.randn_like(x) if i % 2 else None for i, x in enumerate(sources)]
    into = [torch.empty_like(x) if need else None for x, need in zip(sources, needed, strict=True)]
    wanted, grads = passes.sum_gradients(sources, weights, grad, needed, onto)
    found = kernels.sum_gradients(sources, grad, weights, onto, into)
    close(found, wanted, first)
    for got, want in zip(into, grads, strict=True):
        close(got, want, rest)
    in_place = [x.clone() for x in sources]
    kernels.sum_gradients(sources, grad, weights, in_place, in_place, products=False)
    _, grads = passes.sum_gradients(sources, weights, grad, [True] * S, sources)
    for got, want in zip(in_place, grads, strict=True):
        close(got, want, rest)


@runs_kernels
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("R", [1, 7, 25, 81])
@pytest.mark.parametrize(("T", "D"), [(1, 8), (70, 33), (33, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_gradients(kernels, R, T, D, dtype):
    torch.manual_seed(0)
    source, queries, grad = draw(2, T, D, dtype=dtype), draw(R, D), draw(2, T, R)
    found, wanted = (x.scores(source, queries, 1e-6) for x in (kernels, passes))
    for pair in zip(found, wanted, strict=True):
        close(*pair, torch.float32)
    for needed in ([True, True], [True, False], [False, True]):
        grads = [
            x.score_gradients(grad, source, queries, *wanted, needed) for x in (kernels, passes)
        ]
        close(grads[0][0], grads[1][0], dtype)
        close(grads[0][1], grads[1][1], torch.float32)


@runs_kernels
@pytest.mark.parametrize("normalizer", ["softmax", "softmax1"])
@pytest.mark.parametrize("signal", [False, True])
@pytest.mark.parametrize("S", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_and_gradients(used, normalizer, signal, S, dtype):
    results = []
    for with_kernels in (True, False):
        torch.manual_seed(0)
        scores, beta = draw(2, 35, S, dtype=dtype) * 3, draw(dtype=dtype).exp()
        psi = draw(2, 35, S, dtype=dtype).sigmoid() if signal else None
        if S > 1:
            scores[0, 0, 1] = -torch.inf  # a dropped source
        leaves = [
            x.requires_grad_() for x in (scores, psi, beta)[: 3 if signal else 1] if x is not None
        ]
        up, up_null = draw(2, 35, S, dtype=dtype), draw(2, 35, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            if not with_kernels:
                use(lambda _: None, patch)
            weights, null = depth_weights(scores, psi, beta if signal else 0.0, normalizer)
            results.append([weights, null])
            losses = [(weights * up).sum(), (null * up_null).sum()]
            for loss in [losses[0], *([losses[1], sum(losses)] if null.requires_grad else [])]:
                results[-1] += torch.autograd.grad(loss, leaves, retain_graph=True)
    for got, want in zip(*results, strict=True):
        close(got, want, dtype)
    assert used


@runs_kernels
def test_a_source_of_zeros(kernels):
    zeros, queries = torch.zeros(1, 3, 8, device=DEVICE), draw(2, 8)
    found = kernels.scores(zeros, queries, 1e-6)
    grads = kernels.score_gradients(draw(1, 3, 2), zeros, queries, *found, [True, True])
    assert all(x.isfinite().all() for x in (*found, *grads))


@runs_kernels
@pytest.mark.parametrize("case", [{}, {"block_size": 3, "mix_scale": "rms"}], ids=str)
@pytest.mark.parametrize("branches_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_of_routers(used, case, branches_dtype):
    """The gradients of a whole chain of mixes; with an embedding in float32, as under autocast."""
    R, wide = 7, torch.float64 if branches_dtype == torch.float64 else torch.float32
    results = []
    for with_kernels in (True, False):
        torch.manual_seed(0)
        branches = [draw(2, 5, 24, dtype=wide if i == 0 else branches_dtype) for i in range(R)]
        psi = [draw(2, 5, dtype=wide).sigmoid() for _ in range(R)]
        queries, beta = draw(R, 24, dtype=wide), draw(R, dtype=wide).exp()
        leaves = [x.requires_grad_() for x in (*branches, *psi[1:], queries, beta)]
        with pytest.MonkeyPatch.context() as patch:
            if not with_kernels:
                use(lambda _: None, patch)
            mixer = AutogradMixer(Routers(queries, beta, 1e-6, normalizer="softmax1", **case))
            mixes = [mixer.update(branches[i], psi[i] if i else None, i) for i in range(R)]
            loss = sum((x.to(wide) * draw(2, 5, 24, dtype=wide)).sum() for x in mixes)
            results.append([*mixes, *torch.autograd.grad(loss, leaves)])
        assert used
    for got, want in zip(*results, strict=True):
        close(got, want, branches_dtype)


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_inference(kernels, case, dtype):
    """The mixes of `TwoPhaseMixer`, from the same rounded sources."""
    R, B, T, D, wide = 9, 2, 3, 24, torch.promote_types(dtype, torch.float32)
    torch.manual_seed(0)
    branches = [draw(B, T, D, dtype=dtype) for _ in range(R)]
    psi = [None, None, *(draw(B, T, dtype=wide).sigmoid() for _ in range(R - 2))]
    signal = case.get("signal", True)
    beta = draw(R, dtype=wide).exp() if signal else None
    rest = {name: value for name, value in case.items() if name != "signal"}
    routers = Routers(draw(R, D, dtype=wide), beta, 1e-6, **rest)
    triton = TritonMixer(branches[0], routers, kernels)
    two_phase = TwoPhaseMixer(branches[0], routers)
    for router in range(R):
        arguments = branches[router], psi[router] if signal else None, router
        close(triton.update(*arguments), two_phase.update(*arguments), dtype)


@runs_kernels
@pytest.mark.parametrize("change", ["stride", "alignment", "dtype"])
def test_what_the_kernels_cannot_read_falls_back(kernels, change):
    source, other = torch.zeros(2, 4, 16), torch.zeros(2, 4, 16)
    assert kernels.fits([source, other, other])
    other = {
        "stride": torch.zeros(4, 2, 16).transpose(0, 1),
        "alignment": torch.zeros(2 * 4 * 16 + 1)[1:].view(2, 4, 16),
        "dtype": torch.zeros(2, 4, 16, dtype=torch.bfloat16),
    }[change]
    assert not kernels.fits([source, other, source])
    assert not kernels.can_add([other, None], [source, source])


@runs_kernels
def test_inside_vmap_they_cannot_be_used(kernels):
    found = []
    torch.vmap(lambda x: (found.append(kernels.fits([x])), x)[1])(torch.zeros(2, 1, 4, 16))
    assert found == [False]


def test_nothing_else_uses_them():
    assert passes.kernels_for([torch.zeros(2, 4, 16)]) is None


@pytest.mark.skipif(not CUDA, reason="there is no GPU")
@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "sigmoid"])
def test_depth_mix_on_a_gpu_uses_them_and_equals_naive(normalizer):
    torch.manual_seed(0)
    sources = [draw(2, 33, 96).requires_grad_() for _ in range(6)]
    query, psi = draw(96).requires_grad_(), [draw(2, 33).sigmoid() for _ in range(6)]
    assert passes.kernels_for(sources) is not None
    results = []
    for backend in ("fused", "naive"):
        torch.manual_seed(1)
        mixed, weights = depth_mix(
            sources, query, null_evidence=psi, beta=0.7, normalizer=normalizer, backend=backend
        )
        grads = torch.autograd.grad((mixed * draw(2, 33, 96)).sum(), [*sources, query])
        results.append([mixed, weights, *grads])
    for got, want in zip(*results, strict=True):
        close(got, want, torch.float32)
