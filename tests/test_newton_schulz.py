"""Newton-Schulz on stacks of matrices: the reference against the singular value decomposition in float64, the kernels against the reference, over shapes, strides and types."""
import pytest, torch

from effpt_kernels import newton_schulz as ns
from effpt_kernels.newton_schulz import COEFFICIENTS, combine, newton_schulz, square
from device import DEVICE, needs_triton

SHAPES = [(1, 1, 1), (1, 1, 7), (2, 7, 1), (1, 32, 32), (3, 33, 65), (2, 65, 33), (1, 64, 129), (2, 129, 64), (1, 70, 140), (3, 16, 48), (1, 200, 40)]   # odd, tall, wide, square
TYPES = [(torch.float32, 2e-5), (torch.bfloat16, 8e-3)]


def numbers(shape, key=0, dtype=torch.float32):
    "Matrices whose columns are of very different sizes."
    g = torch.Generator().manual_seed(key)
    return (torch.randn(shape, generator=g) * 10 ** (2 * torch.rand(shape[-1], generator=g) - 2)).to(dtype).to(DEVICE)


def apart(a, b): return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def in_float64(g, steps=5, coefficients=COEFFICIENTS):
    "By the decomposition: the polynomial on every singular value."
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    a, b, c = coefficients
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps): s = a * s + b * s ** 3 + c * s ** 5
    return u * s[..., None, :] @ vh


@pytest.mark.parametrize('scale', [1., 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_reference_moves_the_singular_values_only(shape, scale):
    g = scale * (numbers(shape) + numbers(shape, 1).sign())
    assert apart(ns.newton_schulz_reference(g.double()), in_float64(g)) < 1e-9
    assert apart(ns.newton_schulz_reference(g), in_float64(g)) < 1e-4
    assert apart(ns.newton_schulz_reference(g, 3, (1.5, -.5, 0.)), in_float64(g, 3, (1.5, -.5, 0.))) < 1e-4


@needs_triton
@pytest.mark.parametrize('dtype, tolerance', TYPES, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_products(kernels, shape, dtype, tolerance):
    x, m = numbers(shape, dtype=dtype), shape[1]
    c = numbers((shape[0], m, m), 1, dtype)
    c, b, wide = c + c.mT, numbers((shape[0], m, m), 2, dtype), x.double()
    whole, side = square(x), ns.tiles(m, dtype)['M']
    assert whole.dtype == dtype and torch.equal(whole[:, side:, :side], whole[:, :side, side:].mT)       # a mirrored block is the same to the bit
    assert apart(whole, wide @ wide.mT) < tolerance
    assert apart(square(x, c, 2., -.5), 2 * wide @ wide.mT - .5 * c.double()) < tolerance
    assert apart(combine(x, b, 3.), 3 * wide + b.double() @ wide) < tolerance


@needs_triton
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_kernel_and_reference_agree(kernels, shape, dtype):
    g = numbers(shape) + numbers(shape, 1).sign()
    ours, theirs = newton_schulz(g, dtype=dtype), ns.newton_schulz_reference(g, dtype=dtype)
    assert ours.shape == g.shape and ours.dtype == theirs.dtype == dtype
    assert apart(ours, theirs) < (1e-4 if dtype == torch.float32 else 5e-2)
    assert apart(ours, in_float64(g)) < (1e-4 if dtype == torch.float32 else 5e-2)


@needs_triton
def test_strides(kernels):
    base = numbers((3, 20, 36)) + 1
    for view in base.mT, base[:, ::2], base[::2, 3:, 1:], base.permute(1, 0, 2)[:2], base[:1].expand(2, -1, -1):
        assert apart(newton_schulz(view, 2), ns.newton_schulz_reference(view.contiguous(), 2)) < 1e-4
        x = view if view.shape[1] <= view.shape[2] else view.mT
        assert apart(square(x), x.double() @ x.double().mT) < 1e-5
        b = numbers((len(x), x.shape[1], x.shape[1]), 3)
        assert apart(combine(x, b.mT, 2.), 2 * x.double() + b.double().mT @ x.double()) < 1e-5


@needs_triton
def test_each_matrix_is_for_itself(kernels):
    "Its neighbours in the stack change nothing, whatever their size."
    g = numbers((3, 20, 50))
    other = torch.cat([1e6 * g[:1], g[1:2], 0 * g[2:]])
    whole, changed, alone = (newton_schulz(t, 2) for t in (g, other, g[1:2]))
    assert torch.equal(whole[1], changed[1]) and torch.equal(whole[1], alone[0])
    assert (changed[2] == 0).all()


@needs_triton
def test_the_triangle_is_counted_without_a_gap(kernels):
    "More blocks than one row of them, at the border of rounding too."
    x = numbers((1, 500, 8))
    assert apart(square(x), x.double() @ x.double().mT) < 1e-5


@needs_triton
def test_input_is_left_alone_and_empty_stacks_pass(kernels):
    g = numbers((2, 10, 30))
    before = g.clone()
    newton_schulz(g)
    assert torch.equal(g, before)
    assert newton_schulz(g, steps=0).norm(dim=(1, 2)).allclose(torch.ones(2, device=DEVICE))
    for shape in (0, 3, 4), (2, 0, 4), (2, 3, 0): assert newton_schulz(torch.zeros(shape, device=DEVICE)).shape == shape


@needs_triton
@pytest.mark.parametrize('how', ['kernel', 'reference'])
def test_what_does_not_fit_is_refused(kernels, monkeypatch, how):
    if how == 'reference': monkeypatch.setenv('EFFPT_KERNELS', 'torch')
    g = numbers((2, 10, 30))
    with pytest.raises(ValueError, match='g has 2 dimensions: give a stack of matrices'): newton_schulz(g[0])
    with pytest.raises(ValueError, match='give floating-point numbers|the kernel takes'): newton_schulz(g.long())
    with pytest.raises(ValueError, match='steps is -1'): newton_schulz(g, -1)
    with pytest.raises(ValueError, match='three numbers'): newton_schulz(g, 5, (1.5, -.5))
    with pytest.raises(ValueError, match=r'add has the shape \(2, 10, 30\) where \(2, 10, 10\) is needed'): square(g, g)
    with pytest.raises(ValueError, match=r'b has the shape \(1, 10, 10\) where \(2, 10, 10\) is needed'): combine(g, g[:1, :, :10])
    with pytest.raises(ValueError, match='b is torch.bfloat16 on .*, x torch.float32'): combine(g, g[:, :, :10].bfloat16())


@needs_triton
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_the_kernel_names_types_that_it_does_not_read(kernels, dtype):
    for call in newton_schulz, square:
        with pytest.raises(ValueError, match=f'{dtype}: the kernel takes torch.float32 and torch.bfloat16; the reference takes others'): call(numbers((2, 10, 30), dtype=dtype))
