"""Pictures of what the filter keeps: patches of a page lit or dimmed, tokens of a text coloured.

A filter that keeps page numbers and drops headings is found here in a minute, and in no table of scores. All functions
take keep probabilities, so they also show a filter from elsewhere::

    tokens, vectors = token_pieces(retriever, document)
    with torch.inference_mode():
        keep_probability = pooling.model.to(vectors.device)(vectors[None]).keep_probability[0]
    html = kept_tokens_html(tokens, keep_probability)
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.multi_vector_encoder.modules.token_pooling import BaseTokenPooling
from tokenizers.decoders import ByteLevel
from torch import Tensor

from ...errors import InputError
from ...files import staged_file

FOG, OPACITY = 96, 0.6
"""Grey that lies over dropped patches: on dark pages it shows as well, and text below it can still be read."""

HUE = (33, 113, 181)
STRENGTH = 0.6
"""Opacity of the hue at probability 1: black text on it in the light and white text in the dark reach 7:1."""


def token_pieces(retriever: Any, document: Any) -> tuple[list[str], Tensor]:
    """Tokens of a document that are scored and their vectors, as a token pooling receives them.

    The vectors are caught on the way into the first token pooling, or at the end where there is none. So prompts,
    truncation and skiplist are those of ``encode_document``, and token i belongs to vector i.

    Args:
        retriever: A MultiVectorEncoder, or a SentenceTransformer of the same modules; with or without token pooling.
        document: A text, or anything else that the retriever encodes, such as a page image.

    Returns:
        Tokens as the tokenizer writes them, and ``(tokens, dim)`` on the retriever's device.

    Raises:
        InputError: The retriever does not give one vector for each token.
    """
    pooling = next((module for module in retriever if isinstance(module, BaseTokenPooling)), None)
    whole = getattr(retriever[0], "model", None)
    pooling = getattr(whole, "head", None) if pooling is None and hasattr(whole, "trunk") else pooling
    names = ("input_ids", "attention_mask", "token_embeddings")
    caught: dict[str, Any] = {}

    def catch(module: Any, inputs: tuple[Any, ...]) -> None:
        given = inputs[0] if isinstance(module, BaseTokenPooling) else {names[2]: inputs[0], names[1]: inputs[1]}
        caught.update({name: given[name][0] for name in names if name in given})  # the batch is one document

    hook = None if pooling is None else pooling.register_forward_pre_hook(catch)
    try:
        features = retriever.encode_document([document], output_value=None, show_progress_bar=False)[0]
    finally:
        if hook is not None:
            hook.remove()
    found: list[Any] = [(features | caught).get(name) for name in names]
    ids, mask, vectors = found
    if any(part is None for part in found) or not len(ids) == len(mask) == len(vectors):
        shapes = [f"{name} {'absent' if x is None else tuple(x.shape)}" for name, x in zip(names, found, strict=True)]
        raise InputError(
            f"token_pieces: {type(retriever).__name__} gave {', '.join(shapes)}, so no token can be named for a "
            "vector. Use a MultiVectorEncoder that has one vector for each token."
        )
    mask = mask.bool()
    tokens = retriever.tokenizer.convert_ids_to_tokens(ids[mask].tolist())
    return tokens, vectors[mask].clone()  # outside inference mode, so that the copy may be used with gradients


def kept_patches(
    page: Image.Image, keep_probability: Any, rows: int, columns: int, *, threshold: float = 0.5
) -> Image.Image:
    """The page with kept patches as they are and a grey fog over the others.

    Args:
        page: The page, at any size: the grid is stretched over it, as the processors of ColPali and ColQwen2 do.
        keep_probability: ``(rows * columns,)`` row by row. Image patches only: leave out the tokens of the prompt.
        rows: Of patches; ``sentence_transformers.multi_vector_encoder.interpretability.get_n_patches`` tells
            ``(columns, rows)`` of a retriever for a page's size.
        columns: Of patches.
        threshold: Patches above it are kept.

    Raises:
        InputError: Not ``rows * columns`` probabilities.
    """
    probability = _probabilities(keep_probability)
    if len(probability) != rows * columns:
        raise InputError(
            f"kept_patches: {len(probability)} keep probabilities for {rows} rows of {columns} patches, which are "
            f"{rows * columns}, so light would fall on the wrong places. Take rows and columns from the processor, "
            "and only the probabilities of image patches."
        )
    kept = (probability > threshold).reshape(rows, columns)
    light = Image.fromarray(kept.astype(np.uint8) * 255).resize(page.size, Image.Resampling.NEAREST)
    page = page.convert("RGB")
    fogged = page.point(lambda value: round(FOG * OPACITY + value * (1 - OPACITY)))
    return Image.composite(page, fogged, light)


def kept_tokens_flow(
    tokens: Sequence[str], keep_probability: Any, *, clusters: Sequence[int] | None = None, threshold: float = 0.5
) -> str:
    """The tokens alone as HTML, for a page that has styles of its own: a ``<span>`` each, with ``--p`` to shade it by.

    Args:
        tokens: As for :func:`kept_tokens_html`.
        keep_probability: Likewise.
        clusters: Number of the vector that each token goes into, as ``data-cluster`` and in the tooltip.
        threshold: Tokens above it have the class ``kept``.

    Raises:
        InputError: Not one probability or not one cluster for each token.
    """
    probability = _probabilities(keep_probability, tokens)
    if clusters is not None and len(clusters) != len(tokens):
        raise InputError(f"kept_tokens_flow: {len(clusters)} clusters for {len(tokens)} tokens. Pass one for each.")
    flow = []
    for place, ((begins, piece), p) in enumerate(zip(_pieces(tokens), probability, strict=True)):
        space, kept = " " if begins else "", ' class="kept"' if p > threshold else ""
        cluster = "" if clusters is None else f' data-cluster="{clusters[place]}"'
        vector = "" if clusters is None else f", vector {clusters[place]}"
        style = f'style="--p:{p:.3f}" title="keep probability {p:.3f}{vector}"'
        flow.append(f"{space}<span{kept}{cluster} {style}>{html.escape(piece)}</span>")
    return "".join(flow).strip()


def words_of(tokens: Sequence[str]) -> list[str]:
    """Each token's own text, without what the tokenizer marks the beginning or the rest of a word with."""
    return [piece for _, piece in _pieces(tokens)]


def kept_tokens_html(tokens: Sequence[str], keep_probability: Any, *, title: str = "", threshold: float = 0.5) -> str:
    """A page of its own with each token on a colour for its keep probability; kept ones are underlined as well.

    Args:
        tokens: As the tokenizer writes them, e.g. ``##ing`` or ``▁word``; they are joined to words again.
        keep_probability: ``(tokens,)``.
        title: Heading of the page.
        threshold: Tokens above it are kept.

    Raises:
        InputError: Not one probability for each token.
    """
    probability = _probabilities(keep_probability, tokens)
    rows = zip(_pieces(tokens), probability, strict=True)
    table = [f"<tr><td>{html.escape(piece)}</td><td>{p:.3f}</td></tr>" for (_, piece), p in rows]
    share = f"{(probability > threshold).sum()} of {len(tokens)} tokens above {threshold:g} (underlined)"
    scale = "".join(f'<i style="--p:{p}">{p}</i>' for p in (0, 0.25, 0.5, 0.75, 1))
    return _PAGE.format(
        title=html.escape(title or "Kept tokens"),
        hue=", ".join(map(str, HUE)),
        strength=STRENGTH,
        share=share,
        scale=scale,
        flow=kept_tokens_flow(tokens, keep_probability, threshold=threshold),
        table="\n".join(table),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ background: Canvas; color: CanvasText; font: 1rem/2 system-ui, sans-serif; margin: 2rem auto; max-width: 48rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.25rem; line-height: 1.3; }}
span, i {{ background: rgba({hue}, calc(var(--p) * {strength})); font-style: normal; padding: .2em 0; }}
i {{ padding: .2em .6em; }}
.kept {{ border-bottom: 2px solid; }}
.legend {{ font-size: .875rem; }}
td, th {{ padding: 0 1em 0 0; text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="legend">{share}. Keep probability: {scale}</p>
<p class="tokens" dir="auto" lang="">{flow}</p>
<details>
<summary>Keep probabilities as a table</summary>
<table>
<thead><tr><th scope="col">Token</th><th scope="col">Keep probability</th></tr></thead>
<tbody lang="">
{table}
</tbody>
</table>
</details>
</body>
</html>
"""

# Lengths of the drawing, in points.
_WIDTH, _MARGIN, _FONT, _LINE, _BOX = 540.0, 14.0, 10.0, 18.0, 14.0


def kept_tokens_png(
    documents: Sequence[tuple[Sequence[str], Any]],
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    threshold: float = 0.5,
) -> None:
    """Draw documents below one another, each token on a colour for its keep probability; kept ones are underlined.

    Args:
        documents: Tokens and keep probabilities of each.
        path: The PNG file, which appears whole or not at all.
        titles: One for each document.
        threshold: Tokens above it are kept.

    Raises:
        InputError: No document, not one probability for each token, or not one title for each document.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    if not documents or titles is not None and len(titles) != len(documents):
        raise InputError(
            f"kept_tokens_png: {len(documents)} documents and {'no' if titles is None else len(titles)} titles, so "
            "there is nothing to draw or nothing to call it. Pass one document or more, and a title for each or none."
        )
    strongest = 1 - STRENGTH * (1 - np.array(HUE) / 255)  # the hue over white
    colors = LinearSegmentedColormap.from_list("keep", np.stack([np.ones(3), strongest]))
    headings, pieces, height = _laid_out(documents, titles)
    bar = 4 * _FONT  # height of the colour bar with its numbers
    size = np.array([_WIDTH + 2 * _MARGIN, height + bar + 2 * _MARGIN])
    figure = plt.figure(figsize=tuple(size / 72))
    axis = figure.add_axes((_MARGIN / size[0], (_MARGIN + bar) / size[1], _WIDTH / size[0], height / size[1]))
    axis.set(xlim=(0, _WIDTH), ylim=(height, 0))  # one unit is one point, downwards
    axis.axis("off")
    plain: dict[str, Any] = {"fontsize": _FONT, "va": "center_baseline", "parse_math": False}
    for y, text in headings:
        axis.text(0, y, text, weight="bold", **plain)
    for x, y, width, p, text in pieces:
        axis.add_patch(Rectangle((x, y - _BOX / 2), width, _BOX, color=colors(p), lw=0))
        axis.text(x, y, text, **plain)
        if p > threshold:
            axis.hlines(y + _BOX / 2, x, x + width, color="black", lw=1)
    place = (_MARGIN / size[0], (_MARGIN + 2 * _FONT) / size[1], 0.4 * _WIDTH / size[0], 0.7 * _FONT / size[1])
    scale = figure.colorbar(ScalarMappable(cmap=colors), cax=figure.add_axes(place), orientation="horizontal")
    scale.set_label(f"keep probability; underlined: above {threshold:g}", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    try:
        with staged_file(Path(path)) as partial:
            figure.savefig(partial, format="png", dpi=144)
    finally:
        plt.close(figure)


def _laid_out(
    documents: Sequence[tuple[Sequence[str], Any]], titles: Sequence[str] | None
) -> tuple[list[tuple[float, str]], list[tuple[float, float, float, float, str]], float]:
    """Where everything stands, in points from the top left.

    Returns:
        Lines of titles (middle, text), pieces of tokens (left, middle, width, probability, text), and the height.
    """
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font, renderer = FontProperties(size=_FONT), RendererAgg(8, 8, 144)

    def length(text: str) -> float:
        return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / 2  # 144 dots are 72 points

    headings, found, line = [], [], 0.5
    for number, (tokens, keep_probability) in enumerate(documents):
        probability = _probabilities(keep_probability, tokens)
        for part in textwrap.wrap(titles[number], 80) if titles else ():
            headings.append((line * _LINE, part))
            line += 1
        pieces = _pieces(tokens)
        lengths = [length(piece) for _, piece in pieces]
        places = _wrap(pieces, lengths, length(" "), _WIDTH)
        for (_, piece), width, (x, row), p in zip(pieces, lengths, places, probability, strict=True):
            found.append((x, (line + row) * _LINE, width, p, piece))
        line += places[-1][1] + 1.5
    return headings, found, (line - 0.5) * _LINE


def _wrap(pieces: list[tuple[bool, str]], lengths: list[float], space: float, width: float) -> list[tuple[float, int]]:
    """Left edge and line of each piece; a word is broken only where it is longer than a line."""
    begins = [i for i, (begin, _) in enumerate(pieces) if begin or i == 0]
    places, x, line = [], 0.0, 0
    for start, stop in pairwise([*begins, len(pieces)]):
        x += space if x else 0
        if x and x + sum(lengths[start:stop]) > width:
            x, line = 0.0, line + 1
        for piece in lengths[start:stop]:
            if x and x + piece > width:
                x, line = 0.0, line + 1
            places.append((x, line))
            x += piece
    return places


def _pieces(tokens: Sequence[str]) -> list[tuple[bool, str]]:
    """Whether each token begins a word, and its text, whichever way the tokenizer marks words."""
    marks = ("##", "Ġ", "▁")  # WordPiece marks what continues a word, the other two what begins one
    mark = max(marks, key=lambda mark: sum(token.startswith(mark) for token in tokens))
    if mark == "##":
        texts = [token[2:] if token.startswith("##") and len(token) > 2 else f" {token}" for token in tokens]
    elif mark == "Ġ":
        texts = [ByteLevel().decode([token]) for token in tokens]  # letters stand for bytes
    else:
        texts = [token.replace("▁", " ") for token in tokens]
    return [(text[:1].isspace(), text.strip() or "␣") for text in texts]


def _probabilities(keep_probability: Any, tokens: Sequence[str] | None = None) -> np.ndarray:
    """Keep probabilities as a flat array, checked to be probabilities and, if given, one for each token."""
    probability = torch.as_tensor(keep_probability).detach().float().cpu().numpy().ravel()
    if tokens is not None and (not tokens or len(tokens) != len(probability)):
        raise InputError(
            f"kept tokens: {len(probability)} keep probabilities for {len(tokens)} tokens, so colours would fall on "
            "the wrong words. Pass one for each token, of the tokens and vectors that token_pieces returns."
        )
    outside = ~((probability >= 0) & (probability <= 1))  # NaN, too
    if outside.any():
        raise InputError(
            f"keep_probability: {probability[outside][0]:g} is no probability, so no colour stands for it. Pass "
            "ReinPoolOutput.keep_probability; of logits, take the sigmoid."
        )
    return probability
