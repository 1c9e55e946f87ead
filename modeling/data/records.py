"""What a record of a data file is: one rule for what is measured, what is trained on and what is only encoded.

A file is JSON lines in UTF-8, plain or gzipped, with or without a byte order mark. Whoever reads it hears of a bad
record by a ValueError without a place, and says where it lies and what to do.
"""

from __future__ import annotations

import gzip
import json
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError

ID_FIELDS = ("_id", "id", "docid", "doc_id")
"""Where the id of a record is looked for: the first of these that it has."""

MOST_BYTES = 16 << 20
"""Of a line. What is longer is no text that a model reads, and might be a bomb that fills the memory."""

_SELECTORS = (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))
_BLANK = {*"\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0", *map(chr, _SELECTORS)}
"""Letters and marks that nobody sees: fillers, and variation selectors without what they would vary."""


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for each line of a file that is not blank, counted from 1.

    Raises:
        InputError: The file cannot be read, is damaged, or a line is longer than :data:`MOST_BYTES`.
    """
    refuse_no_file(path)
    try:
        with (
            gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened,
            tqdm(desc=path.name, unit=" lines", delay=5, leave=False) as progress,
        ):
            number = 0
            while line := opened.readline(MOST_BYTES + 1):
                number += 1
                progress.update()
                if len(line) > MOST_BYTES:
                    raise InputError(
                        f"{path}:{number}: longer than {MOST_BYTES:,} bytes, which no record is. Is it one record a "
                        "line? Mend or remove the line."
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: damaged or truncated ({error}), so records would be missing. Fetch the file again."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). Mend its rights or its link.") from None


def refuse_no_file(path: Path) -> None:
    """InputError if what has the name of a file is none: whoever opens a pipe waits for ever."""
    if not path.is_file():
        what = "a link to what is not there" if path.is_symlink() else "no file, but is called like one"
        raise InputError(f"{path}: {what}, so records would be missing. Mend or remove it.")


def decoded(line: bytes) -> str:
    """A line as text, without its end.

    Raises:
        ValueError: It is not in UTF-8.
    """
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}). Save the file as UTF-8"
        ) from None


def parsed(line: bytes) -> Any:
    """What stands in a line of JSON.

    Raises:
        ValueError: It is no JSON, or nested too deep.
    """
    try:
        return json.loads(decoded(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not a JSON object that can be read (nested too deep)") from None


def identifier_in(row: Any, field: str = "") -> str:
    """The id of a record, a string or a whole number, from a field or from the first there is of :data:`ID_FIELDS`.

    Raises:
        ValueError: It has none.
    """
    name = field or next((name for name in ID_FIELDS if isinstance(row, dict) and name in row), ID_FIELDS[0])
    found = str(_field(row, name, str | int))
    if not visible(found):
        raise ValueError(f"an empty {name}")
    return found


def text_in(row: Any, text: str = "text", title: str | None = "title") -> str:
    """Title, a space and text, as MTEB joins them; stripped, and empty if nothing in it is to be seen.

    Raises:
        ValueError: The text is no string, or the title is neither a string nor null.
    """
    above = _field(row, title, str) if title and row.get(title) is not None else ""
    return visible(f"{above} {_field(row, text, str)}")


def visible(text: str) -> str:
    """A text without outer space; empty if it consists of characters of no width."""
    text = text.strip()
    return text if any(_seen(character) for character in text) else ""


def refuse_surrogates(text: str, field: str) -> None:
    """ValueError if a text holds half of a surrogate pair, which is legal JSON, and no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} holds half of a surrogate pair ({ascii(text[error.start])} at {error.start}), which no file and "
            "no tokenizer takes. Write the character whole, or remove it"
        ) from None


def _field(row: Any, name: str, kinds: Any) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    if name not in row:
        raise ValueError(f"no {name!r}")
    found = row[name]
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise ValueError(f"{name}={shown(found)}")
    if isinstance(found, str):
        refuse_surrogates(found, name)
    return found


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    try:
        whole = repr(value)
    except (RecursionError, ValueError):  # too deep, or more digits than Python prints
        return f"a {type(value).__name__}"
    return whole if len(whole) <= 100 else f"{whole[:100]}..."


def _seen(character: str) -> bool:
    kind = unicodedata.category(character)  # of no width: separators, controls and formats; not what is unassigned yet
    return not (kind[0] == "Z" or kind in ("Cc", "Cf") or character in _BLANK)
