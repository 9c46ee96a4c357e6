"""The documentation names only what exists: links, files, modules, commands, their flags, tests, imports."""

import ast
import configparser
import fnmatch
import functools
import re
import shlex
from pathlib import Path

import pytest

import pipeline_tango


ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "pipeline_tango" / "tango_tiny").glob("*.md"),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TEMPLATE = ROOT / "examples" / "sound_library" / "card.md"  # its pictures are those of the card made from it
FOLDERS = ("convert", "docs", "examples", "pipeline_tango", "tests", "training")
PACKAGED = ("convert", "training")  # folders that the wheel has inside of `pipeline_tango`
# flags that programs which are not ours take in these pages
LAUNCHERS = {
    "accelerate launch": {"--config_file", "--cpu"},
    "torchrun": {"--nproc_per_node", "--standalone"},
}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def named(page):
    """The text of a page, of the changelog without the former names: those in a table's cells before the last."""
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\|.*\|(?=[^|\n]+\|$)", "|", text, flags=re.MULTILINE)
    return text


def snippets(page, language):
    """The page's code blocks in a language, without their indentation in a list."""
    for found, code in FENCE.findall(named(page)):
        if found == language:
            indent = len(code) - len(code.lstrip(" "))
            yield re.sub(rf"^ {{{indent}}}", "", code, flags=re.MULTILINE)


def spans(page):
    """The inline code of a page, each on one line."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", FENCE.sub("", named(page)))]


def command_lines(page):
    """Every command of a page as a list of words, without comments and paths of the shell."""
    lines = [span for span in spans(page) if " " in span or span.startswith("tango-")]
    for code in snippets(page, "bash"):
        lines += code.replace("\\\n", " ").splitlines()
    for line in lines:
        for part in re.split(r"&&|;|<| \| ", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # not a command
                continue
            if words:
                yield words


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text())
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def source_of(module):
    """The file of one of our modules, as it is named in a checkout or in the installed package, or `None`."""
    parts = module.split(".")
    if parts[0] == "pipeline_tango" and len(parts) > 1 and parts[1] in PACKAGED:
        parts = parts[1:]
    if parts[0] not in FOLDERS:
        return None
    path = ROOT.joinpath(*parts)
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def console_scripts():
    """Module by command."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].split("\n")
    return dict(re.match(r"([\w-]+) *= *([\w.]+):", line).groups() for line in lines if line)


@functools.cache
def read_source(path):
    """The flags that a file writes out, with * for what it fills in, and the files of ours that it imports."""
    source = path.read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            folder = ".".join(path.parents[node.level - 1].relative_to(ROOT).parts) if node.level else ""
            imported.add(source_of(f"{folder}.{node.module or ''}".strip(".")))
    flags = re.findall(r'"(--?\w[\w-]*)"', source) + re.findall(r'f"(--[\w{}-]+)"', source)
    return {re.sub(r"{\w+}", "*", flag) for flag in flags}, imported - {None}


def unknown_flags(flags, known):
    return {flag for flag in flags if not any(fnmatch.fnmatchcase(flag, each) for each in known)}


def flags_of(path):
    """The flags that a program may have: all that it, or one of our files it imports, writes out."""
    flags, seen, left = {"--help"}, set(), [path]
    while left:
        path = left.pop()
        if path not in seen and path.exists():
            seen.add(path)
            found, imported = read_source(path)
            flags |= found
            left += imported
    return flags


@pytest.fixture(params=PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def page(request):
    return request.param


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        assert f"({page.relative_to(ROOT)})" in text


def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?://", target) or (page == TEMPLATE and target == "training.png"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_files_exist(page):
    words = {word for span in spans(page) for word in span.split()}
    words |= {word for command in command_lines(page) for word in command}
    for word in words:
        if re.match(rf"({'|'.join(FOLDERS)})/[\w/*.-]*$", word) or re.fullmatch(r"[\w-]+\.(cfg|toml)", word):
            assert any(ROOT.glob(word)), word


def test_modules_scripts_and_flags_exist(page):
    scripts = console_scripts()
    for words in command_lines(page):
        modules = [after for word, after in zip(words, words[1:]) if word == "-m" and source_of(after)]
        names = [word for word in words if re.fullmatch(r"tango(-\w+)*", word) and word not in ("tango-tiny",)]
        programs = modules or names[:1]
        if not programs:
            continue
        program = programs[0]
        assert program in scripts or modules, f"{program} is no console script"
        path = source_of(scripts.get(program, program))
        assert path.exists(), program
        known = flags_of(path)
        before = words[: words.index(program)]
        for launcher, flags in LAUNCHERS.items():
            if launcher in " ".join(before):
                known |= flags
        flags = {word.strip("[]").partition("=")[0] for word in words if re.match(r"\[?--?[A-Za-z]", word)}
        unknown = unknown_flags(flags - {"-m", "-v"}, known)  # of Python and of `time`
        assert not unknown, f"{program}: {unknown}"


def test_flags_alone_belong_to_one_of_our_programs(page):
    sources = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    known = set().union(*LAUNCHERS.values(), *(read_source(path)[0] for path in sources))
    for span in spans(page):
        if span.startswith("--"):
            assert not unknown_flags({word for word in span.split() if word.startswith("--")}, known), span


def test_tests_that_measure_a_figure_exist(page):
    for words in command_lines(page):
        if "pytest" not in words:
            continue
        rest = words[words.index("pytest") + 1 :]
        paths = [ROOT / word for word in rest if word.startswith("tests/")]
        assert all(path.exists() for path in paths), words
        if "-k" in rest:
            expression = rest[rest.index("-k") + 1]
            assert any(re.search(rf"def test\w*{expression}", path.read_text()) for path in paths), words


def test_python_compiles_and_imports_what_there_is(page):
    for code in snippets(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "pipeline_tango":
                assert {alias.name for alias in node.names} <= set(pipeline_tango.__all__)


def test_architecture_has_a_sentence_for_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for folder in ("pipeline_tango", "convert", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                assert f"`{path.relative_to(ROOT)}`" in text, path
