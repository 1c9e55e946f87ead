"""Every code block of README, cards and docs runs, as it stands on its page, in a small copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from pages import Reader, blocks_of, check_languages, read_card, to_run
from small_world import SmallWorld

PAGES = sorted(
    [
        *(path for folder in ("docs", "demo") for path in (ROOT / folder).rglob("*.md")),
        *ROOT.glob("*.md"),
    ]
)
HERE = [page for page in PAGES if page.name != "add-a-method.md"]
"""The pages but the one that test_add_a_method.py follows in a copy of the whole repository."""

STANDING_FOR = {
    "CAPTIONS": "captions",
    "ORG/NAME": "someone/model",
    "photo.jpg": ".sets/captions/images/ball.png",
}
"""Words that stand for something of the reader's, and what that is in the small world."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallWorld]:
    folder = tmp_path_factory.mktemp("world")
    yield SmallWorld(folder)
    shutil.rmtree(folder)  # a gigabyte of weights


@pytest.mark.parametrize("page", [page for page in HERE if to_run(blocks_of(page))], ids=name_of)
def test_page(page: Path, world: SmallWorld) -> None:
    with Reader(world, STANDING_FOR) as reader:
        ran = [block for block in blocks_of(page) if reader.read(block)]
    assert len(ran) == len(re.findall(r"^ *```(?:python|bash)\b", page.read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_language_and_what_is_not_code_can_be_read(page: Path) -> None:
    check_languages(blocks_of(page))


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "model_cards").glob("*.md")], ids=name_of)
def test_what_opens_our_folders_by_transformers_asks_the_reader_nothing(page: Path) -> None:
    """Also a tokenizer is found by the config of its model, whose class is in the folder's code."""
    calls = re.findall(r"\bAuto\w+\.from_pretrained\(([^\n]*)", page.read_text(encoding="utf-8"))
    assert not [call for call in calls if "trust_remote_code=True" not in call and call != "backbone)"]


BROKEN = {
    "```python\nlen(nothing)\n```": "name 'nothing' is not defined",
    "```python\nimport numpy as np\n\nvector = np.zeros((1, 3))  # (1, 4)\n```": r"\(1, 4\)",
    "```bash\npolyrep serch x\n```": "exit status 2",
    "```bash\npython evaluate.py minilm --dataset data/nowhere\n```": "exit status 2: error: data/nowhere",
    "```bash\npython evaluate.py minilm --datasets scifact\n```": "unrecognized arguments: --datasets",
    "```bash\naccelerate launch --num_proceses 2 train.py x\n```": r"^2$",
    "```bash\nmake quickstrat\n```": "quickstrat",
    "```bash\npip install 'polyrep[serch]'\n```": "extras are quickstart",
    "```bash\nls\n```": "teach the tests what ls does",
    "```bash\npolyrep --help | head\n```": "unknown to the shell of the tests",
    "```\ntext\n```": "language ''",
    "```json\n{\n```": "Expecting",
    "```bibtex\n@misc{key,\n  title = {One},\n  author = {Two}\n}\n```": "title",
    "```python\n1": "a block that does not end",
}
"""What a page may get wrong, and what its test then says."""


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_page_fails(text: str, world: SmallWorld, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    with pytest.raises((Exception, SystemExit), match=BROKEN[text]), Reader(world, {}) as reader:
        blocks = blocks_of(page)
        check_languages(blocks)
        for block in blocks:
            reader.read(block)


# --- cards -----------------------------------------------------------------------------------------------------------


ASKED_FOR = "".join(block.text for page in HERE for block in blocks_of(page))
RUNS = [name for name in sorted(os.listdir(ROOT / "hub_configs")) if re.search(rf"/{name}[/\s]", ASKED_FOR)]
"""What pages train or open."""


@pytest.mark.parametrize("run", RUNS)
def test_card_of_a_trained_model(run: str, world: SmallWorld) -> None:
    world.train(run)
    folder = world.folder / "models" / run
    standing_for = {"path/to/this/folder": f"models/{run}/final", "photo.jpg": world.photo}
    backbone = yaml.safe_load((world.folder / "hub_configs" / run / "recipe.yaml").read_text())["backbone"]
    standing_for[f"path/to/{Path(backbone).parent.name}"] = backbone
    read_card(world, folder / "final" / "README.md", standing_for)
