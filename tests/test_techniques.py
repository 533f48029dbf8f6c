"""Every technique in the catalogue, by the tiny case of its card: it trains, twice to the same bits, resumes to the same bits,
saves without pickle, works on other people's models, and refuses what is wrong. A technique that is added takes part unasked."""
import functools, inspect, math

import pytest
import torch
from torch import nn

import tiny
from effpt import checkpoint
from effpt.basics import InputError
from effpt.model import to_hf
from effpt.recipe import build, open_run, read_recipe
from effpt.train import Diverged
from tiny import MODELS, STEPS, TECHNIQUES, assert_same, cases, difference, function, in_run, recipe, spec, train, train_preset

HALF = STEPS // 2
CASES = cases()
techniques = pytest.mark.parametrize('name', in_run())
each_case = pytest.mark.parametrize('case', CASES)


@functools.cache
def whole(case):
    "The undisturbed run of a case."
    return train(recipe(CASES[case]))


@each_case
def test_trains(case):
    run, watch = whole(case)
    assert run.step == STEPS and all(math.isfinite(row['loss']) for row in run.history)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert watch.moved(run.model), 'no parameter moved'


@each_case
def test_trains_twice_to_the_same_bits(case):
    (first, one), (second, other) = whole(case), train(recipe(CASES[case]))
    assert [row['loss'] for row in second.history] == [row['loss'] for row in first.history]
    assert_same(one.end, other.end)


@pytest.fixture(scope='module')
def halved(tmp_path_factory):
    "By case: a run that is stopped half way, what it saved there, and how it went on."
    @functools.cache
    def go(case):
        out = tmp_path_factory.mktemp('run')/'run'
        stopped = train(recipe(CASES[case]), stop=HALF, out=out)          # what is no tensor, number or text raises here
        folder = checkpoint.latest(out/'checkpoints')
        suffixes, saved = {p.suffix for p in folder.iterdir()}, checkpoint.load(folder)
        again = train(recipe(CASES[case]), out=out, resume=True)
        return stopped, suffixes, saved, again, checkpoint.load(checkpoint.latest(out/'checkpoints'))
    return go


@each_case
def test_state_saves_without_pickle(case, halved):
    (_, watch), suffixes, saved, _, _ = halved(case)
    assert suffixes == {'.safetensors', '.json'}
    assert_same(checkpoint.flatten({k: part for k, part in saved.items() if k != 'ledger'}), watch.end)


@each_case
def test_resumes_to_the_same_bits(case, halved):
    (stopped, _), _, _, (again, watch), _ = halved(case)
    assert (stopped.step, again.step) == (HALF, STEPS)
    assert_same(whole(case)[1].end, watch.end)


@each_case
def test_the_model_returned_is_the_model_saved(case, halved):
    *_, (again, _), saved = halved(case)
    assert_same(checkpoint.flatten(saved['model']), checkpoint.flatten(dict(again.model.state_dict())))


@pytest.mark.parametrize('case', cases('optimizer'))
def test_every_trainable_parameter_is_optimized_once(case):
    run, _ = whole(case)
    held = [id(p) for o in run.optimizers.values() for g in o.param_groups for p in g['params']]
    assert sorted(held) == sorted(id(p) for p in run.model.parameters() if p.requires_grad)


class Still:
    "Sets the rate of each optimizer's first group to zero for a step, and notes which parameters moved."
    def before_step(self, run):
        if run.step != HALF: return
        self.first = [o.param_groups[0] for o in run.optimizers.values()]
        for group in self.first: group['initial_lr'] = 0.
        self.before = {p: p.detach().clone() for p in run.model.parameters()}

    def after_step(self, run, metrics):
        if run.step != HALF + 1: return
        held = {p for group in self.first for p in group['params']}
        self.moved = {which: [not torch.equal(p, old) for p, old in self.before.items() if p.requires_grad and (p in held) == which] for which in (True, False)}


@pytest.mark.parametrize('case', cases('optimizer'))
def test_a_group_has_its_own_rate(case):
    still = Still()
    train(recipe(CASES[case]), callbacks=[still])
    assert still.moved[True] and not any(still.moved[True]) and (any(still.moved[False]) or not still.moved[False])


class Measure:
    "Times a step in the middle of a run, and notes what that changed."
    def after_step(self, run, metrics):
        if run.step != HALF: return
        before, tree = checkpoint.flatten(self.state(run))
        before = {path: t.clone() for path, t in before.items()}
        run.time_step('float32', at_least=.02)
        self.changed = difference((before, tree), checkpoint.flatten(self.state(run)))

    def state(self, run): return dict(model=run.model.state_dict(), optimizer={k: checkpoint.optimizer_state(o, run.model) for k, o in run.optimizers.items()})


@pytest.mark.parametrize('case', cases('optimizer', 'loss', 'model'))
def test_a_measurement_is_no_step(case):
    measure = Measure()
    train(recipe(CASES[case]), callbacks=[measure])
    assert not measure.changed


@pytest.mark.parametrize('case', cases(*tiny.SEE_MODEL))
def test_trains_in_bfloat16(case):
    run, watch = train(recipe(CASES[case]), budget='3 steps', precision='bf16')
    assert all(math.isfinite(row['loss']) for row in run.history) and watch.moved(run.model)


@pytest.mark.parametrize('case', cases(*tiny.SEE_MODEL))
def test_micro_batches_add_up_or_are_refused(case):
    try: run, _ = train(recipe(CASES[case]), accumulate=2)
    except InputError as e:
        assert 'accumulate' in str(e)
        return
    mine, theirs = ([row['loss'] for row in r.history] for r in (run, whole(case)[0]))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5) and mine == pytest.approx(theirs, rel=1e-2)


class Edit:
    "Replaces the model, in the middle of a run, by itself."
    def after_step(self, run, metrics):
        if run.step == HALF: run.edit('tiny:same')


@pytest.mark.parametrize('case', cases('optimizer', 'loss', 'callbacks'))
def test_an_edit_that_changes_nothing_loses_nothing(case):
    run, _ = train(recipe(CASES[case]), callbacks=[Edit()])
    assert len(run.edits) == 1 + len(whole(case)[0].edits) and [row['loss'] for row in run.history] == [row['loss'] for row in whole(case)[0].history]


def frozen(all_of_it=False):
    "The tiny model with a frozen block, or nothing to train."
    model = tiny.transformer()
    (model if all_of_it else model.blocks[0]).requires_grad_(False)
    return model


@pytest.mark.parametrize('case', cases('optimizer', 'loss', 'callbacks'))
def test_what_is_frozen_stays_or_is_refused(case):
    try: run, watch = train(recipe(CASES[case]), frozen, budget='4 steps')
    except InputError: return
    moved = watch.moved(run.model)
    assert moved and not [name for name in moved if name.startswith('blocks.0.')]


@pytest.mark.parametrize('case', cases('optimizer'))
def test_nothing_to_train_raises(case):
    with pytest.raises(InputError): train(recipe(CASES[case]), functools.partial(frozen, True))


def sparse():
    "A model whose embedding has sparse gradients."
    torch.manual_seed(0)
    embedding = nn.Embedding(tiny.VOCAB, tiny.WIDTH, sparse=True)
    return nn.Sequential(embedding, nn.Linear(tiny.WIDTH, tiny.WIDTH), nn.Linear(tiny.WIDTH, tiny.VOCAB))


@pytest.mark.parametrize('case', cases('optimizer'))
def test_sparse_gradients_train_or_are_refused(case):
    try: train(recipe(CASES[case]), sparse, budget='2 steps')
    except InputError as e: assert 'sparse' in str(e)


@each_case
def test_begins_in_the_middle_of_a_run(case, tmp_path):
    "As the slot of a second stage, which is saved and resumed like the first."
    staged = {'stage': [{'share': .5}, {'share': .5, **recipe(CASES[case])}]}
    run, watch = train(staged)
    assert run.step == STEPS and run.stage == 1 and all(math.isfinite(row['loss']) for row in run.history)
    train(staged, stop=HALF + 1, out=tmp_path/'run')
    assert_same(watch.end, train(staged, out=tmp_path/'run', resume=True)[1].end)


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('name', in_run(*tiny.SEE_MODEL))
def test_works_on_other_models(name, kind, tmp_path):
    def go(**options): return train(recipe(name), MODELS[kind], budget='4 steps', **options)
    if kind != 'Sequential': pytest.importorskip('transformers')
    if kind in TECHNIQUES[name].get('not_on', ()):
        with pytest.raises(InputError): go()
        return
    run, watch = go()
    assert all(math.isfinite(row['loss']) for row in run.history) and watch.moved(run.model)
    go(stop=2, out=tmp_path/'run')
    assert_same(watch.end, go(out=tmp_path/'run', resume=True)[1].end)


@pytest.mark.parametrize('kind', MODELS)
def test_a_run_on_another_model_ends_with_its_report(kind, tmp_path):
    if kind != 'Sequential': pytest.importorskip('transformers')
    train(recipe('adamw'), MODELS[kind], budget='2 steps', out=tmp_path/'run', report=True)
    assert (tmp_path/'run'/'report.html').exists()


@pytest.mark.parametrize('name', in_run('model'))
def test_a_converted_model_is_written_for_others_and_stays_as_it_is(name, tmp_path):
    transformers, tokens = pytest.importorskip('transformers'), torch.arange(16)[None]
    model = build(recipe(name))['model'][0](tiny.transformer()).eval()
    before, names = model(tokens), list(model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to_hf(model, tmp_path)).eval()
    assert (theirs(tokens).logits - before).abs().max() < 1e-4 * before.abs().max() and list(model.state_dict()) == names


@pytest.mark.parametrize('match', ['no.such.module', {'fn': 'tiny:nothing'}], ids=['glob', 'predicate'])
@pytest.mark.parametrize('name', [n for n in in_run() if 'match' in inspect.signature(function(n)).parameters])
def test_nothing_matched_raises(name, match):
    with pytest.raises(InputError): train(recipe(spec(name, match=match)))


def wrong_arguments():
    "What no technique should take in silence: not a number for each number, nonsense for each choice, and what the card lists."
    for name in in_run():
        for p in tiny.parameters_of(name):
            value = TECHNIQUES[name]['case'].get(p.name, p.default)
            if isinstance(value, str) and p.name != 'match': yield pytest.param(name, {p.name: 'nonsense'}, id=f'{name}-{p.name}=nonsense')
            if isinstance(value, (int, float)) and not isinstance(value, bool): yield pytest.param(name, {p.name: math.nan}, id=f'{name}-{p.name}=nan')
        for wrong in TECHNIQUES[name].get('wrong', ()):
            yield pytest.param(name, wrong, id=f'{name}-{",".join(f"{k}={v}" for k, v in wrong.items())}')


@pytest.mark.parametrize('name, wrong', wrong_arguments())
def test_wrong_arguments_raise(name, wrong):
    with pytest.raises(InputError) as said: train(recipe(spec(name, **wrong)))
    assert not isinstance(said.value, Diverged), 'it was only noticed while training'
    assert '\n' not in str(said.value).strip(), 'one sentence'


@techniques
def test_unknown_arguments_raise_with_the_nearest(name):
    known = tiny.parameters_of(name)
    given = f'{known[0].name}x' if known else 'nonsense'
    with pytest.raises(InputError, match=f"'?{given}") as said: build(recipe(spec(name, **{given: 1})))
    if known: assert known[0].name in str(said.value).replace(given, '')


@each_case
def test_the_recipe_that_a_run_writes_runs_it_again(case, tmp_path):
    "And its folder opens: what was made of the preset is made again from what is written there."
    run = train_preset(recipe(CASES[case]), out=tmp_path/'run')
    again = train_preset(read_recipe(tmp_path/'run'/'recipe.toml'))
    assert [row['loss'] for row in again.history] == [row['loss'] for row in run.history]
    assert_same(*(checkpoint.flatten(dict(m.state_dict())) for m in (open_run(tmp_path/'run').model, run.model)))


OUTSIDE = sorted(n for n, t in TECHNIQUES.items() if '->' in t['slot'])   # merge, edit, compress, infer: plain functions


def inputs(takes):
    "What a function outside a run is given, by the word before the arrow."
    models = [tiny.transformer().init(i) for i in range(2)]
    return dict(module=models[0], model=models[0], modules=models, models=models).get(takes.strip())


@pytest.mark.parametrize('name', OUTSIDE)
def test_a_function_outside_a_run_gives_the_same_twice(name):
    given = [inputs(TECHNIQUES[name]['slot'].split('->')[0]) for _ in range(2)]
    if given[0] is None: pytest.skip(f"{TECHNIQUES[name]['slot']}: what it takes is made on its page")
    a, b = (function(name)(x, **TECHNIQUES[name]['case']) for x in given)
    state = lambda x: checkpoint.flatten(x.state_dict() if isinstance(x, nn.Module) else dict(result=x))
    assert_same(state(a), state(b))


def test_there_are_techniques():
    assert {'adamw', 'cosine', 'next_token', 'documents'} <= set(in_run())
