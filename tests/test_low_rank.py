"""Low-rank layers on other people's models: there and back, refactorization that changes nothing but the descent, and ReLoRA's restarts."""
import copy
from functools import partial

import pytest, torch
from torch import nn

import tiny
from effpt.arch.convert import Converted, to_dense
from effpt.arch.low_rank import LowRank, Residual, carry, jagged, low_rank, merge, merge_and_restart, prune_moments, refactorize_layer, refactorized, relora
from effpt.basics import InputError, generator
from effpt.ledger import count_flops
from effpt.plan import plan
from effpt.recipe import pretrain, tiny as short
from effpt.schedule import cosine


def draw(*shape, key): return torch.empty(shape).normal_(generator=generator(0, 'test', key))


def loss(model, tokens):
    out = model(dict(tokens=tokens)) if getattr(model, 'takes_batch', False) else model(tokens)
    return getattr(out, 'logits', out).float().square().mean()


@pytest.mark.parametrize('kind', tiny.MODELS)
@pytest.mark.parametrize('technique', [low_rank, relora])
def test_there_and_back(kind, technique):
    if kind != 'Sequential': pytest.importorskip('transformers')
    model, tokens = tiny.MODELS[kind]().eval(), torch.arange(16)[None]
    names = list(model.state_dict())
    technique(model, rank=8, quiet=True)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, LowRank): m.B.add_(draw(*m.B.shape, key='b') * .1)
    before = loss(model, tokens)
    assert any(isinstance(m, Converted) for m in model.modules())
    assert loss(to_dense(copy.deepcopy(model)), tokens).item() == pytest.approx(before.item(), rel=1e-5)
    assert all(p.requires_grad for p in to_dense(copy.deepcopy(model)).parameters())
    assert list(to_dense(model).state_dict()) == names and not any(isinstance(m, Converted) for m in model.modules())


@pytest.mark.parametrize('start', ['scaled', 'spectral', 'zero'])
def test_a_saved_model_comes_back(start, tmp_path):
    model, again = (low_rank(tiny.transformer(), 8, start, seed=s, quiet=True) for s in (1, 2))
    again.load_state_dict(model.state_dict())
    tokens = torch.arange(16)[None]
    assert torch.equal(loss(model, tokens), loss(again, tokens))


def test_factors_are_those_of_the_seed_and_the_layer():
    one, same, other = (low_rank(tiny.transformer(), 8, seed=s, quiet=True).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    changed = [n for n in one if n.endswith('.A')]
    assert changed and not any(torch.equal(one[n], other[n]) for n in changed)
    assert not torch.equal(one['blocks.0.mlp.up.A'], one['blocks.1.mlp.up.A'])


@pytest.mark.parametrize('scale', [1., 1e-3, 1e3])
@pytest.mark.parametrize('m, n, r', [(24, 40, 5), (40, 24, 24), (7, 7, 1)])
def test_refactorization_keeps_the_product_and_balances(m, n, r, scale):
    a, b = draw(r, n, key='a') * scale, draw(m, r, key='b')
    a2, b2, _, _ = refactorized(a, b)
    product = b.double() @ a.double()
    assert torch.linalg.norm(b2.double() @ a2.double() - product) <= 2e-6 * torch.linalg.norm(product)
    left, right = b2.T @ b2, a2 @ a2.T
    assert torch.linalg.norm(left - right) <= 1e-4 * torch.linalg.norm(left)
    assert (left - torch.diag(left.diag())).abs().max() <= 1e-4 * left.abs().max()


def test_factors_of_deficient_rank_survive():
    a, b = draw(6, 20, key='a'), torch.zeros(10, 6)   # as adapters begin
    for t in refactorized(a, b): assert t.isfinite().all()
    layer = LowRank(nn.Linear(20, 10), 6, 'zero')
    with torch.no_grad(): refactorize_layer(layer, ({}, {}), 'reset')
    assert layer.matrix().abs().max() == 0


def test_carried_first_moments_are_those_of_the_new_factors():
    "The mean of gradients, taken in the new factors, is the mean in the old ones, carried."
    a, b = draw(4, 12, key='a').double(), draw(9, 4, key='b').double()
    a2, b2, after, before = refactorized(a, b)
    g = [draw(9, 12, key=f'g{i}').double() for i in range(3)]   # gradients of W
    mean_a, mean_b = sum(b.T @ x for x in g) / 3, sum(x @ a.T for x in g) / 3
    state_a, state_b = dict(exp_avg=mean_a.clone()), dict(exp_avg=mean_b.clone())
    carry(state_a, left=before); carry(state_b, right=after)
    assert torch.allclose(state_a['exp_avg'], sum(b2.T @ x for x in g) / 3, rtol=1e-5) and torch.allclose(state_b['exp_avg'], sum(x @ a2.T for x in g) / 3, rtol=1e-5)


def test_moments_in_8_bits_are_not_carried():
    with pytest.raises(InputError, match="moments='reset'"): carry(dict(m=torch.zeros(2, 2), m_scale=torch.zeros(1)), left=torch.eye(2))


def test_restarts_reach_a_rank_that_no_product_has():
    layer = Residual(nn.Linear(32, 24), 4, 4.)
    first = layer.base.clone()
    for step in range(3):
        with torch.no_grad(): layer.B.copy_(draw(24, 4, key=f'b{step}')); merge(layer, step)
    assert torch.linalg.matrix_rank(layer.base - first) == 12 and layer.B.abs().max() == 0


def test_only_the_factors_are_trained():
    model = relora(tiny.transformer(), 4, quiet=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if n.startswith('blocks') and 'norm' not in n} == {n for n, _ in model.named_parameters() if n.endswith(('.A', '.B'))}


@pytest.mark.parametrize('technique, rank', [('low_rank', 4), ('relora', 4)])
def test_flops_and_plan_agree(technique, rank):
    model = dict(low_rank=low_rank, relora=relora)[technique](tiny.transformer(), rank, quiet=True)
    shape = {k: v for k, v in tiny.transformer().shape.items()}
    found = count_flops(model, tiny.LENGTH)
    assert not found.missing
    planned = plan(shape, convert=[dict(name=technique, rank=rank)], length=tiny.LENGTH, precision='float32')
    assert planned.flops_per_token == pytest.approx(found.total, rel=.01)
    assert planned.numbers == sum(p.numel() for p in model.parameters() if p.requires_grad) and planned.bytes['parameters'] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('call, said', [
    (lambda m: low_rank(m, 0), 'rank is 0'), (lambda m: low_rank(m, 4096), 'above the smaller side'), (lambda m: low_rank(m, 4, match='nothing.*'), 'selects no linear layer'),
    (lambda m: low_rank(m, 4, start='spectra'), "did you mean 'spectral'"), (lambda m: low_rank(low_rank(m, 4, quiet=True), 4), 'is converted already'), (lambda m: relora(m, 4, alpha=0), 'alpha is 0'),
    (lambda m: low_rank(m, 4, match='embed'), 'selects no linear layer')])
def test_bad_input_is_named_and_changes_nothing(call, said):
    model = tiny.transformer()
    with pytest.raises(InputError, match=said): call(model)
    if 'already' not in said: assert not any(isinstance(m, Converted) for m in model.modules())


def test_after_training_has_begun_it_is_too_late():
    model = tiny.transformer()
    loss(model, torch.arange(16)[None]).backward()
    with pytest.raises(InputError, match='has a gradient'): low_rank(model, 4)
    model.zero_grad(set_to_none=True)
    low_rank(model, 4, quiet=True)


def test_a_callback_without_its_layers_says_what_to_do():
    for callback in (dict(name='refactorize', every=2), dict(name='merge_and_restart', every=2)):
        with pytest.raises(InputError, match='convert the model first'): tiny.train(dict(callbacks=[callback]))


def test_a_run_can_be_continued_across_refactorizations(tmp_path):
    slots = tiny.recipe('low_rank', tiny.spec('refactorize', every=2, moments='carry'))
    run, watch = tiny.train(slots)
    tiny.train(slots, stop=3, out=tmp_path/'run')
    tiny.assert_same(watch.end, tiny.train(slots, out=tmp_path/'run', resume=True)[1].end)


def test_pruned_moments_keep_their_largest():
    state = dict(exp_avg=torch.tensor([[1., -5., 2., .5]]), exp_avg_sq=torch.tensor([[4., 1., 3., 2.]]))
    prune_moments(state, .5)
    assert state['exp_avg'].tolist() == [[0, -5, 2, 0]] and state['exp_avg_sq'].tolist() == [[4, 0, 3, 0]]
    prune_moments(state, 1.)
    assert not state['exp_avg'].any()


def test_the_rate_falls_at_each_restart_and_stage_only():
    from effpt.schedule import Progress
    shape = jagged(share=.1)
    assert [shape(Progress(t / 10)) for t in range(10)] == [1.] * 10
    assert [shape(Progress(.5 + t / 100, marks=dict(restart=.5))) for t in (0, 5, 10)] == pytest.approx([0., .5, 1.])
    assert shape(Progress(.25, marks=dict(stage=.2))) == pytest.approx(.5) == shape(Progress(.75, marks=dict(stage=.2, restart=.7)))


def test_restarts_are_counted_from_the_beginning_of_the_stage():
    slots = dict(budget='12 steps', stages=[dict(share=.5), dict(share=.5, model=[partial(relora, rank=4, quiet=True)], callbacks=[merge_and_restart(every=4)])])
    run = pretrain(**short() | slots, schedule=[cosine, jagged]).run
    assert run.marks == pytest.approx(dict(stage=6 / 12, restart=10 / 12))
