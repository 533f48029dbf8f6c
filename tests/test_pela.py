"""PELA on other people's models: ranks by ratio, what a teacher adds to a loss and to the ledger, and teachers that do not fit."""
import copy, math

import pytest, torch
from torch import nn

import tiny
from effpt.arch.convert import Converted, matrix_of, to_dense
from effpt.arch.low_rank import LowRank
from effpt.arch.pela import distance, feature_distillation, inner, listening, matrix_now, perturbation, places, rank_at, truncated_svd, weight_perturbation
from effpt.basics import InputError
from effpt.ledger import count_flops
from effpt.loss import next_token, outputs
from effpt.plan import plan
from effpt.recipe import build


BATCH = dict(tokens=torch.arange(32).view(2, 16))
def another(**shape): return tiny.Transformer(**dict(vocab=tiny.VOCAB, width=tiny.WIDTH, layers=2, heads=2, length=tiny.LENGTH) | shape).init(1)


@pytest.mark.parametrize('ratio', [1, 1.5, 2, 3, 5])
@pytest.mark.parametrize('shape', [(24, 40), (40, 24), (32, 32), (128, 384), (10, 1000)])
def test_the_rank_is_the_largest_that_keeps_to_the_ratio(shape, ratio):
    (m, n), r = shape, rank_at(shape, ratio)
    assert r * (m + n) <= m * n / ratio < (r + 1) * (m + n) and r < min(shape)


@pytest.mark.parametrize('kind', tiny.MODELS)
def test_each_matrix_is_the_nearest_of_its_rank_and_comes_back(kind):
    if kind != 'Sequential': pytest.importorskip('transformers')
    model = tiny.MODELS[kind]().eval()
    names, before = list(model.state_dict()), {path: matrix_of(m).detach().double() for path, m in inner(model).items()}
    truncated_svd(model, 2, quiet=True)
    for path, layer in inner(model).items():
        u, s, vt = torch.linalg.svd(before[path], full_matrices=False)
        r = rank_at(before[path].shape, 2)
        assert torch.allclose(layer.matrix().double(), u[:, :r] * s[:r] @ vt[:r], atol=1e-5) and len(layer.A) == r
    said = outputs(model, BATCH).logits
    assert torch.allclose(outputs(to_dense(model), BATCH).logits, said, atol=1e-5) and list(model.state_dict()) == names


@pytest.mark.parametrize('kind', tiny.MODELS)
def test_what_teachers_add(kind):
    "The mean over places of the squared distance, and of the squared largest deviation, in float64."
    if kind != 'Sequential': pytest.importorskip('transformers')
    teacher = tiny.MODELS[kind]().eval()
    model = truncated_svd(copy.deepcopy(teacher), 2, quiet=True)
    given = []
    for m in (model, teacher):
        with torch.no_grad(), listening(places(m)) as seen: outputs(m, BATCH)
        given.append({path: h.double() for path, h in seen.items()})
    features = sum((h - given[1][path]).square().mean() for path, h in given[0].items()) / len(given[0])
    gaps = [(matrix_now(l).double() - matrix_of(teacher.get_submodule(path)).double()).abs().max() for path, l in inner(model).items()]
    deviation = sum((g - .01) ** 2 for g in gaps) / len(gaps)
    total, weight = weight_perturbation(feature_distillation(next_token, teacher=teacher, alpha=50.), teacher=teacher, weight=300., eps=.01)(model, BATCH)
    assert total.item() / weight.item() == pytest.approx((next_token(model, BATCH)[0] / weight + 50 * features + 300 * deviation).item(), rel=1e-4)
    assert features > 0 and deviation > 0


def test_teachers_learn_nothing_and_leave_no_hooks():
    teacher, model = another().train(), tiny.transformer()
    before = copy.deepcopy(teacher.state_dict())
    total, weight = feature_distillation(next_token, teacher=teacher)(model, BATCH)
    total.backward()
    assert all(p.grad is None for p in teacher.parameters()) and not any(m._forward_hooks for m in [*teacher.modules(), *model.modules()])
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items()) and not teacher.training


def test_the_gradient_of_the_deviation_is_that_of_its_largest_entry():
    layer = LowRank(nn.Linear(8, 6), 3, 'spectral')
    target = torch.zeros(6, 8)
    perturbation(dict(x=layer), dict(x=target), 0.).backward()
    w = layer.matrix().detach()
    i, j = divmod(w.abs().argmax().item(), 8)
    expected = torch.zeros(6, 8)
    expected[i, j] = 2 * w[i, j]
    assert torch.allclose(layer.A.grad, layer.B.detach().T @ expected, atol=1e-6)


def test_without_a_teacher_a_run_is_compared_with_where_it_began():
    first = {name: tiny.train(tiny.recipe(*names), budget='2 steps')[0].history for name, names in dict(
        plain=['next_token'], held=[dict(name='weight_perturbation', weight=4., eps=.5)], both=['feature_distillation', dict(name='weight_perturbation', weight=4., eps=.5)]).items()}
    begun = {name: rows[0]['loss'] for name, rows in first.items()}
    assert begun['held'] == pytest.approx(begun['plain'] + 1, rel=1e-5) and begun['both'] == pytest.approx(begun['held'], rel=1e-5)
    assert first['both'][1]['loss'] > first['held'][1]['loss']


def test_the_original_is_charged():
    teacher = another()
    run, _ = tiny.train(tiny.recipe('truncated_svd'), loss=[next_token, lambda loss, run: feature_distillation(loss, teacher, run=run)])
    assert run.ledger.total('flops', 'train/distil') == pytest.approx(count_flops(teacher, tiny.LENGTH).forward * run.tokens)
    assert run.ledger.total('flops', 'svd') > 0


def test_flops_and_plan_agree():
    model = truncated_svd(tiny.transformer(), 2, quiet=True)
    planned = plan(dict(tiny.transformer().shape), convert=[dict(name='truncated_svd', ratio=2)], length=tiny.LENGTH)
    assert planned.flops_per_token == pytest.approx(count_flops(model, tiny.LENGTH).total, rel=.01)
    assert planned.numbers == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('call, said', [
    (lambda m: truncated_svd(m, .9), 'ratio is 0.9'), (lambda m: truncated_svd(m, math.inf), "leaves no rank for 'blocks.0.attention.q'"), (lambda m: truncated_svd(m, 17), 'leave the layer out with match='),
    (lambda m: truncated_svd(m, match='block.*'), 'selects no linear layer'), (lambda m: truncated_svd(truncated_svd(m, 4, match='blocks.1.*', quiet=True), 4), 'is converted already')])
def test_bad_input_is_named_and_changes_nothing(call, said):
    model = tiny.transformer()
    with pytest.raises(InputError, match=said): call(model)
    assert not any(isinstance(m, Converted) for m in model.blocks[0].modules())


@pytest.mark.parametrize('make, said', [
    (lambda: feature_distillation(next_token, another(width=48)), 'of the same width'), (lambda: feature_distillation(next_token, another(layers=1)), "the teacher has no 'blocks.1'"),
    (lambda: feature_distillation(next_token, another(), match='blocks.7'), 'selects no module'), (lambda: weight_perturbation(next_token, another(hidden=40)), 'of the same shape'),
    (lambda: weight_perturbation(next_token, another(layers=1)), "the teacher has no 'blocks.1"), (lambda: weight_perturbation(next_token, another(), match='norm'), 'selects no linear layer'),
    (lambda: weight_perturbation(next_token), 'there is no teacher'), (lambda: feature_distillation(next_token, {'base': 'nano'}), 'give a model'), (lambda: weight_perturbation(next_token, another(), eps=math.nan), 'eps is nan')])
def test_teachers_that_do_not_fit(make, said):
    with pytest.raises(InputError, match=said): make()(tiny.transformer(), BATCH)


def test_a_bad_teacher_is_refused_before_training_begins():
    with pytest.raises(InputError, match='of the same shape'):
        tiny.train({}, loss=[next_token, lambda loss, run: weight_perturbation(loss, another(hidden=40), run=run)], callbacks=[type('Never', (), dict(before_step=lambda *a: pytest.fail('it was training')))()])


def test_features_of_what_runs_in_bfloat16_are_compared_in_float32():
    teacher, model = another(), tiny.transformer().bfloat16()
    with torch.no_grad(), listening(places(model)) as ours: model(BATCH)
    with torch.no_grad(), listening(places(teacher)) as theirs: teacher(BATCH)
    assert distance(ours, theirs).dtype == torch.float32


@pytest.mark.parametrize('optimizer', ['adam8bit', 'galore', 'muon'])
def test_the_whole_of_it_resumes_with_other_optimizers(optimizer, tmp_path):
    taught = [dict(name='next_token'), dict(name='feature_distillation'), dict(name='weight_perturbation', weight=10.)]
    slots = tiny.recipe('truncated_svd', optimizer) | dict(loss=taught)
    build(slots)
    run, watch = tiny.train(slots)
    tiny.train(slots, stop=3, out=tmp_path/'run')
    tiny.assert_same(watch.end, tiny.train(slots, out=tmp_path/'run', resume=True)[1].end)
