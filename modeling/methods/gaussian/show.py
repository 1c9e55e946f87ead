"""Pictures of distributions: each text an ellipse around its mean, as wide as the model is unsure of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.patches import Ellipse

from ...errors import InputError
from .modeling_gaussian import GaussianOutput

SCALE = 0.2
"""Standard deviations that an ellipse reaches from its mean: at one, all of them would lie on each other."""

QUERY_COLORS = ("C0", "C3", "C4", "C1")


def draw_ellipses(
    axis: Any,
    documents: GaussianOutput,
    queries: GaussianOutput,
    document_names: Sequence[str],
    query_names: Sequence[str],
    *,
    font_size: float = 7,
) -> tuple[int, int]:
    """Draw texts as ellipses, in the two dimensions of the mean in which the documents differ most.

    Args:
        axis: Of matplotlib.
        documents: Grey, each with its name beside it.
        queries: Coloured; their names are the handles of a legend, which the caller draws.
        document_names: One for each document.
        query_names: One for each query.
        font_size: Of the documents' names, in points.

    Returns:
        The two dimensions.

    Raises:
        InputError: Fewer than two documents, another number of names, or a model without a variance.
    """
    spread: Any = documents.mean
    dims = spread.var(0).argsort(descending=True)[:2].tolist() if len(spread) > 1 else []
    sides = (documents, document_names, ("0.55",)), (queries, query_names, QUERY_COLORS)
    for texts, names, colors in sides:
        means: Any = texts.mean
        variances: Any = texts.variance
        if variances is None or len(means) != len(names) or not dims:
            raise InputError(
                f"draw_ellipses: {len(means)} texts, {len(names)} names, {len(spread)} documents and "
                f"{'no' if variances is None else 'a'} variance, so there is nothing to draw. Pass two documents or "
                "more and a name for each text, of a model with a variance."
            )
        every = variances.repeat_interleave(means.shape[1] // variances.shape[1], 1)  # (texts, k)
        for row, name in enumerate(names):
            x, y = means[row, dims].tolist()
            width, height = (2 * SCALE * every[row, dims].sqrt()).tolist()
            color, thick = colors[row % len(colors)], 2.5 if texts is queries else 1
            axis.add_patch(Ellipse((x, y), width, height, fill=False, color=color, lw=thick))
            axis.plot(x, y, ".", color=color)
            if texts is queries:
                axis.plot([], [], color=color, lw=thick, label=name)
            else:  # of two near each other, one above and one below
                beside = (3, 3) if row % 2 else (3, -font_size - 2)
                plain = {"textcoords": "offset points", "fontsize": font_size, "color": "0.3", "parse_math": False}
                axis.annotate(name, (x, y), beside, **plain)
    axis.set_xlabel(f"mean, dimension {dims[0]}")
    axis.set_ylabel(f"mean, dimension {dims[1]}")
    axis.set_aspect("equal")
    axis.autoscale()
    axis.margins(0.08)
    return dims[0], dims[1]
