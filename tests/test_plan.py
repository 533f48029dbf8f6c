"""Plans against real steps at more shapes than the page has, advice that keeps its word, and what bad requests get."""
import math

import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from effpt import catalog
from effpt.basics import InputError
from effpt.ledger import count_flops, measure_activations, measure_bytes
from effpt.loss import next_token
from effpt.model import PRESETS, Transformer
from effpt.plan import (PLANNED, PRECISIONS, activations, changed, complete, converted, cure, describe, estimate, fake_activations, find_technique, levers, numbers, plan,
                        rate, recorded_rate, transformer_flops, transformer_shapes, two_moments)
from effpt.train import adamw

TINY = dict(vocab=60, width=32, layers=2, heads=4, hidden=48, length=400)
SHAPES = [TINY, TINY | dict(kv_heads=2), TINY | dict(kv_heads=1, tied=True), TINY | dict(layers=3, heads=2, hidden=7), TINY | dict(vocab=501, width=16, heads=1),
          TINY | dict(layers=1, width=96, heads=6, kv_heads=3, hidden=20), TINY | dict(heads=16, kv_heads=4, tied=True)]

def made(shape, precision='bf16'):
    model = Transformer(**shape)
    return model.bfloat16() if precision == 'pure-bf16' else model

def batch_of(rows, length, vocab=60): return {name: torch.randint(vocab, (rows, length)) for name in ('tokens', 'targets')}

def loss_of(model, batch, precision):
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): total, weight = next_token(model, batch)
    return total / weight

@pytest.mark.parametrize('size', PRESETS)
def test_parameters_and_flops_of_presets(size):
    with torch.device('meta'): model = Transformer(**PRESETS[size])
    assert transformer_shapes(model.shape) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert complete(PRESETS[size]) == model.shape
    assert math.isclose(transformer_flops(model.shape, 500), count_flops(model, 500).total)
    assert plan(size).numbers == sum(p.numel() for p in model.parameters())

@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_activations(shape, precision):
    model = made(shape, precision)
    for rows, length in ((1, 2), (2, 255), (1, 256), (1, 257), (3, 400)):
        real = measure_activations(lambda: loss_of(model, batch_of(rows, length), precision), model.parameters())
        assert abs(activations(model.shape, rows, length, precision, 'cpu') / real - 1) < .005
        assert abs(fake_activations(model, rows, length, precision) - real) <= 8  # a scalar or two

@pytest.mark.parametrize('precision', ['bf16', 'pure-bf16'])
def test_activations_at_size(precision):
    with torch.device('meta'): model = Transformer(**PRESETS['1b'] | dict(layers=2), seed=None)
    model = Transformer.to_empty(model, device='meta')
    assert math.isclose(activations(model.shape, 4, 1024, precision, 'cpu'), fake_activations(model, 4, 1024, precision), rel_tol=.005)

@pytest.mark.parametrize('precision', PRECISIONS)
def test_checkpointing(precision):
    class Kept(nn.Module):
        def __init__(self, block): super().__init__(); self.block = block
        def forward(self, *args): return checkpoint(self.block, *args, use_reentrant=False)
    model = made(TINY | dict(layers=6), precision)
    one = activations(model.shape, 2, 300, precision, 'cpu') - activations(model.shape | dict(layers=5), 2, 300, precision, 'cpu')
    copies = 2 * (numbers(transformer_shapes(model.shape)) - 60 * 32) if precision == 'bf16' else 0
    model.blocks = nn.ModuleList(Kept(b) for b in model.blocks)
    real = measure_activations(lambda: loss_of(model, batch_of(2, 300), precision), model.parameters())
    ours = activations(model.shape, 2, 300, precision, 'cpu', checkpoint=True)
    assert abs(ours - one - real) < copies + .02 * ours  # the ledger sees neither the block at work nor the copies that autocast holds
    assert ours < activations(model.shape, 2, 300, precision, 'cpu')

def optimizers():
    "Every base of the slot with its tiny case; with 8 bits and updates in the backward pass where it has them."
    known = [('adamw', {})] + [(n, t['case']) for n, t in catalog.techniques('optimizer').items() if t['kind'] == 'base' and not t['spine']]
    known = [(n, case | dict(steps=4) if 'steps' in catalog.arguments(n) else case) for n, case in known]   # the length that a run would tell
    return [(n, case | extra) for n, case in known for extra in ({}, dict(state='8bit'), dict(per_layer=True)) if extra.keys() <= catalog.arguments(n).keys()]

@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('optim', optimizers(), ids=str)
def test_bytes_of_a_step(optim, precision):
    name, arguments = optim
    function = find_technique(name).function
    for shape in [SHAPES[0], SHAPES[2], PRESETS['nano']]:
        model, seen = made(shape, precision), []
        o = function(model, lr=1e-3, **arguments)
        def step():
            loss_of(model, batch_of(2, 100, shape['vocab']), precision).backward()
            seen.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        step(); o.step(); o.zero_grad()
        real = measure_bytes(model, o, step)
        ours = plan(shape, name, batch=2, length=100, precision=precision, device='cpu', **arguments).bytes
        for kind in ('parameters', 'optimizer'): assert abs(ours[kind] / real[kind] - 1) < .1, (kind, ours[kind], real[kind])
        assert abs(ours['activations'] / real['activations'] - 1) < .2
        assert abs(ours['gradients'] / real['gradients'] - 1) < .1
        if arguments.get('per_layer'): assert seen == [0, 0] and real['gradients'] == max(p.nbytes for p in model.parameters())

@pytest.mark.parametrize('shape,rows,length,accumulate', [(PRESETS['nano'], 8, 128, 1), (TINY, 2, 300, 1), (TINY | dict(tied=True, kv_heads=1, vocab=2000), 1, 200, 2), (TINY | dict(vocab=3000, width=64), 2, 130, 3)])
def test_peak(shape, rows, length, accumulate):
    from torch.distributed._tools.mem_tracker import MemTracker
    for precision in PRECISIONS:
        model, tracker = made(shape, precision), MemTracker()
        o = adamw(model)
        def step():
            for _ in range(accumulate):
                tracker.reset_mod_stats()
                loss_of(model, batch_of(rows, length), precision).backward()
            o.step(); o.zero_grad()
        step()
        tracker.track_external(model, o)
        with tracker: step()
        real = tracker.get_tracker_snapshot('peak')[torch.device('cpu')]['Total']
        assert abs(plan(shape, batch=rows * accumulate, length=length, accumulate=accumulate, precision=precision, device='cpu').peak / real - 1) < .05

# ---- other modules

def test_modules():
    transformers = pytest.importorskip('transformers')
    config = transformers.LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config)
    ours = plan(model, batch=2, length=64, device='cpu')
    real = measure_bytes(model, adamw(model), lambda: loss_of(model, batch_of(2, 64, 100), 'bf16').backward())
    assert ours.numbers == sum(p.numel() for p in model.parameters()) and not ours.notes
    assert ours.bytes['parameters'] == real['parameters'] and abs(ours.bytes['activations'] / real['activations'] - 1) < .2
    assert all(type(p) is nn.Parameter for p in model.parameters())

def test_frozen_and_changed_modules():
    model = Transformer(**TINY)
    assert describe(model).shape and plan(model, batch=2, length=64).bytes == plan(TINY, batch=2, length=64).bytes
    for p in model.blocks.parameters(): p.requires_grad_(False)
    part = plan(model, batch=2, length=64)
    assert part.bytes['gradients'] < part.bytes['parameters'] == 4 * part.numbers == 4 * sum(p.numel() for p in model.parameters())
    model = Transformer(**TINY)
    model.blocks[0].mlp.up = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 48))
    assert describe(model).shape is None and plan(model, batch=2, length=64).bytes['activations'] > 0

def test_module_without_tokens():
    p = plan(nn.Sequential(nn.Linear(8, 8)), batch=2)
    assert p.bytes['activations'] == 0 and 'does not take a batch of token ids' in p.notes[0] and 'note: activations' in str(p)

# ---- techniques of others

def test_own_technique():
    def half(model, keep=.5): ...
    half.planned = lambda shapes, keep=.5, itemsize=4: dict(optimizer=int(keep * itemsize * numbers(shapes)), gradients=100)
    def twice(model, inner=None): ...
    twice.planned = lambda shapes, inner: dict(optimizer=2 * inner['optimizer'], flops=1e6)
    n = numbers(transformer_shapes(complete(TINY)))
    p = plan(TINY, [half, twice], keep='0.25', batch=1)
    assert (p.bytes['optimizer'], p.bytes['gradients']) == (2 * n, 100) and p.flops_per_step == plan(TINY, batch=1).flops_per_step + 1e6
    assert 'half(keep=0.25) + twice' in str(p)
    half.planned = lambda shapes: dict(optimiser=1)
    with pytest.raises(InputError, match="planned of 'half' gives 'optimiser', did you mean 'optimizer'"): plan(TINY, half)

def test_conversion():
    def thin(model): ...
    thin.planned = lambda shapes: dict(shapes={n: (s[0] // 2, *s[1:]) for n, s in shapes.items()}, buffers=1000, flops_per_token=-5., activations=3)
    dense, p = plan(TINY), plan(TINY, convert=thin)
    assert p.numbers * 2 == dense.numbers and p.bytes['parameters'] == dense.bytes['parameters'] / 2 + 1000 and p.flops_per_token == dense.flops_per_token - 5
    less = converted(complete(TINY), thin.planned(transformer_shapes(complete(TINY)))['shapes'], dense.tokens_per_step)
    assert less < 0 and p.bytes['activations'] == dense.bytes['activations'] + less + 3 * dense.tokens_per_step
    assert p.bytes['optimizer'] == 8 * p.numbers + 4 * len(transformer_shapes(complete(TINY)))

# ---- several devices, budgets

def test_devices():
    one, data, fsdp = (plan('1b', batch=16, **kw) for kw in ({}, dict(devices=8), dict(devices=8, shard='fsdp')))
    assert data.bytes['parameters'] == one.bytes['parameters'] == 8 * fsdp.bytes['parameters'] and data.bytes['optimizer'] == one.bytes['optimizer'] == 8 * fsdp.bytes['optimizer']
    assert data.sent == 2 * 7 / 8 * 4 * one.numbers and fsdp.sent == 3 * 7 / 8 * 2 * one.numbers and one.sent == 0
    assert fsdp.peak < data.peak < one.peak
    assert plan('1b', batch=16, devices=8, shard=True).bytes == fsdp.bytes

def test_budget(monkeypatch):
    p = plan('nano', tokens='2M', peak='1e12', share=.5)
    assert p.steps == math.ceil(2e6 / 2048) and math.isclose(p.seconds, p.flops / 5e11) and math.isclose(p.flops, p.steps * 2048 * p.flops_per_token)
    assert math.isclose(plan('nano', tokens='2M', peak='1e12', share=.5, devices=4).seconds, p.seconds / 4)
    here = dict(cpu='X', gpu=[], cores=2)
    run = lambda cpu, flops, **kw: dict(page='a', machine=dict(cpu=cpu, gpu=[]), baseline='dense', arms={'dense': dict(flops=flops, seconds=10.)}, **kw)
    monkeypatch.setattr(catalog, 'records', lambda: [run('X', 1e12), run('X', 2e12), run('Y', 9e12), dict(page='b', results={})])
    assert recorded_rate(here) == (2e11, 'a') and recorded_rate(dict(here, cpu='Z')) is None and recorded_rate(dict(here, gpu=['H200'])) is None
    monkeypatch.setattr('effpt.plan.machine', lambda: here)
    assert rate() == (2e11, 'as recorded by a') and rate(share=.3, peak='1e12')[0] == 3e11

# ---- advice

@pytest.mark.parametrize('size,memory', [(s, m) for s in ('nano', '60m', '1b', '7b') for m in ('20MB', '300MB', '2GB', '9GB', '24GB', '80GB', '160GB')])
def test_advice_keeps_its_word(size, memory):
    p = plan(size, memory=memory)
    assert p.fits == (p.peak <= p.memory) and p.advice
    if p.fits: return
    chosen, enough = cure(p)
    if not enough: return
    assert changed(p, chosen).fits and p.advice[0].startswith('fits with ')
    for option in chosen: assert len(chosen) == 1 or not changed(p, [o for o in chosen if o is not option]).fits
    if len(chosen) > 1: assert not any(q.fits for small in ('accumulate', 'batch') for lever in levers(p, small) for o in lever if (q := changed(p, [o])))

def test_room():
    p = plan('60m', memory='24GB', length=256)
    rows = int(p.advice[0].split('up to ')[1].split()[0])
    assert p.but(batch=rows).fits and not p.but(batch=rows + 1).fits

def test_no_tensors():
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None): raise AssertionError(f'{function} ran')
    plan('7b', memory='24GB')  # imports
    with Refuse(): p = plan('7b', memory='24GB', tokens='20B', peak='H100')
    assert not p.fits
    assert estimate(p.request | dict(batch=8)).tokens_per_step == 8 * 1024

def test_forms():
    p = plan('7b', memory='24GB', tokens='20B', peak='A100', devices=4, batch=16)
    for word in ('parameters', 'gradients', 'optimizer', 'activations', 'other', 'does not fit', 'FLOPs per token', 'days', 'sent per device', 'A100'):
        assert word in str(p) and word in p._repr_markdown_()

# ---- bad requests

@pytest.mark.parametrize('request_,says', [
    (dict(model='8b'), "there is no size '8b'"), (dict(model='13Om'), "did you mean '130m'"), (dict(model=dict(vocab=10, width=9, layers=1, heads=2)), 'does not split into 2 heads'),
    (dict(optim='adamx'), "there is no technique 'adamx', did you mean 'adam"), (dict(weight_deca=1), "has an argument 'weight_deca', did you mean 'weight_decay'"),
    (dict(batc=1), "did you mean 'batch'"), (dict(optim={'name': 'adamw', 'lrr': 1}), "adamw has no argument 'lrr', did you mean 'lr'"),
    (dict(memory='24 apples'), "'24 apples' is not an amount of memory"), (dict(tokens='many'), "'many' is not a number"), (dict(batch=0), "batch is '0'"), (dict(batch=1.5), "batch is '1.5'"), (dict(length='x'), "length is 'x'"),
    (dict(batch=10, accumulate=4), 'does not divide'), (dict(batch=10, devices=3), 'does not divide'), (dict(precision='fp8'), "precision is 'fp8'"), (dict(shard='zero'), "shard is 'zero'"),
    (dict(device='tpu'), "device is 'tpu'"), (dict(tokens=1e6, peak='H3000'), "'H3000' is no peak"), (dict(tokens=1e6, share=40, peak=1e12), 'share is 40.0'), (dict(optim='effpt.schedule:cosine'), 'exports no function planned'),
    (dict(model=nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), checkpoint=True), 'checkpointing of Sequential cannot be planned'), (dict(memory='0GB'), 'memory is 0'), (dict(memory=-1), 'memory is -1'), (dict(tokens=-5), 'tokens is -5')])
def test_bad_requests(request_, says):
    with pytest.raises(InputError, match=says.replace('(', r'\(')): plan(**request_)

def test_updates_in_backward_need_one_pass():
    def early(model): ...
    early.planned = lambda shapes: dict(optimizer=0, gradients=10)
    for how in (dict(devices=2), dict(accumulate=2), dict(devices=2, shard='fsdp')):
        with pytest.raises(InputError, match='updates in the backward pass see one pass of one device'): plan(TINY, early, **how)
    assert two_moments({'a': (2, 3)}, 2) == dict(optimizer=28)


@pytest.mark.parametrize('name', sorted(n for n, t in catalog.techniques().items() if t['slot'] in PLANNED.values()))
def test_every_technique_can_be_planned(name):
    known, argument = catalog.techniques(), {slot: a for a, slot in PLANNED.items()}
    given = dict(optim=['adamw'])
    for n in [*known[name]['needs'], name]:
        t = known[n]
        specs = given.setdefault(argument[t['slot']], [])
        if t['slot'] == 'optimizer' and t['kind'] == 'base': specs.clear()
        specs.append(dict(t['case'], name=n))
    found = plan(TINY, **given)
    assert all(found.bytes[kind] > 0 for kind in ('parameters', 'gradients')) and found.numbers > 0

@pytest.mark.parametrize('precision', ['float32', 'bf16'])
@pytest.mark.parametrize('name', sorted(n for n, t in catalog.techniques().items() if t['kind'] == 'conversion'))
def test_activations_of_converted_models(name, precision):
    case, shape = catalog.techniques()[name]['case'], TINY | dict(width=64, hidden=200)
    model = find_technique(name).function(made(shape), **case)
    batch = batch_of(8, 64)
    kept = measure_activations(lambda: loss_of(model, batch, precision), [*model.parameters(), *model.buffers()])
    planned = [plan(shape, convert=c, batch=8, length=64, precision=precision, device='cpu').bytes['activations'] for c in ([dict(case, name=name)], [])]
    assert planned[0] / kept == pytest.approx(1, abs=.1)
    if kept / planned[1] < .9 or kept / planned[1] > 1.1: assert abs(planned[0] - kept) < .3 * abs(planned[1] - kept)

def test_conversions_of_a_sharded_model_count_no_copies():
    low = [dict(name='low_rank', rank=4)]
    one, many = (plan(TINY, convert=low, batch=n, length=32, devices=n, shard='fsdp').bytes['activations'] for n in (1, 2))
    assert 0 < many < one
