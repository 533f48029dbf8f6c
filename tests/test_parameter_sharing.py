"""Shared numbers on other people's models: there and back, one bank in every state, gradients that are projections; and masks at the start that keep what they say they keep."""
import copy, math

import pytest, torch
from torch import nn
from torch.nn import functional as F

import tiny
from effpt import checkpoint
from effpt.arch.convert import Converted, to_dense
from effpt.arch.parameter_sharing import AT_START, Shared, grasp_scores, lottery_rewinding, parameter_sharing, snip_scores, synflow_masks
from effpt.basics import InputError
from effpt.ledger import count_flops
from effpt.optim.rules import select
from effpt.plan import plan

TOKENS = torch.arange(16)[None]
TINY = dict(block=8, quiet=True)


def loss(model, tokens=TOKENS):
    out = model(dict(tokens=tokens)) if getattr(model, 'takes_batch', False) else model(tokens)
    return getattr(out, 'logits', out).float().square().mean()


def shared(model): return {n: m for n, m in model.named_modules() if isinstance(m, Shared)}


@pytest.mark.parametrize('kind', tiny.MODELS)
@pytest.mark.parametrize('mapping', ['fold', 'roast'])
@pytest.mark.parametrize('compression', [1., 5.])
def test_there_and_back(kind, mapping, compression):
    if kind != 'Sequential': pytest.importorskip('transformers')
    model = tiny.MODELS[kind]().eval()
    names, first = list(model.state_dict()), loss(model).item()
    parameter_sharing(model, compression, mapping=mapping, **TINY)
    before = loss(model).item()
    if mapping == 'fold' and compression == 1: assert before == pytest.approx(first, rel=1e-4)
    assert loss(to_dense(copy.deepcopy(model))).item() == pytest.approx(before, rel=1e-5)
    assert all(p.requires_grad for p in to_dense(copy.deepcopy(model)).parameters())
    assert list(to_dense(model).state_dict()) == names and not any(isinstance(m, Converted) for m in model.modules())


@pytest.mark.parametrize('compression', [1., 3., 10.])
def test_the_model_gets_as_small_as_it_was_asked_for(compression):
    model, dense = parameter_sharing(tiny.transformer(), compression, **TINY), tiny.transformer()
    inner, bank = sum(p.numel() for p in select(dense).values()), next(iter(shared(model).values())).bank
    assert bank.numel() == pytest.approx(inner / compression, rel=.01)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) - inner + bank.numel()


def test_one_bank_in_every_state(tmp_path):
    "Once in the state, the file and the optimizer; what is loaded, copied or moved to another type still shares it."
    model, again = (parameter_sharing(tiny.transformer(), 4., spread=s, **TINY) for s in (None, .3))   # other scales, too
    assert [n for n in model.state_dict() if n.endswith('bank')] == ['blocks.0.attention.q.bank']
    checkpoint.save(tmp_path, 1, dict(model=model.state_dict()))
    saved = checkpoint.load(checkpoint.latest(tmp_path))['model']
    again.load_state_dict(saved)
    assert torch.equal(loss(model), loss(again))
    for other in again, copy.deepcopy(again), copy.deepcopy(again).to(torch.bfloat16):
        owner = other.blocks[0].attention.q
        assert all(m.holder() is owner for m in shared(other).values()) and len([p for p in other.parameters() if p is owner.bank]) == 1
    assert loss(other).isfinite()


def test_a_bank_is_trained_by_all_its_layers():
    torch.manual_seed(0)
    model = parameter_sharing(nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 24)), 3., match='*', scaled=False, **TINY)
    x, (a, b) = torch.randn(5, 24), (m.matrix().detach().requires_grad_() for m in (model[0], model[2]))
    model(x).square().sum().backward()
    dense = F.linear(F.gelu(F.linear(x, a, model[0].bias.detach())), b, model[2].bias.detach())
    g = torch.autograd.grad(dense.square().sum(), (a, b))
    from effpt_kernels.hashed import scatter_add_reference
    expected = sum(scatter_add_reference(d.double(), m.place, m.scale.double()) for d, m in zip(g, (model[0], model[2])))
    torch.testing.assert_close(model[0].bank.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('spread', [.01, 1., 50.])
def test_descent_does_not_depend_on_the_size_of_the_bank(spread):
    "With scaled gradients; without, it does."
    def after(spread, scaled):
        model = parameter_sharing(tiny.transformer(), 4., spread=spread, scaled=scaled, **TINY)
        optimizer = torch.optim.SGD(model.parameters(), lr=3.)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return loss(model).item()
    usual = after(None, True)
    assert after(spread, True) == pytest.approx(usual, rel=1e-4)
    if spread != 1.: assert not after(spread, False) == pytest.approx(usual, rel=5e-4)


def test_matrices_of_zeros_can_learn():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(model[1].weight)
    parameter_sharing(model, 2., match='*', **TINY)
    assert model[1].scale > 0 and model[1].matrix().abs().sum() > 0


def test_shapes_of_inputs_and_autocast():
    layer = parameter_sharing(nn.Linear(12, 20), 2., match='*', block=4, quiet=True)
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    for part in x, x[0], x[0, 0], x[:0]: torch.testing.assert_close(layer(part), F.linear(part, layer.matrix(), layer.bias))
    with torch.autocast('cpu', torch.bfloat16): y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.bank.grad.dtype == torch.float32


@pytest.mark.parametrize('compression', [2., 9.])
def test_flops_and_plan_agree(compression):
    model = parameter_sharing(tiny.transformer(), compression, **TINY)
    found = count_flops(model, tiny.LENGTH)
    planned = plan(dict(tiny.transformer().shape), convert=[dict(name='parameter_sharing', compression=compression, block=8)], length=tiny.LENGTH, precision='float32')
    assert not found.missing and planned.flops_per_token == pytest.approx(found.total, rel=.01)
    assert planned.numbers == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('optimizer', [tiny.spec('galore'), tiny.spec('adam8bit'), tiny.spec('muon')], ids=lambda s: s['name'])
def test_other_optimizers_work_on_the_bank(optimizer):
    run, watch = tiny.train(tiny.recipe('parameter_sharing', optimizer))
    assert all(math.isfinite(row['loss']) for row in run.history) and any(n.endswith('.bank') for n in watch.moved(run.model))


@pytest.mark.parametrize('call, said', [
    (lambda m: parameter_sharing(m, .9), 'compression is 0.9'), (lambda m: parameter_sharing(m, 1e6), 'give at most'), (lambda m: parameter_sharing(m, block=256), 'block is 256'),
    (lambda m: parameter_sharing(m, mapping='rost'), "did you mean 'roast'"), (lambda m: parameter_sharing(m, match='nothing.*'), 'selects no linear layer'),
    (lambda m: parameter_sharing(m, spread=-1.), 'spread is -1'), (lambda m: parameter_sharing(m, seed=.5), 'seed is 0.5')])
def test_bad_input_is_named_and_changes_nothing(call, said):
    model = tiny.transformer()
    with pytest.raises(InputError, match=said): call(model)
    assert not any(isinstance(m, Converted) for m in model.modules())


def test_layers_that_cannot_share_are_named():
    model = tiny.transformer()
    model.blocks[1].mlp.up.to(torch.bfloat16)
    with pytest.raises(InputError, match="'blocks.1.mlp.up' has the dtype torch.bfloat16"): parameter_sharing(model, 4.)
    model = tiny.transformer()
    model.blocks[1].mlp.up.requires_grad_(False)
    with pytest.raises(InputError, match="'blocks.1.mlp.up' is frozen"): parameter_sharing(model, 4., match='blocks.*.mlp.*')
    parameter_sharing(model, 4., **TINY)
    assert isinstance(model.blocks[1].mlp.up, nn.Linear)     # by itself, what is frozen is left alone
    with pytest.raises(InputError, match='is converted already'): parameter_sharing(model, 4., match='blocks.*')
    assert not any(isinstance(m, Converted) for m in [model.blocks[1].mlp.up])


@pytest.mark.parametrize('score', AT_START)
@pytest.mark.parametrize('compression', [3., 40.])
def test_as_many_stay_as_were_asked_for(score, compression):
    run, _ = tiny.train(dict(callbacks=[tiny.spec('prune_at_init', score=score, compression=compression)]))
    weights = select(run.model).values()
    assert sum(int((w != 0).sum()) for w in weights) == sum(w.numel() for w in weights) - round((1 - 1 / compression) * sum(w.numel() for w in weights))
    if score in ('snip', 'grasp'): assert run.ledger.total('tokens', 'selection') == run.step_tokens
    assert (run.ledger.total('flops', 'selection') > 0) == (score != 'mag')


@pytest.mark.parametrize('kind', [k for k in tiny.MODELS if k != 'Sequential'])
@pytest.mark.parametrize('score', AT_START)
def test_masks_on_hugging_face_models(kind, score):
    pytest.importorskip('transformers')
    run, _ = tiny.train(dict(callbacks=[tiny.spec('prune_at_init', score=score, **(dict(rounds=3) if score == 'synflow' else {}))]), tiny.MODELS[kind], budget='2 steps')
    assert all(math.isfinite(row['loss']) for row in run.history)


def test_more_batches_are_taken_from_the_stream():
    run, _ = tiny.train(dict(callbacks=[tiny.spec('prune_at_init', score='snip', batches=3)]))
    assert run.taken == run.step + 2 and run.ledger.total('tokens', 'selection') == 3 * run.step_tokens


class Once(torch.autograd.Function):
    "A square whose derivative has none."
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x * x
    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled(): raise RuntimeError('it has no derivative')
        return 2 * dy * ctx.saved_tensors[0]


def test_a_second_derivative_that_is_missing_is_said():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(InputError, match='grasp needs a second derivative, which this model does not have .it has no derivative'):
        grasp_scores(nn.Identity(), lambda model, batch: (Once.apply(model(w)).sum(), 1), [{}], dict(w=w))


def test_grasp_sees_through_shared_layers():
    model = parameter_sharing(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), 2., match='*', scaled=False, block=4, quiet=True).double()
    dense, x = to_dense(copy.deepcopy(model)), torch.randn(5, 8, dtype=torch.float64)
    def loss(model, batch): return model(x).square().sum(), 5
    bank = model[0].bank
    mine = grasp_scores(model, loss, [{}], dict(bank=bank))['bank'].sum()
    # a factor on all numbers of the bank is one on all matrices: in that direction both say the same of their own gradients
    g = torch.autograd.grad(loss(model, {})[0] / 5 / 200 ** 2, bank, create_graph=True)[0]
    assert mine.item() == pytest.approx((torch.autograd.grad(g.square().sum() / 2, bank)[0] * bank).sum().item(), rel=1e-9)
    assert loss(dense, {})[0].item() == pytest.approx(loss(model, {})[0].item())


def test_scores_leave_no_trace():
    "Neither weights nor gradients nor modes change."
    model = nn.Sequential(nn.Linear(8, 12), nn.Dropout(.5), nn.Linear(12, 4))
    before, batch = copy.deepcopy(model.state_dict()), dict(x=torch.randn(5, 8))
    def through(model, batch): return model(batch['x']).square().sum(), 5
    weights = {'0.weight': model[0].weight, '2.weight': model[2].weight}
    for f in snip_scores, grasp_scores: assert all(torch.isfinite(s).all() for s in f(model, through, [batch], weights).values())
    synflow_masks(model, through, batch, list(weights), 4., rounds=2)
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items()) and all(p.grad is None for p in model.parameters()) and not model._forward_hooks


def test_synflow_does_not_cut_a_network_where_magnitudes_do():
    "One layer has much smaller weights than the others."
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    with torch.no_grad(): model[1].weight.mul_(1e-3)
    def through(model, batch): return model(batch['x']).sum(), 1
    from effpt.sparse.masks import masks
    names = [f'{i}.weight' for i in range(4)]
    magnitude = masks({n: model.get_parameter(n).detach().abs() for n in names}, .95, 'all')
    flow = synflow_masks(model, through, dict(x=torch.ones(1, 16)), names, 20.)
    assert not magnitude['1.weight'].any() and all(m.any() for m in flow.values())


def test_a_ticket_begins_with_the_weights_of_its_moment():
    "The run that carries it is the dense one up to there."
    def train(callbacks): return tiny.train({}, callbacks=callbacks)[0]
    dense, last = train([]), lottery_rewinding(train, 4., rounds=1, at=.5)
    mine, theirs = ([row['loss'] for row in r.history] for r in (last, dense))
    assert mine[:3] == theirs[:3] and mine[3:] != theirs[3:]
    assert last.ledger.total('tokens') == 2 * dense.ledger.total('tokens')
    weights = select(last.model).values()
    assert sum(int((w != 0).sum()) for w in weights) == pytest.approx(sum(w.numel() for w in weights) / 4, abs=1)


@pytest.mark.parametrize('wrong, said', [(dict(compression=0.), 'compression is 0'), (dict(rounds=0), 'rounds is 0'), (dict(at=1.), 'at is 1')])
def test_bad_lottery(wrong, said):
    with pytest.raises(InputError, match=said): lottery_rewinding(None, **wrong)
