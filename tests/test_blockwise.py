"""Block-wise 8-bit numbers: the map of the published library, the nearest code, and kernels that give what the references give."""
import itertools

import pytest, torch

from effpt_kernels import blockwise
from effpt_kernels.blockwise import BLOCK, adam_8bit, dequantize, dynamic_map, in_blocks, quantize, tables
from device import DEVICE, needs_triton

SHAPES = [(1,), (7,), (255,), (256,), (257,), (3, 100), (33, 65), (2, 3, 171), (4097,), (0,)]


def numbers(shape, key=0, dtype=torch.float32):
    "Numbers of very different sizes, in all signs."
    g = torch.Generator().manual_seed(key)
    return (torch.randn(shape, generator=g) * 10 ** (4 * torch.rand(shape, generator=g) - 4)).to(dtype).to(DEVICE)


@pytest.mark.parametrize('signed', [True, False])
def test_the_map_is_the_published_one(signed):
    functional = pytest.importorskip('bitsandbytes.functional')
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize('signed', [True, False])
def test_numbers_with_equal_upper_bits_have_at_most_two_codes(signed):
    "What makes the lookup exact."
    upper = tables(signed).middle[:-1].view(torch.int32) >> 16
    assert len(upper.unique()) == len(upper)


@pytest.mark.parametrize('signed', [True, False])
def test_the_code_is_the_nearest(signed):
    table = tables(signed)
    around = torch.cat([table.middle[:-1] + d for d in (-1e-6, -1e-9, 0., 1e-9, 1e-6)] + [table.values, torch.linspace(-1. if signed else 0., 1., 20_001)])
    unit = around[(around.abs() <= 1) & (signed | (around >= 0))]
    distance = (unit.double()[:, None] - table.values.double()).abs()
    chosen = distance.gather(1, blockwise.encode(unit, table).long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 2e-7).all()     # the middle of two values is rounded, too


def test_the_extremes_of_a_block_are_kept():
    x = torch.zeros(3, BLOCK)
    x[0, 5], x[1, 7], x[1, 8] = 3., -2., 2.
    codes, scale = quantize(x.to(DEVICE))
    back = dequantize(codes, scale)
    assert scale.tolist() == [3., 2., 0.] and back[0, 5] == 3 and back[1, 8] == 2 and (back[2] == 0).all()
    assert abs(back[1, 7] + 2) < .02     # there is no code for -1


def test_a_block_does_not_see_its_neighbours():
    x = numbers((4 * BLOCK,))
    huge = torch.cat([x, 1e6 * x[:BLOCK]])
    assert torch.equal(quantize(x)[0], quantize(huge)[0][:len(x)])


@needs_triton
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernel_and_reference_agree_to_the_bit(kernels, shape, signed, dtype):
    x = numbers(shape, dtype=dtype)
    x = x if signed else x.abs()
    codes, scale = quantize(x, signed)
    expected, expected_scale = blockwise.quantize_reference(x, signed)
    assert codes.shape == x.shape and torch.equal(codes, expected) and torch.equal(scale, expected_scale)
    assert torch.equal(dequantize(codes, scale, signed), blockwise.dequantize_reference(codes, scale, signed))


@needs_triton
def test_rows_that_are_not_contiguous(kernels):
    x = numbers((40, 60))
    for view in x.T, x[:, ::2], x[3:, 1:]:
        assert all(map(torch.equal, quantize(view), blockwise.quantize_reference(view.contiguous())))


def in_float64(g, m, v, step, beta1, beta2, eps, p=None, lr=0., weight_decay=0.):
    "A step of AdamW without rounding: direction or parameter, and both moments."
    g = g.double()
    m, v = beta1 * m.double() + (1 - beta1) * g, beta2 * v.double() + (1 - beta2) * g ** 2
    n = (m / (1 - beta1 ** step)) / ((v / (1 - beta2 ** step)).sqrt() + eps)
    return (n if p is None else p.double() * (1 - lr * weight_decay) - lr * n), m, v


STEP = dict(beta1=.9, beta2=.99, eps=1e-8)


@needs_triton
@pytest.mark.parametrize('scale', [1., 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize('shape, dtype, apply', itertools.product([(5,), (300,), (33, 65)], [torch.float32, torch.bfloat16, torch.float16], [True, False]))
@pytest.mark.parametrize('how', ['kernel', 'reference'])
def test_a_step_against_float64(kernels, monkeypatch, how, shape, dtype, apply, scale):
    if how == 'reference': monkeypatch.setenv('EFFPT_KERNELS', 'torch')
    state = [*quantize(scale * numbers(shape, 1)), *quantize(scale ** 2 * numbers(shape, 2).abs(), False)]
    p = numbers(shape, 3, dtype) if apply else None
    extra = dict(lr=.1, weight_decay=.2) if apply else {}
    g = (scale * numbers(shape, 4)).to(dtype)
    expected, m, v = in_float64(g, dequantize(*state[:2]), dequantize(*state[2:], False), 3, p=None if p is None else p.clone(), **STEP, **extra)
    got = adam_8bit(g, *state, 3, p=p, **STEP, **extra)
    assert got.dtype == (dtype if apply else torch.float32) and (not apply or got is p)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2 if apply and dtype != torch.float32 else 1e-5, atol=1e-5)
    for codes, s, moment, signed in (*state[:2], m, True), (*state[2:], v, False):
        largest = in_blocks(moment, BLOCK).abs().amax(1)
        torch.testing.assert_close(s, largest.float(), rtol=1e-5, atol=0)
        gaps = tables(signed).values.to(DEVICE).diff().amax() / 2
        off = in_blocks(dequantize(codes, s, signed).double() - moment, BLOCK).abs().amax(1)
        assert (off <= gaps * largest * 1.001).all()


@needs_triton
def test_many_steps_stay_together(kernels):
    "Kernel and reference over a stream of gradients: the same codes but for ties."
    states = [[*quantize(torch.zeros(1000, device=DEVICE)), *quantize(torch.zeros(1000, device=DEVICE), False)] for _ in range(2)]
    parameters = [numbers((1000,)) for _ in range(2)]
    for t in range(1, 11):
        for step, state, p in zip((adam_8bit, blockwise.adam_8bit_reference), states, parameters): step(numbers((1000,), t), *state, t, p=p, **STEP)
    torch.testing.assert_close(*parameters, rtol=1e-4, atol=1e-5)
    assert (states[0][0] != states[1][0]).float().mean() < .01


@needs_triton
def test_a_parameter_that_is_not_contiguous(kernels):
    state = [*quantize(torch.zeros(60, 40, device=DEVICE)), *quantize(torch.zeros(60, 40, device=DEVICE), False)]
    p = numbers((40, 60)).T
    expected = blockwise.adam_8bit_reference(numbers((60, 40), 1), *(s.clone() for s in state), 1, p=p.clone())
    torch.testing.assert_close(adam_8bit(numbers((60, 40), 1), *state, 1, p=p), expected)


@needs_triton
def test_what_a_kernel_cannot_read_is_refused(kernels):
    codes, scale = quantize(numbers((40, 60)))
    with pytest.raises(ValueError, match='scale holds 10 numbers where 3 are needed'): dequantize(codes[:9], scale)
    zeros = quantize(torch.zeros(60, 40, device=DEVICE), False)
    with pytest.raises(ValueError, match='m is not contiguous'): adam_8bit(numbers((60, 40)), codes.T, scale, *zeros, 1)
    with pytest.raises(ValueError, match='m holds 540 numbers where 2400 are needed'): adam_8bit(numbers((60, 40)), codes[:9].contiguous(), scale, *zeros, 1)
    with pytest.raises(ValueError, match='v is torch.float32: it must be torch.uint8'): adam_8bit(numbers((60, 40)), codes.view(60, 40), scale, zeros[0].float(), zeros[1], 1)
