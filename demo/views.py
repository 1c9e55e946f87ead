"""The HTML of the demo. Every text in it that is not ours is escaped, and nothing in it asks another host."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from collection import FULL, Found, Hit, KeptTokens, LayerScores, Uncertainty, Words
from images import data_uri, embedded
from matplotlib.figure import Figure
from PIL import Image

from polyrep.evaluation.frontier.advice import COSTS, LEVEL, amount, best_of, within
from polyrep.methods.gaussian.show import SCALE, draw_ellipses
from polyrep.methods.reinpool.show import kept_tokens_flow, words_of

SHOWN_HITS = 3
"""Hits of a card that are seen at once; the others unfold."""

SHOWN_WORDS = 30
SNIPPET = 110
"""Characters of a document in a list of hits."""


def refusal(message: str) -> str:
    """A message in place of a result."""
    return f'<p class="refusal" role="alert">{escape(message)}</p>'


def search(text: str, found: Sequence[Found], judged: bool) -> str:
    """A table of all representations, and a card with the hits of each.

    Args:
        text: The query.
        found: What each representation found.
        judged: Whether the test set has judgments of this query.
    """
    cards = "".join(_card(one) for one in found)
    if not judged:
        known = "Only queries of the test set have judgments, so no hit is marked as relevant."
    elif any(hit.relevant for one in found for hit in one.hits):
        known = f"{_RELEVANT} marks what the test set's judgments call relevant."
    else:
        known = "None of these is what the test set's judgments call relevant."
    return f"""
<section aria-label="Results">
{_scrolling("What each representation costs and finds", _summary(found))}
<p class="note">Each search is exact: it scores every document, and of two stages the first does. Milliseconds are
those of this query on this machine, each the median of three runs: encoding the query, then searching an index held in
memory. “As full MaxSim” is the share of full MaxSim's ten best that are among these ten. {known}</p>
<h2>Best documents for “{escape(text)}”</h2>
<div class="cards">{cards}</div>
</section>"""


_RELEVANT = '<span class="relevant">✓ relevant</span>'


def _summary(found: Sequence[Found]) -> str:
    largest = max(one.representation.bytes_per_document for one in found)
    body = []
    for one in found:
        size = one.representation.bytes_per_document
        place = next((str(rank) for rank, hit in enumerate(one.hits, 1) if hit.relevant), "")
        body.append(
            [
                f'{escape(one.representation.name)}<small class="idea">{escape(one.representation.idea)}</small>',
                f'{size:,.0f}<span class="meter" style="--w:{100 * size / largest:.2f}%"></span>',
                _milliseconds(one.encode_ms),
                _milliseconds(one.search_ms),
                f"{100 * one.overlap:.0f} %",
                place,
            ]
        )
    heads = ["representation", "bytes a document", "encode, ms", "search, ms", "as full MaxSim", "relevant at"]
    if not any(row[-1] for row in body):
        heads, body = heads[:-1], [row[:-1] for row in body]
    return _table(heads, body)


def _card(one: Found) -> str:
    shape = one.representation
    hits = [_hit(hit) for hit in one.hits]
    more = ""
    if rest := "".join(hits[SHOWN_HITS:]):
        count = len(hits) - SHOWN_HITS
        more = f'<details><summary>{count} more</summary><ol start="{SHOWN_HITS + 1}">{rest}</ol></details>'
    size = f"{shape.bytes_per_document:,.0f} B · {_milliseconds(one.encode_ms + one.search_ms)} ms"
    label = ' class="full"' if shape.name == FULL else ""
    return f"""<article{label}><header><h3>{escape(shape.name)}</h3><span class="cost">{size}</span></header>
<p class="unit">score: {escape(shape.unit)}</p><ol>{"".join(hits[:SHOWN_HITS])}</ol>{more}</article>"""


def _hit(hit: Hit) -> str:
    text = hit.text if len(hit.text) <= SNIPPET else hit.text[:SNIPPET].rsplit(" ", 1)[0] + " …"
    mark = _RELEVANT if hit.relevant else ""
    return (
        f'<li><div class="line"><b>{escape(hit.id)}</b>{mark}<span class="score">{hit.score:.2f}</span></div>'
        f'<div class="text">{escape(text)}</div></li>'
    )


def words(found: Words, what: str, picture: Image.Image | None = None, alt: str = "") -> str:
    """Weighted words as bars, own words told apart from added ones; beside them the picture that they are of."""
    shown = found.words[:SHOWN_WORDS]
    if not shown:
        return refusal(f"This {what} became no word at all: nothing in it is in the vocabulary.")
    heaviest = shown[0][1]
    bars = []
    for word, weight, own in shown:
        kind = "own" if own else "added" if picture is None else "seen"
        hidden = f'<span class="sr-only">, {kind}</span>' if picture is None else ""
        bars.append(
            f'<li><span class="word">{escape(word)}{hidden}</span><span class="bar {kind}" '
            f'style="--w:{100 * weight / heaviest:.1f}%"></span><span class="weight">{weight:.2f}</span></li>'
        )
    added = len(found.words) - found.own
    counts = (
        f"{len(found.words)} words, all of them added: an image has none of its own."
        if picture is not None
        else f'{len(found.words)} words: <span class="key own">{found.own} of its own</span> '
        f'<span class="key added">{added} added</span>'
    )
    if len(shown) < len(found.words):
        counts += f" The {len(shown)} heaviest are shown."
    seen = "" if picture is None else f'<img class="seen" src="{data_uri(picture)}" alt="{escape(alt)}">'
    return f"""<section aria-label="Words of the {escape(what)}"><p class="note">{counts} “##” marks the rest of a
word.</p><div class="words">{seen}<ol class="bars">{"".join(bars)}</ol></div></section>"""


def kept_tokens(kept: KeptTokens) -> str:
    """A document's tokens shaded by weight, and the vectors that they became."""
    groups: dict[int, list[tuple[float, str]]] = {}
    for token, weight, cluster in zip(words_of(kept.tokens), kept.keep_probability, kept.clusters, strict=True):
        groups.setdefault(cluster, []).append((weight, token))
    items = []
    for cluster in sorted(groups):
        heaviest = sorted(groups[cluster], reverse=True)
        some = " ".join(escape(token) for _, token in heaviest[:12]) + (" …" if len(heaviest) > 12 else "")
        items.append(
            f'<li><b class="chip" data-cluster="{cluster}">vector {cluster}</b> '
            f"<small>{len(heaviest)} {_plural('token', len(heaviest))}</small> {some}</li>"
        )
    flow = kept_tokens_flow(kept.tokens, kept.keep_probability, clusters=kept.clusters)
    ratio, low, high = kept.bytes_before / kept.bytes_after, min(kept.keep_probability), max(kept.keep_probability)
    before, after = f"{kept.bytes_before:,.0f}", f"{kept.bytes_after:,.0f}"
    return f"""<section aria-label="Kept tokens">
<p class="figures"><b>{len(kept.tokens)}</b> token {_plural("vector", len(kept.tokens))}, <b>{before}</b> bytes →
<b>{len(groups)}</b> pooled {_plural("vector", len(groups))}, <b>{after}</b> bytes: 1/{ratio:.0f}</p>
<p class="note">The darker a token, the more it weighs in its vector, from {low:.2f} to {high:.2f}. The line below it
has its vector's colour, and the list names each vector's heaviest tokens.</p>
<p class="tokens" lang="" style="--low:{low:.3f};--high:{max(high, low + 1e-3):.3f}">{flow}</p>
<h2>Heaviest tokens of each vector</h2><ol class="groups" lang="">{"".join(items)}</ol></section>"""


def uncertainty(found: Uncertainty) -> str:
    """A query and its documents as ellipses, and how sure the model is of it."""
    first = found.nats[0]
    rows = []
    for (label, text), nats in zip(found.queries.items(), found.nats, strict=True):
        verdict = "" if nats == first else "wider: less sure" if nats > first else "narrower: surer"
        rows.append([escape(label), escape(text), f"{nats:.1f}", f"{nats - first:+.1f}" if verdict else "", verdict])
    documents = [[str(n), escape(hit.id), f"{hit.score:.2f}"] for n, hit in enumerate(found.hits, 1)]
    alike = found.documents.variance is not None and found.documents.variance.shape[1] == 1
    shape = " This model has one variance for all dimensions of a text, so its ellipses are circles." if alike else ""
    queries = _table(("query", "text", "nats", "difference", "so it is"), rows, numbers=(2, 3))
    nearest = _table(("number", "document", "−KL, nats"), documents, numbers=(2,))
    return f"""<section aria-label="Uncertainty">{_scrolling("Uncertainty of the query", queries)}
<p class="note">Nats are half the sum of the log variances: the entropy of the distribution, up to a constant. Only
differences mean something.</p>
<div class="picture-and-table"><figure>{_ellipses(found)}<figcaption>Ellipses reach {SCALE:g} standard deviations
from the mean, in the two dimensions in which these documents differ most.{shape}</figcaption></figure>
{_scrolling("Nearest documents", nearest)}</div></section>"""


def _ellipses(found: Uncertainty) -> str:
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axis = figure.add_subplot()
    numbers = [str(n) for n in range(1, len(found.hits) + 1)]
    if len(found.hits) < 2:
        return ""
    draw_ellipses(
        axis, found.documents, found.asked, numbers, [f"query, {name}" for name in found.queries], font_size=11
    )
    figure.legend(loc="outside upper center", frameon=False, ncols=2, fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144)
    names = "; ".join(f"{number}: {hit.id}" for number, hit in zip(numbers, found.hits, strict=True))
    alt = f"The query and variants of it as ellipses among its {len(numbers)} nearest documents. {names}."
    return f'<img src="{embedded(stream.getvalue(), "image/png")}" alt="{escape(alt)}">'


def layers(found: LayerScores) -> str:
    """What each layer of a document adds to its score, as numbers on bars, with their sum and the score itself."""
    largest = abs(found.shares).max()
    rows = []
    for hit, shares in zip(found.hits, found.shares, strict=True):
        cells = [
            f'<span class="share {"minus" if share < 0 else "plus"}" style="--w:{100 * abs(share) / largest:.1f}%">'
            f"{share:+.3f}</span>"
            for share in shares
        ]
        mark = _RELEVANT if hit.relevant else ""
        rows.append([f"{escape(hit.id)} {mark}", *cells, f"<b>{shares.sum():.4f}</b>", f"{hit.score:.4f}"])
    heads = ("document", *found.layers, "sum", "score")
    table = _table(heads, rows, numbers=range(1, len(heads)))
    return f"""<section aria-label="Layer scores">{_scrolling("What each layer adds to a score", table)}</section>"""


def recommended(results: Mapping[str, Any], budget: Mapping[str, float]) -> str:
    """What to take within a budget, and what that loses."""
    limits = " and ".join(amount(unit, most) for unit, most in budget.items())
    rows = quality_rows(results)
    if not (fitting := within(rows, budget)):
        return refusal(f"Within {limits}: no representation of this table. Allow more of either.")
    row, full = best_of(fitting), next(row for row in rows if row["system"] == "full model")
    low, high = row["interval"]
    level = ""
    if "p_value" in row:
        verdict = "significant" if row["p_value"] < LEVEL else "not significant"
        level = f" The difference of {row['difference']:+.3f} is {verdict} (p {row['p_value']:.3f})."
    return f"""<p class="figures" role="status">Within {escape(limits)}: <b>{escape(row["system"])}</b></p>
<p>nDCG@10 {row["value"]:.3f} [{low:.3f}, {high:.3f}], {100 * row["value"] / full["value"]:.0f} % of full MaxSim's
{full["value"]:.3f}, at {amount("bytes", row[COSTS["bytes"]])} and {amount("ms", row[COSTS["ms"]])}.{level}</p>"""


def frontier(picture: bytes, results: Mapping[str, Any], name: str) -> str:
    """A frontier's picture, and every row of it, best first."""
    rows = sorted(quality_rows(results), key=lambda row: -row["value"])
    front = [f"{row['system']} {row['value']:.3f}" for row in rows if "bytes" in row["pareto"]]
    alt = (
        f"Quality against bytes per document on {name}, {len(rows)} representations. On the front of bytes, from most "
        f"to fewest: {'; '.join(front)}."
    )
    cells = [
        [
            escape(row["system"]),
            f"{row['value']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]",
            f"{row[COSTS['bytes']]:,.0f}",
            f"{row[COSTS['ms']]:.3g}",
            ", ".join(row["pareto"]),
        ]
        for row in rows
    ]
    heads = ("representation", "nDCG@10 (95 % interval)", "bytes a document", "ms a query", "on the front of")
    table = _scrolling(f"All of {name}", _table(heads, cells, numbers=(2, 3)))
    return f"""<img class="result" src="{embedded(picture, "image/png")}" alt="{escape(alt)}">
<details class="whole"><summary>The whole table, results/frontier-{escape(name)}.md</summary>{table}</details>"""


NESTED = "MetaEmbed"


def unmeasured(name: str) -> str:
    """That results are not there, which is nobody's mistake."""
    return f"""<p class="note" role="status">results/{escape(name)}.json is not there, so there is no curve to show:
nobody has measured it yet. <code>benchmarks/{escape(name.replace("-", "_"))}.py --output results</code> makes
it.</p>"""


def few_vectors(results: Mapping[str, Any], number: int) -> str:
    """What is found with so many vectors of a document, and what with all or with one, on each data set."""
    rows = quality_rows(results)
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    by_system: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        family, _, count = row["system"].partition(", ")
        if count in ("", str(number)):
            by_system.setdefault(family, {})[row["dataset"]] = row
    ours = by_system.get(NESTED, {})
    cells = []
    # The method first, then whatever has as many vectors, then what has another number.
    for system, of in sorted(by_system.items(), key=lambda item: (item[0] != NESTED, _other(item[1], number))):
        size = {f"{row['bytes_per_document']:,.0f}" for row in of.values() if "bytes_per_document" in row}
        values = [f"{of[name]['value']:.3f}" if name in of else "" for name in datasets]
        cells.append([escape(system), *values, " – ".join(sorted(size, key=len))])
    known = ", ".join(f"{row['value']:.3f} on {escape(name)}" for name, row in ours.items())
    size = next(iter(ours.values()))["bytes_per_document"] if ours else 0
    head = f"{number} {_plural('vector', number)} of MetaEmbed, {size:,.0f} bytes: nDCG@10 {known}."
    table = _table(["nDCG@10", *datasets, "bytes a document"], cells)
    return f"""<p class="figures" role="status">{head}</p>
{_scrolling(f"With {number} {_plural('vector', number)} of a document", table)}"""


def _other(rows: Mapping[str, Mapping[str, Any]], number: int) -> bool:
    """Whether rows of a system have another number of vectors than this."""
    return not all(row["system"].endswith(f", {number}") for row in rows.values())


def vectors_curve(picture: bytes, results: Mapping[str, Any], name: str) -> str:
    """The picture of quality over the number of vectors."""
    values: dict[int, list[float]] = {}
    for row in quality_rows(results):
        family, _, count = row["system"].partition(", ")
        if family == NESTED:
            values.setdefault(int(count), []).append(row["value"])
    means = "; ".join(f"{count}: {sum(of) / len(of):.3f}" for count, of in sorted(values.items()))
    alt = f"Quality over the number of vectors of a document. Mean nDCG@10 of MetaEmbed with so many vectors: {means}."
    return f"""<img class="result" src="{embedded(picture, "image/png")}" alt="{escape(alt)}">
<p class="note">The whole table is results/{escape(name)}.md. Bands are 95 % intervals over the test queries.</p>"""


def choices(label: str, texts: Sequence[str]) -> str:
    """Texts to press."""
    return _buttons(label, "choices", [escape(text) for text in texts])


def _buttons(label: str, kind: str, contents: Sequence[str]) -> str:
    buttons = "".join(f'<button type="button" data-number="{n}">{one}</button>' for n, one in enumerate(contents))
    return f'<div class="polyrep {kind}" role="group" aria-label="{escape(label)}">{buttons}</div>'


def quality_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of nDCG@10, which alone carry the costs."""
    return [row for row in results["rows"] if row["metric"] == "nDCG@10"]


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] | None = None) -> str:
    """A table whose first cell of a row is the row's name; columns of ``numbers``, or all others, to the right."""
    heads = list(heads)
    right = set(range(1, len(heads)) if numbers is None else numbers)
    kind = ["num" if column in right else "" for column in range(len(heads))]
    top = "".join(f'<th scope="col" class="{k}">{escape(head)}</th>' for k, head in zip(kind, heads, strict=True))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td class="{k}">{cell}</td>' for k, cell in zip(kind[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _scrolling(label: str, table: str) -> str:
    """A box that scrolls by itself, by keyboard too, so that the page does not."""
    return f'<div class="scrolling" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
