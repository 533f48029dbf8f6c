"""Static sparsity: the same weights all the time, dense again in the next stage, the same bits after resuming, and FLOPs counted both ways."""
import pytest, torch

import tiny
from effpt.basics import InputError
from effpt.ledger import count_flops
from effpt.optim.rules import select
from effpt.sparse.spdf import ideal_flops, planned, static_sparsity


def share_gone(weights): return {round((w == 0).float().mean().item(), 2) for w in weights.values()}


STAGES = {'callbacks': tiny.spec('static_sparsity', sparsity=.75, until=.5), 'stage': [{'share': .5}, {'share': .5, 'schedule': 'linear'}]}


class Seen:
    def __init__(self): self.gone = []
    def after_step(self, run, metrics): self.gone.append({n: w == 0 for n, w in select(run.model).items()})


@pytest.mark.parametrize('optimizer', ['adamw', 'galore', 'muon', 'adam8bit', 'schedule_free'])
def test_the_mask_stays_and_is_lifted(optimizer):
    seen = Seen()
    run, _ = tiny.train({**STAGES, **tiny.recipe(optimizer)}, callbacks=[seen])
    for gone in seen.gone[:3]: assert {round(g.float().mean().item(), 2) for g in gone.values()} == {.75} and all(torch.equal(gone[n], seen.gone[0][n]) for n in gone)
    assert run.stage == 1 and max(share_gone(select(run.model))) < .1


@pytest.mark.parametrize('stop', [2, 3, 4])
def test_a_run_goes_on_across_the_lift_to_the_same_bits(stop, tmp_path):
    _, watch = tiny.train(STAGES)
    tiny.train(STAGES, stop=stop, out=tmp_path/'run')
    tiny.assert_same(watch.end, tiny.train(STAGES, out=tmp_path/'run', resume=True)[1].end)


def test_without_a_lift_the_mask_goes_on():
    run, _ = tiny.train({**STAGES, 'callbacks': tiny.spec('static_sparsity', sparsity=.75)})
    assert share_gone(select(run.model)) == {.75}


@pytest.mark.parametrize('kind', tiny.MODELS)
def test_other_models(kind):
    if kind != 'Sequential': pytest.importorskip('transformers')
    run, _ = tiny.train({}, tiny.MODELS[kind], callbacks=[static_sparsity(.5)], budget='2 steps')
    assert share_gone(select(run.model)) == {.5}


def test_nothing_is_switched_off_at_zero():
    _, plain = tiny.train({})
    run, watch = tiny.train({}, callbacks=[one := static_sparsity(0.)])
    assert not one.masks and tiny.difference((plain.end[0], {}), ({k: v for k, v in watch.end[0].items() if k in plain.end[0]}, {})) == ''


def test_ideal_flops_leave_attention_and_head_dense():
    model = tiny.transformer()
    whole, inner = count_flops(model, 16).total, sum(w.numel() for w in select(model).values())
    assert ideal_flops(model, 0., 16) == whole and ideal_flops(model, .5, 16) == whole - 3 * inner
    assert ideal_flops(model, .5, 16, match='blocks.*.mlp.*') > ideal_flops(model, .5, 16)
    assert planned({n: tuple(p.shape) for n, p in model.named_parameters()})['buffers'] == inner


def test_an_arm_keeps_the_lift():
    "What a comparison runs is the recipe as it is written down."
    from effpt.compare import arm
    written = arm(STAGES, dict(size='nano', budget='2M'))
    assert written['callbacks'] == {'name': 'static_sparsity', 'sparsity': .75, 'until': .5} and len(written['stage']) == 2


def test_what_lived_is_counted_over_the_lift():
    run, _ = tiny.train({}, callbacks=[one := static_sparsity(.5, until=.5)])
    whole = sum(p.numel() for p in run.model.parameters())
    assert one.lived()[2] < whole == one.lived()[3] and one.path[-1] == [3, whole] and not one.hooks


@pytest.mark.parametrize('wrong', [1., 1.5, -.1, float('nan'), 'half'])
def test_a_sparsity_that_leaves_nothing_is_refused(wrong):
    with pytest.raises(InputError, match='sparsity is'): static_sparsity(wrong)


@pytest.mark.parametrize('until', [0, -.5, 1.1, float('nan')])
def test_an_end_outside_the_run_is_refused(until):
    with pytest.raises(InputError, match='until is'): static_sparsity(until=until)
