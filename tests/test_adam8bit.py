"""8-bit Adam against the published library, from equal states step by step; what it keeps, and which tensors it leaves in 32 bits."""
import pytest, torch
from torch import nn

from effpt.basics import generator
from effpt.model import Transformer
from effpt.optim.adam8bit import adam8bit
from effpt_kernels.blockwise import BLOCK, dynamic_map

SHAPE, RATES = (64, 100), dict(lr=1e-2, betas=(.9, .95), eps=1e-8, weight_decay=.1)
KEYS = dict(m='state1', m_scale='absmax1', v='state2', v_scale='absmax2')


def gradient(scale, t): return scale * torch.randn(SHAPE, generator=generator(0, 'gradient', t)) * torch.logspace(-2, 0, SHAPE[1])


@pytest.fixture
def pair():
    "Ours and theirs, on a matrix each."
    theirs = pytest.importorskip('bitsandbytes').optim.AdamW8bit
    layer, other = nn.Linear(*SHAPE[::-1], bias=False), nn.Parameter(torch.zeros(SHAPE))
    return layer.weight, adam8bit(layer, **RATES), other, theirs([other], **RATES)


def both_step(pair, g):
    p, ours, q, theirs = pair
    for x in p, q: x.data.fill_(.01); x.grad = g.clone()
    ours.step(), theirs.step()
    return ours.state[p], theirs.state[q]


@pytest.mark.parametrize('scale', [1., 1e-2, 1e-3, 1e-6])
def test_from_the_same_state_the_same_step(pair, scale):
    "Updates are the same; so are the scales; a code of ours is never farther from the moment than theirs."
    p, _, q, _ = pair
    for t in range(1, 41):
        ours, theirs = both_step(pair, gradient(scale, t))
        assert (p - q).norm() < 1e-6 * (q - .01).norm()
        for key in 'm_scale', 'v_scale': torch.testing.assert_close(ours[key], theirs[KEYS[key]], rtol=1e-6, atol=0)
        assert (ours['m'] != theirs['state1'].view(SHAPE)).float().mean() < .02
        for key, their in KEYS.items(): ours[key].copy_(theirs[their].view(ours[key].shape))


@pytest.mark.parametrize('key, signed', [('m', True), ('v', False)])
def test_our_codes_are_nearer(pair, key, signed):
    g, values = gradient(1., 1), dynamic_map(signed).double()
    ours, theirs = both_step(pair, g)
    moment = (.1 * g if signed else .05 * g * g).double().view(-1, BLOCK)
    def off(codes): return (values[codes.view(-1, BLOCK).int()] * moment.abs().amax(1, keepdim=True) - moment).abs()
    a, b = off(ours[key]), off(theirs[KEYS[key]])
    assert (a <= b + 1e-6 * moment.abs().amax()).all() and a.mean() <= b.mean()


def test_small_and_unmatched_tensors_keep_32_bits():
    def kinds(**options):
        model = Transformer(vocab=64, width=64, layers=1, heads=2, length=8)
        optimizer = adam8bit(model, **options)
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
        return {name: optimizer.state[p]['v'].dtype for name, p in model.named_parameters()}
    everything, some = kinds(), kinds(match='*.up')
    assert {n for n, d in everything.items() if d != torch.uint8} == {n for n in everything if 'norm' in n}
    assert [n for n, d in some.items() if d == torch.uint8] == ['blocks.0.mlp.up.weight']


def test_weights_in_bfloat16_are_rounded_once_and_scales_stay_in_float32():
    layer = nn.Linear(*SHAPE[::-1], bias=False).bfloat16()
    before, g = layer.weight.detach().double(), gradient(1., 1).bfloat16()
    optimizer = adam8bit(layer, **RATES)
    layer.weight.grad = g.clone()
    optimizer.step()
    n = g.double() / (g.double().abs() + RATES['eps'])   # the first step of Adam
    expected = (before * (1 - RATES['lr'] * RATES['weight_decay']) - RATES['lr'] * n).bfloat16()
    assert (layer.weight != expected).float().mean() < .01   # ties of the rounding
    state = optimizer.state[layer.weight]
    assert (state['m'].dtype, state['m_scale'].dtype, layer.weight.dtype) == (torch.uint8, torch.float32, torch.bfloat16)
