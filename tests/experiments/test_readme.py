"""Every number in the generated blocks of the README and of docs/ comes from a results file."""

from pathlib import Path

import pytest

from experiments import readme


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_page_says_what_the_results_say(page: Path):
    begin, end, render = readme.PAGES[page]
    block = page.read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    assert block.strip() == render().strip(), "run `python -m experiments.readme`"
