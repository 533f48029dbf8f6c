"""The ruler itself: intervals that hold as often as they say, runs that are repeated to the bit, files that are read instead of run again."""
import json, math

import numpy as np
import pytest

from effpt import compare as c
from effpt.basics import InputError, rng
from effpt.corpus import load, split
from effpt.recipe import build, pick_sizes, pretrain, stage_text, text_of

DRAWS = 20_000
TINY = dict(limit=200, held_out=.1, eval_tokens='2k', shape=dict(width=32, layers=1, heads=2, hidden=64), batch=4, evaluate_every=1., budget='4 steps', precision='float32', compile=False)


def share_covered(arms, seeds, true, wilder=1.):
    g = rng(0, 'coverage', arms, seeds)
    y = g.normal(size=(DRAWS, arms, seeds)) * .006 + g.normal(size=(DRAWS, 1, seeds)) * .02
    y[:, -1] += true
    return np.mean([(d := c.differences(sample)[-1]).low <= true <= d.high for sample in y])


@pytest.mark.parametrize('arms, seeds, true', [(4, 3, -.02), (4, 3, 0.), (7, 3, -.02), (2, 5, -.02), (3, 5, 0.)], ids=str)
def test_intervals_cover_as_often_as_they_say(arms, seeds, true):
    share = share_covered(arms, seeds, true)
    print(f'{arms} arms, {seeds} seeds: {share:.2%}')
    assert .943 <= share <= .957


def power(d): return 1.5 + 8 * np.asarray(d, float) ** -.22


@pytest.mark.parametrize('true', [1., 1.3, 3.])
def test_multipliers_cover_as_often_as_they_say(true):
    g, rungs = rng(0, 'ladder', true), np.array([1e6, 2e6, 4e6, 8e6])
    exact = c.Ladder({d: np.full(4, power(d)) + np.arange(4) * 1e-9 for d in rungs})
    worth, hits = float(exact.weights([true * 2e6])[0] @ exact.mean), 0
    for _ in range(DRAWS):
        y = power(2e6) + g.normal(size=(4, 3)) * .006 + g.normal(size=3) * .02
        y[-1] += worth - power(2e6)
        losses = power(rungs)[:, None] + g.normal(size=(4, 4)) * .006 + g.normal(size=4) * .02
        ladder = c.Ladder.__new__(c.Ladder)    # without the rejection of rungs, which equal spreads do not need
        ladder.tokens, ladder.losses, ladder.mean, (ladder.variance, ladder.df) = rungs, losses, losses.mean(1), c.residual_variance(losses)
        hits += abs(c.statistic(ladder, np.array([true * 2e6]), 2e6, c.differences(y)[-1])[0][0]) <= 1
    print(f'M = {true}: {hits / DRAWS:.2%}')
    assert .943 <= hits / DRAWS <= .957


def test_a_wild_arm_is_judged_by_itself_and_spoils_nobody():
    g = rng(0, 'wild')
    y = g.normal(size=(5, 3)) * .003
    calm = c.differences(y[:4])
    y[4] = [3., 1., 2.5]
    found = c.differences(y)
    assert [d.unstable for d in found] == [False] * 4 + [True]
    assert found[4].df == 2 and found[4].high - found[4].low > 1
    assert found[1].high - found[1].low == pytest.approx(calm[1].high - calm[1].low)


def test_the_same_arm_ends_with_the_same_bits(tmp_path):
    recipe = c.arm({}, dict(size='nano') | TINY)
    ends = [c.forked(c.run_arm, recipe, 3, str(tmp_path/name), 1, timeout=120) for name in 'ab']
    assert [e.how for e in ends] == ['done', 'done'], ends
    assert ends[0].value['results'] == ends[1].value['results'] and [h[3] for h in ends[0].value['history']] == [h[3] for h in ends[1].value['history']]


def test_the_history_of_an_arm_that_was_stopped_is_whole(tmp_path):
    recipe = c.arm({}, dict(size='nano') | TINY | dict(budget='6 steps'))
    class Stop:
        def after_step(self, run, metrics):
            if run.step == 3: run.stopped = 'SIGTERM'
    trainer, _ = c.plan_run(c.full(recipe) | dict(seed=0, out=str(tmp_path/'parts'), save_every='5min', keep_last=1))
    trainer.watching.append(Stop())
    assert trainer.fit().step == 3
    whole, parts = (c.run_arm(print, recipe, 0, str(tmp_path/name), None) for name in ('whole', 'parts'))
    assert [(tokens, flops, loss) for tokens, flops, _, loss in parts['history']] == [(tokens, flops, loss) for tokens, flops, _, loss in whole['history']]
    assert len(whole['history']) == 6 and parts['results'] == whole['results']


def test_a_stopped_arm_takes_up_no_more_threads_than_there_is_room_for(tmp_path):
    recipe = c.arm({}, dict(size='nano') | TINY)
    ends = [c.forked(c.run_arm, recipe, 0, str(tmp_path/'run'), threads, timeout=120) for threads in (2, None, 1, None)]
    assert [e.how for e in ends] == ['done'] * 4, ends
    assert [e.value['resolved']['threads'] for e in ends] == [2, 2, 1, 1]


@pytest.mark.parametrize('given', [{}, dict(warm=.5, floor=.2), dict(weight_decay=.3, lr=.01), dict(optimizer='adamw', schedule=['wsd'])], ids=str)
def test_an_arm_trains_as_pretrain_does(tmp_path, given):
    "What `pretrain` chooses by itself (its schedule, its rate) an arm has too."
    recipe = c.arm(given, dict(size='nano') | TINY)
    result = c.run_arm(None, recipe, 3, str(tmp_path/'arm'), None)
    run = pretrain(**build(recipe), seed=3, out=tmp_path/'plain', quiet=True).run
    assert result['results'] == run.results and [r[3] for r in result['history']] == [r['loss'] for r in run.history]


def test_a_key_follows_what_decides_the_outcome(monkeypatch):
    recipe = c.arm({}, dict(size='nano') | TINY)
    text = c.text_key(recipe)
    key = c.run_key(recipe, 0, text)
    assert key == c.run_key(dict(recipe), 0, dict(text))
    other = [c.run_key(recipe, 1, text), c.run_key(recipe | dict(lr=.1), 0, text), c.run_key(recipe, 0, text | dict(train='x')), c.run_key(recipe | dict(budget='5 steps'), 0, text)]
    monkeypatch.setattr(c.catalog, 'golden_fingerprint', lambda: 'the spine has changed')
    assert len({key, *other, c.run_key(recipe, 0, text)}) == 6


@pytest.fixture
def cache(monkeypatch, tmp_path):
    "Results of other tests are not read here; text is."
    folder = tmp_path/'runs'
    monkeypatch.setattr(c, 'cache_folder', lambda *parts: (tmp_path.joinpath(*parts), tmp_path.joinpath(*parts).mkdir(parents=True, exist_ok=True))[0])
    return folder


def test_what_is_finished_is_not_run_again_and_what_was_not_is(cache):
    arms = {'dense': {}, 'slow': dict(lr=1e-4)}
    first = c.compare(arms, seeds=2, tune=False, timing=0, quiet=True, **TINY)
    results = sorted(cache.rglob('result.json'))
    assert len(results) == 4
    times = {p: p.stat().st_mtime_ns for p in results}
    results[0].unlink()
    again = c.compare(arms, seeds=2, tune=False, timing=0, quiet=True, **TINY)
    assert again.values == first.values
    assert [p for p in sorted(cache.rglob('result.json')) if p.stat().st_mtime_ns != times[p]] == [results[0]]
    assert not list(cache.rglob('checkpoints'))


def test_several_at_a_time_give_what_one_at_a_time_gives(cache):
    arms = {'dense': {}, 'slow': dict(lr=1e-4)}
    alone = c.compare(arms, seeds=2, tune=False, timing=0, quiet=True, **TINY).values
    for p in cache.rglob('result.json'): p.unlink()
    assert c.compare(arms, seeds=2, tune=False, timing=0, processes=2, quiet=True, **TINY).values == alone


def test_a_crash_and_a_divergence_are_told_and_the_others_go_on(cache):
    arms = {'dense': {}, 'broken': dict(loss='effpt.train:bind'), 'hot': dict(lr=1e30)}
    found = c.compare(arms, seeds=2, tune=False, timing=1, quiet=True, **TINY)
    assert set(found.errors) == {'broken', 'hot'} and 'TypeError' in found.errors['broken'] and 'Traceback' in found.errors['broken']
    assert found.names == ['dense'] and 'failed' in repr(found.table())
    with pytest.raises(InputError, match="there is no arm 'hot' that ended"): found.multiplier('tokens', 'hot')
    assert found.verdict(c.Claim('x', 'broken')).claim == 'not tested'


def test_averaged_weights_are_what_is_evaluated_saved_and_resumed(tmp_path):
    from effpt.recipe import build, open_run, pretrain
    import torch
    recipe = dict(TINY, callbacks={'name': 'average_weights', 'share': .5, 'points': 2})
    whole = pretrain(**build(recipe | dict(save_every=3)), out=tmp_path/'whole', quiet=True)
    plain = pretrain(**TINY, quiet=True)
    assert whole.results != plain.results
    saved = open_run(tmp_path/'whole').model.state_dict()
    assert all(torch.equal(saved[k], v) for k, v in whole.model.state_dict().items())


def test_the_record_of_a_comparison_is_plain_json_and_holds_what_was_measured(cache):
    found = c.compare({'dense': {}, 'slow': dict(lr=1e-4)}, seeds=2, tune=True, timing=1, quiet=True, **TINY)
    record = json.loads(json.dumps(found.record('08_compare')))
    slow = record['arms']['slow']
    assert slow['mean'] == pytest.approx(np.mean(found.values['slow'])) and slow['lr'] in map(float, slow['tried'])
    assert slow['difference']['low'] <= slow['difference']['mean'] <= slow['difference']['high'] and slow['bytes']['optimizer'] > 0
    assert record['baseline'] == 'dense' and record['seeds'] == [0, 1] and math.isfinite(slow['seconds'])


def test_diff_names_what_differs(tmp_path):
    from effpt.recipe import pretrain
    for name, lr in ('a', .001), ('b', .002): pretrain(**TINY, lr=lr, out=tmp_path/name, quiet=True)
    names = [row[''] for row in c.diff(tmp_path/'a', tmp_path/'b').rows]
    assert names[0] == 'recipe.lr' and 'results.bpb' in names and not any(n.startswith('machine') for n in names)
    assert c.diff(tmp_path/'a', tmp_path/'a').rows == []
    with pytest.raises(InputError, match='nowhere does not exist'): c.diff(tmp_path/'a', 'nowhere')


def test_stages_train_on_no_copies_of_what_is_held_out(tmp_path):
    g = rng(0, 'copies')
    def some(n): return [' '.join(f'word{i}' for i in g.integers(0, 500, 40)) for _ in range(n)]
    def written(name, texts): (tmp_path/name).write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts)); return str(tmp_path/name)
    measured, fresh, short = some(60), some(40), [f'only {i}' for i in range(40)]   # the short ones have no shingles
    one, other = written('one.jsonl', measured + short), written('other.jsonl', fresh + [f'before {t} after' for t in measured] + short)
    recipe = dict(data=one, held_out=.2, stage=[dict(share=.5, data=other), dict(share=.25, data=one), dict(share=.25, batch=4)])
    a = pick_sizes(c.full(recipe) | dict(vocab=512))
    tokenizer, train, held = text_of(a)
    assert held.n_docs > 10
    assert stage_text(a, dict(data=other), tokenizer).n_docs == len(fresh + measured + short) - held.n_docs
    assert stage_text(a, dict(data=one), tokenizer).fingerprint == train.fingerprint
    key = c.text_key(recipe | dict(vocab=512))
    assert key['stages'] == [stage_text(a, dict(data=text), tokenizer).fingerprint for text in (other, one)]
    assert 'stages' not in c.text_key(recipe | dict(vocab=512, stage=[dict(share=1.)]))
    with pytest.raises(InputError, match='holds a copy of one that is held out'): stage_text(a, dict(data=written('copies.jsonl', split(load(one, quiet=True), .2, quiet=True).held_out['text'])), tokenizer)


def test_bytes_and_seconds_are_those_of_all_stages(cache):
    thin = dict(share=.5, model=dict(name='low_rank', rank=4, quiet=True))
    plan = dict(c.tiny(), seeds=2, tune=False, timing=1, budget='4 steps')
    found = c.compare({'dense': {}, 'thin': {k: v for k, v in thin.items() if k == 'model'}, 'staged': dict(stage=[dict(share=.5), thin]), 'shrunk': dict(callbacks=dict(name='efficientllm', hidden=16, start=0., end=.5, every=1))}, **plan)
    size = {name: found.cost('bytes', name) for name in found.names}
    assert size['thin'] < size['dense'] == size['staged'] == size['shrunk'] and found.arms['shrunk']['runs'][0]['parameters'] < found.arms['dense']['runs'][0]['parameters']
    assert all(found.steps[name] > 0 for name in found.names)
    with pytest.raises(InputError, match='the baseline has its own stage'): c.ladder_for(dict(stage=[thin]), {}, 'bpb')


def test_bytes_of_stages_on_a_model_that_is_referred_to(cache):
    tiny = {k: v for k, v in c.tiny().items() if k != 'quiet'}
    start = dict(base='nano', budget='2 steps', **tiny)
    compressed = dict(model=[start, dict(name='truncated_svd', quiet=True)])
    found = c.compare({'dense': dict(model=start), 'in stages': dict(compressed, stage=[dict(share=.5), dict(share=.5)])}, **dict(c.tiny(), seeds=2, tune=False, timing=0, budget='4 steps'))
    assert not found.errors and found.cost('bytes', 'in stages') < found.cost('bytes', 'dense')


def written_down(say, path):
    "Work that leaves a line each time."
    import time
    with open(path, 'a') as file: file.write('done\n')
    time.sleep(.5)
    return dict(value=1)


def test_work_that_two_want_at_a_time_is_done_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(3) as pool: found = [*pool.map(lambda _: c.once(tmp_path/'result', written_down, str(tmp_path/'lines')), range(3))]
    assert [f['value'] for f in found] == [1, 1, 1] and (tmp_path/'lines').read_text() == 'done\n'
