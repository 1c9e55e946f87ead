"""Open an image that a stranger sent: a small RGB picture, or a message that says what is wrong with the file."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from polyrep.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MOST_BYTES = 8 * 2**20
MOST_PIXELS = 40_000_000
"""More than any telephone's photograph has, and 160 MB when decoded."""

SHOWN = 480
"""Pixels of the longer side of what is shown again; the model takes 224."""


def opened(source: str | Path | bytes) -> Image.Image:
    """The first frame of an image, upright, in RGB, what is transparent on white, and no larger than is shown.

    Args:
        source: A file, or the content of one.

    Raises:
        InputError: The file is too large, no image of :data:`FORMATS`, damaged, or has too many pixels.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    remedy = f"Use a photograph as {', '.join(FORMATS)}."
    if len(content) > MOST_BYTES:
        raise InputError(
            f"This file has {len(content) / 2**20:.1f} MB, more than the {MOST_BYTES // 2**20} MB that the demo "
            "reads. Use a smaller copy."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise InputError(
                        f"This image has {image.width:,} × {image.height:,} pixels, more than the "
                        f"{MOST_PIXELS // 10**6} million that the demo decodes. Use a smaller copy."
                    )
                image.draft("RGB", (2 * SHOWN, 2 * SHOWN))  # a JPEG need not be decoded at full size
                clear = image.has_transparency_data
                picture = image.convert("RGBA" if clear else "RGB")
                picture.thumbnail((SHOWN, SHOWN))
                picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except UnidentifiedImageError:
        raise InputError(f"This file is no image that can be read, whatever its name says. {remedy}") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"This image has more than the {MOST_PIXELS // 10**6} million pixels that the demo decodes. "
            "Use a smaller copy."
        ) from None
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError):  # Pillow's ways to say that a file ends too early or makes no sense
        raise InputError(f"This image is damaged or cut off, so it cannot be decoded. {remedy}") from None
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG inside a page."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return embedded(stream.getvalue(), "image/jpeg")


def embedded(content: bytes, kind: str) -> str:
    """A file as an address that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
