"""Groups on other models and shapes; moments of other optimizers; pruning that is resumed, refused, and undone by nothing."""
import copy, math

import pytest, torch

import tiny
from effpt import checkpoint
from effpt.arch.low_rank import low_rank
from effpt.basics import InputError
from effpt.ledger import count_flops
from effpt.model import Transformer, from_hf, generate, to_hf
from effpt.sparse.efficientllm import Uneven, axes, choose, counts, cut_moments, efficientllm, least, planned, prune_groups, reachable, saliency
from effpt.plan import transformer_shapes

TOKENS = torch.arange(16)[None]


def llama(**options):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options)).eval()


def ours(**options): return Transformer(64, **dict(width=32, layers=3, heads=4, kv_heads=2, hidden=48, length=16) | options).init(0)


def logits(model): out = model(TOKENS); return getattr(out, 'logits', out)


@torch.no_grad()
def zeroed(model, remove):
    model, found = copy.deepcopy(model), {a.key: a for a in axes(model)}
    for key, which in remove.items():
        for name, dim, lo, hi in (s for i in which for s in found[key].group(i)): model.get_parameter(name).narrow(dim, lo, hi - lo).zero_()
    return model


REMOVE = {'channel': {'channel 0': [0, 47], 'channel 2': [5]}, 'head': {'head 1': [1]}, 'query': {'query 0': [1, 2], 'query 2': [0, 3]}, 'width': {'width': [0, 7, 8, 31]},
          'layer': {'layer 0': [0]}, 'all': {'channel 1': [3], 'head 1': [0], 'query 1': [2], 'width': [1], 'layer 2': [0]}}


@pytest.mark.parametrize('remove', REMOVE.values(), ids=REMOVE)
@pytest.mark.parametrize('make', [ours, lambda: ours(tied=True), llama, lambda: llama(tie_word_embeddings=True), lambda: llama(head_dim=12)], ids=['ours', 'tied', 'llama', 'llama tied', 'llama with wide heads'])
def test_outputs_are_those_of_the_model_with_zeros(make, remove):
    model = make()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))   # norms that are not one
    want = logits(zeroed(model, remove))
    assert prune_groups(model, remove, quiet=True) is model
    assert torch.allclose(logits(model), want, atol=1e-5, rtol=1e-5)


def test_twice_is_as_well_as_once():
    one, two = ours(), ours()
    prune_groups(one, {'channel 0': [1, 5, 6], 'width': [0, 4], 'layer 1': [0]}, quiet=True)
    prune_groups(two, {'channel 0': [5], 'layer 1': [0]}, quiet=True)
    prune_groups(two, {'channel 0': [1, 5], 'width': [0, 4]}, quiet=True)
    assert torch.allclose(logits(one), logits(two), atol=1e-5) and {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in two.named_parameters()}


def test_a_pruned_llama_is_saved_and_read_by_both(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = llama()
    last = reachable(model, heads=2, hidden=40, width=16, layers=2)
    first = dict(layers=3, heads=4, kv_heads=2, hidden=48, width=32)
    model(TOKENS, labels=TOKENS).loss.backward()
    prune_groups(model, choose(model, saliency(model, samples=16), first, last, 1.), quiet=True)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model), atol=1e-5)
    assert torch.allclose(logits(from_hf(tmp_path)), logits(model), atol=1e-4)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 19)


def test_what_reached_its_target_is_an_ordinary_transformer(tmp_path):
    run, _ = tiny.train(tiny.recipe(tiny.spec('efficientllm', hidden=40, heads=1, layers=1)), out=tmp_path/'run')
    assert type(run.model) is Transformer and {k: run.model.shape[k] for k in ('layers', 'heads', 'kv_heads', 'hidden', 'width')} == dict(layers=1, heads=1, kv_heads=1, hidden=40, width=16)
    assert len(generate(run.model, [1, 2], tokens=4)) == 6
    to_hf(run.model, tmp_path/'hf')
    assert torch.equal(logits(from_hf(tmp_path/'hf')), logits(run.model))


def test_on_the_way_flops_are_exact_and_nothing_is_generated():
    model = prune_groups(ours(kv_heads=4), {'head 0': [0], 'channel 1': [1, 2], 'width': [3]}, quiet=True)
    assert isinstance(model, Uneven) and counts(model) == dict(heads=[3, 4, 4], kv_heads=[3, 4, 4], hidden=[48, 46, 48], width=31)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != 'embed.weight')
    assert count_flops(model, 16).total == 6 * weights + 3 * 4 * 8 * 11 * 16 / 2
    with pytest.raises(InputError, match='cannot generate'): generate(model, [1, 2], tokens=2)
    with pytest.raises(InputError): to_hf(model, 'nowhere')


@pytest.mark.parametrize('optimizer', ['adamw', 'adam8bit', 'galore', 'apollo', 'muon', 'schedule_free', 'lamb', 'spam'])
def test_every_optimizer_goes_on_and_resumes_to_the_same_bits(optimizer, tmp_path):
    slots = tiny.recipe(optimizer, tiny.spec('efficientllm', hidden=40, heads=1))
    run, watch = tiny.train(slots)
    assert all(math.isfinite(row['loss']) for row in run.history) and run.model.shape['hidden'] == 40
    tiny.train(slots, stop=3, out=tmp_path/'run')
    _, end = tiny.train(slots, out=tmp_path/'run', resume=True)
    tiny.assert_same(watch.end, end.end)
    assert torch.equal(logits(replayed(tmp_path/'run')), logits(run.model))


def replayed(folder):
    "The model of the last checkpoint, its edits replayed on a new one."
    from effpt.train import resolve_name
    parts, model = checkpoint.load(checkpoint.latest(folder/'checkpoints')), tiny.transformer()
    for _, path, arguments in parts['run']['edits']: model = resolve_name(path)(model, **arguments)
    model.load_state_dict(parts['model'])
    return model


def test_moments_of_factors_and_of_few_numbers():
    kept = {0: torch.tensor([0, 2]), 1: torch.tensor([1])}
    state = dict(step=3, m=torch.arange(12.).view(3, 4), v_rows=torch.arange(3.).view(3, 1), v_columns=torch.arange(4.).view(1, 4), norm=torch.tensor(2.))
    found = cut_moments(state, (3, 4), kept, {})
    assert found['m'].tolist() == [[1.], [9.]] and found['v_rows'].tolist() == [[0.], [2.]] and found['v_columns'].tolist() == [[1.]] and found['step'] == 3
    assert cut_moments(dict(state, m=torch.zeros(2, 4)), (3, 4), kept, {}) == {} and cut_moments(state, (3, 4), {}, {}) is state


def test_a_block_keeps_what_the_target_says():
    worth = {0: torch.tensor([1., 2., 3.]), 1: torch.tensor([10., 20., 30.])}
    assert least(worth, {0: 1, 1: 1}, 3) == {0: [0, 1], 1: [0]}
    assert least(worth, {0: 3, 1: 2}, 5) == {1: [0]}


def test_data_decide_and_the_seed_where_chance_does():
    def found(order, seed): return tiny.train(tiny.recipe(tiny.spec('efficientllm', order=order)), seed=seed)[0].edits
    assert found('random', 0) == found('random', 0) != found('random', 1)
    assert found('first', 0) != found('random', 0)


def test_plan_is_that_of_the_pruned_shapes():
    shapes = transformer_shapes(ours(kv_heads=4).shape)
    small = count_flops(ours(width=24, heads=3, kv_heads=3, hidden=40, layers=2), 16).linear - count_flops(ours(kv_heads=4), 16).linear
    assert planned(shapes, layers=2, heads=3, hidden=40, size=8, start=0., end=1e-9)['flops_per_token'] == pytest.approx(3 * small)
    assert planned(shapes, start=0., end=.5)['flops_per_token'] == 0


@pytest.mark.parametrize('remove, said', [
    ({'channel 9': [0]}, "no groups 'channel 9'"), ({'channel 0': [48]}, 'has the groups 0 to 47'), ({'channel 0': [1, 1]}, 'each at most once'), ({'head 0': [0, 1]}, 'would lose all'),
    ({f'layer {i}': [0] for i in range(3)}, 'all 3 layers'), ({'query 0': [0]}, 'take as many from each'), ({'query 0': [0, 1]}, 'take as many from each'), ({'width': range(32)}, 'would lose all')])
def test_groups_that_cannot_go_are_named_and_nothing_changes(remove, said):
    model, before = ours(), copy.deepcopy(ours().state_dict())
    with pytest.raises(InputError, match=said): prune_groups(model, remove)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()) and type(model) is Transformer


@pytest.mark.parametrize('target, said', [
    (dict(layers=4), 'whole numbers from 1 to 3'), (dict(hidden=0), 'from 1 to 48'), (dict(heads=5), 'from 1 to 4, what the model has in each block'), (dict(width=20), 'reaches 8, 16, 24, 32'),
    (dict(width=16, heads=3), 'it is 24; name one of the two'), (dict(heads=3, kv_heads=2), 'heads may be 1, 2, 4'), (dict(heads=4, kv_heads=1), 'kv_heads may be 2'), (dict(hidden=48), 'has the target shape already')])
def test_a_target_out_of_reach_names_the_range(target, said):
    with pytest.raises(InputError, match=said): reachable(ours(), **target)


def test_what_cannot_be_pruned_says_why():
    def frozen():
        model = tiny.transformer()
        model.embed.weight.requires_grad_(False)
        return model
    with pytest.raises(InputError, match="'embed.weight' is frozen"): tiny.train(tiny.recipe('efficientllm'), frozen)
    with pytest.raises(InputError, match='turn it back with to_dense'): axes(low_rank(ours(), 2, quiet=True))
    with pytest.raises(InputError, match='has a bias'): axes(llama(attention_bias=True))
    with pytest.raises(InputError, match='per_layer=False'): tiny.train(tiny.recipe(tiny.spec('adam8bit', per_layer=True), 'efficientllm'))
    with pytest.raises(InputError, match='name at least one'): efficientllm()


def test_an_optimizer_that_cannot_be_made_leaves_the_run_as_it_was():
    class Prune:
        def after_step(self, run, metrics):
            if run.step != 2: return
            from effpt.sparse.efficientllm import prune_run
            before = run.model, {n: p.detach().clone() for n, p in run.model.named_parameters()}
            with pytest.raises(InputError, match='rank 20 is above'): prune_run(run, {'width': list(range(14))})
            assert run.model is before[0] and all(torch.equal(p, before[1][n]) for n, p in run.model.named_parameters()) and not run.edits
    run, _ = tiny.train(tiny.recipe(tiny.spec('galore', rank=20)), callbacks=[Prune()])
    assert run.step == tiny.STEPS
