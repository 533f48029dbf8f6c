"""Average parameters: the mean of every law against the steps of a run, windows in compute, and laws that are found again from what they say."""
import itertools

import numpy as np, pytest

import tiny
from effpt.basics import InputError
from effpt.sparse.average_parameters import errors, fit_law, in_window, mean_density, window
from effpt.sparse.gradual_pruning import LAWS, gradual_pruning, sparsity_at

TIMES = (np.arange(20_000) + .5) / 20_000


@pytest.mark.parametrize('law', LAWS)
@pytest.mark.parametrize('final, start, end, initial', [(.9, 0., 1., 0.), (.5, .3, .4, 0.), (.75, .1, .7, .5), (.3, .2, .9, .3)])
def test_the_mean_is_that_of_the_schedule(law, final, start, end, initial):
    steps = [sparsity_at(t, final, start, end, initial, law) for t in TIMES]
    assert mean_density(final, start, end, initial, law) == pytest.approx(1 - np.mean(steps), abs=1e-4)


@pytest.mark.parametrize('law', LAWS)
def test_the_mean_is_that_of_a_run(law):
    plan = dict(final=.6, start=.2, end=.7, law=law)
    run, _ = tiny.train({}, callbacks=[one := gradual_pruning(**plan, every=1)], budget='20 steps')
    whole, pruned = sum(p.numel() for p in run.model.parameters()), sum(w.numel() for w in one.weights.values())
    steps = [whole - pruned * sparsity_at(t / 20, **plan) for t in range(20)]
    assert one.lived() == pytest.approx(steps, abs=len(one.weights))
    assert 1 - (whole - one.average()) / pruned == pytest.approx(mean_density(**plan), abs=.02)


@pytest.mark.parametrize('law', LAWS)
@pytest.mark.parametrize('begin, finish', [(.25, .75), (0., 1.), (0., .3), (.6, 1.)])
@pytest.mark.parametrize('final', [.2, .8])
def test_a_window_holds_its_share_of_the_compute(law, begin, finish, final):
    w = window(begin, finish, final, law)
    spent = np.cumsum([0.] + [1 - sparsity_at(t, **w) for t in TIMES])
    at = lambda share: spent[round(share * len(TIMES))] / spent[-1]
    assert (at(w['start']), at(w['end'])) == pytest.approx((begin, finish), abs=1e-3)
    gradual_pruning(**w)


def test_nothing_pruned_is_dense():
    for law in LAWS: assert mean_density(0., law=law) == in_window(0., law=law) == 1. and window(final=0., law=law)['end'] == pytest.approx(.75)


N, D = (np.array(c, float) for c in zip(*itertools.product([3e5, 1e6, 4e6, 2e7], [1e7, 1e8, 2e9])))


def test_a_law_is_found_again():
    plain, whole = lambda n, d: 30 * n ** -.12 * d ** -.07, lambda n, d: 1.5 + 300 / n ** .35 + 900 / d ** .4
    assert fit_law(N, D, plain(N, D))(1e8, 1e10) == pytest.approx(plain(1e8, 1e10))
    assert fit_law(N, D, whole(N, D), floor=True)(1e8, 1e10) == pytest.approx(whole(1e8, 1e10), rel=2e-3)
    assert abs(errors(plain, N, D, plain(N, D) * 1.01) - .01).max() < 1e-9


@pytest.mark.parametrize('call, said', [
    (lambda: fit_law([1., 2.], [1., 2.], [1.]), 'give as many of each'), (lambda: fit_law([0., 1.], [1., 1.], [1., 1.]), 'not a number above 0'), (lambda: fit_law([1.] * 5, [1.] * 5, [1.] * 5, floor=True), 'at least 6'),
    (lambda: window(.5, .5), 'finish after the beginning'), (lambda: window(-.1), 'begin is -0.1'), (lambda: window(final=1.), 'nothing would be left'), (lambda: window(law='geometry'), "did you mean 'geometric'")])
def test_bad_input_is_named(call, said):
    with pytest.raises(InputError, match=said): call()
