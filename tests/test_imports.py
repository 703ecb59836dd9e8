"""Imports point one way, those inside functions too; none form a circle; and no name of ours hides a library's."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = """
config pages
shapes data/storyworld
tools data runs
model tokenizer
modules
inference fast originals
metrics
training
train
evaluation search export serve
benchmarks experiments tests
"""  # a line may import itself and the lines above it; what is not named here is an experiment
LEVELS = {room: level for level, line in enumerate(ORDER.split("\n")) for room in line.split()}
OPTIONAL = {"accelerate", "apex", "deepspeed", "evaluate", "flash_attn", "kernels", "optimum", "peft", "quark", "timm", "triton"}


def imports(root: Path) -> dict[str, set[str]]:
    """The files of ours that each file of ours imports: {"data/sources.py": {"data/cache.py"}}."""
    folders = {name.split("/")[0] for name in LEVELS} | {path.parent.name for path in root.glob("*/__init__.py")}
    paths = [*root.glob("*.py"), *(path for folder in folders for path in root.glob(f"{folder}/**/*.py"))]
    graph = {path.relative_to(root).as_posix(): set() for path in paths}
    for file, targets in graph.items():
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            names = [[alias.name] for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = file.split("/")[: -node.level] if node.level else []
                module = ".".join(package + [node.module] * bool(node.module))
                names = [[f"{module}.{alias.name}", module] for alias in node.names]  # a file of a package, or a name in a file
            for choices in names:
                files = [f"{name.replace('.', '/')}{end}" for name in choices for end in (".py", "/__init__.py")]
                targets.update([file for file in files if file in graph][:1])
    return graph


def room(file: str) -> str:
    """The name in ORDER that a file belongs to: tests, its nearest folder, or its own name."""
    if Path(file).name.startswith(("test_", "conftest")):
        return "tests"
    return next((name for name in [*map(Path.as_posix, Path(file).parents), Path(file).stem] if name in LEVELS), "experiments")


def wrong_arrows(graph: dict[str, set[str]]) -> list[str]:
    arrows = [(file, other) for file in sorted(graph) for other in sorted(graph[file])]
    return [f"{file} -> {other}" for file, other in arrows if LEVELS[room(file)] < LEVELS[room(other)]]


def circle(graph: dict[str, set[str]]) -> str:
    """A circle of files, or else of rooms, such as "data/a.py -> data/b.py -> data/a.py"; "" where there is none."""
    rooms = {name: {room(other) for file in graph if room(file) == name for other in graph[file]} - {name} for name in LEVELS}
    try:
        TopologicalSorter(graph).prepare()
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def hidden(root: Path) -> set[str]:
    """Names of ours that a library, or one that looks for it, would get in its place."""
    ours = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/__init__.py")}
    return ours & (OPTIONAL | packages_distributions().keys() | sys.stdlib_module_names)


def plant(folder: Path, **sources: str) -> dict[str, set[str]]:
    for name, source in sources.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return imports(folder)


def test_imports_point_one_way():
    wrong = wrong_arrows(imports(ROOT))
    assert not wrong, "\n".join(wrong)


def test_no_files_or_rooms_import_each_other_in_a_circle():
    assert circle(imports(ROOT)) == ""


def test_no_name_at_the_root_hides_a_library():
    assert hidden(ROOT) == set()


def test_each_room_says_what_is_in_its_files():
    for face in (ROOT / name / "__init__.py" for name in LEVELS):
        text = face.read_text(encoding="utf-8") if face.exists() else ""
        for file, names in re.findall(r"^(\w+\.py) +(\w[\w, ]*):", text, re.MULTILINE):
            source = face.with_name(file).read_text(encoding="utf-8")
            missing = [name for name in names.split(", ") if not re.search(rf"^((def|class) )?{name}\b", source, re.MULTILINE)]
            assert not missing, f"{face.relative_to(ROOT)}: {file} has no {', '.join(missing)}"


def test_a_planted_arrow_is_found(tmp_path):
    graph = plant(tmp_path, modules__a="def f():\n    from fast import ops", fast__ops="import model", model="import my_idea",
                  my_idea="import train", train="", data__test_a="import train")  # fmt: skip
    assert wrong_arrows(graph) == ["model.py -> my_idea.py", "modules/a.py -> fast/ops.py"]


def test_a_planted_circle_is_found(tmp_path):
    files = {"data__a": "from .b import f", "data__b": "def f():\n    import data.c", "data__c": "from data import a"}
    assert "data/b.py -> data/c.py" in circle(plant(tmp_path / "files", **files))
    rooms = {"data__a": "from tools import show", "tools": "import data.b", "data__b": ""}
    assert "data -> tools" in circle(plant(tmp_path / "rooms", **rooms))


def test_a_planted_name_is_found(tmp_path):
    plant(tmp_path, kernels="", inspect="", tokenizer="")
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").touch()
    assert hidden(tmp_path) == {"kernels", "inspect", "tokenizers"}
