"""Techniques of different slots go together: runs of a few steps, drawn so that every pair occurs in one of them; pairs that a card forbids are refused.

All pairs run where they are few. Else these run: all that hold a technique of a page whose code was changed since the branch began, and 40
others, chosen by a word: the commit, or today's date where there is no commit. `EFFPT_PAIRS=all pytest tests/test_pairs.py` runs them all, `EFFPT_PAIRS=WORD` those of that word."""
import itertools, math, os, re, subprocess, time
from pathlib import Path

import pytest
import torch
from allpairspy import AllPairs

from effpt import catalog
from effpt.basics import InputError, rng
from effpt.loss import next_token
from effpt.recipe import build, check
from tiny import BASES, RUN_SLOTS, TECHNIQUES, assert_same, in_run, recipe, spec, train

ROOT = Path(__file__).resolve().parents[1]
ROTATING = 40


def dimensions(techniques):
    "What is chosen for each slot, and for the wrapper around it: one technique, or none where the slot can do without."
    found = {}
    for name in sorted(n for n, t in techniques.items() if t['slot'] in RUN_SLOTS):
        t = techniques[name]
        found.setdefault((t['slot'], t['kind'] == 'wrapper'), []).append(name)
    plain = ('source', False), ('loss', False), ('optimizer', False), ('schedule', False)     # slots that somebody must fill
    return {where: names if where in plain else [None, *names] for where, names in sorted(found.items())}


def forbidden(techniques):
    "Pairs of which one card names the other."
    return sorted({tuple(sorted((name, other))) for name, t in techniques.items() for other in t['without'] if other in techniques})


def impossible(techniques):
    "These, and those of which one needs what the other, or something that it needs, must not meet."
    named, whole = set(forbidden(techniques)), {name: [name, *t.get('needs', ())] for name, t in techniques.items()}
    return {(a, b) for a, b in itertools.combinations(sorted(techniques), 2) if any(tuple(sorted((x, y))) in named for x in whole[a] for y in whole[b])}


def together(names, excluded):
    return not any(pair in excluded for pair in itertools.combinations(sorted(n for n in names if n), 2))


def covering_array(techniques):
    "Runs, each a list of names, in which every pair of techniques that may go together does."
    found, excluded = list(dimensions(techniques).values()), impossible(techniques)
    if len(found) < 2: return [[n] for names in found for n in names if n]
    rows = [list(row) for row in AllPairs(found, filter_func=lambda row: together(row, excluded))]
    missing = pairs_of(found) - excluded - set().union(*map(pairs_in, rows))       # with exclusions, AllPairs leaves some out
    while missing:
        row = complete(pair := min(missing), found, excluded)       # the least, so that one word always means the same runs
        if row: rows.append(row)
        missing -= pairs_in(row) | {pair}
    return [[n for n in row if n] for row in rows]


def pairs_in(row): return set(itertools.combinations(sorted(n for n in row if n), 2))


def pairs_of(found): return {tuple(sorted((a, b))) for one, other in itertools.combinations(found, 2) for a in one if a for b in other if b}


def complete(pair, found, excluded):
    "The pair, with the first that goes with it in every other dimension; nothing where there is none."
    row = list(pair)
    for names in found:
        if set(pair) & set(names): continue
        fits = [n for n in names if together([*row, n], excluded)]
        if not fits: return []
        row.append(fits[0])
    return row


def git(*words):
    try: done = subprocess.run(['git', '-c', 'safe.directory=*', *words], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError: return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_pages():
    "Pages of techniques whose code, or code of a part or a kernel that they use, differs from where the branch began: the merge base with origin's main, else the commit before."
    here = git('rev-parse', 'HEAD')
    began = next((b for b in (git('merge-base', 'HEAD', 'origin/main'), git('rev-parse', 'HEAD~1')) if b and b != here), here)
    paths = (git('diff', '--name-only', *began, '--', 'effpt', 'kernels') if began else []) + git('ls-files', '--others', '--exclude-standard', '--', 'effpt', 'kernels')
    changed = {re.sub('^kernels', 'effpt_kernels', p.removesuffix('.py').replace('/', '.')) for p in paths}
    return {page for page in {t['page'] for t in TECHNIQUES.values() if not t['spine']} if changed & catalog._own_code(page).keys()}


def chosen(rows, techniques, changed, word):
    "The rows to run, by their number."
    if word == 'all' or len(rows) <= ROTATING: return list(range(len(rows)))
    touched = [i for i, row in enumerate(rows) if any(techniques[n]['page'] in changed for n in row)]
    others = [i for i in range(len(rows)) if i not in set(touched)]
    return sorted(touched + rng(0, 'pairs', word).permutation(others)[:ROTATING].tolist())


ROWS = covering_array(TECHNIQUES)
WORD = os.environ.get('EFFPT_PAIRS') or ''.join(git('rev-parse', '--short', 'HEAD')) or time.strftime('%Y-%m-%d')
CHOSEN = chosen(ROWS, TECHNIQUES, changed_pages(), WORD)


@pytest.mark.parametrize('names', [pytest.param(ROWS[i], id='+'.join(ROWS[i])) for i in CHOSEN])
def test_together(note, names):
    note(f'{len(CHOSEN)} of {len(ROWS)} combinations of {len(in_run())} techniques: EFFPT_PAIRS={WORD} pytest tests/test_pairs.py')
    run, watch = train(recipe(*names), budget='4 steps')
    assert run.step == 4 and all(math.isfinite(row['loss']) for row in run.history), f'EFFPT_PAIRS={WORD} runs this again'
    assert all(torch.isfinite(p).all() for p in run.model.parameters()) and watch.moved(run.model)


@pytest.mark.parametrize('pair', forbidden(TECHNIQUES), ids='+'.join)
def test_forbidden_pairs_are_refused(pair):
    a, b = pair
    for refuse in check, build:
        with pytest.raises(InputError) as said: refuse(recipe(a, b))
        assert a in str(said.value) and b in str(said.value)


@pytest.mark.parametrize('slot', BASES)
def test_a_slot_holds_one_base_then_wrappers(slot):
    bases, wrappers = ([n for n in in_run(slot) if (TECHNIQUES[n]['kind'] == 'wrapper') == wraps] for wraps in (False, True))
    wrong = [[bases[0], bases[-1]], *([w, bases[0]] for w in wrappers), *([w] for w in wrappers)]
    for names in wrong:
        with pytest.raises(InputError) as said: check({slot: [spec(n) for n in names]})
        assert any(n in str(said.value) for n in names)


class Growing:
    "A loss wrapper with a memory: the n-th batch counts 1 + n / 10."
    def __init__(self, loss): self.loss, self.n = loss, 0
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state['n']

    def __call__(self, model, batch):
        self.n += 1
        value, weight = self.loss(model, batch)
        return value * (1 + self.n / 10), weight


def doubled(loss): return lambda model, batch: (2 * loss(model, batch)[0], loss(model, batch)[1])


@pytest.mark.parametrize('chain', [[next_token, Growing], [next_token, Growing, doubled], [next_token, Growing, Growing]], ids=['last', 'inner', 'two'])
def test_every_wrapper_of_a_chain_is_remembered(chain, tmp_path):
    whole = train({}, loss=chain)[1]
    train({}, loss=chain, stop=3, out=tmp_path/'run')
    assert_same(whole.end, train({}, loss=chain, out=tmp_path/'run', resume=True)[1].end)


def entry(slot, kind='base', page='x', without=()): return dict(slot=slot, kind=kind, page=page, without=list(without), case={}, spine=False)


MANY = {f'{slot}{i}': entry(slot, 'wrapper' if i > 6 else 'base', page=f'{slot}/{i}') for slot in ('loss', 'optimizer', 'schedule') for i in range(9)} | \
       {f'callback{i}': entry('callbacks', 'callback', f'c/{i}', ['optimizer3', 'loss8'] if i == 2 else []) for i in range(9)}


def test_every_allowed_pair_of_two_slots_is_in_the_array():
    rows, excluded = covering_array(MANY), set(forbidden(MANY))
    assert excluded == {('callback2', 'optimizer3'), ('callback2', 'loss8')}
    where = {name: at for at, names in dimensions(MANY).items() for name in names}
    wanted = {pair for pair in itertools.combinations(sorted(MANY), 2) if where[pair[0]] != where[pair[1]]} - excluded
    had = {pair for row in rows for pair in itertools.combinations(sorted(row), 2)}
    assert wanted <= had and not had & excluded
    assert len(rows) < 150      # of 7 x 3 x 7 x 3 x 7 x 3 x 10 combinations


def test_changed_pages_run_and_the_rest_rotates():
    rows = covering_array(MANY)
    mine = {i for i, row in enumerate(rows) if 'loss4' in row}
    first, again, other = (chosen(rows, MANY, {'loss/4'}, word) for word in ('monday', 'monday', 'tuesday'))
    assert first == again != other and mine <= set(first) & set(other)
    assert len(first) == len(mine) + ROTATING and chosen(rows, MANY, set(), 'all') == list(range(len(rows)))
    seen = set().union(*(chosen(rows, MANY, set(), str(day)) for day in range(30)))
    assert len(seen) == len(rows)       # in a month each had its turn
