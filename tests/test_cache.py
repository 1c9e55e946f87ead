"""Cached embeddings: equal to what the model gives, found again only for the same inputs, and whole or absent."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, run_python
from PIL import Image

from polyrep import InputError
from polyrep.encoding import Embeddings, cache, embed, encoders
from polyrep.encoding.cache import cache_key, open_cache

TEXTS = DOCUMENTS | {"long": "open the list of ports " * 9, "short": "x"}  # cut off at 64 tokens; and the shortest
HALF = {"rtol": 2**-11, "atol": 1e-6}  # float16 has 11 significant bits, and rounding errs by half of the last
EXACT = {"rtol": 1e-4, "atol": 1e-6}


class Fake(list):
    """Enough of a model for the cache: no modules, and a text such as ``1.5`` becomes vectors ``(1.5, 1)``.

    Args:
        before: Called with each chunk before it is encoded.
    """

    prompts: dict[str, str] = {}
    default_prompt_name = None
    max_seq_length = 8
    tokenizer = SimpleNamespace(get_vocab=dict)

    def __init__(self, before: Callable[[list[str]], None] = lambda texts: None):
        super().__init__()
        self.before = before

    def encode_document(self, texts: list[str], convert_to_sparse_tensor: bool = False, **_: Any) -> Any:
        self.before(texts)
        values = np.array([[float(text), 1.0] for text in texts], np.float32)
        return torch.from_numpy(values - [[0.0, 1.0]]).to_sparse() if convert_to_sparse_tensor else values


class FakeTokens(Fake):
    """A text becomes as many vectors as it has characters."""

    def encode_document(self, texts: list[str], **_: Any) -> list[np.ndarray]:
        rows = super().encode_document(texts)
        return [np.repeat(row[None], len(text), 0) for text, row in zip(texts, rows, strict=True)]


NUMBERS = {f"d{i}": str(i) for i in range(8)}


def fake_embed(model: Fake, cache_dir: Path | None, texts: dict[str, str] = NUMBERS, **options: Any) -> Embeddings:
    return embed(model, texts, task="document", cache_dir=cache_dir, show_progress=False, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, starting threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks for the texts above, the last with fewer than three texts."""
    monkeypatch.setattr(cache, "CHUNK", 3)


# Equal to what the model gives for each text by itself.


def one_by_one(model: Any, kind: str, task: str) -> list[np.ndarray]:
    encode = model.encode_query if task == "query" else model.encode_document
    if kind == "layers":
        return [layer_means(model, model.prompts.get(task, "") + text) for text in TEXTS.values()]
    if kind == "sparse":
        return [encode([text], convert_to_sparse_tensor=True).to_dense()[0].cpu().numpy() for text in TEXTS.values()]
    return [encode([text], convert_to_numpy=True)[0] for text in TEXTS.values()]


def layer_means(model: Any, text: str) -> np.ndarray:
    """Mean over the tokens of one text, unpadded, after every layer."""
    tokens = model.tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        states = model[0].model(**tokens, output_hidden_states=True).hidden_states
    return np.stack([np.mean([vector.numpy() for vector in layer[0]], axis=0) for layer in states])


def rows_of(embeddings: Embeddings, text: int) -> np.ndarray:
    if embeddings.offsets is None:
        return embeddings.values[text]
    part = slice(*embeddings.offsets[text : text + 2])
    if embeddings.kind == "tokens":
        return embeddings.values[part]
    row = np.zeros(embeddings.dim, embeddings.values.dtype)
    row[embeddings.indices[part]] = embeddings.values[part]
    return row


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", EXACT), ("float16", HALF)])
@pytest.mark.parametrize(
    ("kind", "family", "dim"),
    [
        ("sentence", "sentence_model", 32),
        ("tokens", "multi_vector_model", 16),
        ("sparse", "sparse_model", 64),
        ("layers", "sentence_model", 32),
    ],
)
@pytest.mark.parametrize("task", ["document", "query"])
def test_a_cache_holds_what_the_model_gives(request, monkeypatch, tmp_path, kind, family, dim, task, dtype, tolerance):
    model = request.getfixturevalue(family)
    monkeypatch.setitem(model.prompts, "query", "list: ")
    asked = "layers" if kind == "layers" else None  # the others are what the family of the model gives
    embeddings = embed(
        model, TEXTS, task=task, cache_dir=tmp_path, kind=asked, dtype=dtype, batch_size=2, show_progress=False
    )
    assert (embeddings.kind, embeddings.dim, len(embeddings)) == (kind, dim, len(TEXTS))
    assert isinstance(embeddings.values, np.memmap) and not embeddings.values.flags.writeable
    assert embeddings.values.dtype == dtype
    expected = one_by_one(model, kind, task)
    for text, vectors in enumerate(expected):
        assert rows_of(embeddings, text).shape == vectors.shape
        np.testing.assert_allclose(rows_of(embeddings, text), vectors, **tolerance)
    lengths = {"sentence": 1, "layers": 3, "sparse": 8}  # one; two layers and the embeddings; k=8
    assert embeddings.lengths.tolist() == [lengths.get(kind) or len(vectors) for vectors in expected]


def test_a_prompt_changes_what_a_cache_of_queries_holds(monkeypatch, sentence_model):
    """Otherwise the test above could not tell an ignored prompt from a used one."""
    plain = one_by_one(sentence_model, "layers", "query")
    monkeypatch.setitem(sentence_model.prompts, "query", "list: ")
    assert not np.allclose(plain, one_by_one(sentence_model, "layers", "query"), **HALF)


def test_a_model_without_a_length_limit_is_cached(static_model, tmp_path):
    assert static_model.max_seq_length == math.inf  # which JSON cannot say
    embeddings = embed(static_model, TEXTS, task="document", cache_dir=tmp_path, dtype="float32", show_progress=False)
    np.testing.assert_allclose(embeddings.values, static_model.encode(list(TEXTS.values())), **EXACT)


def test_texts_without_any_active_term_stay_empty(tmp_path):
    texts = {"a": "0", "b": "0", "c": "0", "d": "0", "e": "2"}  # a whole chunk of empty ones, then a mixed one
    embeddings = fake_embed(Fake(), tmp_path, texts, kind="sparse")
    assert embeddings.lengths.tolist() == [0, 0, 0, 0, 1]
    assert (embeddings.values.tolist(), embeddings.indices.tolist()) == ([2], [0])
    nothing = fake_embed(Fake(), tmp_path, {"a": "0"}, kind="sparse")
    assert (len(nothing), nothing.lengths.tolist(), len(nothing.values), len(nothing.indices)) == (1, [0], 0, 0)


# Page images, which are decoded when they are asked for.


class FakePages(Fake):
    """A page becomes the vector of its first pixel."""

    def encode_document(self, texts: list[Any], **_: Any) -> np.ndarray:
        self.before(texts)
        return np.array([page.getpixel((0, 0))[:2] for page in texts], np.float32)


class Pages(dict):
    """Counts how often each page is decoded, and how many are held at once."""

    def __init__(self, pages: dict[str, Image.Image]):
        super().__init__(pages)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Image.Image:
        self.asked.append(name)
        return super().__getitem__(name)


def pages(**colours: tuple[int, int, int]) -> Pages:
    return Pages({name: Image.new("RGB", (3, 2), colour) for name, colour in colours.items()})


def test_pages_are_encoded_in_order_and_fetched_a_chunk_at_a_time(tmp_path):
    texts = pages(**{f"p{i}": (i + 1, 7, 0) for i in range(7)})
    texts.digests = {name: f"hash of {name}" for name in texts}  # known already, so the key decodes no page
    held: list[int] = []
    embeddings = fake_embed(FakePages(lambda chunk: held.append(len(texts.asked))), tmp_path, texts)
    np.testing.assert_array_equal(embeddings.values, [[i + 1, 7] for i in range(7)])
    assert held == [3, 6, 7], "no page is decoded before its chunk's turn"


def test_pages_are_found_again_by_their_pixels_size_and_mode():
    def key(texts: Any) -> dict[str, Any]:
        return cache_key(Fake(), texts, task="document", kind="sentence", dtype="float16")["texts"]

    texts = pages(a=(1, 2, 3), b=(4, 5, 6))
    assert key(texts) == key(pages(a=(1, 2, 3), b=(4, 5, 6)))
    turned = {"a": texts["a"].resize((2, 3)), "b": texts["b"]}  # of one colour, so the bytes are the same
    grey = {"a": Image.frombytes("L", (9, 2), texts["a"].tobytes()), "b": texts["b"]}
    others = [pages(a=(1, 2, 4), b=(4, 5, 6)), pages(b=(4, 5, 6), a=(1, 2, 3)), turned, grey]
    assert all(key(other) != key(texts) for other in others)


# Read again instead of encoded again, and only if nothing changed.


def test_a_second_call_does_not_use_the_model(monkeypatch, sentence_model, tmp_path):
    def call(texts: dict[str, str]) -> Embeddings:
        return embed(sentence_model, texts, task="document", cache_dir=tmp_path, show_progress=False)

    first = call(TEXTS)
    monkeypatch.setitem(encoders._ENCODERS, "sentence", lambda *_: pytest.fail("encoded again"))
    second = call(dict(TEXTS))
    assert second.path == first.path and second.seconds == first.seconds
    np.testing.assert_array_equal(second.values, first.values)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        call(TEXTS | {"short": "y"})


def test_a_copy_of_a_model_has_its_key(sentence_model):
    models = (sentence_model, copy.deepcopy(sentence_model))
    first, second = (cache_key(m, TEXTS, task="query", kind="sentence", dtype="float16") for m in models)
    assert first == second


def test_what_was_encoded_before_does_not_change_the_key(sentence_model):
    def key() -> dict[str, Any]:
        return cache_key(model, TEXTS, task="query", kind="sentence", dtype="float16")

    model = copy.deepcopy(sentence_model)
    model.tokenizer.backend_tokenizer.no_truncation()  # as it is right after loading
    model.tokenizer.backend_tokenizer.no_padding()
    before = key()
    model.encode(list(TEXTS.values()))
    assert key() == before
    model.tokenizer.add_tokens(["ports"])
    assert key()["tokenizer"] != before["tokenizer"]


def change_weight(model: Any, patch: pytest.MonkeyPatch) -> None:
    parameter = next(model[0].parameters())
    changed = parameter.detach().clone()
    changed[-1, -1] = torch.nextafter(changed[-1, -1], torch.tensor(9.0))
    patch.setattr(parameter, "data", changed)


CHANGES: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], dict[str, Any] | None], str]] = {
    "text": (lambda *_: {"texts": TEXTS | {"d1": "tar: archive files into one fil"}}, "texts.sha256: cached '"),
    "id": (lambda *_: {"texts": {("D1" if k == "d1" else k): v for k, v in TEXTS.items()}}, "texts.sha256: cached '"),
    "border of id and text": (
        lambda *_: {"texts": {(k + v[0] if k == "d1" else k): v[k == "d1" :] for k, v in TEXTS.items()}},
        "texts.sha256: cached '",
    ),
    "order": (lambda *_: {"texts": dict(reversed(TEXTS.items()))}, "texts.sha256: cached '"),
    "number of texts": (lambda *_: {"texts": DOCUMENTS}, "texts.count: cached 7, wanted 5"),
    "task": (lambda *_: {"task": "query"}, "task: cached 'document', wanted 'query'"),
    "kind": (lambda *_: {"kind": "layers"}, "kind: cached 'sentence', wanted 'layers'"),
    "dtype": (lambda *_: {"dtype": "float32"}, "dtype: cached 'float16', wanted 'float32'"),
    "max_length": (lambda m, patch: patch.setattr(m, "max_seq_length", 32), "max_length: cached 64, wanted 32"),
    "truncate_dim": (lambda m, patch: patch.setattr(m, "truncate_dim", 8), "truncate_dim: cached None, wanted 8"),
    "prompt": (
        lambda m, patch: patch.setitem(m.prompts, "document", "d:"),
        "prompts.document: cached '', wanted 'd:'",
    ),
    "pooling": (lambda m, patch: patch.setattr(m[1], "pooling_mode", "cls"), "modules[1].config: cached '"),
    "one weight, by one bit": (change_weight, "modules[0].weights: cached '"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_ingredient_changes_the_key_and_is_named(monkeypatch, caplog, sentence_model, tmp_path, change):
    def call(texts=TEXTS, task="document", **options) -> Embeddings:
        return embed(sentence_model, texts, task=task, cache_dir=tmp_path, show_progress=False, **options)

    def key(texts=TEXTS, task="document", kind="sentence", dtype="float16") -> dict[str, Any]:
        return cache_key(sentence_model, texts, task=task, kind=kind, dtype=dtype)

    path, before = call().path, key()
    apply, named = CHANGES[change]
    settings = apply(sentence_model, monkeypatch) or {}
    after = key(**settings)
    assert after != before
    with pytest.raises(InputError) as refusal:
        open_cache(path, after)
    assert str(path) in str(refusal.value) and named in str(refusal.value)
    assert str(refusal.value).count(": cached") == 1 + (change == "number of texts")  # that changes the hash as well
    caplog.set_level(logging.INFO, logger="polyrep.encoding.cache")
    assert call(**settings).path != path and len(names(tmp_path)) == 2
    same_name = not settings.keys() & {"task", "kind"}
    assert (f"{path.name} differs in" in caplog.text and named in caplog.text) == same_name
    assert open_cache(path, before).path == path


# Damaged and foreign folders.


def damage(path: Path, manifest: str | bytes | None) -> None:
    (path / "manifest.json").unlink()
    if manifest is not None:
        (path / "manifest.json").write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)


FOREIGN = '{"format": "polyrep-embeddings-0", "key": {}, "arrays": {}}'
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "short values": (lambda p: os.truncate(p / "values.bin", 31), ["values.bin: has 31 bytes, expected 32"]),
    "long values": (lambda p: os.truncate(p / "values.bin", 33), ["values.bin: has 33 bytes, expected 32"]),
    "no values": (lambda p: (p / "values.bin").unlink(), ["values.bin: is missing, expected 32"]),
    "no manifest": (lambda p: damage(p, None), ["no readable manifest.json"]),
    "cut manifest": (lambda p: damage(p, '{"format": '), ["no readable manifest.json"]),
    "binary manifest": (lambda p: damage(p, b"\xff\xfe"), ["no readable manifest.json"]),
    "list for a manifest": (lambda p: damage(p, "[]"), ["manifest.json", cache.FORMAT]),
    "manifest of another format": (lambda p: damage(p, FOREIGN), ["manifest.json", cache.FORMAT, "Delete"]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_or_foreign_cache_is_refused_and_the_file_named(tmp_path, kind):
    path = fake_embed(Fake(), tmp_path).path  # 8 texts, 2 numbers, 2 bytes each: 32
    break_it, expected = DAMAGES[kind]
    break_it(path)
    for attempt in (lambda: open_cache(path), lambda: fake_embed(Fake(), tmp_path)):
        with pytest.raises(InputError) as refusal:
            attempt()
        for part in [str(path), *expected]:
            assert part in str(refusal.value)


@pytest.mark.parametrize("array", ["offsets", "indices"])
def test_every_array_of_a_cache_is_checked(tmp_path, array):
    path = fake_embed(Fake(), tmp_path, kind="sparse").path
    os.truncate(path / f"{array}.bin", 4)
    with pytest.raises(InputError, match=rf"{array}\.bin: has 4 bytes"):
        open_cache(path)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match="no readable manifest.json .* is no embedding cache"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no readable manifest.json .* is no embedding cache"):
        open_cache(tmp_path)


# What cannot be encoded.


def test_no_text_is_refused(sentence_model, tmp_path):
    with pytest.raises(InputError, match="queries: no text"):
        embed(sentence_model, {}, task="query", cache_dir=tmp_path, name="queries")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", ""])
def test_a_type_that_caches_do_not_have_is_refused(sentence_model, tmp_path, dtype):
    with pytest.raises(InputError, match=f"dtype '{dtype}'.*float16 or float32"):
        embed(sentence_model, TEXTS, task="query", cache_dir=tmp_path, dtype=dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("model", [Fake(), FakeTokens()])
def test_a_number_too_large_for_float16_is_refused_with_the_id_of_its_text(tmp_path, model):
    texts = NUMBERS | {"large": "65504", "zero": "0", "too large": "1e5", "last": "1"}
    kind = "tokens" if isinstance(model, FakeTokens) else "sentence"
    with pytest.raises(InputError, match="'too large': its vector is not finite in float16.*use float32"):
        fake_embed(model, tmp_path, texts, kind=kind)
    assert names(tmp_path) == []
    embeddings = fake_embed(model, tmp_path, texts, kind=kind, dtype="float32")
    assert rows_of(embeddings, list(texts).index("too large")).max() == 1e5


@pytest.mark.parametrize(("kind", "bad"), [("sentence", "nan"), ("sentence", "-inf"), ("sparse", "nan")])
def test_a_vector_that_is_not_finite_is_refused_also_in_float32(tmp_path, kind, bad):
    with pytest.raises(InputError, match="'broken': its vector is not finite in float32"):
        fake_embed(Fake(), tmp_path, NUMBERS | {"zero": "0", "broken": bad, "last": "1"}, kind=kind, dtype="float32")


# Whole or absent.


class FailingSecondChunk:
    def __init__(self, error: BaseException):
        self.error, self.chunks = error, 0

    def __call__(self, texts: list[str]) -> None:
        self.chunks += 1
        if self.chunks == 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_nothing(monkeypatch, tmp_path, error):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cache_dir in (tmp_path, None):
        failing = FailingSecondChunk(error)
        with pytest.raises(type(error)):
            fake_embed(Fake(failing), cache_dir)
        assert failing.chunks == 2 and names(tmp_path) == []
    np.testing.assert_array_equal(fake_embed(Fake(), tmp_path).values[:, 0], range(8))


def test_without_a_cache_folder_the_files_go_with_the_result(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    embeddings = fake_embed(Fake(), None)
    assert len(names(tmp_path)) == 1 and tmp_path in embeddings.path.parents
    np.testing.assert_array_equal(embeddings.values[:, 0], range(8))
    del embeddings
    gc.collect()
    assert names(tmp_path) == []


def test_of_two_processes_the_first_to_finish_keeps_its_cache(tmp_path):
    """The other process is played by its result: it puts the finished folder in place while this one still encodes."""
    theirs = fake_embed(Fake(), tmp_path / "theirs").path
    manifest = json.loads((theirs / "manifest.json").read_text())
    (theirs / "manifest.json").write_text(json.dumps(manifest | {"seconds": 12345.0}))
    ours = tmp_path / "ours" / theirs.name

    def finish_theirs(texts: list[str]) -> None:
        if texts == ["0", "1", "2"]:
            assert not ours.exists()
            shutil.copytree(theirs, ours)

    embeddings = fake_embed(Fake(finish_theirs), tmp_path / "ours")
    assert embeddings.seconds == 12345.0
    np.testing.assert_array_equal(embeddings.values[:, 0], range(8))
    assert names(tmp_path / "ours") == [theirs.name]


FULL_DISKS = {
    "no room": (8, 40, 0),
    "room for a part of the vectors": (8, 40, 1000),
    "room for all but their last byte": (8, 40, 8 * 40 * 8 - 1),
    "room for them but not for their offsets": (300, 1, 300 * 8),
    "room for both but not for the manifest": (8, 4, 8 * 4 * 8),
    "enough room": (8, 40, 8 * 40 * 8),
}
"""Texts; characters of each, thus vectors, each of 2 numbers of 4 bytes; bytes of the largest file that fits.

There is one offset of 8 bytes more than there are texts.
"""


def fill_the_disk_then_die(folder: str) -> None:
    """Runs in a process of its own. A limit on the size of files stands for a disk that is full."""
    cache.CHUNK = 3
    outcomes: dict[str, Any] = {}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, (count, length, limit) in FULL_DISKS.items():
        texts = {f"d{i}": f"{i % 10:0{length}d}" for i in range(count)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            written = fake_embed(FakeTokens(), Path(folder) / "full", texts, kind="tokens", dtype="float32")
            result: Any = written.values.nbytes
        except OSError as error:
            result = error.strerror or str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        outcomes[name] = [result, names(Path(folder) / "full")]
    print(json.dumps(outcomes), flush=True)
    fake_embed(Fake(lambda texts: texts[0] == "3" and os.kill(os.getpid(), signal.SIGKILL)), Path(folder) / "killed")


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What a process left that met a full disk and was killed in the middle of encoding."""
    folder = tmp_path_factory.mktemp("dead")
    code = "import sys, test_cache; test_cache.fill_the_disk_then_die(sys.argv[1])"
    process = run_python("-c", code, str(folder))
    assert process.returncode == -signal.SIGKILL, process.stderr
    return folder, json.loads(process.stdout)


def test_a_full_disk_leaves_nothing(dead):
    _, outcomes = dead
    for name, (written, left) in outcomes.items():
        if name == "enough room":
            assert written == 8 * 40 * 8 and len(left) == 1
        else:
            assert (written, left) == ("File too large", []), name
    assert outcomes.keys() == FULL_DISKS.keys()


def test_kill_9_leaves_nothing_that_counts_and_the_next_attempt_cleans_up(dead):
    folder = dead[0] / "killed"
    (leftover,) = names(folder)
    assert leftover.startswith(".") and leftover.endswith(".partial")
    embeddings = fake_embed(Fake(), folder)
    assert leftover.startswith(f".{embeddings.path.name}.")
    assert names(folder) == [embeddings.path.name]
    np.testing.assert_array_equal(embeddings.values[:, 0], range(8))


def test_a_manifest_without_its_fields_is_refused(tmp_path):
    folder = fake_embed(Fake(), tmp_path).path
    (folder / "manifest.json").write_text(json.dumps({"format": cache.FORMAT}))
    with pytest.raises(InputError, match="manifest.json is not of format"):
        open_cache(folder)


def test_only_leftovers_of_this_machine_and_of_dead_processes_are_removed(tmp_path):
    from polyrep import files

    host = files.socket.gethostname()
    dead, other = f".x.{host}-999999999.partial", f".x.{host}-1-7.partial"
    kept = [other, f".x.{host}-{os.getppid()}.partial", f".x.{host}-soon.partial"]
    for name in (dead, *kept):
        (tmp_path / name).mkdir()
    with files.staged_folder(tmp_path / "x"):
        pass
    assert names(tmp_path) == sorted([*kept, "x"])


# Vectors that are known already


def test_stored_vectors_are_found_instead_of_encoded(tmp_path, monkeypatch, sentence_model):
    texts = {"a": "one file", "b": "two ports"}
    vectors = np.arange(64, dtype=np.float32).reshape(2, 32)
    where = {"task": "document", "cache_dir": tmp_path, "name": "known"}
    stored = cache.store(sentence_model, texts, vectors, **where)
    monkeypatch.setitem(encoders._ENCODERS, "sentence", None)  # nothing can be encoded any more
    found = embed(sentence_model, texts, **where)
    assert found.path == stored.path and found.dim == 32 and found.values.dtype == np.float16
    np.testing.assert_array_equal(found.values, vectors)


@pytest.mark.parametrize(
    "vectors,message", [(np.ones((3, 4)), "3 vectors for 2 texts"), (np.array([[1.0], [1e9]]), "'b'.*not finite")]
)
def test_vectors_that_cannot_be_stored_are_refused(tmp_path, sentence_model, vectors, message):
    with pytest.raises(InputError, match=message):
        cache.store(sentence_model, {"a": "x", "b": "y"}, vectors, task="document", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
