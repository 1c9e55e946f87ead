"""The documentation as a site: it builds without a warning; nothing in it is missing, dead or fetched elsewhere."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import warm
from conftest import PATIENCE

ROOT = Path(__file__).parent.parent
METHODS = sorted(file.parent.name for file in (ROOT / "modeling" / "methods").glob("*/__init__.py"))


class Page(HTMLParser):
    """What one built page has and wants: ids, links, resources, counts of tags, and its words outside code."""

    RESOURCES = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
    HIDDEN = {"code", "pre", "script", "style", "math"}

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.text = path.read_text()
        self._hidden = 0
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if found.get(self.RESOURCES.get(tag, "")):
            self.resources.append(found[self.RESOURCES[tag]])
        self._hidden += tag in self.HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self.HIDDEN

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [warm.python(), "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "."]
    run = subprocess.run(
        [*command, str(folder / "html"), "-d", str(folder / "doctrees")],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def public_names() -> dict[str, list[str]]:
    """Every module of the package -> what it says is public, else its classes and functions without an underscore."""
    names = {}
    for file in (ROOT / "modeling").rglob("*.py"):
        parts = file.relative_to(ROOT / "modeling").with_suffix("").parts
        body = ast.parse(file.read_text()).body
        stated = [ast.literal_eval(node.value) for node in body if ast.unparse(node).startswith("__all__ =")]
        defined = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        public = stated[0] if stated else [name for name in defined if not name.startswith("_")]
        names[".".join(["polyrep", *parts]).removesuffix(".__init__")] = public
    return names


def test_every_page_is_there_and_the_front_door_leads_to_it(site, pages):
    wanted = {
        f"docs/{page}.html"
        for page in ("index", "choose", "data", "add-a-method", "scale", "hybrid", "serving", "api/index")
    }
    wanted |= {f"docs/methods/{method}.html" for method in METHODS}
    wanted |= {file.relative_to(ROOT).with_suffix(".html").as_posix() for file in (ROOT / "results").glob("*.md")}
    assert not {page for page in wanted if not (site / page).is_file()}
    assert "url=docs/index.html" in pages[site / "index.html"].text
    menu = {(site / "docs" / link).resolve() for link in pages[site / "docs" / "index.html"].links}
    missing = {page for page in (site / "docs").rglob("*.html")} - menu - {site / "docs" / "index.html"}
    assert not missing, "not in the table of contents of docs/index.md"


def test_no_link_is_dead(site, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links + page.resources:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            here = target.is_file() and (target.suffix != ".html" or not anchor or anchor in pages[target].ids)
            if not here:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert sum(len(page.links) for page in pages.values()) > 1000  # the walk saw the site
    assert not dead


def test_a_link_to_a_folder_leads_to_its_readme(site, pages):
    assert "demo/README.html" in pages[site / "README.html"].links


def test_nothing_is_fetched_from_another_host(site, pages):
    for path, page in pages.items():
        assert not [resource for resource in page.resources if "//" in resource], path
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet


def test_equations_are_mathml(site, pages):
    for method in METHODS:
        source = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / "docs" / "methods" / f"{method}.md").read_text(), flags=re.S)
        wanted = len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, flags=re.S))
        page = pages[site / "docs" / "methods" / f"{method}.html"]
        assert page.tags.count("math") == wanted > 0, method
        assert "$" not in "".join(page.words), method


def test_an_equation_that_the_converter_does_not_know_fails_the_build(conf):
    assert "<mfrac>" in conf.as_mathml(r"\frac{1}{2}", "inline")
    for latex in (r"\unheardof{x}", r"\begin{unheardof} a &= b \end{unheardof}"):
        with pytest.raises(ValueError):
            conf.as_mathml(latex, "block")
    aligned = conf.as_mathml(r"\begin{aligned} a &= \log (b) \\ c &= d \end{aligned}", "block")
    assert aligned.count("<mtr>") == 2 and ">log</mo>" in aligned


def test_the_reference_has_every_public_name_of_every_module(site, pages, conf):
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    modules = public_names()
    internal = {f"polyrep.{name}" for name in conf.INTERNAL}
    assert internal <= modules.keys() and not {f"module-{name}" for name in internal} & ids
    for module in {name for name in modules.keys() - internal if not conf.COPY.match(name)}:
        assert f"module-{module}" in ids, f"{module} is on no page of docs/api"
        for name in modules[module]:
            defined = {f"{module}.{name}", f"polyrep.registry.{name}"}  # the latter: ROOMS, which does not know
            if not defined & ids:  # handed on by a package
                thing = getattr(importlib.import_module(module), name)
                assert f"{thing.__module__}.{thing.__qualname__}" in ids, f"{module}.{name} is on no page of docs/api"
