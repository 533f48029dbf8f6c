"""Cropping channels of other people's models: the cropped model is the whole one with channels silenced, budgets are met, and what cannot be reached leaves the model as it was."""
import copy, math

import numpy as np, pytest, torch
from torch import nn

import tiny
from effpt.arch.low_rank import low_rank
from effpt.arch.precropping import Channels, best_shares, channel_groups, costs_of, crop, feed_forwards, followed, level, precrop, total_of, widths
from effpt.basics import InputError
from effpt.ledger import count_flops
from effpt.loss import outputs
from effpt.plan import plan


BATCH, IMAGES = dict(tokens=torch.arange(32).view(2, 16)), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SHARE = dict(Sequential=.6, Llama=.85, GPT2=.85, Bert=.85)


class Mobile(nn.Module):
    "Depthwise convolutions, a chain of residual blocks, a concatenation that nobody may crop, and features that are flattened."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.wide, self.deep, self.narrow = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.Conv2d(24, 8, 1)
        self.more = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.left, self.right, self.joined = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(12, 10, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(10 * 16, 14), nn.Tanh(), nn.Linear(14, 5))

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.narrow(torch.relu(self.deep(self.wide(x))))
        x = x + self.more(x)
        x = torch.relu(self.joined(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(nn.functional.max_pool2d(x, 2))


def silenced(model, groups, kept):
    "At its old size: the channels that went give nothing."
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, g in groups.items():
            for path in (*g.makers, *g.norms):
                m = model.get_submodule(path)
                for p in m.parameters(): (p[..., kept[name]:] if type(m).__name__ == 'Conv1D' else p[kept[name]:]).zero_()
    return model


def test_groups_are_those_that_meet():
    found = followed(Mobile())
    assert {frozenset(g.makers): (g.size, dict(g.takers), set(g.norms)) for g in found.values()} == {
        frozenset(['stem', 'narrow', 'more.3']): (8, dict.fromkeys(['wide', 'more.0', 'left', 'right'], 1), {'norm'}), frozenset(['wide']): (24, dict(narrow=1), {'deep'}),
        frozenset(['more.0']): (12, {'more.3': 1}, {'more.1'}), frozenset(['joined']): (10, {'head.1': 16}, set()), frozenset(['head.1']): (14, {'head.3': 1}, set())}


@pytest.mark.parametrize('of, rule, share', [('parameters', 'flow', .5), ('parameters', 'uniform', .3), ('flops', 'flow', .4), ('parameters', 'flow', .08)])
def test_a_cropped_network_is_the_whole_one_silenced(of, rule, share):
    model = Mobile().eval()
    groups = followed(model)
    costs = costs_of(model, groups, of, IMAGES)
    kept = widths(costs, {n: g.size for n, g in groups.items()}, share, rule)
    whole, now = (total_of(*costs[:2], s) for s in (dict.fromkeys(groups, 1.), {n: kept[n] / g.size for n, g in groups.items()}))
    small = precrop(copy.deepcopy(model), share, of, rule, example=IMAGES, rescale=False, quiet=True)
    assert now <= share * whole * 1.0001 and any(kept[n] < g.size for n, g in groups.items())
    assert torch.allclose(small(IMAGES), silenced(model, groups, kept)(IMAGES), atol=1e-5)
    if of == 'parameters': assert sum(p.numel() for p in small.parameters()) == round(now)
    small.train()(IMAGES).sum().backward()
    for _, m in small.named_modules():
        if isinstance(m, nn.Conv2d): assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        if isinstance(m, nn.Linear): assert m.weight.shape == (m.out_features, m.in_features)


@pytest.mark.parametrize('kind', tiny.MODELS)
def test_feed_forward_parts_of_other_models(kind, tmp_path):
    if kind != 'Sequential': pytest.importorskip('transformers')
    model = tiny.MODELS[kind]().eval()
    groups, before = channel_groups(model), sum(p.numel() for p in model.parameters())
    kept = widths(costs_of(model, groups), {n: g.size for n, g in groups.items()}, SHARE[kind])
    small = precrop(copy.deepcopy(model), SHARE[kind], rescale=False, quiet=True)
    assert len(groups) == (1 if kind == 'Sequential' else 2) and all(kept[n] < g.size for n, g in groups.items())
    assert SHARE[kind] - .02 < sum(p.numel() for p in small.parameters()) / before <= SHARE[kind]
    assert torch.allclose(outputs(small, BATCH).logits, outputs(silenced(model, groups, kept), BATCH).logits, atol=1e-5)
    if kind == 'Sequential': return
    small.save_pretrained(tmp_path/'model')
    again = type(small).from_pretrained(tmp_path/'model').eval()
    assert torch.equal(outputs(again, BATCH).logits, outputs(small, BATCH).logits)


def test_a_saved_transformer_comes_back(tmp_path):
    from transformers import AutoModelForCausalLM
    from effpt.model import from_hf, to_hf
    model = precrop(tiny.transformer(), .8, quiet=True)
    assert torch.equal(from_hf(to_hf(model, tmp_path/'hf'))(BATCH), model(BATCH))
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path/'hf')(BATCH['tokens']).logits, model(BATCH), atol=1e-5)


@pytest.mark.parametrize('seed', range(6))
def test_shares_have_the_most_flow(seed):
    "No small step that keeps the cost increases the flow, and nothing is left of what may be spent."
    draw = np.random.default_rng(seed)
    names = 'abcd'[:2 + seed % 3]
    terms = [(float(draw.integers(10, 5000)), [n for n in pair if n]) for pair in zip(['', *names], [*names, ''])]
    ways = {n: sum(n in t[1] for t in terms) for n in names}
    whole, least = sum(c for c, _ in terms), dict.fromkeys(names, 1e-3)
    flow = lambda s: sum(ways[n] * math.log(s[n]) for n in names)
    for keep in .6, .1, .01:
        found = best_shares(0., terms, ways, keep * whole, least)
        assert total_of(0., terms, found) == pytest.approx(keep * whole, rel=1e-3)
        for _ in range(200):
            other = {n: min(1., s * math.exp(.05 * draw.standard_normal())) for n, s in found.items()}
            if total_of(0., terms, other) <= keep * whole: assert flow(other) <= flow(found) + 2e-3


@pytest.mark.parametrize('keep', [1., .5, .1, .01])
def test_levels(keep):
    counts = [3, 100, 50, 1000, 100]
    found = level(counts, keep)
    stay = [p * n for p, n in zip(found, counts)]
    assert sum(stay) == pytest.approx(keep * sum(counts)) and all(0 < p <= 1 for p in found)
    level_at = max(stay)
    assert all(s == pytest.approx(level_at) or p == 1 for s, p in zip(stay, found))


def test_one_factor_is_one_factor():
    kept = widths(costs_of(m := Mobile(), followed(m)), {n: g.size for n, g in followed(m).items()}, .4, 'uniform')
    shares = [kept[n] / g.size for n, g in followed(m).items()]
    assert max(shares) - min(shares) < .13   # what rounding does to eight channels


def test_weights_are_as_if_drawn_for_fewer_inputs():
    model, rough = (precrop(tiny.transformer(), .75, rescale=r, quiet=True).blocks[0].mlp.down.weight for r in (True, False))
    assert torch.allclose(model, rough * (96 / model.shape[1]) ** .5)


def test_match_says_which():
    model = precrop(tiny.transformer(), .9, match='blocks.1.*', quiet=True)
    assert model.blocks[0].mlp.up.out_features == 96 and model.blocks[1].mlp.up.out_features < 96 and model.shape['hidden'] == 96
    assert next(model.parameters()).requires_grad and outputs(model, BATCH).logits.isfinite().all()


def test_flops_and_plan_agree():
    model = precrop(tiny.transformer(), .8, quiet=True)
    planned = plan(dict(tiny.transformer().shape), convert=[dict(name='precrop', keep=.8)], length=tiny.LENGTH)
    assert planned.flops_per_token == pytest.approx(count_flops(model, tiny.LENGTH).total, rel=.01)
    assert planned.numbers == sum(p.numel() for p in model.parameters())


class Odd(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
    def forward(self, x): return self.a(x) if x.sum() > 0 else x


@pytest.mark.parametrize('make, arguments, said', [
    (tiny.transformer, dict(keep=.5), "keep is 0.5, but 'blocks.0.mlp.gate'.* at the least"), (Mobile, dict(keep=.001), "keep is 0.001, but 'stem'"), (tiny.transformer, dict(keep=0), 'keep is 0'),
    (tiny.transformer, dict(keep=math.nan), 'keep is nan'), (tiny.transformer, dict(match='blocks.*.attention.*'), 'selects no channels'), (tiny.transformer, dict(rule='flows'), "did you mean 'flow'"),
    (Mobile, dict(of='flops'), 'give an example'), (tiny.transformer, dict(multiple=0), 'multiple is 0'), (Odd, dict(), 'cannot be followed'), (lambda: nn.Sequential(nn.Linear(4, 4)), dict(), 'has no channels'),
    (lambda: low_rank(tiny.transformer(), 4, quiet=True), dict(), 'is converted already')])
def test_bad_input_is_named_and_changes_nothing(make, arguments, said):
    model = make()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(InputError, match=said): precrop(model, **dict(dict(keep=.9, quiet=True), **arguments))
    assert before.keys() == model.state_dict().keys() and all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_after_training_has_begun_it_is_too_late():
    model = tiny.transformer()
    outputs(model, BATCH).logits.sum().backward()
    with pytest.raises(InputError, match='has a gradient'): precrop(model, .8, quiet=True)
    assert model.blocks[0].mlp.up.out_features == 96


def test_what_is_shared_is_left():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match="'0' is tied to '2'"): precrop(model, .5, quiet=True)
    assert model[0].out_features == 6


def test_groups_by_shape():
    gated = {f'layers.{i}.{n}': s for i in range(2) for n, s in dict(q=(32, 32), k=(8, 32), v=(8, 32), gate=(48, 32), up=(48, 32), down=(32, 48)).items()}
    assert feed_forwards(gated) == {f'layers.{i}.gate': Channels(48, (f'layers.{i}.gate', f'layers.{i}.up'), ((f'layers.{i}.down', 1),)) for i in range(2)}
    assert not feed_forwards({'layers.0.a': (32, 32), 'layers.0.b': (32, 32)}) and not feed_forwards({'head': (100, 32), 'tail': (32, 100)})


def test_crops_can_be_repeated():
    model = precrop(precrop(tiny.transformer(), .9, quiet=True), .9, quiet=True)
    assert model.shape['hidden'] == model.blocks[0].mlp.up.out_features < 96 and outputs(model, BATCH).logits.isfinite().all()
    groups = channel_groups(model)
    assert crop(model, groups, {n: g.size for n, g in groups.items()}) is model
