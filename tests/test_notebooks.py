"""Every page of the book runs in the smoke profile, in a process of its own, against the installed package."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from effpt.book import pages, run_page

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 180   # seconds for one page, ten times what a page should need: CI machines can be slow
PAGES = [p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in pages(ROOT)]


@pytest.fixture(scope='module')
def runs(request):
    "Future results by page: two pages at a time, those that the selected tests ask for, in the order of the tests."
    asked = [item.callspec.params['page'] for item in request.session.items if item.path == Path(__file__) and hasattr(item, 'callspec')]
    with ThreadPoolExecutor(2) as pool:
        yield {page: pool.submit(run_page, ROOT/'nbs'/f'{page}.ipynb', 'smoke', timeout=LIMIT) for page in dict.fromkeys(asked)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize('page', PAGES)
def test_page(runs, page, page_seconds):
    ran = runs[page].result()
    page_seconds[page] = ran.seconds
    if ran.error: pytest.fail(ran.error, pytrace=False)


def test_there_are_pages():
    assert 'index' in PAGES and len(PAGES) > 3
