"""The imports run one way: a room imports what is below it, not what is beside or above it."""

import ast
from pathlib import Path

import fastlt

LEVELS = [  # low to high; the rooms of one level do not import each other
    {"errors"},
    {"utils"},
    {"classes", "config", "recipes"},
    {"decode"},
    {"packing"},
    {"data", "models", "losses"},
    {"methods"},
    {"evaluation", "reports"},
    {"training"},
    {"studies", "sweep", "curate", "demo"},
    {"api", "cli"},
    {"_moved"},
    {"__init__", "__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}
FASTLT = Path(fastlt.__file__).parent


def imports_of(file: Path) -> set[str]:
    """Return the modules that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            is_package = node.module == "fastlt"
            found |= {f"fastlt.{name.name}" for name in node.names} if is_package else {node.module}
    return found


def modules(folder: Path, package: str) -> dict[str, set[str]]:
    """Return what each file of a folder imports of a package."""
    return {
        file.relative_to(folder).as_posix(): {
            module for module in imports_of(file) if module.partition(".")[0] == package
        }
        for file in folder.rglob("*.py")
    }


def test_imports_of_fastlt_run_one_way():
    wrong = set()
    for file, imported in modules(FASTLT, "fastlt").items():
        room = file.partition("/")[0].removesuffix(".py")
        for other in {module.split(".")[1] for module in imported if "." in module} & HEIGHT.keys():
            if other != room and HEIGHT[other] >= HEIGHT[room]:
                wrong.add((file, other))
    assert wrong == set()


def test_every_room_has_its_level():
    rooms = {path.name for path in FASTLT.iterdir() if (path / "__init__.py").is_file()}
    files = {path.stem for path in FASTLT.glob("*.py")}
    assert rooms | files <= HEIGHT.keys()


def test_kernels_know_nothing_of_fastlt():
    kernels = FASTLT.parent / "kernels"
    assert len(modules(kernels, "fastlt_kernels")) > 10
    assert not any(modules(kernels, "fastlt").values())
    assert not any(modules(kernels, "fastlt_benchmarks").values())


def test_only_the_bench_commands_need_the_benchmarks():
    found = modules(FASTLT, "fastlt_benchmarks")
    assert [file for file, imported in found.items() if imported] == ["cli/benchmarks.py"]
