"""A page that shows one corpus under every representation.

    python demo/app.py

The first start encodes the corpus, for some minutes on two cores, and keeps it; an interrupted one goes on. What is
computed lies in collection.py, the HTML in views.py; here is which part of the page asks for what.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gradio as gr
import images
import views
from collection import LONGEST, RUNS, Collection, few
from sentence_transformers import SparseEncoder
from storage import open_models

from polyrep.data import load_retrieval_dataset
from polyrep.errors import InputError
from polyrep.evaluation.frontier.pooling import LADDER
from polyrep.files import read_json
from polyrep.hub import load

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "results").is_dir() else HERE.parent
"""Of the clone, or of the Space, in which this file lies beside the results."""

logger = logging.getLogger("demo")

EXAMPLES = (
    "q:pandas.read_csv",
    "q:os.truncate",
    "q:threading.Condition.notify_all",
    "q:numpy.cov",
    "q:matplotlib.pyplot.ylim",
    "q:email.utils.parseaddr",
)
"""Test queries to begin with, where the data set has them."""

RESULTS = ROOT / "results"
FRONTIERS = ("python_docs", "tldr_pages", "scifact")
BUDGETS = {"trained with the encoder": "metaembed-text", "a head over a frozen model": "metaembed-frozen"}
"""What MetaEmbed's vectors are made by -> name of its results."""

MOST_VECTORS = 16
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models", "show_progress": "minimal"}
"""One computation at a time: two cores give one query its milliseconds, and two queries neither theirs."""

INTRODUCTION = """<div class="polyrep"><h1>One embedding model, many retrieval representations</h1>
<p class="lead">Ask {documents:,} documents of {name} a question and see what each representation finds, how many bytes
a document takes in it, and how long a search takes.</p></div>"""


def main() -> None:
    """Open or encode the corpus, then serve the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="python_docs", help="name, folder or Hub id, as in evaluate.py")
    parser.add_argument("--documents", type=int, default=0, help="so many of its documents; 0: all")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="packed models, or outputs of runs")
    parser.add_argument("--vision", help="folder or Hub id of a Dense2Sparse model of images, for the tab Words")
    parser.add_argument("--revision", help="commit of that model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that that model carries")
    parser.add_argument("--cache", type=Path, default=_default_cache(), help="where the encoded corpus is kept")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="make a public link")
    args = parser.parse_args()
    if args.documents < 0:
        parser.error(f"--documents {args.documents}: a corpus has no fewer than none. Use 0 for all.")
    try:
        dataset = load_retrieval_dataset(args.dataset)
        if args.documents:
            shown = [query for query in EXAMPLES if query in dataset.qrels] or list(dataset.qrels)[: len(EXAMPLES)]
            dataset = few(dataset, args.documents, [document for query in shown for document in dataset.qrels[query]])
        images_model = open_vision(args.vision, args.revision, args.trust_remote_code) if args.vision else None
        collection = Collection(dataset, open_models(args.models, RUNS, args.cache), args.cache, images_model)
    except InputError as error:
        parser.error(str(error))
    demo = build(collection)
    demo.queue(max_size=32)
    demo.launch(
        server_port=args.port,
        share=args.share,
        ssr_mode=False,
        footer_links=[],
        max_file_size=images.MOST_BYTES,
        css_paths=HERE / "style.css",
        theme=theme(),
    )


def open_vision(name: str, revision: str | None, trusted: bool) -> Any:
    """The model that makes words of images.

    Raises:
        InputError: It cannot be opened, or makes none.
    """
    model = load(name, revision=revision, trust_remote_code=trusted)
    if not isinstance(model, SparseEncoder) or "image" not in getattr(model[0], "modalities", ()):
        raise InputError(
            f"--vision {name}: gives no words of images. Name a Dense2Sparse model on a dual encoder, such as "
            "`train.py hub_configs/dense2sparse-mobilenet-minilm` makes."
        )
    return model


def theme() -> gr.themes.Base:
    """Gradio's plain theme with the reader's own fonts, which nobody must fetch, and colours of enough contrast."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    colors: dict[str, Any] = {
        "button_primary_background_fill": "#1d5fa8",
        "button_primary_background_fill_hover": "#174c86",
        "button_primary_background_fill_dark": "#1d5fa8",
        "button_primary_background_fill_hover_dark": "#174c86",
        "button_primary_text_color": "#ffffff",
    }
    for part in ("body_text_color_subdued", "block_label_text_color", "block_title_text_color"):
        colors |= {part: "#566274", f"{part}_dark": "#a3afbf"}
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", **fonts).set(**colors)


def _default_cache() -> Path:
    """A Space brings its corpus encoded; a clone makes it."""
    return HERE / "encoded" if (HERE / "encoded").is_dir() else ROOT / ".cache" / "demo"


def answered(make: Callable[..., str]) -> Callable[..., str]:
    """Turn an error into a message on the page: of bad input its own words, of a fault of ours that the log has it."""

    @wraps(make)
    def answer(*inputs: Any) -> str:
        try:
            content = make(*inputs)
        except InputError as error:
            content = views.refusal(str(error))
        except Exception:
            logger.exception("%s failed", make.__name__)
            content = views.refusal("Something went wrong here. The server's log says what; try another input.")
        return f'<div class="polyrep">{content}</div>'

    return answer


def build(collection: Collection) -> gr.Blocks:
    """The page over a collection."""
    queries = example_queries(collection)
    with gr.Blocks(
        title="polyrep: one model, many representations",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(60, 60),
    ) as demo:
        _html(INTRODUCTION.format(documents=len(collection.ids), name=views.escape(collection.dataset.name)))
        with gr.Tab("Search"):
            _search_tab(collection, queries)
        with gr.Tab("Words"):
            _words_tab(collection, queries)
        with gr.Tab("Kept tokens"):
            _kept_tab(collection, queries)
        with gr.Tab("Uncertainty"):
            _uncertainty_tab(collection, queries)
        with gr.Tab("Layers"):
            _layers_tab(collection, queries)
        with gr.Tab("Vectors"):
            _vectors_tab()
        with gr.Tab("Frontier"):
            _frontier_tab()
    return demo


def example_queries(collection: Collection) -> list[str]:
    """Test queries to try: the known ones, or else the first of the data set."""
    queries = collection.dataset.queries
    known = [queries[identifier] for identifier in EXAMPLES if identifier in queries]
    return known or list(queries.values())[: len(EXAMPLES)]


def _query_form(queries: list[str], button: str, make: Callable[[str], str]) -> None:
    """A text box with a button, and test queries to press; what ``make`` answers stands below."""
    with gr.Row(equal_height=False):
        box = gr.Textbox(
            label="Query", value=queries[0], placeholder="Type a few words", scale=4, min_width=260, max_lines=1
        )
        go = gr.Button(button, variant="primary", scale=1, min_width=120)
    examples = gr.HTML(views.choices("Queries of the test set", queries), js_on_load=PRESSED, apply_default_css=False)
    answer = answered(make)
    result = _html(answer(queries[0]))
    gr.on([box.submit, go.click], answer, box, result, **ONE_AT_A_TIME)

    def choose(event: gr.EventData) -> str:
        return queries[_pressed(event, queries)]

    filled = examples.click(choose, None, box, queue=False)
    filled.then(answer, box, result, **ONE_AT_A_TIME)


PRESSED = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) trigger("click", { number: Number(button.dataset.number) });
});"""
"""Tells Python which button of an HTML part was pressed; the browser presses it by keyboard, too."""


def _pressed(event: gr.EventData, choices: list[Any]) -> int:
    """The number that :data:`PRESSED` sent; the first for anything that it would not send."""
    number = (event._data or {}).get("number")
    return number if isinstance(number, int) and 0 <= number < len(choices) else 0


def _html(content: str) -> gr.HTML:
    return gr.HTML(content, apply_default_css=False)


def _explain(text: str) -> None:
    _html(f'<div class="polyrep"><p>{text}</p></div>')


def _search_tab(collection: Collection, queries: list[str]) -> None:
    def search(text: str) -> str:
        found = collection.search(text)
        return views.search(text.strip(), found, text.strip() in collection.relevant)

    _query_form(queries, "Search", search)


def _words_tab(collection: Collection, queries: list[str]) -> None:
    def text_words(text: str, task: str) -> str:
        return views.words(collection.words(text, "query" if task == "query" else "document"), task)

    def uploaded(content: bytes | None) -> str:
        if not content:
            raise InputError("No file came, or an empty one. Choose a photograph.")
        image = images.opened(content)
        return views.words(collection.image_words(image), "image", image, "Your image")

    _explain(
        "Dense2Sparse turns one dense vector into weighted words, for an inverted index that a person can read. A "
        "text's own words get a learned weight; others are added that it does not hold."
    )
    with gr.Row(equal_height=False):
        box = gr.Textbox(label="Text", value=queries[0], scale=4, min_width=260, lines=2, max_lines=6)
        task = gr.Radio(["query", "document"], value="query", label="Read it as a", scale=1)
    go = gr.Button("Show its words", variant="primary")
    answer = answered(text_words)
    result = _html(answer(queries[0], "query"))
    gr.on([box.submit, go.click, task.input], answer, [box, task], result, **ONE_AT_A_TIME)

    if collection.images is None:
        _explain(
            "The same with a photograph: its pixels become words of such an index, by which captions find it. The "
            "demo brings no model of images. Start it with <code>--vision MODEL</code>, a Dense2Sparse model on a "
            "dual encoder: what <code>train.py hub_configs/dense2sparse-mobilenet-minilm</code> makes of your "
            "captions, or a repository that holds one."
        )
        return
    _explain(
        "The same with a photograph: its pixels become words of such an index, by which captions find it. Upload one "
        f"({', '.join(images.FORMATS)}; at most {images.MOST_BYTES // 2**20} MB and "
        f"{images.MOST_PIXELS // 10**6} million pixels; deleted within minutes)."
    )
    # Of any type, since the browser would drop a file that does not fit without a word.
    upload = gr.UploadButton("Upload a photograph", type="binary", size="md")
    upload.upload(answered(uploaded), upload, _html(""), **ONE_AT_A_TIME)


def _kept_tab(collection: Collection, queries: list[str]) -> None:
    def kept(text: str, k: float) -> str:
        return views.kept_tokens(collection.kept_tokens(text, int(min(max(k, 1), MOST_VECTORS))))

    _explain(
        "Late interaction keeps a vector for each token of a document. ReinPool weighs them, groups them by direction "
        "and keeps one vector a group."
    )
    corpus = {document: text[: LONGEST["document"]] for document, text in collection.dataset.corpus.items()}
    relevant = dict.fromkeys(document for query in queries for document in collection.relevant[query][:1])
    documents = sorted(relevant or collection.ids[:1], key=lambda document: -len(corpus[document]))
    with gr.Row(equal_height=False):
        box = gr.Textbox(label="Document", value=corpus[documents[0]], lines=4, max_lines=8, scale=3)
        with gr.Column(scale=1, min_width=220):
            page = gr.Dropdown(documents, label="Or a page of the corpus", value=documents[0])
            k = gr.Slider(1, MOST_VECTORS, value=8, step=1, label="Vectors kept, at most")
    go = gr.Button("Show what is kept", variant="primary")
    answer = answered(kept)
    result = _html(answer(corpus[documents[0]], 8))
    gr.on([box.submit, go.click, k.change], answer, [box, k], result, trigger_mode="always_last", **ONE_AT_A_TIME)
    fill = page.input(lambda document: corpus.get(document, ""), page, box, queue=False)
    fill.then(answer, [box, k], result, **ONE_AT_A_TIME)


def _uncertainty_tab(collection: Collection, queries: list[str]) -> None:
    _explain(
        "The Gaussian model makes of a text a mean and a variance. A query with less in it, cut short or misspelt, "
        "should be wider than the whole: the model is less sure what is meant, and says so before any search."
    )
    _query_form(queries, "Compare", lambda text: views.uncertainty(collection.uncertainty(text)))
    _explain(
        "What it is good for: of the test queries of tldr-pages, SciTLDR and SciFact, 93 % are called wider when they "
        "are cut short and 89 % when they are misspelt. What it is not: <b>a variance does not rank better</b>. Of "
        "equal width and equally supervised, a plain vector is as good. And once the search is done, the gap between "
        "its first two scores says far more of how well it went."
    )


def _layers_tab(collection: Collection, queries: list[str]) -> None:
    _explain(
        "MultiLayer reads every layer of the encoder, not the last alone: a document is the sum of one linear map a "
        "layer, brought to unit length. That length is one number for the whole document, so its score is a sum over "
        "its layers, exactly."
    )
    _query_form(queries, "Take apart", lambda text: views.layers(collection.layer_scores(text)))
    _explain(
        "Each column is the query's inner product with what this layer adds to the document, over the document's "
        "length. The column “sum” adds them up; “score” is what the model itself gives. The Search tab's score may "
        "differ in the fourth digit, since the index holds 16 bits a number."
    )


def nested_results(made: str) -> tuple[str, dict[str, Any] | None]:
    """Name of the results of MetaEmbed, and these; None if they have not been measured."""
    name = BUDGETS.get(made) or next(iter(BUDGETS.values()))
    path = RESULTS / f"{name}.json"
    return name, read_json(path) if path.is_file() else None


def _vectors_tab() -> None:
    def at(made: str, number: int | None) -> str:
        if number not in LADDER:
            raise InputError(f"Choose how many vectors a document has: {', '.join(map(str, LADDER))}.")
        name, results = nested_results(made)
        return views.unmeasured(name) if results is None else views.few_vectors(results, number)

    def shown(made: str) -> str:
        name, results = nested_results(made)
        if results is None:
            return ""
        return views.vectors_curve((RESULTS / f"{name}.png").read_bytes(), results, name)

    _explain(
        "A model of MetaEmbed writes 32 vectors of a document, and any first ones of them are an index by "
        "themselves. So the size is chosen when an index is made or searched, not when the model is trained. Beside "
        "it are as many vectors by other means, of as many bytes."
    )
    with gr.Row(equal_height=False):
        made = gr.Radio(list(BUDGETS), value=next(iter(BUDGETS)), label="MetaEmbed", scale=1)
        number = gr.Radio(list(LADDER), value=8, label="Vectors of a document", scale=1)
    answer, draw = answered(at), answered(shown)
    result = _html(answer(made.value, number.value))
    picture = _html(draw(made.value))
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([made.input, number.input], answer, [made, number], result, **quick)
    made.input(draw, made, picture, **quick)


def _frontier_tab() -> None:
    tables = {name: json.loads((RESULTS / f"frontier-{name}.json").read_text(encoding="utf-8")) for name in FRONTIERS}

    def recommended(name: str, size: float | None, time: float | None) -> str:
        if size is None or time is None:
            raise InputError("Choose how many bytes and milliseconds there are.")
        results = tables[name if name in tables else FRONTIERS[0]]
        budget = {"bytes": size, "ms": time}
        return views.recommended(results, budget)

    def shown(name: str) -> str:
        name = name if name in tables else FRONTIERS[0]
        content = (RESULTS / f"frontier-{name}.png").read_bytes()
        return views.frontier(content, tables[name], name)

    _explain(
        "What to take for your bytes and milliseconds, of everything that was fitted to the late-interaction model "
        "and measured on a whole test set. Full MaxSim and BM25 are the lines across; rings are on the front: nothing "
        "else is as good for as few bytes."
    )
    with gr.Row(equal_height=False):
        name = gr.Radio(list(FRONTIERS), value=FRONTIERS[0], label="Data set", scale=1)
        sizes = [(f"{2.0**power:,g}", 2.0**power) for power in range(4, 17)]
        times = [(f"{2.0**power:,g}", 2.0**power) for power in range(-3, 9)]
        size = gr.Dropdown(sizes, value=1024.0, label="Bytes a document, at most", scale=2, min_width=260)
        time = gr.Dropdown(times, value=8.0, label="Milliseconds a query, at most", scale=2, min_width=260)
    answer, draw = answered(recommended), answered(shown)
    result = _html(answer(FRONTIERS[0], size.value, time.value))
    picture = _html(draw(FRONTIERS[0]))
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([name.input, size.change, time.change], answer, [name, size, time], result, **quick)
    name.input(draw, name, picture, **quick)


if __name__ == "__main__":
    main()
