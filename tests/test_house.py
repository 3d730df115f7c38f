"""The layout: which file lies where, who imports whom, how long the reading path is. Files are read, not imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READING_PATH = ("pyramid", "schedule", "model", "train", "sample")
FLOORS = {"config": 0, "pyramid": 0, "schedule": 1, "model": 1, "data.conditions": 1, "run.modern": 1, "mini": 2,
          "baselines": 2, "run": 3, "data": 3, "scores": 4, "run.card": 4, "sample": 5, "fid": 6, "train": 7,
          "extras": 8, "studies": 8, "docs": 8}


def files() -> dict[str, Path]:
    """Every Python file except the tests, by the name it is imported with; a package by that of its folder."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", "build", "venv") and not any(part.startswith(".") for part in parts):
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


FILES = files()
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def floor(module: str) -> int:
    return FLOORS[module] if module in FLOORS else FLOORS[module.split(".")[0]]


def imports(tree: ast.Module) -> set[str]:
    """The project's modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide who imports whom"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & set(FILES)) or {node.module}
    return names & set(FILES)


# The one import upwards, inside Run.sample: a script that loads a run draws images with one more call, and the loop
# that draws stays in sample.py, where a reader looks for it. Nothing is imported before the method is called.
UPWARDS = ("run.load", "Run", "sample", {"sample", "extras.causal"})
IMPORTS = {name: imports(tree) - (UPWARDS[3] if name == UPWARDS[0] else set()) for name, tree in TREES.items()}


def lines(name: str) -> int:
    return len(FILES[name].read_text().splitlines())


# ---------------------------------------------------------------------------------------------------------------------
# rooms


def test_eight_files_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "mini.py", "config.py", "pyramid.py", "schedule.py", "model.py", "train.py", "sample.py", "fid.py"}


def test_every_folder_has_a_floor_and_a_docstring():
    """A new folder needs a line in FLOORS."""
    assert {name for name in FILES if name.split(".")[0] not in FLOORS} == set()
    for folder in {path.parent for path in FILES.values()} - {ROOT, ROOT / "docs"}:
        text = ast.get_docstring(TREES[".".join(folder.relative_to(ROOT).parts)])
        assert text, f"{folder.name}/__init__.py needs a docstring"


def test_imports_go_downwards_only():
    upwards = [f"{name} imports {other}" for name, others in IMPORTS.items() for other in sorted(others)
               if floor(other) > floor(name)]
    assert upwards == []


def test_the_one_import_upwards_is_inside_its_method():
    module, name, method, allowed = UPWARDS
    tree = ast.parse(FILES[module].read_text())
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    inside = next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == method)
    owner.body.remove(inside)
    assert imports(inside) == allowed and not imports(tree) & allowed


def test_there_is_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(IMPORTS[name]):
                visit(other)
            done.add(path.pop())

    for name in FILES:
        visit(name)


def test_folders_below_the_programs_import_none_of_them():
    programs = {"sample", "fid", "train", "mini"}
    wrong = {name: others & programs for name, others in IMPORTS.items() if floor(name) <= 4 and others & programs}
    assert wrong == {}


def test_the_files_of_the_method_import_no_extras():
    for name in (*READING_PATH, "mini", "fid", "config"):
        assert not {other for other in IMPORTS[name] if other.split(".")[0] in ("extras", "studies", "docs")}, name


def test_a_baseline_imports_no_other_system():
    for name, others in IMPORTS.items():
        if name.startswith("baselines."):
            assert {other for other in others if other.startswith("baselines")} <= {"baselines.trunk"}, name


def test_config_and_the_presets_load_without_torch():
    """So that mistakes on the command line are answered at once."""
    def reach(name):
        return {name}.union(*(reach(other) for other in IMPORTS[name]))

    for name in reach("config") | reach("run.paper"):
        used = {node.names[0].name if isinstance(node, ast.Import) else node.module for node in ast.walk(TREES[name])
                if isinstance(node, (ast.Import, ast.ImportFrom))}
        assert not {module for module in used if module.split(".")[0] in ("torch", "torchdiffeq", "diffusers")}, name


# ---------------------------------------------------------------------------------------------------------------------
# habits


def test_nothing_touches_the_path_of_imports():
    for name, node in ((name, node) for name, tree in TREES.items() for node in ast.walk(tree)):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "site.addsitedir")), name
        assert not (isinstance(node, ast.ImportFrom) and node.module == "sys"), name


def test_parsers_are_built_inside_functions():
    def calls(node):
        """Of what runs when the file is imported: not inside functions, not under __name__ == "__main__"."""
        for child in ast.iter_child_nodes(node):
            is_main = isinstance(child, ast.If) and "__name__" in ast.unparse(child.test)
            if not is_main and not isinstance(child, (ast.FunctionDef, ast.Lambda)):
                if isinstance(child, ast.Call):
                    yield ast.unparse(child.func)
                yield from calls(child)

    wrong = [f"{name} calls {call}" for name, tree in TREES.items() for call in calls(tree) if call.split(".")[-1] in (
        "ArgumentParser", "parser", "add_argument", "parse_args", "add_config_flags", "add_sampling_flags")]
    assert wrong == []


def test_programs_end_in_one_way():
    for name, tree in TREES.items():
        blocks = [node for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
        assert len(blocks) <= 1 and all(block is tree.body[-1] for block in blocks), name
        assert all(ast.unparse(block.body) == "config.run(main)" for block in blocks), name


# ---------------------------------------------------------------------------------------------------------------------
# lengths


def test_the_reading_path_is_short():
    count = {name: lines(name) for name in READING_PATH}
    assert sum(count.values()) <= 1000, count


def test_functions_of_the_reading_path_fit_a_screen():
    long = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for name in READING_PATH
            for node in ast.walk(TREES[name]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert {name: count for name, count in long.items() if count > 45} == {}


def test_mini_fits_a_page():
    assert lines("mini") <= 45


def test_float64_is_made_on_the_cpu():
    """A Mac's GPU has none."""
    assert [name for name, tree in TREES.items() if ".double().cpu()" in ast.unparse(tree)] == []


def test_all_code_together_has_a_limit():
    count = {name: lines(name) for name in FILES if name.split(".")[0] != "docs"}
    assert sum(count.values()) <= 8650, count


def test_the_readme_has_a_limit():
    assert (ROOT / "README.md").stat().st_size <= 14_000
