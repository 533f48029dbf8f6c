"""APOLLO's fused update: the reference against float64, the kernel against the reference, over shapes, layouts and types; what cannot be read is refused."""
import itertools

import pytest, torch

from effpt_kernels import apollo
from effpt_kernels.apollo import apollo_step, apollo_step_reference
from device import DEVICE, needs_triton

SHAPES = [(1, 1), (1, 7), (7, 1), (16, 256), (17, 257), (70, 33)]
AXES = [None, 0, 1]


def numbers(shape, key=0, dtype=torch.float32, decades=4):
    "Numbers of very different sizes, in all signs."
    g = torch.Generator().manual_seed(key)
    return (torch.randn(shape, generator=g) * 10 ** (decades * torch.rand(shape, generator=g) - decades)).to(dtype).to(DEVICE)


def inputs(shape, axis, rank=3, scale=1., dtype=torch.float32):
    "Parameter, gradient, projected gradient and direction."
    small = (shape[0], rank) if axis == 1 else (rank, shape[1])
    return numbers(shape, 1, dtype), scale * numbers(shape, 2, dtype), scale * numbers(small, 3), numbers(small, 4)


def in_float64(p, g, r, n, before, lr, scale, axis, weight_decay, limit):
    "The parameter and the norm, channel by channel."
    p, g, r, n = (t.double() for t in (p, g, r, n))
    def ratio(a, b): return a.square().sum().sqrt() / b.square().sum().sqrt()
    if axis is None: u = g * ratio(n, r)
    elif axis == 0: u = torch.stack([g[:, j] * ratio(n[:, j], r[:, j]) for j in range(g.shape[1])], 1)
    else: u = torch.stack([g[i] * ratio(n[i], r[i]) for i in range(g.shape[0])])
    u = u * scale
    norm = u.square().sum().sqrt()
    if limit is not None and before is not None and norm > limit * before.double():
        u, norm = u * (limit * before.double() / norm), limit * before.double()
    return p * (1 - lr * weight_decay) - lr * u, norm


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape, axis', itertools.product(SHAPES, AXES))
def test_a_step_against_float64(how, shape, axis, dtype):
    p, g, r, n = inputs(shape, axis, dtype=dtype)
    free = in_float64(p, g, r, n, None, .1, 2., axis, .3, None)[1]
    cases = [(None, None), (.5 * free, 1.01)] if dtype != torch.float32 else [(None, 1.01), (None, None), (.5 * free, 1.01), (2 * free, 1.01), (.5 * free, None)]
    for before, limit in cases:
        before = None if before is None else before.float()
        options = dict(lr=.1, scale=2., axis=axis, weight_decay=.3, limit=limit)
        expected, norm = in_float64(p, g, r, n, before, **options)
        q = p.clone()
        got = apollo_step(q, g, r, n, before, **options)
        assert q.dtype == dtype and (got is None) == (limit is None)
        eps = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(q.double(), expected, rtol=eps, atol=2e-6 if dtype == torch.float32 else 1e-5)
        if got is not None:
            assert got.shape == () and got.dtype == torch.float32 and got.untyped_storage().nbytes() == 4
            torch.testing.assert_close(got.double(), norm, rtol=2e-6, atol=0)


@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('scale', [1., 1e-2, 1e-3, 1e-6])
def test_any_size_of_the_gradient(how, scale, axis):
    "A gradient of another size gives the same update, for the direction has none."
    p, g, r, n = inputs((33, 65), axis, scale=scale)
    expected, _ = in_float64(p, g, r, n, None, .1, 1., axis, 0., None)
    apollo_step(p, g, r, n, lr=.1, axis=axis)
    torch.testing.assert_close(p.double(), expected, rtol=2e-6, atol=2e-6)


def layouts():
    "Matrices of 33 x 65 that lie differently in memory."
    wide = numbers((66, 130), 5)
    return {'transposed': numbers((65, 33), 6).T, 'every second': wide[::2, ::2], 'a part': wide[3:36, 7:72], 'reversed axes of a part': numbers((80, 70), 7)[5:70, 2:35].T}


@needs_triton
@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('of_p', layouts())
@pytest.mark.parametrize('of_g', ['contiguous', *layouts()])
def test_any_layout(kernels, of_p, of_g, axis):
    r, n = (numbers((65, 3), k).T if axis == 0 else numbers((3, 33), k).T for k in (3, 4))
    p, g = layouts()[of_p], dict(layouts(), contiguous=numbers((33, 65), 8))[of_g]
    expected = p.clone()
    around = p.untyped_storage().nbytes()
    norm = apollo_step_reference(expected, g, r, n, axis=axis, weight_decay=.1)
    got = apollo_step(p, g, r, n, axis=axis, weight_decay=.1)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, norm, rtol=1e-5, atol=0)
    assert p.untyped_storage().nbytes() == around


@needs_triton
def test_what_lies_around_is_left_alone(kernels):
    whole = numbers((40, 300), 9)
    before = whole.clone()
    p, g, r, n = whole[3:20, 5:290], *inputs((17, 285), 0)[1:]
    apollo_step(p, g, r, n, axis=0)
    before[3:20, 5:290] = p
    assert torch.equal(whole, before)


def test_a_channel_without_a_gradient_stays(how):
    for axis in (0, 1):
        p, g, r, n = inputs((5, 6), axis)
        (g[:, 2] if axis == 0 else g[2]).zero_(); (r[:, 2] if axis == 0 else r[2]).zero_()
        before = p.clone()
        apollo_step(p, g, r, n, axis=axis)
        still = (p == before).all(axis)
        assert p.isfinite().all() and still.tolist() == [k == 2 for k in range(p.shape[1 - axis])]


def test_after_a_norm_of_zero_anything_may_come(how):
    p, g, r, n = inputs((5, 6), 0)
    zero = apollo_step(p, 0 * g, 0 * r, 0 * n, axis=0)
    first = apollo_step(p, g, r, n, zero, axis=0)
    assert zero == 0 and first > 0
    assert apollo_step(p, 3 * g, r, n, first, axis=0).item() == pytest.approx(1.01 * first.item(), rel=1e-6)


def test_no_number_is_not_hidden(how):
    p, g, r, n = inputs((5, 6), 0)
    g[1, 2] = float('nan')
    assert apollo_step(p, g, r, n, axis=0).isnan() and p.isnan().any()


def test_nothing_is_nothing(how):
    p = torch.zeros(0, 5, device=DEVICE)
    assert apollo_step(p, p, torch.ones(2, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE), axis=0) == 0


@needs_triton
@pytest.mark.parametrize('axis', AXES)
def test_many_steps_stay_together(kernels, axis):
    "Kernel and reference over a stream of gradients, the norm handed on."
    p, norms = [numbers((24, 40)) for _ in range(2)], [None, None]
    for t in range(10):
        _, g, r, n = (x * (1 + t % 3) for x in inputs((24, 40), axis))
        for i, step in enumerate((apollo_step, apollo_step_reference)): norms[i] = step(p[i], g, r, n, norms[i], axis=axis, weight_decay=.1)
    torch.testing.assert_close(*p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


def test_shapes_that_do_not_belong_together_are_refused(how):
    p, g, r, n = inputs((5, 6), 0)
    for wrong, text in [((p, g[1:], r, n), 'p has the shape .5, 6., g .4, 6.'), ((p[0], g[0], r, n), 'two matrices of one shape'), ((p, g, r, n[1:]), 'r has the shape .3, 6., n .2, 6.'),
                        ((p, g, r[:, 1:], n[:, 1:]), 'r has 5 channels along axis 1 where p has 6')]:
        with pytest.raises(ValueError, match=text): apollo_step(*wrong, axis=0)
    with pytest.raises(ValueError, match='axis is 2'): apollo_step(p, g, r, n, axis=2)


@needs_triton
def test_what_a_kernel_cannot_read_is_refused(kernels):
    p, g, r, n = inputs((5, 6), 0)
    with pytest.raises(ValueError, match='p is torch.float64: it must be one of torch.float32'): apollo_step(p.double(), g, r, n, axis=0)
    with pytest.raises(ValueError, match='g is torch.int64'): apollo_step(p, g.long(), r, n, axis=0)
    with pytest.raises(ValueError, match='numbers of p share their memory'): apollo_step(p[:1].expand(5, 6), g, r, n, axis=0)
    q = p.double()
    apollo_step_reference(q, g.double(), r, n, axis=0)      # the reference takes it
    apollo.apollo_step_triton(p, g, r, n, axis=0)
    torch.testing.assert_close(q.float(), p, rtol=1e-5, atol=1e-6)
