"""The documentation as a site: ``python -m sphinx -c docs . build/docs``, or ``make docs``.

The source folder is the repository, not ``docs/``, so that a page may link to results, pictures and files beside
``docs/`` by the same relative path that works on GitHub. Nothing of the built site comes from another host.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)
PACKAGE = Path(__file__).parent.parent / "modeling"
INTERNAL = {
    "cli": "finds the verb of a command line and calls it",
    "files": "writes whole files or none",
    "flags": "makes flags of a dataclass",
    "hub.fingerprint": "hands on names of hub.polyrep_folder",
    "publishing.compare": "stands behind publishing.export",
    "publishing.doors": "runs in a process without polyrep, when a model is published",
    "publishing.inspection": "checks what publish uploads",
    "publishing.signatures": "stands behind publishing.export",
    "publishing.upload": "speaks with the Hub for publish",
    "search.local": "what the engines of one process share",
    "search.qdrant_engine": "stands behind search.qdrant",
    "search.qdrant_remote": "stands behind search.qdrant",
}
"""Modules without a place in the API reference, and why nobody calls them."""

COPY = re.compile(r"polyrep\.methods\.\w+\.(polyrep_\w+)")
"""Copies of what stands in ``polyrep.hub``, where it is told."""

project = "polyrep"
project_copyright = "the polyrep authors"
version = release = installed_version("polyrep")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "results/*.md", "demo/README.md", "*.md"]
exclude_patterns = [".*", "build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors, page.md#heading
highlight_language = "text"  # of blocks without a language

# References to our own names must resolve; those to other projects would need a network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!polyrep\.).*"),
    (r"py:.*", r"polyrep\.evaluation\.frontier\.rows\.T"),  # a type variable
    (r"py:.*", r"polyrep\.search\.(local\.FolderIndex|qdrant_engine\.Engine)"),  # bases that nobody calls
]
# Tables of results and files of the repository have pages because others link to them, but no place in the menu.
suppress_warnings = ["toc.not_included"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # what torch and transformers say of their own methods
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "polyrep"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


PREPARED = {"{aligned}": "{align*}"}
"""LaTeX that the converter does not know -> the same in what it knows."""

POLISHED = {
    # Names of functions are operators: a thin space around them, none before a parenthesis.
    r"<m[io]>([A-Za-z]{2,})</m[io]>(?=(?:<mrow>)?<mo[^>]*>&#x00028;)": r'<mo lspace="0.167em" rspace="0em">\1</mo>',
    r"<m[io]>([A-Za-z]{2,})</m[io]>": r'<mo lspace="0.167em" rspace="0.167em">\1</mo>',
    # A norm's bars would grow and take the space of an operator; \big( with an exponent would sink.
    r"<m[io]>&#x02016;</m[io]>": '<mo stretchy="false" lspace="0em" rspace="0em">&#x02016;</mo>',
    r'<mo [^>]*minsize="1.2em"[^>]*>': '<mo stretchy="false">',
}
"""What the converter writes -> what browsers set as LaTeX would."""


def as_mathml(latex: str, display: str) -> str:
    """An equation as MathML, which browsers draw by themselves: no script, and no font from elsewhere.

    What the converter does not know, a command or an environment, stays in its output as it is: that is an error here.
    """
    for unknown, known in PREPARED.items():
        latex = latex.replace(unknown, known)
    mathml = convert(latex, display=display)
    if left := re.findall(r"\\[a-zA-Z]+|(?<=>)&(?=<)", mathml):
        raise ValueError(f"latex2mathml leaves {', '.join(left)} as it is. Write it in plainer LaTeX.")
    for written, wanted in POLISHED.items():
        mathml = re.sub(written, wanted, mathml)
    return mathml


def visit_math(writer: Any, node: nodes.math) -> None:
    """Write an equation within a line."""
    _write(writer, node, "inline")


def visit_math_block(writer: Any, node: nodes.math_block) -> None:
    """Write an equation of its own, which scrolls by itself where it is wider than the page."""
    writer.body.append(writer.starttag(node, "div", CLASS="math"))
    _write(writer, node, "block", end="</div>\n")


def _write(writer: Any, node: nodes.Element, display: str, end: str = "") -> None:
    try:
        writer.body.append(as_mathml(node.astext(), display) + end)
    except Exception as error:  # whatever the converter makes of it: the page and the line are what helps
        logger.warning("%s: %r", node.astext(), error, location=node)
    raise nodes.SkipNode


def link_folders(app: Sphinx, document: nodes.document) -> None:
    """Lead links to a folder to the page of its README; without one the words stay, unlinked."""
    for link in list(document.findall(addnodes.pending_xref)):
        if link["reftype"] != "myst" or link.get("refdomain"):
            continue
        folder = Path(app.env.relfn2path(link["reftarget"])[1])
        if (readme := app.env.path2doc(folder / "README.md")) in app.env.found_docs:
            link.attributes |= {"refdomain": "doc", "reftarget": readme, "reftargetid": None}
        elif folder.is_dir():
            link.replace_self(link.children)


class Wing(SphinxDirective):
    """``.. wing:: search`` is the reference of a folder of the package; ``methods/*`` of several, none of the root.

    Each module is a section. A package names what is imported from it, which is told where it is defined.
    """

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Read the folders and write what autodoc needs."""
        folders = sorted(PACKAGE.glob(self.arguments[0])) if self.arguments else [PACKAGE]
        files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
        written = []
        for file in files:
            self.env.note_dependency(str(file))
            module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
            if module not in INTERNAL and not COPY.match(f"polyrep.{module}"):
                written += _section(f"polyrep.{module}".removesuffix(".__init__"))
        return self.parse_text_to_nodes("\n".join(written), allow_section_headings=True)


def _section(name: str) -> list[str]:
    """One module's lines of reStructuredText."""
    module: Any = import_module(name)
    lines = [name, "-" * len(name), "", f".. automodule:: {name}"]
    if "__all__" in vars(module):
        homes = {public: _home(module, public) for public in module.__all__}
        own = [public for public, home in homes.items() if home == f"{name}.{public}"]
        lines += [f"   :members: {', '.join(own)}" if own else "   :no-members:", "", "Import from here:"]
        lines += [f":py:obj:`{public} <{home}>`" for public, home in homes.items()]
    elif ".modeling_" in name:
        lines += ["   :show-inheritance:"]
    elif name.endswith(".objective"):
        lines += ["   :inherited-members: Module"]  # objectives of a method share a base
    return [*lines, ""]


def _home(module: Any, name: str) -> str:
    """Where a name that a package hands on is defined: of a function or class; the one table that is, is ROOMS."""
    thing = getattr(module, name)
    return f"{thing.__module__}.{thing.__qualname__}" if callable(thing) else f"polyrep.registry.{name}"


def follow_public_name(app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Element) -> Any:
    """Lead a name as users import it, ``polyrep.search.Index``, or of a copy to where it is told."""
    module, _, name = node["reftarget"].rpartition(".")
    home = COPY.sub(r"polyrep.hub.\1", node["reftarget"])
    if module.startswith("polyrep") and name in getattr(sys.modules.get(module), "__all__", ()):
        home = _home(sys.modules[module], name)
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], home, node, content)


def plain_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out what Python makes up: a protocol's ``(*args, **kwargs)``, and ``<factory>``, which no parser takes."""
    if getattr(thing, "_is_protocol", False):
        return "", returns
    return signature and signature.replace("<factory>", "..."), returns


def keep_colon(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Hide the first line of an attribute's docstring from napoleon, for which a colon in it ends a type."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def setup(app: Sphinx) -> dict[str, bool]:
    """Add what this file defines to Sphinx."""
    app.add_directive("wing", Wing)
    app.connect("missing-reference", follow_public_name)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("doctree-read", link_folders)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("autodoc-process-docstring", keep_colon, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
