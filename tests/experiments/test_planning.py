"""The tables of docs/planning.md are those of the results, and weak scaling is computed as it says."""

from __future__ import annotations

from experiments.planning.tables import PAGE, render
from experiments.planning.weak_scaling import chips, table


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run python -m experiments.planning.tables"


def test_weak_scaling_table() -> None:
    rows = [
        {
            "chips": n,
            "mesh": {"data": n // 16, "fsdp": 16, "tensor": 1},
            "batch_size": 2 * n,
            "compute": 3.0,
            "collective_bytes": {"all-gather over fsdp": 4 * 10**9, "all-reduce over data": 10**9},
            "exposed": 1.0,
            "step": 4.0 * n / 16,
            "tokens_per_second": 1600.0,
        }
        for n in (16, 32)
    ]
    first, second = table(rows).splitlines()[2:]
    assert first == "| 16 | 1 x 16 x 1 | 32 | 3.00 | 5 | 1.00 | 4.00 | 100 | 100% |"
    assert second == "| 32 | 2 x 16 x 1 | 64 | 3.00 | 5 | 1.00 | 8.00 | 50 | 50% |"
    assert chips("v5p:2x2x4") == 16 and chips("v5e:16x16") == 256
