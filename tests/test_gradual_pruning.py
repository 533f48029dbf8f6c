"""Gradual pruning: the law's ends and its middle, that what is gone stays gone, that a run goes on across choices, and the bytes of what is left."""
import pytest, torch
from torch import nn

import tiny
from effpt.basics import InputError
from effpt.optim.rules import select
from effpt.plan import plan
from effpt.sparse.gradual_pruning import LAWS, gradual_pruning, planned, sparsity_at, stored_bytes
from effpt.sparse.masks import pack


def share_gone(weights): return {round((w == 0).float().mean().item(), 2) for w in weights.values()}


@pytest.mark.parametrize('law', LAWS)
@pytest.mark.parametrize('initial, final', [(0., .5), (.2, .9), (.6, .6), (0., 0.)])
def test_every_law_rises_from_end_to_end(law, initial, final):
    at = [sparsity_at(t / 100, final, .2, .7, initial, law) for t in range(101)]
    assert at[:20] == [0.] * 20 and at[20] == pytest.approx(initial) and at[70:] == pytest.approx([final] * 31)
    assert all(b >= a - 1e-12 for a, b in zip(at, at[1:]))


def test_the_cubic_law_in_numbers():
    assert sparsity_at(.5, .8, 0., 1., 0.) == pytest.approx(.8 * (1 - .125)) and sparsity_at(.25, .8, 0., 1., .2) == pytest.approx(.8 - .6 * .75 ** 3)


class Seen:
    def __init__(self): self.gone, self.shares = [], []
    def after_step(self, run, metrics):
        self.gone.append({n: w == 0 for n, w in select(run.model).items()})
        self.shares.append(max(share_gone(select(run.model))))


@pytest.mark.parametrize('by', ['magnitude', 'random'])
@pytest.mark.parametrize('within', ['matrix', 'all'])
def test_what_is_gone_does_not_come_back(by, within):
    seen = Seen()
    run, _ = tiny.train({}, callbacks=[gradual_pruning(.8, every=2, by=by, within=within), seen], budget='10 steps')
    for a, b in zip(seen.gone, seen.gone[1:]): assert all((b[n] | ~a[n]).all() for n in a)
    numbers = sum(w.numel() for w in select(run.model).values())
    assert sum(int((w == 0).sum()) for w in select(run.model).values()) == pytest.approx(.8 * numbers, abs=len(seen.gone[0]))


def test_the_end_is_reached_whatever_the_pace():
    seen = Seen()
    tiny.train({}, callbacks=[gradual_pruning(.5, start=.5, end=1., every=7), seen], budget='10 steps')
    assert seen.shares[4] == 0 and seen.shares[-1] == .5


def test_a_run_that_is_stopped_between_choices_goes_on_to_the_same_bits(tmp_path):
    slots = {'callbacks': tiny.spec('gradual_pruning', every=4, end=.9), 'optimizer': tiny.spec('galore')}
    _, watch = tiny.train(slots, budget='10 steps')
    tiny.train(slots, stop=6, out=tmp_path/'run', budget='10 steps')
    run, again = tiny.train(slots, out=tmp_path/'run', resume=True, budget='10 steps')
    tiny.assert_same(watch.end, again.end)
    assert share_gone(select(run.model)) == {.5}


def test_conv1d_and_a_choice_of_matrices():
    pytest.importorskip('transformers')
    run, _ = tiny.train({}, tiny.MODELS['GPT2'], callbacks=[gradual_pruning(.75, every=1, match='*.mlp.*')])
    assert share_gone(select(run.model, '*.mlp.*')) == {.75} and share_gone(select(run.model, '*.attn.*')) == {0.}


def test_what_is_stored():
    layer = nn.Linear(24, 10)
    assert stored_bytes(layer) == 4 * 250
    with torch.no_grad(): layer.weight[1:] = 0
    assert stored_bytes(layer) == 4 * 24 + len(pack(layer.weight != 0)) + 4 * 10
    assert stored_bytes(nn.Sequential(layer, layer)) == stored_bytes(layer)


def test_costs_are_charged_and_planned():
    run, _ = tiny.train({}, callbacks=[one := gradual_pruning(.5, every=1, end=.99)])
    numbers = sum(w.numel() for w in one.weights.values())
    shapes = {n: tuple(p.shape) for n, p in run.model.named_parameters()}
    assert run.ledger.total('flops', 'train/prune') == 10 * numbers * (tiny.STEPS - 1)   # nothing is to go in the first step
    assert planned(shapes)['buffers'] == numbers == sum(m.numel() * m.element_size() for m in one.masks.values())


def test_the_planner_adds_the_masks():
    shape, pruning = dict(tiny.transformer().shape), 'effpt.sparse.gradual_pruning:gradual_pruning'
    plain, pruned = (plan(shape, optim=optim, length=tiny.LENGTH) for optim in ('adamw', ['adamw', pruning]))
    numbers = sum(w.numel() for w in select(tiny.transformer()).values())
    assert pruned.bytes['parameters'] - plain.bytes['parameters'] == numbers and pruned.bytes['optimizer'] == plain.bytes['optimizer']


@pytest.mark.parametrize('wrong, said', [
    (dict(final=1.), 'nothing would be left'), (dict(final=-1), 'final is -1'), (dict(initial=.9), 'above final'), (dict(start=.7), 'give an end after the start'), (dict(end=2), 'share of the run'),
    (dict(every=0), 'every is 0'), (dict(every=2.), 'every is 2.0'), (dict(law='cubc'), "did you mean 'cubic'"), (dict(by='magnitud'), "did you mean 'magnitude'"), (dict(within='matrx'), "did you mean 'matrix'")])
def test_bad_input_is_named(wrong, said):
    with pytest.raises(InputError, match=said): gradual_pruning(**wrong)


def test_a_choice_of_nothing_is_refused_before_the_first_step():
    with pytest.raises(InputError, match='selects no matrix'): tiny.train({}, callbacks=[gradual_pruning(match='blocks.9.*')])
