"""The smallest run there is, made from names of techniques: what the tests share that the cards drive."""
import contextlib, functools, importlib, inspect, json, os, tempfile
from pathlib import Path
from unittest import mock

import pytest, torch
from torch import nn

from effpt import catalog, checkpoint
from effpt.model import Transformer
from effpt.recipe import build, pretrain

TECHNIQUES = catalog.techniques()
RUN_SLOTS = 'corpus', 'source', 'transforms', 'model', 'loss', 'optimizer', 'schedule', 'callbacks'
SEE_MODEL = 'transforms', 'model', 'loss', 'optimizer', 'callbacks'   # slots whose techniques meet the model
BASES = dict(source='documents', loss='next_token', optimizer='adamw', schedule='cosine')   # under a wrapper that is named alone
VOCAB, WIDTH, LENGTH, STEPS = 512, 32, 16, 6
OPTIONS = dict(budget=f'{STEPS} steps', batch=4, length=LENGTH, vocab=VOCAB, held_out=.1, eval_tokens='200', evaluate_every=.5, precision='float32', quiet=True)


def in_run(*slots):
    "Names of the techniques on these slots of a run; on any without one."
    return sorted(name for name, t in TECHNIQUES.items() if t['slot'] in (slots or RUN_SLOTS))


def function(name):
    "The function that a technique's name stands for."
    return getattr(importlib.import_module(TECHNIQUES[name]['module']), name)


def spec(name, **arguments):
    "What a recipe says of a technique, with its tiny case."
    return {'name': name, **TECHNIQUES[name]['case'], **arguments}


def cases(*slots):
    "By name, what a recipe says of the techniques on these slots: their tiny case, and what their cards want tried `also`."
    found = {name: spec(name) for name in in_run(*slots)}
    for name in in_run(*slots):
        for other in TECHNIQUES[name].get('also', ()): found[f"{name},{','.join(f'{k}={v}' for k, v in other.items())}"] = spec(name, **other)
    return found


def with_needed(specs):
    "And what their cards say that they need, unless it is there."
    needed = dict.fromkeys(n for one in specs for n in TECHNIQUES[one['name']].get('needs', ()))
    return specs + [spec(n) for n in needed if n not in {one['name'] for one in specs}]


def recipe(*specs):
    "The recipe that puts each technique on its slot: bases before wrappers, and the plainest base where there is none."
    slots, specs = {}, [spec(one) if isinstance(one, str) else one for one in specs]
    for one in with_needed(specs):
        slots.setdefault(TECHNIQUES[one['name']]['slot'], []).append(one)
    wraps = lambda one: TECHNIQUES[one['name']]['kind'] == 'wrapper'
    for slot, entries in slots.items():
        entries.sort(key=wraps)
        if slot in BASES and wraps(entries[0]): entries.insert(0, spec(BASES[slot]))
    return slots


@functools.cache
def text():
    "A file of verses."
    path = Path(tempfile.mkdtemp(dir=os.environ['EFFPT_CACHE']))/'verses.jsonl'
    verses = (Path(__file__).parent/'golden.txt').read_text(encoding='utf-8').splitlines()
    path.write_text(''.join(json.dumps(dict(text=verse)) + '\n' for verse in verses))
    return str(path)


def transformer(): return Transformer(vocab=VOCAB, width=WIDTH, layers=2, heads=2, length=LENGTH).init(0)


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, VOCAB))


def hugging_face(kind, **shape):
    "Make the maker of a Hugging Face model that is built from its config, without weights from anywhere."
    def make():
        import transformers
        torch.manual_seed(0)
        config = getattr(transformers, f'{kind.removesuffix("LMHeadModel").removesuffix("ForCausalLM")}Config')
        return getattr(transformers, kind)(config(vocab_size=VOCAB, **shape))
    return make


MODELS = dict(
    Sequential=sequential,
    Llama=hugging_face('LlamaForCausalLM', hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
    GPT2=hugging_face('GPT2LMHeadModel', n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64),   # its matrices are transposed (Conv1D), its head is its embedding
    Bert=hugging_face('BertLMHeadModel', hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, is_decoder=True))


class Watch:
    "Remembers the model as it was at the start and the state at the end, and stops the run after a step."
    def __init__(self, stop=None): self.stop, self.start, self.end = stop, {}, None

    def before_fit(self, run):
        if not run.step: self.start = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def after_step(self, run, metrics):
        if run.step == self.stop: run.stopped = 'SIGTERM'

    def after_fit(self, run):
        tensors, tree = bits(run)
        self.end = {path: t.detach().clone() for path, t in tensors.items()}, tree

    def moved(self, model):
        "Names of the parameters that are not what they were."
        return [name for name, p in model.named_parameters() if name not in self.start or not torch.equal(p, self.start[name])]


def no_report():
    "A context in which runs end without a curve and a report, which take most of a tiny run's time."
    nothing = lambda *args, **kwargs: None
    return mock.patch.multiple('effpt.recipe', curve=nothing, report=nothing, summary=nothing)


def train(slots, make=transformer, stop=None, report=False, callbacks=(), **options):
    "Train a model for a few steps; the run, and what watched it."
    watch = Watch(stop)
    arguments = OPTIONS | dict(data=text()) | build(slots) | options
    arguments['model'] = [make(), *arguments.get('model', ())]
    for stage in (arguments, *arguments.get('stages', ())):
        if stage is arguments or 'callbacks' in stage: stage['callbacks'] = [*stage.get('callbacks', ()), *callbacks, watch]
    with contextlib.nullcontext() if report else no_report(): return pretrain(**arguments).run, watch


def train_preset(slots, **options):
    "Train a tiny preset as `effpt train --recipe` would; the run."
    shape = dict(width=WIDTH, layers=2, heads=2)
    with no_report(): return pretrain(**(OPTIONS | dict(data=text(), shape=shape) | build(slots) | options)).run


def nothing(module, name):
    "A `match` that selects nothing."
    return False


def same(model):
    "An edit that changes nothing."
    return model


def bits(run):
    "All of a run's state but the seconds in its ledger: tensors by path, and the rest."
    return checkpoint.flatten({name: part for name, part in run.state_dict().items() if name != 'ledger'})


def difference(a, b):
    "The first thing in which two states differ, in words; '' if they are the same to the bit."
    (tensors, tree), (others, other) = a, b
    if tensors.keys() != others.keys(): return f'only one has {sorted(tensors.keys() ^ others.keys())[0]}'
    for path, t in tensors.items():
        if not same_bits(t, others[path]): return path
    return plain_difference(tree, other)


def assert_same(a, b):
    "Fail, naming the first thing in which two states differ."
    __tracebackhide__ = True
    if found := difference(a, b): pytest.fail(f'not the same bits: {found}')


def same_bits(a, b):
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def plain_difference(a, b, path='state'):
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((found for k in a if (found := plain_difference(a[k], b[k], f'{path}/{k}'))), '')
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next((found for i in range(len(a)) if (found := plain_difference(a[i], b[i], f'{path}/{i}'))), '')
    return '' if a == b or (a != a and b != b) else f'{path}: {a!r:.80} and {b!r:.80}'


def parameters_of(name):
    "The keyword arguments of a technique, those that the slot itself fills in left out."
    known = list(inspect.signature(function(name)).parameters.values())
    return [p for p in known if p.default is not p.empty and p.name != 'run']
