"""Images with captions as data: layouts, splits, vectors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawings import SCENES, write_scenes
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.numpy import save_file

from polyrep import InputError
from polyrep.data import load_retrieval_dataset
from polyrep.data.captions import is_captions
from polyrep.encoding import embed

SPLITS = ["train", "restval", "val", "test", "train"]


def images() -> list[dict]:
    """Karpathy's list: five images, two captions each, ids that are no places."""
    return [
        {
            "imgid": 10 + i,
            "filename": f"{i}.png",
            "split": split,
            "sentences": [{"sentid": 100 + 2 * i + k, "raw": f" a file {i} {k} "} for k in range(2)],
        }
        for i, split in enumerate(SPLITS)
    ]


def karpathy(folder: Path, rows: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dataset_meta.json").write_text(json.dumps({"images": images() if rows is None else rows}))
    return folder


def jsonl(folder: Path, rows: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    splits = ["dev" if split == "val" else split for split in SPLITS]
    own = [{"image": f"{i}.png", "split": s, "captions": [f"a {i}", f"b {i}"]} for i, s in enumerate(splits)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (own if rows is None else rows)))
    return folder


def vectors(count: int = 5, width: int = 3) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def parquet(file: Path, ids: list, values: np.ndarray, column: str = "emb") -> None:
    order = np.random.default_rng(0).permutation(len(ids))  # rows in no order
    table = {"id": [ids[i] for i in order], column: [values[i].tolist() for i in order]}
    pq.write_table(pa.table(table), file)


@pytest.mark.parametrize("column", ["emb", "embedding"])
def test_parquet_vectors_go_with_the_ids_of_karpathys_file(tmp_path, column):
    folder = karpathy(tmp_path / "set")
    parquet(folder / "img_embs.parquet", [10 + i for i in range(5)], vectors(), column)
    parquet(folder / "text_embs.parquet", [100 + i for i in range(10)], vectors(10), column)
    dataset = load_retrieval_dataset(folder, "test")
    assert list(dataset.corpus) == ["13"]
    assert dataset.queries == {"106": "a file 3 0", "107": "a file 3 1"}
    assert dataset.qrels == {"106": {"13": 1}, "107": {"13": 1}}
    np.testing.assert_array_equal(dataset.vectors["document"], vectors()[[3]])
    np.testing.assert_array_equal(dataset.vectors["query"], vectors(10)[[6, 7]])


@pytest.mark.parametrize(("restval", "expected"), [("train", ["10", "11", "14"]), ("ignore", ["10", "14"])])
def test_restval_is_trained_with_or_left_out(tmp_path, restval, expected):
    folder = karpathy(tmp_path / "set")
    np.save(folder / "v.npy", vectors())
    dataset = load_retrieval_dataset(folder, "train", restval=restval)
    assert list(dataset.corpus) == expected
    np.testing.assert_array_equal(dataset.vectors["document"], vectors()[[int(i) - 10 for i in expected]])


def test_dev_is_what_karpathy_calls_val(tmp_path):
    folder = karpathy(tmp_path / "set")
    np.save(folder / "v.npy", vectors())
    assert list(load_retrieval_dataset(folder, "dev").corpus) == list(load_retrieval_dataset(folder, "val").corpus)
    with pytest.raises(InputError, match="split 'test2' has no image.*restval"):
        load_retrieval_dataset(folder, "test2")
    with pytest.raises(InputError, match="--restval 'some'"):
        load_retrieval_dataset(folder, "train", restval="some")


def test_safetensors_hold_images_and_perhaps_captions(tmp_path):
    folder = jsonl(tmp_path / "set")
    save_file({"images": vectors(), "captions": vectors(10)}, folder / "v.safetensors")
    dataset = load_retrieval_dataset(folder, "dev")
    assert list(dataset.queries) == ["2.png#0", "2.png#1"]
    np.testing.assert_array_equal(dataset.vectors["document"], vectors()[[2]])
    np.testing.assert_array_equal(dataset.vectors["query"], vectors(10)[[4, 5]])
    save_file({"captions": vectors(10)}, folder / "v.safetensors")
    with pytest.raises(InputError, match="no tensor 'images'"):
        load_retrieval_dataset(folder, "dev")


def test_drawn_scenes_are_a_data_set_that_is_the_same_each_time(tmp_path):
    folders = [write_scenes(tmp_path / name) for name in ("scenes", "again")]
    seen: dict[str, str] = {}
    for split, count in (("train", 6), ("dev", 2), ("test", 4)):
        dataset, again = (load_retrieval_dataset(folder, split) for folder in folders)
        assert len(dataset.corpus) == count and len(dataset.queries) == len(set(dataset.queries.values())) == 5 * count
        for name, image in dataset.corpus.items():
            assert image.mode == "RGB" and max(image.size) <= 256
            assert image.tobytes() == again.corpus[name].tobytes()
            seen[name] = image.resize((32, 32)).tobytes()
    assert list(seen) == list(SCENES) and len(set(seen.values())) == 12


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_photograph_of_a_camera_opens_as_rgb(tmp_path, mode):
    folder = jsonl(tmp_path / "set", [{"image": "face.jpg", "split": "test", "captions": ["a woman in uniform"]}])
    (folder / "images").mkdir()
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as photograph:
        photograph.convert(mode).save(folder / "images" / "face.jpg")
        opened = load_retrieval_dataset(folder, "test").corpus["face.jpg"]
        assert opened.mode == "RGB" and opened.size == photograph.size
        expected = np.asarray(photograph.convert("L").convert("RGB") if mode == "L" else photograph, float)
    assert abs(np.asarray(opened, float) - expected).mean() < 6


def test_a_photograph_taken_sideways_stands_upright(tmp_path):
    folder = jsonl(tmp_path / "set")
    (folder / "images").mkdir()
    for i in range(5):
        turned = Image.new("RGB", (8, 4))
        exif = turned.getexif()
        exif[0x0112] = 6  # the camera was held at a right angle
        turned.save(folder / "images" / f"{i}.png", exif=exif)
    assert load_retrieval_dataset(folder, "test").corpus["3.png"].size == (4, 8)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"image": "a", "split": "test", "captions": []}], "'a' of split 'test' has no caption"),
        ([{"image": "a", "split": "test", "captions": ["x", " "]}], "caption 'a#1' of 'a' is empty"),
        ([{"image": "a", "split": "test"}], "captions.jsonl:1: not a JSON object with image, split and captions"),
        ([{"image": "a", "split": s, "captions": ["x"]} for s in ("test", "dev")], "image 'a' is there twice"),
        ([{"image": "a", "split": "test", "captions": "dog"}], "captions are a list"),
        ([{"image": 7, "split": "test", "captions": ["x"]}], "image is a name"),
    ],
)
def test_malformed_captions_are_named(tmp_path, rows, words):
    folder = jsonl(tmp_path / "set", rows)
    np.save(folder / "v.npy", vectors(len(rows)))
    with pytest.raises(InputError, match=words):
        load_retrieval_dataset(folder, "test")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.png", "half\ud83d.png", "circle.png"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    folder = jsonl(tmp_path / "set", [{"image": name, "split": "test", "captions": ["x"]}])
    (folder / "images").mkdir()
    (folder / "images" / "circle.png").symlink_to("circle.png")
    with pytest.raises(InputError, match="set.*(no file can have|surrogate|no such file)"):
        load_retrieval_dataset(folder, "test")


@pytest.mark.parametrize("caption", [r"half \ud83d", r"\u200b\ufeff"])
def test_a_caption_that_is_no_text_is_refused(tmp_path, caption):
    folder = jsonl(tmp_path / "set", [{"image": "0.png", "split": "test", "captions": ["CAPTION"]}])
    (file,) = folder.glob("*.jsonl")
    file.write_text("\n" + file.read_text().replace("CAPTION", caption))
    np.save(folder / "v.npy", vectors(1))
    with pytest.raises(InputError, match="captions.jsonl:2: .*surrogate|caption '0.png#0' of '0.png' is empty"):
        load_retrieval_dataset(folder, "test")


def test_karpathys_layout_is_held_to(tmp_path):
    rows = images()
    del rows[0]["sentences"]
    with pytest.raises(InputError, match="not of Karpathy's layout .KeyError: 'sentences'"):
        load_retrieval_dataset(karpathy(tmp_path / "set", rows), "test")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: np.save(f / "v.npy", vectors(4)), r"shape \(4, 3\).*has 5 images"),
        (lambda f: np.save(f / "v.npy", vectors().reshape(-1)), r"shape \(15,\)"),
        (lambda f: np.save(f / "v.npy", vectors().astype(int)), "type int64"),
        (
            lambda f: np.save(f / "v.npy", np.where(vectors() == 9, np.nan, vectors())),
            "1 image vectors are not finite",
        ),
        (lambda f: (f / "v.npy").write_bytes(b"pickle"), "no array of numbers"),
        (lambda f: np.save(f / "v.npy", np.array([{}] * 5)), "no array of numbers"),
        (lambda f: (f / "v.safetensors").write_bytes(b"x"), "damaged or truncated"),
        (lambda f: [np.save(f / name, vectors()) for name in ("a.npy", "b.npy")], r"\['a.npy', 'b.npy'\]"),
        (lambda f: None, r"there are \[\]"),
        (lambda f: parquet(f / "img_embs.parquet", ["0.png"], vectors(1)), "no vector of '3.png' .1 of 1 missing"),
        (lambda f: parquet(f / "img_embs.parquet", ["3.png"], vectors(1), "vector"), "expected id, and emb"),
        (lambda f: (f / "img_embs.parquet").write_bytes(b"PAR1"), "no readable parquet"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path, make, words):
    folder = jsonl(tmp_path / "set")
    make(folder)
    with pytest.raises(InputError, match=words):
        load_retrieval_dataset(folder, "test")


def test_ids_that_are_there_twice_are_refused(tmp_path):
    rows = images()
    rows[3]["sentences"][1]["sentid"] = rows[3]["sentences"][0]["sentid"]
    with pytest.raises(InputError, match="imgid 13 has a sentid twice"):
        load_retrieval_dataset(karpathy(tmp_path / "set", rows), "test")
    folder = karpathy(tmp_path / "other")
    parquet(folder / "img_embs.parquet", [13, 13], vectors(2))
    with pytest.raises(InputError, match="1 ids are there twice"):
        load_retrieval_dataset(folder, "test")


def test_images_may_lie_elsewhere_and_what_datasets_writes_tells_no_captions(tmp_path):
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "photographs" / "3.png")
    folder = jsonl(tmp_path / "set", [{"image": "3.png", "split": "test", "captions": ["x"]}])
    (folder / "images").symlink_to(tmp_path / "photographs")
    (folder / "dataset_infos.json").write_text("{}")
    assert load_retrieval_dataset(folder, "test").corpus["3.png"].size == (8, 4)
    (folder / "dataset_coco.json").write_text("{}")
    with pytest.raises(InputError, match="dataset_coco.json and captions.jsonl both tell captions"):
        load_retrieval_dataset(folder, "test")


def test_files_are_looked_for_at_once_and_only_inside(tmp_path, sentence_model):
    folder = jsonl(tmp_path / "set")
    (folder / "images").mkdir()
    with pytest.raises(InputError, match="3.png: no such file, but '3.png' is in the captions"):
        load_retrieval_dataset(folder, "test")
    jsonl(folder, [{"image": "../../3.png", "split": "test", "captions": ["x"]}])
    with pytest.raises(InputError, match="lies outside"):
        load_retrieval_dataset(folder, "test")
    jsonl(folder, [{"image": "3.png", "split": "test", "captions": ["x"]}])
    (folder / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_retrieval_dataset(folder, "test").corpus["3.png"]


def test_vectors_are_not_encoded_again(tmp_path, sentence_model):
    folder = jsonl(tmp_path / "set")
    np.save(folder / "v.npy", vectors())
    dataset = load_retrieval_dataset(folder, "test")
    with pytest.raises(InputError, match="holds vectors instead of images"):
        embed(sentence_model, dataset.corpus, task="document")


def test_other_folders_are_not_taken_for_captions(beir):
    assert not is_captions(beir)
