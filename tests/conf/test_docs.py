"""The documentation is true: options are the schema's, commands compose, links lead somewhere.

tests/stories/test_documentation.py runs the commands.
"""

import itertools
import re
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from doc_commands import PAGES, ROOT, code_lines, doc_commands
from fledge.conf.cli import COMMANDS, main
from fledge.conf.schema import Config
from fledge.conf.schema.describe import describe
from make_options import PAGE
from make_options import text as options_page
from omegaconf import OmegaConf

_START = re.compile(r"\s*(?:(?:torchrun|srun|deepspeed) .*?(?:-m|--module) )?fledge(?:\.train)? ")
# Placeholders of texts; each stands for a value.
_STAND_INS = {"ORG/VERIFIER": "embedded", "HEAD": "head", "FOLDER": "folder", "VERIFIER": "embedded", "NAME": "x"}


def test_every_option_has_a_meaning():
    assert [option.name for option in describe(Config) if len(option.meaning) < 8] == []


def test_every_option_is_described():
    def leaves(node, prefix=""):
        for name, value in node.items():
            inner = isinstance(value, dict) and value
            yield from leaves(value, f"{prefix}{name}.") if inner else [prefix + name]

    schema = OmegaConf.to_container(OmegaConf.structured(Config))
    described = {option.name for option in describe(Config)}
    assert set(leaves(schema)) <= described
    assert {"data.sources[].path", "train.stores[].weight"} <= described


def test_the_page_of_options_is_the_schemas():
    assert PAGE.read_text() == options_page(), "run python tests/tools/make_options.py"


def _commands() -> list:
    """Return the lines in code blocks that start a command of fledge's and that no test runs, with their first page."""
    found, seen = [], {command.text for command in doc_commands() if not command.needs}
    for page in PAGES:
        for line in itertools.chain(*code_lines(page)):
            text = " ".join(line.partition("#")[0].split())
            if (match := _START.match(text)) and text not in seen:
                seen.add(text)
                words = ["train"] * ("fledge.train " in match[0]) + shlex.split(text[match.end() :])
                found.append(pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_and_script_that_is_written_down_is_there(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in itertools.chain(*code_lines(page)):
        words = line.partition("  #")[0].split()
        if words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets), line
        missing = [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
        assert not missing, f"{page}: {missing}"


def test_a_command_of_the_demo_needs_nothing():
    """What has a mark is not run by tests/stories/test_documentation.py."""
    assert [command for command in doc_commands() if command.needs and "experiment=demo" in command.text] == []


def test_what_is_installed_is_what_there_is():
    """`make` installs the same way."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.compile(rf"pip install -c constraints\.txt -e ('\.\[({'|'.join(extras)})\]'|\.)")
    commands = [command.text for command in doc_commands() if command.text.startswith("pip ")]
    assert commands
    assert [command for command in commands if not installed.fullmatch(command)] == []


@pytest.mark.parametrize("words", _commands())
def test_every_command_that_no_test_runs_composes(words, monkeypatch):
    command, *arguments = words
    started = []
    monkeypatch.setitem(sys.modules, "nothing", SimpleNamespace(runs=started.append))
    monkeypatch.setitem(COMMANDS, command, replace(COMMANDS[command], function="nothing:runs"))
    for name, value in _STAND_INS.items():
        arguments = [re.sub(rf"\b{name}\b", value, argument) for argument in arguments]
    main([command, *arguments])
    assert isinstance(started[0], Config)


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_page_that_is_there(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page}: {target}"
        assert not anchor or anchor in _anchors(there), f"{page}: {target}"
        if page != ROOT / "README.md":
            assert there.is_relative_to(ROOT / "docs"), f"{page}: {target} is no page of the site"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_have_at_most_120_columns(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)  # what commands print is not wrapped
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "guide").glob("*.md")), ids=lambda page: page.stem)
def test_a_guide_opens_with_a_command_and_ends_with_its_options(page):
    body = page.read_text()
    title, _, rest = body.partition("\n\n")
    assert title.startswith("# ")
    assert rest.startswith("```"), page
    assert re.search(r"^## Options$", body, re.MULTILINE), page
    assert "](../reference/" in body.rpartition("\n## ")[2], page


def test_a_folder_of_pages_has_at_most_twelve_entries():
    folders = {page.parent for page in PAGES[1:]}
    assert [folder for folder in folders if len(list(folder.iterdir())) > 12] == []


def test_the_readme_has_at_most_110_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_every_page_is_in_the_sites_navigation():
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
