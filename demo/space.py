"""Stage the demo as a Space: one folder with all that it needs, the package included.

    python demo/space.py FOLDER
    hf upload ORG/NAME FOLDER --repo-type space

A Space installs requirements.txt before it sees anything else of the folder, so polyrep itself comes as a package
beside app.py. The documentation that was read here goes along, where the Space finds it by its name; so does what was
encoded of it, and the Space starts at once.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from collection import RUNS, keys
from storage import open_models, place

from polyrep.data import load_retrieval_dataset
from polyrep.data.named import located
from polyrep.errors import InputError
from polyrep.files import staged_folder

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
OWN = ("app.py", "collection.py", "images.py", "packed.py", "storage.py", "views.py", "style.css")
SPACE = ("README.md", "requirements.txt")
SHOWN = ("frontier", "metaembed")
BESIDE = ("LICENSE", *(f"results/{name}-*.{kind}" for name in SHOWN for kind in ("json", "png")))
_UNWANTED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.partial")


def stage(target: Path, cache: Path) -> bool:
    """Write the folder of a Space.

    Args:
        target: Where to write; must not exist.
        cache: Where the demo keeps its encoded corpus.

    Returns:
        Whether the encoded corpus was there to go along.

    Raises:
        InputError: ``target`` exists.
    """
    if target.exists():
        raise InputError(f"{target}: exists already, and files of an earlier version would stay. Remove it first.")
    corpus = located("python_docs")
    dataset = load_retrieval_dataset(corpus)
    wanted = keys(dataset, open_models(DEMO / "models", RUNS, cache))
    folders = [place(cache, name, key) for name, key in wanted.items()]
    whole = all(folder.is_dir() for folder in folders)
    with staged_folder(target) as staged:
        for name in (*OWN, *SPACE):
            shutil.copyfile(DEMO / name, staged / name)
        shutil.copytree(DEMO / "models", staged / "models", ignore=_UNWANTED)
        shutil.copytree(ROOT / "modeling", staged / "polyrep", ignore=_UNWANTED)
        for name in ("hub_configs", "model_cards"):  # where a wheel has them
            shutil.copytree(ROOT / name, staged / "polyrep" / name, ignore=_UNWANTED)
        for pattern in BESIDE:
            for source in ROOT.glob(pattern):
                copied = staged / source.relative_to(ROOT)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copied)
        shutil.copytree(corpus, staged / "python_docs")
        for folder in folders if whole else ():
            shutil.copytree(folder, staged / "encoded" / folder.name)
    return whole


def main() -> None:
    """Stage a Space."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to make")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "demo", help="of the demo")
    args = parser.parse_args()
    try:
        whole = stage(args.folder, args.cache)
    except InputError as error:
        parser.error(str(error))
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    start = "starts at once" if whole else "encodes the corpus first; run demo/app.py here to spare it that"
    print(f"{args.folder}: {size / 2**20:,.0f} MiB. The Space {start}.")


if __name__ == "__main__":
    main()
