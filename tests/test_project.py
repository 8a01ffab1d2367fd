"""The project itself: one version, a public table that holds, files a stranger can read, nothing of the machine it was written on."""

import importlib
import importlib.metadata
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import monovl_jax

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CODE = ("monovl_jax", "pallas_kernels", "experiments", "tests")
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".html", ".yml", ".yaml", ".cfg", ".sh", ""}


def texts() -> Iterator[Path]:
    """Every text file of the project (what git ignores lies outside these folders)."""
    yield from (path for path in sorted(ROOT.iterdir()) if path.is_file() and path.suffix in TEXT)
    for folder in (".ci", "docs", *CODE):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


# --- the version ------------------------------------------------------------------------------------------------------------------


def test_version_has_one_source() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    copies = [path for path in texts() if path.suffix == ".py" and re.search(r"^__version__\s*=", path.read_text("utf-8"), re.MULTILINE)]
    assert copies == [ROOT / "monovl_jax" / "__init__.py"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", monovl_jax.__version__)


def test_installed_version_is_the_source_version() -> None:
    installed = importlib.metadata.version("monovl_jax")
    assert installed == monovl_jax.__version__, "the installed metadata is older than the source: run `make install`"


def test_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert any(heading.split()[0].strip("[]") == monovl_jax.__version__ for heading in headings), headings


# --- what a user reaches ------------------------------------------------------------------------------------------------------------


def test_console_script_is_there() -> None:
    module, _, function = PROJECT["scripts"]["monovl"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_importing_the_library_imports_nothing_heavy(run_python: Callable[..., str]) -> None:
    loaded = run_python("import monovl_jax, sys; print(*{'jax', 'flax', 'numpy', 'grain', 'PIL'} & set(sys.modules))")
    assert loaded.strip() == ""


@pytest.mark.parametrize("name", monovl_jax.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(monovl_jax, name) is not None
    assert name in dir(monovl_jax)


def test_public_names_load_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(monovl_jax._PUBLIC, "Fraction", "fractions")
    assert "Fraction" in dir(monovl_jax) and "Fraction" not in vars(monovl_jax)
    try:
        assert monovl_jax.Fraction(1, 2) + monovl_jax.Fraction(1, 2) == 1
        assert "Fraction" in vars(monovl_jax), "the second use should not go through the table"
    finally:
        vars(monovl_jax).pop("Fraction", None)


def test_unknown_public_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(monovl_jax._PUBLIC, "Fraction", "fractions")
    with pytest.raises(AttributeError, match=r"no public name 'Fractoin'.*Fraction"):
        _ = monovl_jax.Fractoin


# --- what the project depends on ------------------------------------------------------------------------------------------------------


def names(requirements: list[str]) -> set[str]:
    """Distribution names, extras and versions dropped."""
    return {re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-") for requirement in requirements}


def test_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"tpu", "aot", "aot-cuda", "beam", "cuda", "hf", "torch", "demo", "dev"}
    everywhere = names(PROJECT["dependencies"]) | names(extras["dev"]) | names(extras["demo"])
    assert not everywhere & {"torch", "torchvision", "tensorflow", "transformers", "libtpu"}, "their wheels bring gigabytes"


def test_every_dependency_has_a_tested_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[A-Za-z0-9.]+", line) for line in lines), "exact versions, no addresses"
    tested = {line.split("==")[0] for line in lines}
    extras = PROJECT["optional-dependencies"]
    wanted = names(PROJECT["dependencies"]) | names(extras["dev"]) | names(extras["demo"])
    assert not wanted - tested - {"monovl-jax"}


# --- files --------------------------------------------------------------------------------------------------------------------------


def test_no_file_is_too_long_to_hold_in_the_head() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in texts() if path.suffix == ".py"}
    assert not {str(path): length for path, length in lengths.items() if length > 700}


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in texts()
        if path.suffix == ".py"
        and "tests" not in path.relative_to(ROOT).parts
        and (text := path.read_text("utf-8").strip())
        and not re.match(r"[rR]?\"\"\"|#", text)
    ]
    assert not silent, "a module begins with a docstring: what it holds, for whom"


# Spelled in pieces, so that this file is not its own first finding.
BELONGS_TO_A_MACHINE = {
    "an absolute path of one machine": r"(?<![\w.~/-])/(?:" + "|".join(["work", "root", "opt", "home", "Users", "mnt"]) + r")/\w",
    "a folder outside the project": r"\.\./" + "shared|" + r"shared/(?:golden|spec|prototypes)",
    "a package index": r"(?:extra-)?index-" + r"url\b|find-" + r"links\b|PIP_(?:INDEX|FIND)" + "_|trusted-" + "host",
    "how the work was organised": r"(?i)\b(?:this|next|last|previous|earlier|another) " + r"session\b|\bthe " + r"(?:brief|sandbox)\b",
}


@pytest.mark.parametrize("what", BELONGS_TO_A_MACHINE)
def test_nothing_of_the_machine_it_was_written_on(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in texts()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if re.search(BELONGS_TO_A_MACHINE[what], line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize("required", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", ".ci/run", "docs/parity.md"])
def test_a_newcomer_finds(required: str) -> None:
    assert (ROOT / required).stat().st_size > 200


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in texts():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
                if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                    broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not broken
