"""From what authors publish to BEIR layout, one function a data set: ``convert(fetched, target)``.

``fetched`` holds the downloaded files under their own names, archives unpacked; ``target`` is empty. Nothing is
shuffled or drawn, so that the same commit gives the same files. The dev split, where authors have none, is the tenth
by hash.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .dataset import in_dev_tenth, tenth

Judged = Mapping[str, Iterable[tuple[str, str]]]
"""Split -> (query id, document id), of judgments that are 1."""


def write_beir(
    folder: Path, documents: Mapping[str, tuple[str, str]], queries: Mapping[str, str], judged: Judged
) -> None:
    """Write a data set in BEIR layout.

    Args:
        folder: An empty one.
        documents: Id -> (title, text).
        queries: Id -> text.
        judged: A split's judgments, in order.
    """
    write_lines(folder / "corpus.jsonl", ({"_id": k, "title": v[0], "text": v[1]} for k, v in documents.items()))
    write_lines(folder / "queries.jsonl", ({"_id": k, "text": v} for k, v in queries.items()))
    (folder / "qrels").mkdir()
    for split, pairs in judged.items():
        write_qrels(folder / "qrels" / f"{split}.tsv", ((query, document, 1) for query, document in pairs))


def write_lines(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """One JSON object a line."""
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_qrels(file: Path, rows: Iterable[tuple[str, str, int]]) -> None:
    """Query id, document id and score, below a header."""
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        lines.write("query-id\tcorpus-id\tscore\n")
        lines.writelines(f"{query}\t{document}\t{score}\n" for query, document, score in rows)


def tldr_pages(fetched: Path, target: Path) -> None:
    """English pages: the name as title and the worked examples as text; the page's introduction is the query.

    The command's own name becomes "this command" in it. Pages that only point to another are left out, and an
    introduction that several pages have is no query.
    """
    pages = sorted(fetched.glob("*/pages/*/*.md")) or sorted(fetched.glob("pages/*/*.md"))
    documents, introductions = {}, {}
    for page in pages:
        identifier = f"{page.parent.name}/{page.stem}"
        lines = [line.strip() for line in page.read_text(encoding="utf-8").splitlines() if line.strip()]
        title = next((line[1:].strip() for line in lines if line.startswith("#")), "")
        said = [line[1:].strip() for line in lines if line.startswith(">")]
        said = [line for line in said if not line.lower().startswith(("more information", "see also", "homepage"))]
        examples = [line[1:].strip().removesuffix(":") for line in lines if line.startswith("-")]
        commands = [line.strip("`") for line in lines if line.startswith("`")]
        pointer = re.search(r"is an alias (?:of|for)|is deprecated|moved to|has been renamed", " ".join(said))
        if not title or not said or not examples or len(examples) != len(commands) or pointer:
            continue
        examples = [re.sub(r"\[(\w+)\]", r"\1", example) for example in examples]  # [c]reate, a letter to remember
        commands = [re.sub(r"\{\{(.*?)\}\}", r"\1", command) for command in commands]
        text = " ".join(f"{example}: {command} ." for example, command in zip(examples, commands, strict=True))
        documents[identifier] = (title, text)
        own_name = re.compile(rf"(?<![\w-]){re.escape(title)}(?![\w-])", re.IGNORECASE)
        introductions[identifier] = own_name.sub("this command", " ".join(said).replace("`", ""))
    often = Counter(introductions.values())
    asked = {key: text for key, text in introductions.items() if often[text] == 1}
    judged: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for identifier in asked:
        judged[{0: "test", 1: "dev"}.get(tenth(identifier), "train")].append((f"q:{identifier}", identifier))
    write_beir(target, documents, {f"q:{identifier}": text for identifier, text in asked.items()}, judged)


def scitldr(fetched: Path, target: Path) -> None:
    """A summary by hand asks for its abstract, of SciTLDR-A; splits are the authors'."""
    documents, queries = {}, {}
    judged: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "dev", "test"):
        judged[split] = []
        for row in rows_of(
            fetched / f"{split}.jsonl", {"paper_id": str, "title": str, "source": list, "target": list}
        ):
            paper = row["paper_id"]
            documents[paper] = (row["title"].strip(), one_line(row["source"]))
            for number, summary in enumerate(row["target"]):
                queries[f"{paper}-{number}"] = one_line([summary])
                judged[split].append((f"{paper}-{number}", paper))
    write_beir(target, documents, queries, judged)


def pubmedqa(fetched: Path, target: Path) -> None:
    """A question asks for the abstract that answers it, without its conclusion; test are the 500 official ones."""
    papers, official = (read_object(fetched / f"{name}.json") for name in ("ori_pqal", "test_ground_truth"))
    documents, queries = {}, {}
    judged: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for paper, row in papers.items():
        if not isinstance(row, dict) or not {"QUESTION", "CONTEXTS"} <= row.keys():
            raise InputError(f"{fetched / 'ori_pqal.json'}: {paper} has no QUESTION and CONTEXTS. Fetch it again.")
        documents[paper], queries[f"q{paper}"] = ("", one_line(row["CONTEXTS"])), one_line([row["QUESTION"]])
        split = "test" if paper in official else "dev" if in_dev_tenth(paper) else "train"
        judged[split].append((f"q{paper}", paper))
    write_beir(target, documents, queries, judged)


def one_line(parts: Iterable[str]) -> str:
    """Texts behind one another, with single spaces."""
    return " ".join(" ".join(parts).split())


def rows_of(file: Path, fields: Mapping[str, type]) -> Iterable[dict[str, Any]]:
    """Objects of a file of JSON lines, each with these fields."""
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file.name}:{number}: no JSON ({error}). Fetch it again.") from None
        if not isinstance(row, dict) or any(not isinstance(row.get(name), kind) for name, kind in fields.items()):
            raise InputError(f"{file.name}:{number}: expected an object with {', '.join(fields)}. Fetch it again.")
        yield row


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(_text(file))
    except ValueError as error:
        raise InputError(f"{file.name}: no JSON ({error}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file.name}: {type(content).__name__} where an object is expected. Fetch it again.")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file.name}: cannot be read ({error}). Fetch it again.") from None
