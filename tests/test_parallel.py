"""Two processes with gloo see what one process sees."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = '''
import json, os, sys
from effpt.recipe import pretrain
data, out, stop, resume, accumulate = sys.argv[1:6]

class Stop:
    def after_step(self, run, metrics):
        if run.step == int(stop) and run.rank == 1: run.stopped = 'SIGTERM'   # only one of the processes is told

def weigh(batch, generator):
    import torch
    return {**batch, 'weights': (torch.rand(batch['tokens'].shape, generator=generator) ** 4).round(decimals=1)}

trained = pretrain(data=data, held_out=.1, eval_tokens='3k', budget='12 steps', batch=8, length=32, vocab=512, precision='float32', save_every=4, quiet=True,
                   out=out, transforms=[weigh], callbacks=[Stop()], resume=resume == 'resume', accumulate=int(accumulate))
import torch.distributed as dist
if dist.is_initialized(): dist.destroy_process_group()
'''


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('parallel')
    verses = (HERE/'golden.txt').read_text().splitlines()
    (folder/'verses.jsonl').write_text(''.join(json.dumps(dict(text=v)) + '\n' for v in verses))
    (folder/'script.py').write_text(SCRIPT)
    return folder


def train(place, name, processes=1, stop=0, resume='', accumulate=1):
    out = place/name
    launch = [sys.executable] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    words = [str(place/'script.py'), str(place/'verses.jsonl'), str(out), str(stop), resume or 'fresh', str(accumulate)]
    done = subprocess.run(launch + words, capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    return [row['loss'] for row in rows if 'loss' in row], [row['tokens'] for row in rows if 'loss' in row], [row['evaluate']['bpb'] for row in rows if 'evaluate' in row]


def test_two_processes_see_what_one_sees_and_resume(place):
    one, two = train(place, 'one'), train(place, 'two', processes=2)
    assert len(one[0]) == 12 and one[0][-1] < one[0][0]
    assert two[0] == pytest.approx(one[0], abs=1e-4)
    assert two[1] == one[1]
    assert two[2] == pytest.approx(one[2], abs=1e-4)
    accumulated = train(place, 'two, accumulated', processes=2, accumulate=2)
    assert accumulated[0] == pytest.approx(one[0], abs=1e-4)
    train(place, 'stopped', processes=2, stop=6)
    assert train(place, 'stopped', processes=2, resume='resume') == two
