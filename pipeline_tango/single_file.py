"""The one code file that a model repository carries, generated from the modules of a package."""

import ast
import re
import symtable
import sys
import textwrap
from itertools import groupby
from pathlib import Path


LINE_LENGTH = 119


def single_file(path):
    """Source of a module and of all modules that it imports relatively, dependencies first, as one module.

    The result depends on the sources only. A module without relative imports, such as a generated one, is returned as
    it is.

    Args:
        path (`str` or `Path`): a module of a package whose `__init__.py` sets `__version__`.

    Returns:
        `str`, as clean to `ruff check` and `ruff format` as the sources are.

    Raises:
        ValueError: if a relative import is not a top-level `from .module import name`, or if a name has two meanings.
    """
    path, bodies, imports, meanings = Path(path), {}, {}, {}

    def bind(name, meaning):
        if meanings.setdefault(name, meaning) != meaning:
            raise ValueError(f"`{name}` is both {meanings[name]} and {meaning}: rename one of them.")

    def inline(module):
        source = path.with_name(f"{module}.py").read_text(encoding="utf-8")
        tree, lines = ast.parse(source), source.split("\n")
        docstring = ast.get_docstring(tree) or ""
        head = lines[: tree.body[0].end_lineno] if docstring else []
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            parent, is_top_level = getattr(node, "module", None), node in tree.body
            if level := getattr(node, "level", 0):
                if level > 1 or not is_top_level or "." in (parent or ".") or any(each.asname for each in node.names):
                    raise ValueError(f"{module}.py:{node.lineno}: only `from .module import name` can be inlined.")
                if parent not in bodies:
                    inline(parent)
            elif is_top_level:
                comment = lines[node.end_lineno - 1][node.end_col_offset :]
                for name, alias in [(each.name, each.asname) for each in node.names]:
                    imports[parent, name, alias] = imports.get((parent, name, alias)) or comment
                    meaning = f"{parent}.{name}" if parent else name if alias else name.split(".")[0]
                    bind(alias or (name if parent else meaning), meaning)
            if is_top_level:
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        body = "\n".join(lines[len(head) :]).strip("\n")
        for symbol in symtable.symtable(body, module, "exec").get_symbols():
            if symbol.is_assigned() or symbol.is_imported():
                bind(symbol.get_name(), f"that of {module}.py")
        title = f"{module}.py: {docstring}" if module != path.stem else f"{module}.py"
        paragraphs = ["\n# ".join(textwrap.wrap(each, LINE_LENGTH - 2)) for each in title.split("\n\n")]
        bodies[module] = "# " + "\n#\n# ".join(paragraphs) + f"\n\n\n{body}"
        return source, "\n".join(head)

    source, head = inline(path.stem)
    if len(bodies) == 1:
        return source
    package, init = path.parent.name, path.with_name("__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)[1]
    origin = f"# Generated from {package} {version} by {package}/single_file.py: edit that package, not this file."
    return "\n\n\n".join([f"{origin}\n#\n{head}\n\n{import_block(imports)}", *bodies.values()]) + "\n"


def import_block(imports):
    """Import statements, sorted and wrapped as by `ruff`, of a dict `(module or None, name, alias)` -> comment."""

    def statement_key(key):
        module, name, alias = key
        top = (module or name).split(".")[0]
        section = 0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 2
        return section, module is not None, (module or name).lower(), alias or ""

    def sort_key(key):
        name = key[1]  # constants first, then classes, then the rest
        return *statement_key(key), not (len(name) > 1 and name.isupper()), not name[0].isupper(), name.lower()

    sections = {}
    for (section, *_), group in groupby(sorted(imports, key=sort_key), statement_key):
        keys = list(group)
        start = f"from {keys[0][0]} import " if keys[0][0] else "import "
        names = [f"{name} as {alias}" if alias else name for _, name, alias in keys]
        comment = "".join(dict.fromkeys(imports[key] for key in keys))
        statement = start + ", ".join(names)
        if len(statement + comment) > LINE_LENGTH:
            statement = f"{start}(\n" + "".join(f"    {name},\n" for name in names) + ")"
        sections.setdefault(section, []).append(statement + comment)
    return "\n\n".join("\n".join(statements) for statements in sections.values())
