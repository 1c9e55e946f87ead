r"""Draw what images become: six drawn scenes, with their heaviest words under several models.

    python benchmarks/dense2sparse_pictures.py --output results --models \
        "no control=models/dense2sparse-mobilenet-free/final" \
        "batch control=models/dense2sparse-mobilenet-controlled/final" \
        "Dense2Sparse=models/dense2sparse-mobilenet-minilm/final"

The last is the shipped run; the first two are it with the flags of PUBLISHED in ``dense2sparse_images.py`` and
``--control none`` or ``batch``. The pixels go through the whole folder. A word in bold is in one of the captions.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from scenes import SCENES

from polyrep.hub import fingerprint, load
from polyrep.report import provenance, write_results

SHOWN = ["ball.png", "zebra.png", "pizza.png", "umbrella.png", "boat.png", "bus.png"]
WORDS = 8


def main() -> None:
    """Encode, draw and write the words down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER of each")
    parser.add_argument("--output", type=Path, required=True, help="folder for dense2sparse-pictures.json and .png")
    args = parser.parse_args()
    images = {name: SCENES[name].draw() for name in SHOWN}
    models = dict(named.split("=", 1) for named in args.models)
    words, rows = {}, []
    for name, folder in models.items():
        model = load(folder, device="cpu")
        vectors = model.encode_document([images[image] for image in SHOWN])
        said = {
            image: {w for text in SCENES[image].captions for w in model.tokenizer.tokenize(text)} for image in SHOWN
        }
        words[name] = dict(zip(SHOWN, model.decode(vectors, top_k=WORDS), strict=True))
        found = [word in said[image] for image in SHOWN for word, _ in words[name][image]]
        row = {"system": name, "dataset": "drawn scenes", "split": "all"}
        rows.append(
            row | {"metric": f"share of the {WORDS} heaviest words in a caption", "value": sum(found) / len(found)}
        )
    draw(images, words, said, args.output / "dense2sparse-pictures.png")
    results = provenance(shlex.join(["python", *sys.argv])) | {
        "name": "dense2sparse-pictures",
        "seeds": [0],
        "settings_tried": 1,
        "models": {name: fingerprint(Path(folder)) for name, folder in models.items()},
        "rows": rows,
        "claims": [],
        "drawn": [],
        "words": words,
    }
    print(write_results(results, args.output))


def draw(images: dict, words: dict, said: dict, path: Path) -> None:
    """A row an image: the picture, then a column of words for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(SHOWN), 1 + len(words), figsize=(2.6 + 2.0 * len(words), 1.75 * len(SHOWN)), layout="constrained"
    )
    for row, image in enumerate(SHOWN):
        for axis in axes[row]:
            axis.set_axis_off()
        axes[row][0].imshow(images[image])
        for column, (name, found) in enumerate(words.items(), start=1):
            axis = axes[row][column]
            if not row:
                axis.set_title(name, fontsize=10)
            for place, (word, weight) in enumerate(found[image]):
                weight_of = "bold" if word in said[image] else "normal"
                height = 0.95 - place / (WORDS + 0.5)
                axis.text(0.02, height, word, fontsize=8.5, va="top", fontweight=weight_of)
                axis.text(0.98, height, f"{weight:.2f}", fontsize=8, va="top", ha="right", color="0.4")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
