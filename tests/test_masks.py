"""Masks on other people's models and under other optimizers: what is gone is exactly zero, survives edits, stages and resuming, and leaves nothing behind."""
import pytest, torch

import tiny
from effpt.basics import InputError, generator
from effpt.optim.rules import select
from effpt.sparse.masks import Masked, best, check_sparsity, masks, pack, scores, unpack


def draw(*shape, key): return torch.empty(shape).normal_(generator=generator(0, 'test', key))


def share_gone(weights): return {round((w == 0).float().mean().item(), 2) for w in weights.values()}


class Half(Masked):
    "Half of every chosen matrix, at once."
    def wanted(self, run): return None if self.masks else .5
    def choose(self, run, weights, sparsity): return masks(scores(weights), sparsity)


@pytest.mark.parametrize('shape', [(1,), (7,), (8, 3), (33, 5)])
@pytest.mark.parametrize('sparsity', [0., .3, .75, .999])
def test_exactly_so_many_go_and_bits_keep_them(shape, sparsity):
    worth = draw(*shape, key='worth').round()   # with ties
    mask = best(worth, sparsity)
    assert int((~mask).sum()) == round(sparsity * worth.numel())
    assert not mask.any() or mask.all() or worth[mask].min() >= worth[~mask].max()
    assert torch.equal(unpack(pack(mask), shape), mask)


def test_a_random_choice_is_that_of_its_seed_and_name():
    w = dict(a=torch.zeros(40, 3), b=torch.zeros(40, 3))
    one, same, other = (masks(scores(w, 'random', seed), .5) for seed in (1, 1, 2))
    assert torch.equal(one['a'], same['a']) and not torch.equal(one['a'], other['a']) and not torch.equal(one['a'], one['b'])


def test_half_precision_is_ranked_too():
    assert int(best(scores(dict(w=draw(64, 64, key='w').bfloat16()))['w'], .9).sum()) == 4096 - round(.9 * 4096)


OPTIMIZERS = [name for name in tiny.in_run('optimizer') if tiny.TECHNIQUES[name]['kind'] == 'base']


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_what_is_gone_is_zero_under_every_optimizer(optimizer):
    "In training, in evaluation, and at the end."
    seen = []
    class Look:
        def after_step(self, run, metrics):
            with run.evaluating(): seen.append(share_gone(half.weights))
    half = Half()
    run, _ = tiny.train(tiny.recipe(optimizer), callbacks=[half, Look()], budget='4 steps')
    assert seen == [{.5}] * 4 and share_gone(select(run.model)) == {.5}


@pytest.mark.parametrize('kind', tiny.MODELS)
def test_gradients_are_masked_only_in_steps(kind):
    if kind != 'Sequential': pytest.importorskip('transformers')
    half = Half()
    run, _ = tiny.train({}, tiny.MODELS[kind], callbacks=[half], budget='2 steps')
    assert share_gone(half.weights) == {.5} and not half.hooks
    (w, *_), (mask, *_) = half.weights.values(), half.masks.values()
    (w.sum()).backward()
    assert (w.grad[~mask] == 1).all()   # as it would be without a mask


class Edit:
    def after_step(self, run, metrics):
        if run.step == 3: run.edit('test_masks:anew')


def anew(model):
    "Other parameters of the same names, without zeros."
    for m in model.modules():
        if isinstance(m, torch.nn.Linear): m.weight = torch.nn.Parameter(m.weight.detach() + 1)
    return model


def test_a_weight_that_is_replaced_keeps_its_mask():
    half = Half()
    run, _ = tiny.train({}, callbacks=[half, Edit()])
    assert share_gone(select(run.model)) == {.5} and all(half.weights[n] is w for n, w in select(run.model).items())


def test_a_stage_that_is_over_leaves_weights_free():
    staged = {'stage': [{'share': .5, 'callbacks': tiny.spec('gradual_pruning', final=.5, end=.1)}, {'share': .5, 'callbacks': []}]}
    run, _ = tiny.train(staged)
    assert run.stage == 1 and max(share_gone(select(run.model))) < .1


def test_the_mean_counts_steps():
    half = Half('blocks.0.mlp.*')
    run, _ = tiny.train({}, callbacks=[half], budget='4 steps')
    whole = sum(p.numel() for p in run.model.parameters())
    assert half.average() == whole - sum(m.numel() for m in half.masks.values()) / 2 and half.path == [[0, half.average()]]


@pytest.mark.parametrize('value', [1, 1., -.1, float('nan'), 'much', True])
def test_a_share_that_is_none_is_refused(value):
    with pytest.raises(InputError, match='density is'): check_sparsity('density', value)
