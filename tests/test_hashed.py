"""Hashed blocks: a slow loop in float64, the references, the kernels and the gradient all say the same, over odd shapes, types, folds and seeds."""
import pytest, torch

from effpt_kernels.hashed import Place, gather, gather_reference, mix, scatter_add, scatter_add_reference, signs_of, slots_of
from device import DEVICE, needs_triton

PLACES = [Place((7, 5), 0, 1, 4), Place((16, 16), 0, 4, 8), Place((33, 65), 0, 7, 16), Place((33, 65), 11, 7, 16, seed=3), Place((1, 100), 5, 3, 8), Place((30, 1), 2, 40, 4),
          Place((11, 6), 1000, 13, 2, seed=2 ** 40 + 1), Place((12, 30), 9, 50, 4), Place((5, 3), 8, 3, 1), Place((70, 130), 3, 2, 64)]
places = pytest.mark.parametrize('place', [p._replace(fold=fold) for p in PLACES for fold in (True, False)], ids=str)


def numbers(*shape, key=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(key)).to(dtype).to(DEVICE)
def bank_of(place, dtype=torch.float32): return numbers(place.slots, place.block ** 2, dtype=dtype)


def uses(place):
    "For every number of the matrix, one after the other: its block, where in it, its sign."
    for i in range(place.shape[0]):
        for j in range(place.shape[1]):
            tile = place.first + i // place.block * place.tiles[1] + j // place.block
            yield i, j, slots_of(tile, place), i % place.block * place.block + j % place.block, signs_of(tile, place)


@places
def test_references_against_a_loop(place):
    bank, g = bank_of(place, torch.float64).cpu(), numbers(*place.shape, key=1, dtype=torch.float64).cpu()
    weight = torch.rand(place.slots, dtype=torch.float64) + .5
    w, out = torch.zeros(place.shape, dtype=torch.float64), torch.zeros_like(bank)
    for i, j, slot, inside, sign in uses(place):
        w[i, j] = .3 * sign * bank[slot, inside]
        out[slot, inside] += .3 * sign * g[i, j] * weight[slot]
    assert torch.equal(gather_reference(bank, place, .3), w)
    torch.testing.assert_close(scatter_add_reference(g, place, .3, weight), out, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@places
def test_gathered(kernels, place, dtype):
    "To the bit, but for bfloat16, which the interpreter cuts off where hardware rounds."
    bank, scale = bank_of(place, dtype), torch.tensor(.3, device=DEVICE)
    torch.testing.assert_close(gather(bank, place, scale), gather_reference(bank, place, scale), rtol=.01 if dtype == torch.bfloat16 else 0, atol=0)
    torch.testing.assert_close(gather(bank, place, dtype=torch.bfloat16), gather_reference(bank, place, dtype=torch.bfloat16), rtol=.01, atol=0)
    assert torch.equal(gather(bank, place, dtype=torch.float32), gather_reference(bank, place, dtype=torch.float32))


@needs_triton
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@places
def test_summed(kernels, place, dtype):
    "Gradients that differ everywhere, also transposed and with gaps; twice to the same bits."
    weight, scale = torch.rand(place.slots, device=DEVICE) + .5, torch.tensor(.3, device=DEVICE)
    plain = numbers(*place.shape, key=1, dtype=dtype)
    for g in plain, plain.T.contiguous().T, numbers(place.shape[0], 2 * place.shape[1], key=2, dtype=dtype)[:, ::2]:
        expected = scatter_add_reference(g.double(), place, scale, weight)
        got = scatter_add(g, place, scale, weight)
        assert got.dtype == torch.float32 and torch.equal(got, scatter_add(g, place, scale, weight))
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scatter_add(g, place).double(), scatter_add_reference(g.double(), place), rtol=1e-5, atol=1e-5)


@places
def test_one_is_the_transpose_of_the_other(place):
    "<gather(b), g> = <b, scatter_add(g)>."
    bank, g = bank_of(place, torch.float64), numbers(*place.shape, key=1, dtype=torch.float64)
    assert (gather_reference(bank, place, .3) * g).sum().item() == pytest.approx((bank * scatter_add_reference(g, place, .3)).sum().item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('slots', [1, 2, 7, 64])
def test_folds_use_every_block_equally_often(slots):
    place = Place((64, 64), 0, slots, 8)
    count = torch.bincount(slots_of(torch.arange(place.count), place), minlength=slots)
    assert count.max() - count.min() <= 1
    assert (slots_of(torch.arange(slots), place).sort().values == torch.arange(slots)).all()     # a fold is a bijection


def test_hashes_are_even_and_differ_by_seed():
    x = torch.arange(100_000)
    assert abs((mix(x) % 10).bincount().float() / 1e4 - 1).max() < .05 and len(mix(x).unique()) == len(x)
    a, b = Place((1, 1), 0, 97, fold=False), Place((1, 1), 0, 97, seed=1, fold=False)
    assert abs((slots_of(x, a) == slots_of(x, b)).float().mean() - 1 / 97) < .002
    assert abs(signs_of(x, a).float().mean()) < .01 and abs((signs_of(x, a) * signs_of(x, b)).float().mean()) < .01
    assert mix(12345) == mix(torch.tensor(12345)).item() == mix(12345 + 2 ** 32)


@needs_triton
def test_what_does_not_fit_is_refused(kernels):
    place = Place((8, 8), 0, 2, 4)
    with pytest.raises(ValueError, match='the bank has the shape'): gather(numbers(3, 16), place)
    with pytest.raises(ValueError, match='block is 3'): gather(numbers(2, 9), place._replace(block=3))
    with pytest.raises(ValueError, match='slots is 0'): scatter_add(numbers(8, 8), place._replace(slots=0))
    with pytest.raises(ValueError, match='the gradient has the shape'): scatter_add(numbers(8, 7), place)
    with pytest.raises(ValueError, match='weight has the shape'): scatter_add(numbers(8, 8), place, weight=numbers(3))


@needs_triton
def test_float64_is_left_to_the_reference(kernels):
    place = PLACES[3]
    bank, g = bank_of(place, torch.float64), numbers(*place.shape, key=1, dtype=torch.float64)
    assert torch.equal(gather(bank, place), gather_reference(bank, place)) and torch.equal(scatter_add(g, place), scatter_add_reference(g, place))
