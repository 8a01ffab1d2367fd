"""What every test gets: JAX on the CPU, checked type annotations, slow tests on request."""

import collections
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports jax. A machine with an accelerator is asked for by name: JAX_PLATFORMS=cuda pytest ...
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:  # parallel test processes share the cores: one each, not all of them each
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
os.environ.setdefault("NPROC", "8")  # XLA's threads: with fewer, Pallas's interpreters, whose cores wait for each other, may wait for good

from jaxtyping import install_import_hook

import tests.strict_types

# Array shapes in signatures are documentation to a user and assertions here.
install_import_hook(["monovl_jax", "pallas_kernels"], f"{tests.strict_types.__name__}.checked")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs under `make test-all` (pytest --slow)")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped: one line a reason, the most frequent first."""
    reasons = collections.Counter(
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5d}  {reason}")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a piece of Python in a new process, with `devices` CPU devices; returns what it printed.

    For what one process cannot show: several devices, a clean import, a kill. Fails with the child's own words.
    """

    def run(code: str, *, devices: int = 1, timeout: float = 300, **environment: str) -> str:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        child = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if child.returncode:
            pytest.fail(f"exit code {child.returncode}\n{child.stdout}{child.stderr}", pytrace=False)
        return child.stdout

    return run
