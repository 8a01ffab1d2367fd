"""Every number in the README's tables comes from a results file."""

from experiments import readme


def test_the_readme_says_what_the_results_say():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(readme.BEGIN)[1].split(readme.END)[0]
    assert block.strip() == readme.render().strip(), "run `python -m experiments.readme`"
