"""Every page of the book runs in the smoke profile, in a process of its own, against the installed package."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effpt.book import pages, run_page

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 180   # seconds for one page, ten times what a page should need: CI machines can be slow
PAGES = [p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in pages(ROOT)]


@pytest.mark.parametrize('page', PAGES)
def test_page(page, page_seconds):
    ran = run_page(ROOT/'nbs'/f'{page}.ipynb', 'smoke', timeout=LIMIT)
    page_seconds(page, ran.seconds)
    if ran.error: pytest.fail(ran.error, pytrace=False)


def test_there_are_pages():
    assert 'index' in PAGES and len(PAGES) > 3


def test_a_script_may_fork_at_its_top_level(tmp_path):
    "A comparison is often a few lines in a file, and these must not be run again in each of its processes."
    (tmp_path/'script.py').write_text('from effpt.book import forked\nprint("once")\nend = forked(print, "twice")\nprint(end.how, end.value)\n')
    ran = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split('\n') == ['once', 'done None', ''], ran.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='sessions of processes')
def test_a_forked_process_ends_with_the_one_that_asked_for_it(tmp_path):
    "Else a run that was killed would go on unseen, and the next attempt would write to the same folder."
    (tmp_path/'nap.py').write_text('import os, time\ndef nap(say): print(os.getpid(), file=open("pid", "w"), flush=True); os.rename("pid", "started"); time.sleep(600)\n')
    (tmp_path/'ask.py').write_text('from effpt.book import forked\nfrom nap import nap\nif __name__ == "__main__": forked(nap, timeout=600)\n')
    asking = subprocess.Popen([sys.executable, 'ask.py'], cwd=tmp_path)
    until = time.monotonic() + 120
    while not (tmp_path/'started').exists() and time.monotonic() < until: time.sleep(.05)
    napping = int((tmp_path/'started').read_text())
    asking.kill()
    asking.wait()
    while time.monotonic() < until:
        try: os.kill(napping, 0)
        except ProcessLookupError: return
        time.sleep(.05)
    os.kill(napping, 9)
    pytest.fail('it is still there')
