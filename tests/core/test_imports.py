"""The direction of imports: a module imports what stands below it, and nothing imports in a circle.

A late import, inside a function, counts as well: it would hide a circle, not avoid one.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "llava_fwd2bot"
ROOT = Path(__file__).parents[2] / PACKAGE

# from the bottom to the top; the longest entry that a module's name begins with is its place. The files of a checkpoint
# and its fingerprint are plain readers and writers below the model; opening and converting one needs the hosts.
LAYERS = (
    ("version", "extras"),
    ("files",),
    ("config",),
    ("processing",),
    ("bottleneck", "losses"),
    ("checkpoint.adapter_names",),
    ("compressors",),
    (
        "checkpoint.read",
        "checkpoint.write",
        "checkpoint.fingerprint",
        "checkpoint.gathering",
        "checkpoint.hub",
        "checkpoint.embedding_files",
        "checkpoint.card",
    ),
    ("modeling",),
    ("mixin",),
    ("smol",),
    ("hosts",),
    ("checkpoint",),
    ("training",),
    ("cache",),
    ("evaluation",),
    ("integrations",),
    ("serving",),
    ("cli",),
    ("__main__",),
)


def layer(module: str) -> int:
    names = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    return next(names[".".join(parts[:n])] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in names)


def imports() -> dict[str, set[str]]:
    """Module → modules of this package that it imports, by names below the package."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items() if name != "__init__"}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        inside = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            bases: list[list[str]] = []  # of `from BASE import names`
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = inside.split(".") if inside else []
                bases = [parts[: len(parts) - node.level + 1] + (node.module.split(".") if node.module else [])]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                bases = [node.module.split(".")[1:]]
            elif isinstance(node, ast.Import):
                named = (alias.name.split(".") for alias in node.names)
                found[name].update(".".join(parts[1:]) for parts in named if parts[0] == PACKAGE and len(parts) > 1)
            for base in bases:  # a name is a module, or stands in the module BASE
                targets = {".".join([*base, alias.name]) for alias in node.names}
                found[name].update(t if t in modules else ".".join(base) for t in targets)
        found[name] = {target for target in found[name] if target in modules and target != name}
    return found


def test_imports_go_one_way():
    """A reader starts at the bottom and never meets a name that is explained further up."""
    against = [f"{a} → {b}" for a, targets in imports().items() for b in targets if layer(b) > layer(a)]
    assert not against


def test_no_import_goes_in_a_circle():
    """Within a layer as well; a package's own __init__ may name its modules."""
    edges, done = imports(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in edges[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_few_files_beside_the_method():
    """config, bottleneck, losses and mixin are the method; more beside them would hide that."""
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_scripts_find_what_is_not_installed():
    """`eval` is in the checkout alone; a script is run from anywhere, with its own folder on the path."""
    for script in (ROOT.parent / "scripts").glob("*.py"):
        source = script.read_text(encoding="utf-8")
        assert "\nfrom eval" not in source or "\nimport _root" in source, script
