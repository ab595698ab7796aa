"""The structure of the package, checked on its source: floors, annotations, lengths, options that nothing reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

from torchxihe.config.options import Config, Documents, Section, Source

PACKAGE = Path(__file__).parents[2] / "torchxihe"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}

FLOORS = {
    "errors": 0,
    "config": 0,
    "utils": 0,
    "kernels": 1,
    "model": 1,
    "data": 1,
    "parallelisms": 2,
    "components": 2,
    "plan": 3,
    "trainer": 3,
    "run": 3,
    "api": 4,
    "parsers": 4,
    "page": 4,
    "commands": 4,
    "__main__": 4,
    "__init__": 4,  # imports `api` when it is used
}
MUST_NOT_IMPORT_EACH_OTHER = [{"model", "data"}, {"kernels", "data"}, {"parallelisms", "components"}]
LONGEST_FUNCTION = 80
LONGEST_FILE = 450
MAY_USE_THE_WORLD_SIZE = {
    "parallelisms/dims.py",
    "utils/distributed.py",
    "utils/log.py",
    "commands/launch.py",
    "components/runtime/elastic.py",
}

FunctionDef = (ast.FunctionDef, ast.AsyncFunctionDef)
Import = (ast.Import, ast.ImportFrom)


def name_of(path: Path) -> str:
    """The module's dotted name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The first name below the package."""
    return [*module.split("."), "__init__"][1]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of the package's own modules, anywhere in the file."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from torchxihe import a` hides which module it means, as a relative import does.
            modules = ["." * (node.level or node.module == "torchxihe") + (node.module or "")]
        yield from ((node.lineno, module) for module in modules if module.startswith((".", "torchxihe")))


def test_imports_go_downward() -> None:
    faults = []
    for path, tree in TREES.items():
        here = part_of(name_of(path))
        for line, module in imports(tree):
            there = part_of(module)
            if module.startswith("."):
                faults.append(f"{path}:{line}: write `from torchxihe.a.b import c`")
            elif FLOORS[there] > FLOORS[here]:
                faults.append(f"{path}:{line}: {here} is below {there}")
            elif {here, there} in MUST_NOT_IMPORT_EACH_OTHER:
                faults.append(f"{path}:{line}: {here} must not import {there}")
    assert not faults, "\n".join(faults)


def test_no_cycles() -> None:
    names = {name_of(path) for path in TREES}
    needs = {
        name_of(path): {module for _, module in imports(tree)} & names - {name_of(path)} for path, tree in TREES.items()
    }
    while leaves := {module for module, below in needs.items() if not below}:
        needs = {module: below - leaves for module, below in needs.items() if module not in leaves}
    assert not needs, f"import cycle among: {needs}"


def test_imports_inside_functions_say_why() -> None:
    faults = []
    for path, tree in TREES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        functions = [node for node in ast.walk(tree) if isinstance(node, FunctionDef)]
        inside = {node.lineno for function in functions for node in ast.walk(function) if isinstance(node, Import)}
        for line in sorted(inside):
            first = line
            while first - 1 in inside:  # one comment applies to a block of imports
                first -= 1
            if not any("#" in text for text in lines[first - 1 : line]) and not lines[first - 2].lstrip().startswith(
                "#"
            ):
                faults.append(f"{path}:{line}: say in a comment why this is not imported at the top")
    assert not faults, "\n".join(faults)


def test_functions_are_short_and_annotated() -> None:
    faults = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, FunctionDef):
                continue
            where = f"{path}:{node.lineno}: {node.name}"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= LONGEST_FUNCTION:
                faults.append(f"{where} has {length} lines")
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                continue  # compiled by Triton, whose annotations mean something else
            bare = [arg.arg for arg in arguments if arg and not arg.annotation and arg.arg not in ("self", "cls")]
            if bare or not node.returns:
                faults.append(f"{where} is not annotated: {', '.join(bare) or 'what it returns'}")
    assert not faults, "\n".join(faults)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert not (long := {str(path): lines for path, lines in lengths.items() if lines > LONGEST_FILE}), long


def test_kernels_know_no_model() -> None:
    """`model` imports `kernels`, not the reverse."""
    rooms = {str(path): list(imports(tree)) for path, tree in TREES.items() if path.parent.name == "kernels"}
    faults = [f"{path}:{line}" for path, found in rooms.items() for line, module in found if part_of(module) == "model"]
    assert not faults, faults


def test_subpackages_of_components_import_each_other_through_their_init() -> None:
    faults = []
    for path, tree in TREES.items():
        here = name_of(path).split(".")
        for line, module in imports(tree):
            there = module.split(".")
            if here[1:2] == there[1:2] == ["components"] and here[2] != there[2] and len(there) > 3:
                faults.append(f"{path}:{line}: import from {'.'.join(there[:3])}")
    assert not faults, "\n".join(faults)


def test_only_dims_and_launching_use_the_world_size() -> None:
    """Everything else uses an axis of `ParallelDims`."""
    asking = {
        str(path.relative_to(PACKAGE))
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Name, ast.Attribute, ast.alias)) and "world_size" in ast.dump(node)
        if not (isinstance(node, ast.Attribute) and node.attr != "world_size")
    }
    assert asking <= MAY_USE_THE_WORLD_SIZE | {"config/load.py", "config/checks.py", "config/options.py"}, asking


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Name and class of every section of a config."""
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        yield name, field.annotation
    yield "sources", Source
    yield "sets", Documents  # the base class of a source, which adds the weight


def reads(tree: ast.AST) -> set[tuple[str, str]]:
    """(section, option) for every option that a file reads.

    A section is known by its name (`config.training`), or is what a name or an attribute was annotated with
    (`options: Checkpoint`) or assigned from (`training = config.training`) anywhere in the file.
    """
    classes = {section.__name__: name for name, section in sections()}
    known: dict[str, set[str]] = {name: {name} for name, _ in sections()}

    def last(node: ast.AST | None) -> str:
        return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""

    def learn(target: ast.AST, source: ast.AST | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple):
            for pair in zip(target.elts, source.elts, strict=False):
                learn(*pair)
        elif last(source) in known and last(target):
            known.setdefault(last(target), set()).update(known[last(source)])

    for node in [*ast.walk(tree)] * 2:  # twice: a later assignment may identify a name that was used earlier
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            name = node.arg if isinstance(node, ast.arg) else last(node.target)
            mentioned = {last(part) for part in ast.walk(node.annotation)} & set(classes)
            if mentioned:
                known.setdefault(name, set()).update(classes[mention] for mention in mentioned)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                learn(target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            iterated = node.iter.args[0] if isinstance(node.iter, ast.Call) and node.iter.args else node.iter
            for target in node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]:
                learn(target, iterated)
    return {
        (section, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        for section in known.get(last(node.value), ())
    }


def test_every_option_is_read() -> None:
    read = set().union(*(reads(tree) for path, tree in TREES.items() if path.parent != PACKAGE / "config"))
    # Config.run_dir, Config.total_steps and data_degrees read these for the others.
    read |= {("run", "dir"), ("run", "name"), ("training", "steps"), ("training", "tokens")}
    read |= {("parallelism", "dp_replicate"), ("parallelism", "dp_shard")}
    read |= {("sources", key) for name, key in read if name == "sets"}
    unread = [
        f"{name}.{key}" for name, section in sections() for key in section.model_fields if (name, key) not in read
    ]
    assert not unread, f"options that nothing reads, so that nobody needs them: {', '.join(unread)}"
