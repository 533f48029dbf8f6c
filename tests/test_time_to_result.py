"""A race goes on when a submission fails, keeps what was run, and judges by the rules."""
import math
from functools import partial

import pytest

from effpt.basics import InputError
from effpt.catalog import part_of, techniques, used_by
from effpt.optim import time_to_result as t

ROWS = partial(t.images, width=16, layers=1, batch=32)
BRIEF = dict(seeds=(0, 1), factors=(1.,), timing=0, quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch): monkeypatch.setenv('EFFPT_CACHE', str(tmp_path_factory.getbasetemp()/'cache'))


def crash(recipe, seed, budget):
    "A task on which one of the submissions cannot run."
    if recipe.get('warm') == .5: raise RuntimeError('no memory is left')
    trainer = ROWS(recipe, seed, budget)
    if recipe.get('warm') == .25: trainer.evaluate = lambda model: dict(loss=math.nan)
    return trainer


def test_a_crash_is_reported_and_the_others_go_on():
    race = t.race(dict(good={}, broken=dict(warm=.5), blind=dict(warm=.25)), dict(a=t.Workload(crash, 128)), **BRIEF)
    assert list(race.errors) == [('broken', 'a')] and 'no memory is left' in race.errors['broken', 'a']
    assert race.times()['broken']['a'] == race.times()['blind']['a'] == math.inf
    assert race.scores()['broken'] == 0 and race.reached()['blind'] == 0
    assert {r['optimizer'] for r in t.table(race).rows} == {'good', 'broken', 'blind'}


def test_what_was_run_is_read_and_a_change_is_run(monkeypatch):
    task, ran = t.Workload(ROWS, 128), []
    run = t.once
    monkeypatch.setattr(t, 'once', lambda folder, *a, **k: ran.append((folder/'result.json').exists()) or run(folder, *a, **k))
    for recipe in {}, {}, dict(warm=.1): t.trials(task, recipe, (1.,), (0,))
    t.trials(task._replace(budget=160), {}, (1.,), (0,))
    t.trials(task, {}, (1.,), (1,))
    assert ran == [False, True, False, False, False]


def test_the_same_trial_gives_the_same_numbers():
    first, again = (t.run_trial(t.Workload(ROWS, 256), dict(lr=.01), 3, 256) for _ in range(2))
    assert first['evaluations'] == again['evaluations'] and len(first['evaluations']) == 8


def test_a_target_is_the_median_of_the_best_rate(monkeypatch):
    def run(workload, recipe, seed, budget):
        if recipe['lr'] > 3: return dict(evaluations=[[1, .1]], diverged=True)
        return dict(evaluations=[[1, 9.], [2, abs(recipe['lr'] - 2) + seed], [3, abs(recipe['lr'] - 2) + seed + 1]])
    monkeypatch.setattr(t, 'run_trial', run)
    found = t.run_target(None, None, t.at_rates(dict(lr=1.), t.WIDER), [5, 3, 4], 128)
    assert found == dict(target=4., factor=2.)   # a rate of 2, three seeds, the best value that each has seen
    with pytest.raises(InputError, match='no rate works'): t.run_target(None, None, t.at_rates(dict(lr=100.), t.WIDER), [5, 3, 4], 128)


@pytest.mark.parametrize('recipe, word', [(dict(batch=4), 'batch'), (dict(shape={}), 'shape'), (dict(optimiser='adam8bit'), 'optimizer')])
def test_a_submission_may_not_change_the_task(recipe, word):
    with pytest.raises(InputError, match=word): t.race(dict(mine=recipe), dict(a=t.Workload(ROWS, 128)), **BRIEF)


def test_every_optimizer_of_the_part_takes_part():
    named = str(t.submissions())
    assert all(f"'{n}'" in named for n, tech in techniques('optimizer').items() if part_of(tech['page']) == 'optim')


@pytest.mark.parametrize('name', t.submissions())
def test_a_trial_is_of_its_submission(name):
    "Nothing is lost on the way to another process, but for the rate, which is the trial's."
    given = t.submissions()[name]
    (_, own), = t.at_rates(given, (2.,))
    assert used_by(own) == used_by(given) and t.rate_of(own) == 2 * t.rate_of(given)
    for key in given.keys() - {'optimizer'}: assert own[key] == given[key]


@pytest.mark.parametrize('tasks', ['cpu', 'gpu'])
def test_the_tasks_of_a_profile_can_be_begun(tasks):
    for name, task in t.workloads(tasks, limit=100, eval_tokens='1k').items():
        if name == 'text, code': continue   # another corpus
        trainer = task.make({}, 0, task.budget)
        assert task.varies in ('', *t.workloads(tasks))
        if tasks == 'gpu': continue   # in bfloat16 a step of a nano is slow on a CPU
        run = trainer.begin(False)
        trainer.advance(run)
        assert run.step == 1 and task.metric in trainer.evaluate(run.model), name


def test_hidden_tokens_do_not_leak():
    "What is to be foretold is found in the input no more often than the rule has it."
    import torch
    from effpt.basics import generator
    tokens = torch.randint(0, 256, (64, 128), generator=generator(0, 'tokens'))
    hidden = t.hide(dict(tokens=tokens), generator(0, 'hide'), 256)
    asked = hidden['weights'].bool()
    assert .07 < (hidden['tokens'][asked] == tokens[asked]).float().mean() < .14
    assert (hidden['tokens'][~asked] == tokens[~asked]).all() and hidden['tokens'].max() == 256


@pytest.mark.parametrize('name', t.submissions())
def test_every_submission_can_run_on_every_task(name):
    tasks = t.workloads('smoke', limit=100, eval_tokens='1k') | dict(images=t.Workload(t.images, 128))
    for task in tasks.values():
        trial = t.run_trial(task, t.submissions()[name], 0, 128 if task.metric == 'loss' else 2048)
        assert trial['steps'] == 2 and math.isfinite(trial['evaluations'][-1][1])
