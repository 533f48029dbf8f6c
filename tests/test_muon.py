"""Muon against torch's, step by step; matrices in stacks, one by one and during the backward pass; what it keeps, resumes, and refuses."""
from functools import partial

import pytest, torch, torch.distributed as dist
from torch import nn

from effpt import checkpoint
from effpt.basics import InputError, generator
from effpt.optim import muon as page
from effpt.optim.muon import muon, newton_schulz_flops, planned
from effpt.optim.rules import adam, select
from effpt.train import Diverged
from looped import bits, furthest, run, same, stopped_and_resumed, transformer, updates

SHAPES = [(24, 40), (40, 24), (24, 24), (24, 40)]


def recorded(scale=1., steps=25):
    "Gradients of a slowly turning signal of low rank, and noise."
    def draw(*shape, key): return torch.randn(shape, generator=generator(0, *key))
    for t in range(steps):
        yield [scale * ((draw(m, 3, key=('a', i)) + t / 50 * draw(m, 3, key=('b', i))) @ draw(n, 3, key=('c', i)).T + .3 * draw(m, n, key=('noise', t, i))) for i, (m, n) in enumerate(SHAPES)]


def matrices(): return nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in SHAPES)
def apart(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()


def theirs(parameters, **options):
    if not hasattr(torch.optim, 'Muon'): pytest.skip('torch has Muon from 2.9 on')
    return torch.optim.Muon(parameters, **options)


@pytest.fixture
def in_float32(monkeypatch):
    "torch's five rounds without rounding to bfloat16."
    monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda self: self.float().clone())


def furthest_apart(gradients=1., ours=None, others=None):
    "Relative differences of updates, worst of all steps and matrices, and of the momenta at the end."
    model, parameters = matrices(), [nn.Parameter(torch.zeros(s)) for s in SHAPES]
    a, b = muon(model, lr=.01, **ours), theirs(parameters, lr=.01, **others)
    pairs = zip(updates(a, list(model.parameters()), recorded(gradients)), updates(b, parameters, recorded(gradients)))
    return max(max(map(apart, x, y)) for x, y in pairs), max(apart(a.state[p]['m'], b.state[q]['momentum_buffer']) for p, q in zip(model.parameters(), parameters))


@pytest.mark.parametrize('gradients', [1., 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize('scale, name', [('rms', 'match_rms_adamw'), ('original', 'original')])
def test_updates_are_those_of_torch(in_float32, scale, name, gradients):
    update, momentum = furthest_apart(gradients, dict(scale=scale, precision='float32'), dict(adjust_lr_fn=name))
    assert update < 1e-4 and momentum < 1e-6


@pytest.mark.parametrize('options', [dict(nesterov=False), dict(momentum=.5), dict(iterations=3, coefficients=(1.5, -.5, 0.))], ids=str)
def test_options_are_those_of_torch(in_float32, options):
    said = {dict(iterations='ns_steps', coefficients='ns_coefficients').get(k, k): v for k, v in options.items()}
    assert max(furthest_apart(1., options, dict(said, adjust_lr_fn='match_rms_adamw'))) < 1e-4


@pytest.mark.parametrize('scale, name', [('rms', 'match_rms_adamw'), ('original', 'original')])
def test_in_bfloat16_they_are_near(scale, name):
    "Directions of a thousandth of the norm are lost in eight bits, and made large all the same: the input's rounding alone is 7 % here."
    update, momentum = furthest_apart(1., dict(scale=scale, precision='bf16'), dict(adjust_lr_fn=name))
    assert update < .2 and momentum < 1e-6


def test_weights_decay_as_those_of_torch(in_float32):
    model, others = matrices(), [nn.Parameter(torch.ones(s)) for s in SHAPES]
    for p in model.parameters(): p.data.fill_(1.)
    ours, other = muon(model, lr=.05, weight_decay=.3), theirs(others, lr=.05, weight_decay=.3, adjust_lr_fn='match_rms_adamw')
    for gradients in recorded(steps=20):
        for p, q, g in zip(model.parameters(), others, gradients): p.grad, q.grad = g.clone(), g.clone()
        ours.step(); other.step()
    assert max(map(apart, model.parameters(), others)) < 1e-5


def test_the_rest_is_adamw():
    "Embedding, head and norms move as with AdamW alone, given the same gradients."
    def go(make):
        model = transformer()
        optimizer = make(model, lr=.01, betas=(.9, .95), weight_decay=.1)
        for t in range(5):
            for i, p in enumerate(model.parameters()): p.grad = torch.randn(p.shape, generator=generator(0, t, i))
            optimizer.step()
        return model
    a, b = go(muon), go(adam)
    inner = set(select(a))
    assert len(inner) == 7
    for (name, p), q in zip(a.named_parameters(), b.parameters()): assert torch.equal(p, q) != (name in inner), name


@pytest.mark.parametrize('most', [0, 2 * 24 * 40, 2 ** 24])
def test_stacks_do_not_matter(monkeypatch, most):
    seen = []
    monkeypatch.setattr(page, 'newton_schulz', lambda x, *rest: seen.append(tuple(x.shape)) or original(x, *rest))
    model, alike = matrices(), matrices()
    ours, plain = muon(model, lr=.01), muon(alike, lr=.01)
    ours.most, plain.most = most, 0
    a, b = (list(updates(o, list(m.parameters()), recorded(steps=3)))[-1] for o, m in ((ours, model), (plain, alike)))
    assert max(map(apart, a, b)) < 1e-5 and not ours.waiting
    counts = {0: [1, 1, 1, 1], 2 * 24 * 40: [2, 1, 1], 2 ** 24: [2, 1, 1]}[most]
    assert sorted((s[0] for s in seen[:len(counts)]), reverse=True) == counts


original = page.newton_schulz


def test_a_step_that_fails_leaves_nothing_behind():
    model = matrices()
    o = muon(model, lr=.01)
    first, *_, last = parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    for p in parameters: p.grad = torch.ones_like(p)
    last.grad[0, 0] = float('nan')
    with pytest.raises(InputError, match="gradient of '3.weight' is no number: lower the learning rate"): o.step()
    assert all(map(torch.equal, before, parameters)) and not o.state
    last.grad = torch.eye(*last.shape).to_sparse()
    with pytest.raises(InputError, match="'3.weight' has a sparse gradient"): o.step()
    last.grad = torch.ones_like(last)
    o.step()
    assert not o.waiting and all(p.isfinite().all() for p in parameters)


# A tiny run of the trainer.

@pytest.mark.parametrize('form', [dict(), dict(state='8bit'), dict(per_layer=True), dict(per_layer=True, state='8bit'), dict(scale='original', nesterov=False), dict(precision='bf16')], ids=str)
def test_a_stopped_run_resumes_to_the_bits(tmp_path, form):
    optimizer = partial(muon, **form)
    whole, again = stopped_and_resumed(tmp_path, partial(run, optimizer))
    assert same(bits(whole), bits(again))


@pytest.mark.parametrize('state', ['fp32', '8bit'])
def test_per_layer_is_the_same(state):
    plain, in_backward = (run(partial(muon, state=state, per_layer=p)) for p in (False, True))
    assert furthest(bits(plain), bits(in_backward)) < 1e-5


def test_per_layer_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(InputError, match='cannot accumulate: use accumulate=1, or per_layer=False'): run(partial(muon, per_layer=True), accumulate=2)
    model = transformer()
    o = muon(model, per_layer=True)
    (model(torch.arange(8)[None]).sum() * float('inf')).backward()
    with pytest.raises(Diverged, match='is no number'): o.step()
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    with pytest.raises(InputError, match='one process only: use one process, or per_layer=False'): muon(transformer(), per_layer=True)


def test_accumulation_is_the_mean():
    whole, parts = (run(muon, accumulate=k) for k in (1, 2))
    assert furthest(bits(whole), bits(parts)) < 1e-3


def test_flops_are_charged():
    r = run(partial(muon, iterations=3), steps=2)
    shapes = {n: tuple(p.shape) for n, p in r.model.named_parameters()}
    by_hand = sum(newton_schulz_flops(tuple(p.shape), 3) for p in select(r.model).values())
    assert r.ledger.total('flops', 'train/newton-schulz') == 2 * by_hand == 2 * planned(shapes, 3)['flops']


def test_bfloat16_parameters():
    model = transformer().bfloat16()
    o = muon(model)
    model(torch.arange(8)[None]).float().square().mean().backward()
    o.step()
    assert {o.state[p]['m'].dtype for p in model.parameters()} == {torch.float32}
    assert all('v' not in o.state[p] for p in select(model).values())
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


def test_tied_frozen_and_missing_gradients():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 6))
    model[2].weight = model[0].weight
    model[3].weight.requires_grad_(False)
    o = muon(model)
    assert [len(g['params']) for g in o.param_groups] == [1, 1]      # the shared matrix once; a bias
    before = model[0].weight.detach().clone()
    o.step()
    assert not o.state and torch.equal(before, model[0].weight)      # nor does it decay
    model(torch.ones(1, 8)).sum().backward()
    o.step()
    o.zero_grad(set_to_none=True)
    o.step()
    assert [s['step'] for s in o.state.values()] == [1, 1]
    with pytest.raises(InputError, match="'0.weight' of '0' is tied to '2', which is not chosen"): muon(model, match='0')
    with pytest.raises(InputError, match="'3.weight' is frozen"): muon(model, match='3')


@pytest.mark.parametrize('wrong, text', [
    (dict(momentum=1), 'momentum is 1'), (dict(momentum=-.1), 'momentum is -0.1'), (dict(momentum='0.9'), 'momentum is 0.9'), (dict(iterations=0), 'iterations is 0'), (dict(iterations=2.5), 'iterations is 2.5'),
    (dict(coefficients=(1, 2)), 'coefficients are'), (dict(coefficients=3), 'coefficients are 3'), (dict(coefficients=(1, 2, float('nan'))), 'coefficients are'), (dict(scale='orginal'), "did you mean 'original'"), (dict(precision='bf61'), "did you mean 'bf16'"),
    (dict(lr=-1), 'lr is -1'), (dict(lr=float('nan')), 'lr is nan'), (dict(betas=(2, 2)), 'betas are'), (dict(eps=-1), 'eps is -1'), (dict(weight_decay=-1), 'weight_decay is -1'), (dict(state='8-bit'), "did you mean '8bit'"),
    (dict(match='layers.*'), 'selects no matrix'), (dict(match=7), 'match is 7')])
def test_wrong_arguments_are_named(wrong, text):
    with pytest.raises(InputError, match=text): muon(nn.Sequential(nn.Linear(8, 16)), **wrong)


def test_complex_parameters_are_named():
    with pytest.raises(InputError, match="'0.weight' is complex"): muon(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)))


def test_a_state_of_another_kind_is_refused():
    def kept(make):
        model = transformer()
        o = make(model)
        model(torch.arange(8)[None]).square().mean().backward()
        o.step()
        return model, o, checkpoint.optimizer_state(o, model)
    model, o, state = kept(muon)
    for other, text in (adam, 'the saved optimizer state is of Muon, the optimizer is Adam'), (partial(muon, state='8bit'), "state = 'fp32', this optimizer '8bit'"):
        with pytest.raises(InputError, match=text): checkpoint.load_optimizer_state(other(model), model, state)
    with pytest.raises(InputError, match='the saved optimizer state is of Adam, the optimizer is Muon'): checkpoint.load_optimizer_state(muon(model), model, kept(adam)[2])
    up = model.blocks[0].mlp.up.weight
    assert o.accepts(up, o.state[up]) and not o.accepts(model.head.weight, o.state[up])


def test_the_optimizer_is_freed():
    "Nothing that waits keeps it alive."
    import gc, weakref
    o = muon(transformer())
    gc.collect(); gc.disable()
    try: gone = weakref.ref(o); del o; assert gone() is None
    finally: gc.enable()


def test_two_rates_for_two_parts():
    model = transformer()
    groups = muon(model, lr=.02, adam_lr=.003).param_groups
    assert [(g['rule'], g['lr']) for g in groups] == [('muon', .02), ('plain', .003), ('plain', .003)]
    assert {g['lr'] for g in muon(model, lr=.02).param_groups} == {.02}
    with pytest.raises(InputError, match='adam_lr is 0: give a rate above 0'): muon(model, adam_lr=0)
