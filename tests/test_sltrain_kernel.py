"""SLTrain's linear layer: the reference against a dense matrix in float64, the kernels against the reference, over shapes, layouts and types; nothing of the size of W is made."""
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode

from effpt_kernels import sltrain
from effpt_kernels.sltrain import WORD, mixed, places, sltrain_backward, sltrain_backward_reference, sltrain_forward, sltrain_forward_reference, sltrain_linear
from device import DEVICE, needs_triton

SHAPES = [(1, 1, 1, 1, 1), (3, 5, 7, 2, 1), (17, 33, 65, 5, 3), (20, 70, 31, 40, 11), (5, 64, 48, 16, 16), (40, 16, 100, 3, 7)]   # tokens, m, n, r, k
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def numbers(*shape, key=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(key)).to(dtype).to(DEVICE)


def inputs(tokens, m, n, r, k, dtype=torch.float32, stored=False):
    "Input, factors, values and support, and a gradient that is not uniform."
    support = torch.tensor(0xDEADBEEF)
    if stored: support = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))[:k] for i in range(m)]).int()
    return (numbers(tokens, n, key=1, dtype=dtype), numbers(r, n, key=2, dtype=dtype), numbers(m, r, key=3, dtype=dtype), numbers(m * k, key=4, dtype=dtype), support.to(DEVICE)), numbers(tokens, m, key=5, dtype=dtype)


def dense(a, b, values, support, scale):
    "W in float64, entry by entry."
    m, n, k = len(b), a.shape[1], values.numel() // len(b)
    w = scale * b.double() @ a.double()
    for i, columns in enumerate(places(support, k, n, 0, m).tolist()):
        for t, c in enumerate(columns): w[i, c] += values[i * k + t].double()
    return w


def in_float64(x, a, b, values, support, scale, g):
    "Output and gradients, by autograd through W."
    x, a, b, values = (t.double().requires_grad_() for t in (x, a, b, values))
    m, n, k = len(b), a.shape[1], values.numel() // len(b)
    w = (scale * b @ a).scatter_add(1, places(support, k, n, 0, m), values.view(m, k))
    assert torch.allclose(w, dense(a.detach(), b.detach(), values.detach(), support, scale))
    y = x @ w.T
    return y.detach(), torch.autograd.grad(y, (x, a, b, values), g.double())


def close(got, expected, eps):
    assert torch.linalg.norm(got.double() - expected) <= eps * torch.linalg.norm(expected) + 1e-9


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape', SHAPES)
def test_output_and_gradients_against_float64(how, shape, dtype):
    given, g = inputs(*shape, dtype=dtype)
    y, gradients = in_float64(*given, .7, g)
    got = sltrain_forward(*given, .7)
    assert got.dtype == dtype and got.shape == y.shape
    close(got, y, EPS[dtype])
    for found, expected, like in zip(sltrain_backward(g, *given, .7), gradients, given):
        assert found.dtype == dtype and found.shape == like.shape
        close(found, expected, EPS[dtype])


@pytest.mark.parametrize('stored', [False, True])
@pytest.mark.parametrize('shape', SHAPES[:4])
def test_the_reference_in_float64(shape, stored):
    given, g = inputs(*shape, dtype=torch.float64, stored=stored)
    y, gradients = in_float64(*given, 1.3, g)
    close(sltrain_forward_reference(*given, 1.3), y, 1e-12)
    for found, expected in zip(sltrain_backward_reference(g, *given, 1.3), gradients): close(found, expected, 1e-12)


@pytest.mark.parametrize('stored', [False, True])
def test_gradcheck(stored):
    (*given, support), _ = inputs(3, 5, 7, 2, 2, dtype=torch.float64, stored=stored)
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda *t: sltrain_linear(*t, support, .6), given)


@pytest.mark.parametrize('wanted', [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_only_what_is_wanted(how, wanted):
    given, g = inputs(17, 33, 65, 5, 3)
    every, some = sltrain_backward(g, *given, .7), sltrain_backward(g, *given, .7, *map(bool, wanted))
    for a, b, want in zip(every, some, (wanted[0], wanted[1], wanted[1], wanted[2])): assert torch.allclose(a, b, atol=1e-5) if want else b is None


@needs_triton
@pytest.mark.parametrize('k', [1, 2, 12, 65])
def test_any_density(kernels, k):
    given, g = inputs(9, 19, 65, 4, k)
    torch.testing.assert_close(sltrain_forward(*given, .5), sltrain_forward_reference(*given, .5), rtol=1e-4, atol=1e-4)
    for got, expected in zip(sltrain_backward(g, *given, .5), sltrain_backward_reference(g, *given, .5)): torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_any_layout_and_mixed_types(kernels):
    (x, a, b, values, support), g = inputs(17, 33, 65, 5, 3)
    expected, gradients = sltrain_forward_reference(x, a, b, values, support), sltrain_backward_reference(g, x, a, b, values, support)
    x, a, b = x.T.contiguous().T, numbers(10, 130)[::2, ::2].copy_(a), b.T.contiguous().T
    torch.testing.assert_close(sltrain_forward(x, a, b, values, support), expected, rtol=1e-4, atol=1e-4)
    for got, want in zip(sltrain_backward(g.T.contiguous().T, x, a, b, values, support), gradients): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    one = g[:1, :1].expand(17, 33)   # a gradient whose numbers share their memory
    for got, want in zip(sltrain_backward(one, x, a, b, values, support), sltrain_backward_reference(one, x, a, b, values, support)): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    low = x.bfloat16()   # as under autocast: parameters in float32
    got = sltrain_backward(g.bfloat16(), low, a, b, values, support)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for found, want in zip(got, gradients): close(found, want.double(), 2e-2)


def test_the_hash_is_that_of_whole_numbers():
    def in_python(key, row, part):
        h = (key + row * 0x9E3779B1 + part * 0x85EBCA77) & WORD
        h ^= h >> 16; h = h * 0x7FEB352D & WORD
        h ^= h >> 15; h = h * 0x846CA68B & WORD
        return h ^ h >> 16
    rows, parts = torch.tensor([0, 1, 77, 11007]), torch.tensor([0, 1, 5, 550])
    for key in (0, 1, WORD, 0x12345678): assert mixed(torch.tensor(key), rows, parts).tolist() == [in_python(key, i, t) for i, t in zip(rows.tolist(), parts.tolist())]


@pytest.mark.parametrize('n, k', [(1, 1), (7, 1), (7, 7), (100, 3), (2048, 61), (5461, 164)])
def test_places_are_sorted_apart_and_one_in_each_stratum(n, k):
    at = places(torch.tensor(5), k, n, 0, 200)
    assert at.min() >= 0 and at.max() < n and (at[:, 1:] > at[:, :-1]).all()
    starts = torch.arange(k + 1) * n // k
    assert ((at >= starts[:-1]) & (at < starts[1:])).all()
    assert torch.equal(places(torch.tensor(5), k, n, 50, 60), at[50:60])
    if n >= 100 > k: assert not torch.equal(places(torch.tensor(6), k, n, 0, 200), at)


def test_places_are_spread_evenly():
    at = places(torch.tensor(9), 4, 64, 0, 8000).flatten()
    count = torch.bincount(at, minlength=64).float()
    assert ((count - 500).square() / 500).sum() < 110    # chi-squared with 60 degrees of freedom: beyond this, once in 10,000


class Largest(TorchDispatchMode):
    "Remembers the largest storage that any operation gave, in bytes."
    bytes = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor): self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize('stored', [False, True])
@pytest.mark.parametrize('m, n', [(96, 80), (600, 512)])
def test_nothing_of_the_size_of_w_is_made(m, n, stored):
    given, g = inputs(6, m, n, 4, 3, stored=stored)
    with Largest() as largest:
        sltrain_forward_reference(*given)
        sltrain_backward_reference(g, *given)
    assert largest.bytes <= 4 * m * n / 3.9


@needs_triton
def test_nothing_but_thin_tensors_around_the_kernels(kernels):
    given, g = inputs(6, 96, 80, 4, 3)
    with Largest() as largest:
        sltrain.sltrain_forward_triton(*given)
        sltrain.sltrain_backward_triton(g, *given)
    assert largest.bytes <= 4 * 6 * 96    # what the layer gives


def test_nothing_of_the_size_of_w_is_saved():
    (x, a, b, values, support), g = inputs(6, 96, 80, 4, 3)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = sltrain_linear(x.requires_grad_(), a.requires_grad_(), b.requires_grad_(), values.requires_grad_(), support, 1.)
    assert {t.data_ptr() for t in seen} == {t.data_ptr() for t in (x, a, b, values, support)}
    y.backward(g)


def test_the_operation_can_be_traced():
    (x, a, b, values, support), _ = inputs(6, 33, 20, 4, 3)
    torch.library.opcheck(sltrain_linear, (*(t.requires_grad_() for t in (x, a, b, values)), support, .5))


def test_no_tokens(how):
    given, g = inputs(0, 5, 7, 2, 2)
    assert sltrain_forward(*given).shape == (0, 5)
    assert [tuple(t.shape) for t in sltrain_backward(g, *given)] == [(0, 7), (2, 7), (5, 2), (10,)]
    assert all((t == 0).all() for t in sltrain_backward(g, *given))


def test_shapes_that_do_not_belong_together_are_refused(how):
    (x, a, b, values, support), g = inputs(3, 5, 7, 2, 2)
    for wrong, said in [((x[:, 1:], a, b, values, support), 'give .tokens, 7'), ((x, a[1:], b, values, support), 'a has the shape .1, 7.'), ((x, a, b, values[1:], support), 'give k times 5'),
                        ((x, a, b, values[:0], support), 'k from 1 to 7'), ((x, a, b, values, torch.zeros(5, 1, dtype=torch.int32)), 'support has 5 places for 10')]:
        with pytest.raises(ValueError, match=said): sltrain_forward(*wrong)
    with pytest.raises(ValueError, match='g has the shape'): sltrain_backward(g[1:], x, a, b, values, support)


@needs_triton
def test_what_a_kernel_cannot_read_is_refused(kernels):
    (x, a, b, values, support), g = inputs(3, 5, 7, 2, 2)
    with pytest.raises(ValueError, match='x is torch.float64'): sltrain_forward(x.double(), a, b, values, support)
    with pytest.raises(ValueError, match='support is a table'): sltrain_forward(x, a, b, values, torch.zeros(5, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match='values is not contiguous'): sltrain_forward(x, a, b, numbers(20)[::2], support)
    y = sltrain_linear(x.double(), a.double(), b.double(), values.double(), support, 1.)    # the operation falls back to the reference
    torch.testing.assert_close(y.float(), sltrain_forward(x, a, b, values, support), rtol=1e-4, atol=1e-4)
