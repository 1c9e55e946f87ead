"""Pictures that are drawn, so that the tests need none of others: the scenes of benchmarks/, and pages of text."""

from __future__ import annotations

import sys
import textwrap

from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(ROOT / "benchmarks"))
from scenes import SCENES, Scene, write_scenes

__all__ = ["SCENES", "Scene", "page", "write_scenes"]


def page(text: str, width: int = 693, height: int = 896) -> Image.Image:
    """A page as a scanner would give it: the first line of a text as its heading, every other line a paragraph.

    What does not fit onto the page is left out.
    """
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    margin, body = width // 12, max(8, min(width, height) // 36)
    y = float(margin)
    for number, line in enumerate(filter(str.strip, text.splitlines())):
        size = body * (1.0 if number else 1.8)
        font = ImageFont.load_default(size)
        letters = (width - 2 * margin) / font.getlength(line) * len(line)
        for row in textwrap.wrap(line, int(letters)):
            if y + size > height - margin:
                return sheet
            pen.text((margin, y), row, (20, 20, 20), font)
            y += 1.4 * size
        y += 0.7 * size
    return sheet
