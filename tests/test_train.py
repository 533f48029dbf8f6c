"""What the training page cannot hold: compiled blocks, Hugging Face models in the trainer, loggers."""
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from effpt.model import Transformer
from effpt.loss import bits_per_byte
from effpt.tokens import TokenStream, encode, train_tokenizer
from effpt.train import Trainer, blocks, has_compiler

VERSES = (Path(__file__).parent/'golden.txt').read_text().splitlines()


@pytest.fixture(scope='module')
def store():
    ds = Dataset.from_dict(dict(text=VERSES, domain=['verse'] * len(VERSES), source=[f'verse:{i}' for i in range(len(VERSES))]))
    return encode(ds, train_tokenizer(ds, vocab=512, quiet=True), quiet=True)


def model(): return Transformer(vocab=512, width=32, layers=3, heads=2, length=32).init(0)


def trainer(store, out=None, **kw):
    kw = dict(model=model(), batches=TokenStream(store, batch=8, length=32), budget='10 steps', precision='float32', quiet=True, out=out,
              evaluate=bits_per_byte(store, tokens='2k', length=32)) | kw
    return Trainer(**kw)


@pytest.mark.skipif(not has_compiler(torch.device('cpu')), reason='torch.compile needs a C++ compiler')
def test_compiled_blocks_train_and_resume_alike(store, tmp_path):
    eager, whole = trainer(store).fit(), trainer(store, compile=True).fit()
    assert all(b._compiled_call_impl is not None for b in blocks(whole.model))
    assert [r['loss'] for r in whole.history] == pytest.approx([r['loss'] for r in eager.history], abs=1e-3)
    assert whole.results['bpb'] == pytest.approx(eager.results['bpb'], abs=1e-3)

    class Stop:
        def after_step(self, run, metrics):
            if run.step == 4: run.stopped = 'SIGTERM'
    trainer(store, tmp_path/'run', compile=True, callbacks=[Stop()]).fit()
    again = trainer(store, tmp_path/'run').fit(resume=True)   # 'auto' now, but what was decided is read
    assert again.resolved['compile'] is True
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()))


@pytest.mark.parametrize('family', ['Llama', 'GPT2', 'GPTNeoX'])
def test_hugging_face_models_train_save_and_resume(family, store, tmp_path):
    transformers = pytest.importorskip('transformers')
    shapes = dict(Llama=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
                  GPT2=dict(n_embd=32, n_layer=2, n_head=2), GPTNeoX=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))

    def make():
        torch.manual_seed(0)
        config = getattr(transformers, f'{family}Config')(vocab_size=512, **shapes[family])
        name = dict(GPT2='GPT2LMHeadModel').get(family, f'{family}ForCausalLM')
        return getattr(transformers, name)(config)

    class Stop:
        def after_step(self, run, metrics):
            if run.step == 5: run.stopped = 'SIGTERM'
    whole = trainer(store, model=make()).fit()
    assert whole.history[-1]['loss'] < whole.history[0]['loss'] and whole.results['bpb'] > 0
    trainer(store, tmp_path/'run', model=make(), callbacks=[Stop()]).fit()
    again = trainer(store, tmp_path/'run', model=make()).fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()))   # dropout included


def test_bfloat16_parameters_resume_to_the_same_bits(store, tmp_path):
    class Stop:
        def after_step(self, run, metrics):
            if run.step == 5: run.stopped = 'SIGTERM'
    make = lambda **kw: trainer(store, model=model().bfloat16(), **kw)
    whole = make().fit()
    make(out=tmp_path/'run', callbacks=[Stop()]).fit()
    again = make(out=tmp_path/'run').fit(resume=True)
    assert again.model.head.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()))


def test_tensorboard_through_the_recipe(store, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from effpt.recipe import pretrain
    (tmp_path/'verses.jsonl').write_text(''.join(json.dumps(dict(text=v)) + '\n' for v in VERSES))
    pretrain(str(tmp_path/'verses.jsonl'), out=tmp_path/'run', budget='4 steps', batch=4, length=32, vocab=512, held_out=.1, eval_tokens='1k', log='tensorboard', quiet=True)
    found = EventAccumulator(str(next(p.parent for p in (tmp_path/'run').rglob('events.out*')))).Reload()
    assert any('loss' in tag for tag in found.Tags()['scalars'])
