"""SLTrain on other people's models: there and back, supports that travel with a model, numbers that the planner knows, and runs that change in the middle."""
import copy

import pytest, torch
from torch import nn

import tiny
from effpt.arch.convert import Converted, to_dense
from effpt.arch.sltrain import SLTrain, planned, sltrain, support_of, values_per_row
from effpt.basics import InputError, generator
from effpt.ledger import count_flops
from effpt.plan import plan
from effpt_kernels.sltrain import places


def draw(*shape, key): return torch.empty(shape).normal_(generator=generator(0, 'test', key))


def loss(model, tokens):
    out = model(dict(tokens=tokens)) if getattr(model, 'takes_batch', False) else model(tokens)
    return getattr(out, 'logits', out).float().square().mean()


def moved(model):
    "The model, its factors and values away from where they began."
    with torch.no_grad():
        for name, m in model.named_modules():
            if isinstance(m, SLTrain): m.B.add_(.3 * draw(*m.B.shape, key=name)); m.values.add_(.1)
    return model


@pytest.mark.parametrize('kind', tiny.MODELS)
@pytest.mark.parametrize('support', ['seed', 'stored'])
def test_there_and_back(kind, support):
    if kind != 'Sequential': pytest.importorskip('transformers')
    model, tokens = tiny.MODELS[kind]().eval(), torch.arange(16)[None]
    names, biases = list(model.state_dict()), {n: p.clone() for n, p in model.named_parameters() if n.endswith('bias')}
    before = loss(moved(sltrain(model, 8, .2, support=support, quiet=True)), tokens)
    assert any(isinstance(m, SLTrain) for m in model.modules())
    assert loss(to_dense(copy.deepcopy(model)), tokens).item() == pytest.approx(before.item(), rel=1e-5)
    assert all(p.requires_grad for p in to_dense(copy.deepcopy(model)).parameters())
    assert list(to_dense(model).state_dict()) == names and not any(isinstance(m, Converted) for m in model.modules())
    assert all(torch.equal(p, biases[n]) for n, p in model.named_parameters() if n in biases)


@pytest.mark.parametrize('support', ['seed', 'stored'])
def test_the_support_travels_with_the_model(support):
    model, again = (sltrain(tiny.transformer(), 8, support=support, seed=s, quiet=True) for s in (1, 2))
    tokens, one, other = torch.arange(16)[None], model.blocks[0].mlp.up, again.blocks[0].mlp.up
    assert not torch.equal(one.support, other.support) and not torch.equal(one.support, model.blocks[1].mlp.up.support)
    again.load_state_dict(moved(model).state_dict())
    assert torch.equal(loss(model, tokens), loss(again, tokens))
    assert one.support.nbytes == (8 if support == 'seed' else 4 * one.values.numel())


def test_all_is_that_of_the_seed_and_the_layer():
    one, same, other = (sltrain(tiny.transformer(), 8, seed=s, quiet=True).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if n.endswith(('.A', '.values', '.support')))


def test_the_beginning_is_that_of_the_authors():
    m = SLTrain(nn.Linear(400, 300), 20, .03, 5.)
    assert not m.B.any() and m.scale == .25 and len(m.values) == 300 * 12
    for t in (m.A, m.values):
        assert t.abs().max() <= 400 ** -.5 and t.std().item() == pytest.approx(400 ** -.5 / 3 ** .5, rel=.03)
    w = m.matrix()
    assert (w != 0).sum(1).tolist() == [12] * 300


@pytest.mark.parametrize('n, density, k', [(4, .03, 1), (128, .03, 4), (2048, .03, 61), (10, 1., 10), (10, 1, 10)])
def test_values_in_a_row(n, density, k):
    assert values_per_row(n, density) == k
    for support in 'seed', 'stored':
        at = places(support_of(6, n, k, support), k, n, 0, 6)
        assert at.shape == (6, k) and all(len(set(row)) == k and 0 <= min(row) <= max(row) < n and row == sorted(row) for row in at.tolist())


def test_a_density_of_one_is_any_matrix():
    m, w = SLTrain(nn.Linear(9, 7, bias=False), 2, 1., 1.), draw(7, 9, key='w')
    with torch.no_grad(): m.values.copy_(w.flatten())
    assert torch.equal(m.matrix(), w)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    layer, x = moved(SLTrain(nn.Linear(24, 16).to(dtype), 4, .2, 4.)), draw(2, 5, 24, key='x').to(dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype and y.shape == (2, 5, 16) and all(p.grad.dtype == dtype for p in layer.parameters())
    expected = nn.functional.linear(x.double(), layer.matrix().double(), layer.bias.double())
    assert torch.linalg.norm(y.double() - expected) <= {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype] * torch.linalg.norm(expected)


def test_autocast_and_frozen_inputs():
    layer, x = moved(SLTrain(nn.Linear(24, 16), 4, .2, 4.)), draw(5, 24, key='x')
    with torch.autocast('cpu', torch.bfloat16): y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    exact = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for n, p in layer.named_parameters(): assert torch.linalg.norm(p.grad - exact[n]) <= .05 * torch.linalg.norm(p.grad)


def test_a_strange_layout_of_the_input():
    layer = moved(SLTrain(nn.Linear(24, 16), 4, .2, 4.))
    x = draw(24, 5, 3, key='x').permute(2, 1, 0)
    assert torch.allclose(layer(x), layer(x.contiguous())) and layer(x[0, 0]).shape == (16,)
    y = layer(x)
    y.sum().backward()      # its gradient shares its memory
    assert layer.values.grad.isfinite().all()


def test_it_compiles_in_one_piece():
    layer, x = moved(SLTrain(nn.Linear(24, 16), 4, .2, 4.)), draw(5, 24, key='x')
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend='aot_eager')(x), layer(x))


@pytest.mark.parametrize('support', ['seed', 'stored'])
def test_flops_bytes_and_plan_agree(support):
    options = dict(rank=4, density=.1, support=support)
    model = sltrain(tiny.transformer(), **options, quiet=True)
    found = count_flops(model, tiny.LENGTH)
    assert not found.missing
    expected = plan(dict(tiny.transformer().shape), convert=[dict(name='sltrain', **options)], length=tiny.LENGTH)
    assert expected.flops_per_token == pytest.approx(found.total, rel=.001)
    assert expected.numbers == sum(p.numel() for p in model.parameters())
    shapes = {n: tuple(p.shape) for n, p in tiny.transformer().named_parameters()}
    assert planned(shapes, **options)['buffers'] == sum(b.nbytes for n, b in model.named_buffers() if n.endswith('support'))
    with pytest.raises(InputError, match='rank 4096 is above'): planned(shapes, rank=4096)


@pytest.mark.parametrize('call, said', [
    (lambda m: sltrain(m, 0), 'rank is 0'), (lambda m: sltrain(m, 4096), "above the smaller side of 'blocks.0.attention.q'"), (lambda m: sltrain(m, 4, 0), 'density is 0: give a share'),
    (lambda m: sltrain(m, 4, 1.01), 'at most 1'), (lambda m: sltrain(m, 4, '3%'), 'density is 3%'), (lambda m: sltrain(m, 4, alpha=0), 'alpha is 0'), (lambda m: sltrain(m, 4, alpha=float('nan')), 'alpha is nan'),
    (lambda m: sltrain(m, 4, support='sead'), "did you mean 'seed'"), (lambda m: sltrain(m, 4, match='nothing.*'), 'selects no linear layer'), (lambda m: sltrain(sltrain(m, 4, quiet=True), 4), 'is converted already')])
def test_bad_input_is_named_and_changes_nothing(call, said):
    model = tiny.transformer()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(InputError, match=said): call(model)
    if 'already' not in said: assert model.state_dict().keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_tied_layers_and_late_conversions_are_refused():
    model = tiny.transformer()
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    with pytest.raises(InputError, match='is tied to'): sltrain(model, 4)
    model = tiny.transformer()
    loss(model, torch.arange(16)[None]).backward()
    with pytest.raises(InputError, match='has a gradient'): sltrain(model, 4)


class Convert:
    "Converts the model in the middle of a run, and turns it back later."
    def after_step(self, run, metrics):
        if run.step == 2: run.edit(sltrain, rank=4, density=.1, quiet=True)
        if run.step == 4: run.edit(to_dense)


@pytest.mark.parametrize('optimizer', ['adamw', 'adam8bit', 'galore'])
def test_a_run_that_is_edited_resumes(optimizer, tmp_path):
    slots = tiny.recipe(optimizer)
    run, watch = tiny.train(slots, callbacks=[Convert()])
    assert len(run.edits) == 2 and not any(isinstance(m, SLTrain) for m in run.model.modules())
    tiny.train(slots, callbacks=[Convert()], stop=3, out=tmp_path/'run')
    tiny.assert_same(watch.end, tiny.train(slots, callbacks=[Convert()], out=tmp_path/'run', resume=True)[1].end)


@pytest.mark.parametrize('optimizer', [dict(name='adam8bit', per_layer=True), dict(name='galore', rank=2, update_gap=2, per_layer=True), 'muon', 'apollo'])
def test_other_optimizers(optimizer):
    run, watch = tiny.train(tiny.recipe(tiny.spec('sltrain'), tiny.spec(**optimizer) if isinstance(optimizer, dict) else optimizer))
    moved = {n.rpartition('.')[2] for n in watch.moved(run.model) if n.startswith('blocks')}
    assert {'A', 'B', 'values'} <= moved
