"""What the pages on model, loss and schedule cannot hold: compilation, faults, process groups, other families, odd shapes."""
import copy, json, math, pickle

import pytest, torch
from torch import nn

from effpt.basics import InputError, generator
from effpt.loss import bits_per_byte, next_token, outputs
from effpt.model import Cache, Transformer, attention_mask, from_hf, full_mask, generate, preset, rope, to_hf

TINY = dict(vocab=50, width=32, layers=2, heads=4, kv_heads=2, hidden=64, length=16)

@pytest.fixture
def model(): return Transformer(**TINY)

@pytest.fixture
def tokens(): return torch.randint(50, (2, 16), generator=generator(0, 'tokens'))

def naive(model, tokens, seen):
    "The whole model as formulas, in float64; `seen` is (B, T, T)."
    P, s = {n: p.detach().double() for n, p in model.state_dict().items()}, model.shape
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + s['eps']).sqrt() * w
    D = s['width'] // s['heads']
    angle = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None] * s['theta'] ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    def turn(x):
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)
    x = P['embed.weight'][tokens]
    for i in range(s['layers']):
        W = lambda name: P[f'blocks.{i}.{name}.weight']
        h, heads = norm(x, W('attention_norm')), []
        for j in range(s['heads']):
            g = j * s['kv_heads'] // s['heads']
            q, k, v = (h @ W('attention.' + n)[m * D:(m + 1) * D].T for n, m in (('q', j), ('k', g), ('v', g)))
            heads.append((turn(q) @ turn(k).mT / math.sqrt(D)).masked_fill(~seen, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ W('attention.o').T
        h = norm(x, W('mlp_norm'))
        x = x + (nn.functional.silu(h @ W('mlp.gate').T) * (h @ W('mlp.up').T)) @ W('mlp.down').T
    return norm(x, P['norm.weight']) @ P['head.weight'].T

@pytest.mark.parametrize('change', [{}, dict(kv_heads=4), dict(kv_heads=1), dict(tied=True), dict(heads=2, kv_heads=1), dict(width=24, heads=3, kv_heads=3, hidden=7), dict(theta=50., eps=1e-2)])
@pytest.mark.parametrize('ask', ['causal', 'bidirectional', 'prefix', 'documents'])
def test_against_formulas(change, ask, tokens):
    model = Transformer(**TINY | change)
    documents = torch.tensor([[0] * 5 + [1] * 11, [3] * 10 + [2] * 6])
    batch = dict(causal={}, bidirectional=dict(mask='bidirectional'), prefix=dict(mask=torch.tensor([3, 16])), documents=dict(documents=documents))[ask]
    mask = attention_mask(batch, 16)[0]
    seen = full_mask(ask, 16)[0] if mask is None else mask[:, 0]
    assert (model(dict(tokens=tokens, **batch)) - naive(model, tokens, seen)).abs().max() < 2e-4
    # the cosines are float32, all else is float64
    assert (model.double()(dict(tokens=tokens, **batch)) - naive(model, tokens, seen)).abs().max() < 1e-5

def test_gradients_in_float64(tokens):
    model = Transformer(**TINY | dict(layers=1, width=8, heads=2, kv_heads=1, hidden=6)).double()
    for name, p in model.named_parameters(): p.data.normal_(0, .5, generator=generator(1, name)) if p.ndim > 1 else None
    names, values = zip(*model.named_parameters())
    def loss(*values): return next_token(Bound(model, dict(zip(names, values))), dict(tokens=tokens[:, :6]))[0]
    assert torch.autograd.gradcheck(loss, [v.detach().clone().requires_grad_() for v in values], eps=1e-6, atol=1e-5)

class Bound(nn.Module):
    takes_batch = True
    def __init__(self, model, values): super().__init__(); self.model, self.values = model, values
    def forward(self, batch): return torch.func.functional_call(self.model, self.values, (batch,))

def test_one_graph_without_breaks(model, tokens):
    want, (cos, sin) = model(tokens), model.angles_for(dict(tokens=tokens))
    x = torch.randn(2, 16, 32, generator=generator(0, 'x'))
    plain = model.blocks[0](x, cos, sin)
    fast = torch.compile(model.blocks[0], backend='aot_eager', fullgraph=True, dynamic=False)
    assert (fast(x, cos, sin) - plain).abs().max() < 1e-5
    graphs = []
    def count(graph, inputs): graphs.append(graph); return graph.forward
    torch._dynamo.reset()
    for block in model.blocks: block.compile(backend=count, fullgraph=True, dynamic=False)
    assert (model(tokens) - want).abs().max() < 1e-5
    model(tokens)
    assert len(graphs) == 1, 'blocks share one graph'
    written = generate(model, tokens[0, :3], 5, temperature=0)
    assert len(graphs) == 1, 'writing runs as written'
    assert written.tolist() == generate(Transformer(**TINY), tokens[0, :3], 5, temperature=0).tolist()
    torch._dynamo.reset()

def test_from_meta_to_memory(model, tokens):
    with torch.device('meta'): empty = Transformer(**TINY)
    full = empty.to_empty(device='cpu').init(0)
    assert torch.equal(full(tokens), model(tokens))

def test_tables_survive_types_and_copies(model, tokens):
    want = model(tokens)
    assert torch.equal(model.angles, copy.deepcopy(model).bfloat16().float().angles)
    assert torch.equal(copy.deepcopy(model)(tokens), want)
    assert set(model.state_dict()) == set(n for n, _ in model.named_parameters())
    model.angles = model.angles.to('meta')
    with torch.inference_mode(): model(tokens)
    model(tokens).sum().backward()
    assert model.embed.weight.grad.isfinite().all()

@pytest.mark.parametrize('mask', [None, 'bidirectional', 'bias'])
def test_autocast(model, tokens, mask):
    batch = dict(tokens=tokens)
    if mask: batch['mask'] = mask if mask != 'bias' else torch.randn(16, 16, generator=generator(0, 'bias'))
    with torch.autocast('cpu', torch.bfloat16):
        logits, hidden = model(batch, hidden=True)
        cache = Cache(model, 2)
    assert logits.dtype == torch.bfloat16 == cache.tensors.dtype and hidden.dtype == torch.float32
    assert (logits - model(batch)).abs().max() < 0.05
    next_token(model, dict(tokens=tokens))[0].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())

def test_prefix_then_cache(model, tokens):
    prefix, cache = torch.tensor([6, 6]), Cache(model, 2)
    with torch.no_grad():
        first = model(dict(tokens=tokens[:, :6], mask=prefix), cache=cache)
        rest = model(tokens[:, 6:], cache=cache)
        whole = model(dict(tokens=tokens, mask=prefix))
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 1e-5

def test_generate_leaves_the_model_as_it_was(model):
    model.train()
    generate(model, [[1, 2], [3, 4]], 3)
    assert model.training and model.embed.weight.grad is None
    model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): generate(model, [1], 3)
    assert model.training

def test_generate_ends_each_row(model):
    for p in model.parameters(): p.data *= 4
    prompts = torch.arange(12).view(6, 2)
    long = generate(model, prompts, 12, seed=1)
    eos = int(long[0, 4])
    short = generate(model, prompts, 12, seed=1, eos=eos)
    for a, b in zip(long[:, 2:].tolist(), short[:, 2:].tolist()):
        n = b.index(eos) + 1 if eos in b else len(b)
        assert set(b[n:]) <= {eos}
        if a is not long: assert b[:1] == a[:1]
    assert generate(model, [1, 2], 0).tolist() == [1, 2]
    assert generate(model, list(range(40)), 3, temperature=0).shape == (43,)

def test_data_parallel_wrapper(model, tokens, tmp_path):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert torch.equal(next_token(wrapped, dict(tokens=tokens))[0], next_token(model, dict(tokens=tokens))[0])
    finally: dist.destroy_process_group()

def test_auxiliary_terms_reach_the_gradient(model, tokens):
    gate = model.blocks[0].mlp
    gate.register_forward_hook(lambda m, i, y: setattr(m, 'aux_loss', 3 * m.up.weight.sum()))
    with_aux, weight = next_token(model, dict(tokens=tokens))
    assert gate.aux_loss is None
    (with_aux / weight).backward()
    grad = gate.up.weight.grad.clone()
    model.zero_grad(); gate._forward_hooks.clear()
    without, _ = next_token(model, dict(tokens=tokens))
    (without / weight).backward()
    assert (grad - gate.up.weight.grad - 3).abs().max() < 1e-5

@pytest.mark.parametrize('family', ['gpt2', 'gpt_neox', 'qwen3', 'mistral'])
def test_other_families_read_the_mask(family, tokens):
    transformers = pytest.importorskip('transformers')
    small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64, head_dim=8)
    config = transformers.AutoConfig.for_model(family, **(dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4) if family == 'gpt2' else small))
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    read = lambda **ask: outputs(hf, dict(tokens=tokens, **ask)).logits.detach()
    assert (read() - read(mask='causal')).abs().max() < 1e-5
    assert (read()[:, 5:] - read(mask='bidirectional')[:, 5:]).abs().max() > 1e-4
    documents = torch.tensor([[0] * 6 + [1] * 10] * 2)
    places = torch.cat([torch.arange(6), torch.arange(10)])
    alone = outputs(hf, dict(tokens=tokens[:, 6:])).logits.detach()
    assert (read(documents=documents, positions=places)[:, 6:] - alone).abs().max() < 1e-4

def test_folders_that_are_no_model(model, tmp_path):
    to_hf(model, tmp_path)
    weights, config = (tmp_path/'model.safetensors').read_bytes(), json.loads((tmp_path/'config.json').read_text())
    def refused(words):
        with pytest.raises(InputError, match=words): from_hf(tmp_path)
    (tmp_path/'config.json').write_text('{"model_type": ')
    refused('config.json is not valid JSON')
    (tmp_path/'config.json').write_text(json.dumps({k: v for k, v in config.items() if k != 'hidden_size'}))
    refused("lacks 'hidden_size'")
    (tmp_path/'config.json').write_text(json.dumps(config | dict(num_hidden_layers=3)))
    refused('the model lacks')
    (tmp_path/'config.json').write_text(json.dumps(config | dict(num_hidden_layers=1)))
    refused("has 'model.layers.1")
    (tmp_path/'config.json').write_text(json.dumps(config | dict(intermediate_size=60)))
    refused('its configuration says')
    (tmp_path/'config.json').write_text(json.dumps(config))
    (tmp_path/'model.safetensors').write_bytes(weights[:100])
    refused('cannot be read')
    (tmp_path/'model.safetensors').write_bytes(pickle.dumps(dict(a=1)))
    refused('cannot be read')
    (tmp_path/'model.safetensors').unlink()
    (tmp_path/'pytorch_model.bin').write_bytes(pickle.dumps(dict(a=1)))
    refused('pickled weights are never read')
    to_hf(model, tmp_path, shard='4kB')
    next(tmp_path.glob('model-00002*')).unlink()
    refused('cannot be read')

def test_half_precision_round_trip(model, tmp_path):
    half = copy.deepcopy(model).bfloat16()
    back = from_hf(to_hf(half, tmp_path))
    assert json.loads((tmp_path/'config.json').read_text())['torch_dtype'] == 'bfloat16'
    assert all(b.dtype == torch.float32 and torch.equal(a.float(), b) for a, b in zip(half.parameters(), back.parameters()))

def test_hugging_face_generates_the_same(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = Transformer(**TINY)
    for p in model.parameters(): p.data *= 4
    hf = transformers.AutoModelForCausalLM.from_pretrained(to_hf(model, tmp_path))
    theirs = hf.generate(torch.tensor([[3, 7, 9]]), attention_mask=torch.ones(1, 3).long(), max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert generate(model, [3, 7, 9], 10, temperature=0).tolist() == theirs[0].tolist()

def test_evaluation_of_compiled_blocks(model, tmp_path):
    from effpt.tokens import write_tokens
    store = write_tokens(tmp_path/'store', [[(list(range(1, 40)), 'toy', 100)]], vocab=50, eos=0)
    evaluate = bits_per_byte(store, length=16, batch=2)
    want, seen = evaluate(model), []
    for block in model.blocks: block.compile(backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    assert evaluate(model) == want and not seen
    model.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError): evaluate(model)
    assert model.training

def test_presets_start_alike():
    assert torch.equal(preset('nano', seed=3).blocks[2].mlp.up.weight, preset('nano', seed=3, layers=6, vocab=99).blocks[2].mlp.up.weight)
    assert rope(torch.arange(4), 8).dtype == rope(torch.tensor([.5]).double(), 8).dtype == torch.float32
