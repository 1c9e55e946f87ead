"""``export-onnx``: graphs give torch's vectors at any size, as recomputed here; what cannot be exported is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from room_examples import EXAMPLES
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, AutoTokenizer, ViTConfig, ViTModel

import polyrep
from polyrep.cli import main
from polyrep.hub import fingerprint
from polyrep.hub.example import one_folder
from polyrep.methods import (
    CheckedTransformer,
    CitadelConfig,
    Dense2SparseForRetrieval,
    Dense2SparseForRetrievalConfig,
    GaussianConfig,
    LateInteractionConfig,
    LemurForRetrievalConfig,
    MetaEmbedConfig,
    MetaEmbedForRetrievalConfig,
    MultiLayerConfig,
    MultiLayerHead,
    MultiLayerHeadConfig,
    MultiLayerModel,
    ReinPoolForRetrievalConfig,
    UnifierConfig,
)
from polyrep.methods.dual_encoder.backbone import load_processor
from polyrep.methods.dual_encoder.example import dual_encoder, image_text_folder, tiny_vision
from polyrep.publishing import compare, export

SHORT = ["x"]
MIXED = ["show open ports", "make an archive of a file", "q", "list a port file: a port file list a port"]
SIZES = ((1, 1), (1, 6), (2, 9), (4, 40))

# Of each room the folders whose graphs differ in kind: whole models, heads alone, and modules with a head behind them.
KINDS = {
    CitadelConfig.model_type: ["retriever"],
    GaussianConfig.model_type: ["retriever"],
    MultiLayerConfig.model_type: ["retriever", "head of multi"],
    Dense2SparseForRetrievalConfig.model_type: ["images", "modules of pipeline"],
    ReinPoolForRetrievalConfig.model_type: ["pipeline", "single", "head of single"],
    LemurForRetrievalConfig.model_type: ["pipeline"],
    LateInteractionConfig.model_type: ["retriever"],
    MetaEmbedConfig.model_type: ["retriever"],
    MetaEmbedForRetrievalConfig.model_type: ["pipeline", "head of pipeline"],
}
RETRIEVERS = [(room, kind) for room, kinds in KINDS.items() for kind in kinds if " of " not in kind]


class Exported:
    """A model of sentence-transformers, its folder, and the graphs that the command made of it.

    The folder's own code would end the run: nothing of it may be read.
    """

    def __init__(self, model: Any, folder: Path, kind: str = "") -> None:
        self.model, self.folder, self.kind = model, folder, kind
        assert main(["export-onnx", str(folder)]) == 0
        self.manifest = json.loads((folder / "onnx" / "export.json").read_text())
        self.graphs = {
            name.removesuffix(".onnx"): onnxruntime.InferenceSession(str(folder / "onnx" / name))
            for name in self.manifest["graphs"]
        }

    def run(self, graph: str, **inputs: torch.Tensor) -> dict[str, np.ndarray]:
        session = self.graphs[graph]
        found = session.run(None, {node.name: inputs[node.name].numpy() for node in session.get_inputs()})
        return {node.name: value for node, value in zip(session.get_outputs(), found, strict=True)}


@pytest.fixture(scope="module")
def examples(backbone: Path, shallow_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    deep = MultiLayerConfig.model_type  # which needs layers to choose from
    return {
        room: EXAMPLES[room](backbone if room == deep else shallow_backbone, tmp_path_factory.mktemp("example"))
        for room in (*KINDS, "polyrep_toy")
    }


def words_of_images(backbone: Path, scratch: Path) -> Any:
    """A sparse retriever of texts and images whose vision tower has few operations."""
    torch.manual_seed(11)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny_vision(scratch / "vision")  # for its processor
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(scratch / "vision")
    dual_encoder(backbone, scratch, scratch / "vision").save_pretrained(scratch / "towers")
    processor = load_processor(str(scratch / "texts"), str(scratch / "vision"))
    processor.save_pretrained(scratch / "towers")
    model = Dense2SparseForRetrieval.from_encoder(str(scratch / "towers"), average_length=5.0)
    with torch.no_grad():
        model.head.own_weight.uniform_(0.5, 2)
    return image_text_folder(model, processor, scratch / "images", SparseEncoder, CheckedTransformer, "expand")


def two_encoders(backbone: Path, scratch: Path) -> Any:
    torch.manual_seed(12)
    model = MultiLayerModel.from_encoder(str(backbone), layers=[-1, 0], pooling="scalar_mix", tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return one_folder(model, backbone, scratch)


OWN = {
    (Dense2SparseForRetrievalConfig.model_type, "images"): words_of_images,
    (MultiLayerConfig.model_type, "retriever"): two_encoders,
}
"""Models with fewer operations than the shared examples have."""


FOLDERS = [(room, kind) for room, kinds in KINDS.items() for kind in kinds]


@pytest.fixture(scope="module", params=FOLDERS, ids=" ".join)
def exported(request, examples, shallow_backbone, tmp_path_factory) -> Exported:
    """One after another, so that no worker makes graphs of a folder that another worker tests."""
    (room, kind), folder = request.param, tmp_path_factory.mktemp("exported")
    own, name = OWN.get((room, kind)), kind.rpartition(" of ")[2]
    model = own(shallow_backbone, folder / "own") if own else examples[room].models[name]
    part = model[-1].model if kind.startswith("head") else model
    saved = polyrep.save(part, folder / "model", form="pipeline" if kind.startswith("modules") else None)
    for file in saved.rglob("*.py"):
        file.write_text("raise SystemExit('the code of a folder was run')")
    return Exported(model, saved, kind)


def only(*folders: tuple[str, str]) -> pytest.MarkDecorator:
    """A test of some folders alone."""
    return pytest.mark.parametrize("exported", folders, indirect=True, ids=" ".join)


def close(ours: Any, theirs: Any, message: str = "") -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-4, atol=1e-4, err_msg=message)


def vectors(model: Any, task: str, texts: list[Any]) -> np.ndarray:
    found = getattr(model, f"encode_{task}")(texts, convert_to_tensor=True)
    return (found.to_dense() if found.is_sparse else found).cpu().numpy()


def in_order(found: np.ndarray) -> np.ndarray:
    """Vectors of a text, which are a set, in the order of their sums."""
    return found[found.sum(1).argsort()]


@only(*RETRIEVERS)
def test_graphs_of_a_retriever_give_the_vectors_of_encode(exported):
    it = exported
    tokenizer = AutoTokenizer.from_pretrained(it.folder)
    for texts in (SHORT, MIXED, [" ".join(MIXED), *MIXED, *SHORT]):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        for task in ("query", "document"):
            found = it.run(task, **tokens)
            if "mask" not in found:
                close(found["sentence_embedding"], vectors(it.model, task, texts), f"{task} {texts}")
                continue
            expected = getattr(it.model, f"encode_{task}")(texts, convert_to_numpy=True)
            for row, there, ours in zip(found["token_embeddings"], found["mask"], expected, strict=True):
                assert there.sum() == len(ours), "what is padded or skipped does not count"
                close(in_order(row[there]), in_order(ours), f"{task} {texts}")


def test_queries_and_documents_are_two_graphs_unless_they_are_the_same(exported):
    alike = exported.kind == "head of single"
    assert ("model" in exported.graphs) == alike and ({"query", "document"} <= exported.graphs.keys()) != alike


def test_graphs_of_two_views_give_both_and_the_gate_of_a_query(shallow_backbone, tmp_path):
    model = EXAMPLES[UnifierConfig.model_type](shallow_backbone, tmp_path / "example").models["retriever"]
    it = Exported(model, polyrep.save(model, tmp_path / "model"))
    tokens = AutoTokenizer.from_pretrained(it.folder)(MIXED, padding=True, return_tensors="pt")
    for task in ("query", "document"):
        with torch.no_grad():
            expected = model[0].model.encode_views(**tokens, task=task)
        found = it.run(task, **tokens)
        assert ("gate" in found) == (task == "query")
        gate = found.get("gate", np.ones(len(MIXED)))[:, None]
        close(found["dense"] * gate, expected["dense"], task)
        close(found["lexicon"] * (2 - gate), expected["lexicon"], task)


@only((CitadelConfig.model_type, "retriever"))
def test_graphs_give_the_entries_of_an_index(exported):
    it = exported
    tokens = AutoTokenizer.from_pretrained(it.folder)(MIXED, padding=True, return_tensors="pt")
    for task in ("query", "document"):
        with torch.no_grad():
            expected = it.model[0].model.encode_routed(**tokens, task=task)
        found = it.run(task, **tokens)
        assert ((found["weights"] > 0) == expected.mask.numpy()).all()
        assert (found["keys"] == expected.keys.numpy())[expected.mask.numpy()].all()
        for name, values in (("weights", expected.weights), ("vectors", expected.vectors)):
            close(found[name], values, f"{task} {name}")
        close(found["dense"], expected.sentence_embedding, task)


@only((GaussianConfig.model_type, "retriever"))
def test_a_query_says_how_uncertain_it_is(exported):
    it = exported
    tokens = AutoTokenizer.from_pretrained(it.folder)(MIXED, padding=True, return_tensors="pt")
    with torch.no_grad():
        variance = it.model[0].model(**tokens, task="query").variance.double()  # (batch, groups)
    size = it.model[0].model.config.mean_dim // variance.shape[1]
    close(it.run("query", **tokens)["uncertainty"], size * variance.log().sum(1) / 2)


@only((Dense2SparseForRetrievalConfig.model_type, "images"))
def test_images_have_a_graph_of_their_own(exported):
    it = exported
    assert set(it.graphs) == {"query", "document", "image"}, "images are the same to both tasks"
    drawn = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in drawn]
    pixels = AutoProcessor.from_pretrained(it.folder).image_processor(images=images, return_tensors="pt")
    for count in (1, 3):
        found = it.run("image", pixel_values=pixels["pixel_values"][:count])["sentence_embedding"]
        close(found, vectors(it.model, "document", images[:count]))


def drawn_tokens(batch: int, tokens: int) -> tuple[torch.Generator, torch.Tensor]:
    """A source of numbers, and the mask of as many texts of up to so many tokens."""
    generator = torch.Generator().manual_seed(batch * 100 + tokens)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    return generator, (torch.arange(tokens) < lengths[:, None]).long()


@only((ReinPoolForRetrievalConfig.model_type, "head of single"))
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_a_head_of_tokens_gives_torchs_numbers_at_any_size(exported, batch, tokens):
    generator, mask = drawn_tokens(batch, tokens)
    states = F.normalize(torch.randn(batch, tokens, 16, generator=generator), dim=-1)  # padding, too, is no zero
    with torch.no_grad():
        expected = exported.model[-1].model(states, mask)
    gate = exported.run("model", token_embeddings=states, attention_mask=mask)["keep_probability"]
    close(gate, expected.keep_probability)
    assert gate.shape == (batch, tokens) and not gate[mask.numpy() == 0].any() and gate[mask.numpy() == 1].all()
    pooled = exported.run("pooling", token_embeddings=states, attention_mask=mask)
    close(pooled["embeddings"], expected.embeddings)
    assert (pooled["mask"] == expected.mask.numpy()).all()


@only((MultiLayerConfig.model_type, "head of multi"))
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_head_of_layers_gives_torchs_numbers_at_any_size(exported, batch):
    states = torch.randn(batch, 2, 32, generator=torch.Generator().manual_seed(batch))
    for task, count in (("query", 1), ("document", 2)):
        with torch.no_grad():
            expected = exported.model[-1].model(states, task=task).token_embeddings
        found = exported.run(task, layer_embeddings=states)["token_embeddings"]
        assert found.shape == (batch, count, 32)
        close(found, expected)


@only((MetaEmbedForRetrievalConfig.model_type, "head of pipeline"))
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_a_head_of_meta_tokens_gives_torchs_numbers_at_any_size(exported, batch, tokens):
    generator, mask = drawn_tokens(batch, tokens)
    states = F.normalize(torch.randn(batch, tokens, 16, generator=generator), dim=-1)
    for task in ("query", "document"):
        with torch.no_grad():
            expected = exported.model[-1].model(states, mask, task)
        found = exported.run(task, input_token_embeddings=states, attention_mask=mask)
        close(found["token_embeddings"], expected.token_embeddings)
        assert (found["mask"] == expected.mask.numpy()).all()


@only((Dense2SparseForRetrievalConfig.model_type, "modules of pipeline"))
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_a_head_of_words_gives_torchs_numbers_at_any_size(exported, batch, tokens):
    generator, mask = drawn_tokens(batch, tokens)
    head = exported.model[-1].model
    states = F.normalize(torch.randn(batch, 32, generator=generator), dim=-1)
    ids = torch.randint(5, head.config.vocab_size, (batch, tokens), generator=generator)
    for task in ("query", "document"):
        with torch.no_grad():
            expected = head(states, ids, mask, task=task).sentence_embedding
        found = exported.run(task, input_sentence_embedding=states, input_ids=ids, attention_mask=mask)
        close(found["sentence_embedding"], expected)


def test_the_manifest_says_what_was_made_of_what(exported):
    it = exported
    assert it.manifest["fingerprint"] == fingerprint(it.folder)
    part = it.folder / it.manifest["part"]
    assert json.loads((part / "config.json").read_text())["architectures"] == [it.manifest["model"]]
    assert list(it.folder.glob("modeling_*.py")), "a folder that carries code"
    assert (part == it.folder) == (not it.kind.startswith("modules"))
    assert it.manifest["versions"]["onnx"] == onnx.__version__
    assert it.manifest["versions"]["torch"] == torch.__version__
    assert {f.name for f in (it.folder / "onnx").iterdir()} == {"export.json", *it.manifest["graphs"]}
    for name, entry in it.manifest["graphs"].items():
        written = (it.folder / "onnx" / name).read_bytes()
        for place in (b"site-packages", b"/modeling/", b"stack_trace", str(Path.home()).encode()):
            assert place not in written, "where the code lay when it was traced is nobody's business"
        graph = onnx.load(it.folder / "onnx" / name)
        assert entry["opset"] == next(o.version for o in graph.opset_import if not o.domain)
        assert {node.name for node in graph.graph.input} == set(entry["inputs"])
        assert set(entry["outputs"]) == set(entry["difference"])
        assert all(node["shape"][0] == "batch" for kind in ("inputs", "outputs") for node in entry[kind].values())
        assert max(entry["difference"].values()) < 1e-4
    assert not [f.name for f in it.folder.iterdir() if f.name.endswith(".partial")]


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """The folder of a head whose graph is made in a second."""
    torch.manual_seed(0)
    model = MultiLayerHead(MultiLayerHeadConfig(layers=[-1, 0], pooling="linear", hidden_size=8, num_hidden_layers=2))
    with torch.no_grad():
        model.map.weight.normal_()
    model.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    """What the command says on refusing; nothing of an export may be left."""
    before = {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["export-onnx", str(folder), *flags]) == 2
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before
    return capsys.readouterr().err


def test_a_graph_with_other_numbers_is_refused_with_the_numbers(head, capsys, monkeypatch):
    convert = export._convert

    def then_change_the_model(program: Any, door: Any, file: Path, part: Path, model: Any) -> int:
        opset = convert(program, door, file, part, model)
        model.map.weight.mul_(1.01)
        return opset

    monkeypatch.setattr(export, "_convert", then_change_the_model)
    assert "sentence_embedding 9.9e-03 off, where 1e-04 is allowed" in refused(capsys, head)


def test_what_torch_cannot_trace_is_refused(head, capsys, monkeypatch):
    forward = MultiLayerHead.forward

    def looks_at_numbers(self: Any, layer_embeddings: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, layer_embeddings if float(layer_embeddings.sum()) > 0 else -layer_embeddings, **kwargs)

    monkeypatch.setattr(MultiLayerHead, "forward", looks_at_numbers)
    assert "no ONNX graph can be made of MultiLayerHead (" in refused(capsys, head)


def test_a_task_that_the_model_refuses_has_no_graph(head, monkeypatch, capsys):
    forward = MultiLayerHead.forward

    def answers(*tasks: str) -> None:
        def only(self: Any, layer_embeddings: torch.Tensor, task: str | None = None, **kwargs: Any) -> Any:
            if task not in tasks:
                raise ValueError(f"not for {task}")
            return forward(self, layer_embeddings, task=task, **kwargs)

        monkeypatch.setattr(MultiLayerHead, "forward", only)

    answers()
    assert "the model refuses its inputs: not for query" in refused(capsys, head)
    answers("document")
    assert main(["export-onnx", str(head)]) == 0
    assert {f.name for f in (head / "onnx").iterdir()} == {"export.json", "document.onnx"}


def test_an_export_is_replaced_only_on_request_and_leaves_no_stale_graph(head, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "ONE_FILE_BYTES", 0)  # as if the weights were larger than one file holds
    assert main(["export-onnx", str(head)]) == 0
    files = {"export.json", "model.onnx", "model.onnx.data"}
    assert {f.name for f in (head / "onnx").iterdir()} == files
    shutil.copytree(head / "onnx", tmp_path / "elsewhere")  # the graph finds its weights wherever both are
    session = onnxruntime.InferenceSession(str(tmp_path / "elsewhere" / "model.onnx"))
    states = torch.randn(3, 2, 8)
    expected = AutoModel.from_pretrained(head)(states).sentence_embedding.detach()
    close(session.run(None, {"layer_embeddings": states.numpy()})[0], expected)
    shutil.rmtree(tmp_path / "elsewhere")
    assert "exists and would be replaced. Pass --overwrite" in refused(capsys, head)
    (head / "onnx" / "notes.txt").write_text("mine")
    monkeypatch.undo()
    assert main(["export-onnx", str(head), "--overwrite"]) == 0
    assert {f.name for f in (head / "onnx").iterdir()} == {"export.json", "model.onnx", "notes.txt"}


def test_queries_that_are_lengthened_have_no_graph(examples, capsys, tmp_path):
    folder = polyrep.save(examples[LateInteractionConfig.model_type].models["retriever"], tmp_path / "late")
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    settings["query_expansion"] = {"strategy": "fixed", "length": 16}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert "its queries are lengthened to 16 tokens" in refused(capsys, folder)


def test_folders_that_hold_nothing_to_export_are_refused(
    head, examples, sentence_model, capsys, monkeypatch, tmp_path
):
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "taken").write_text("mine")
    assert "taken is no folder" in refused(capsys, head, "--output", str(tmp_path / "taken"), "--overwrite")
    assert "Stock modules need no export of ours" in refused(capsys, polyrep.save(sentence_model, tmp_path / "stock"))
    pipeline = polyrep.save(examples["polyrep_toy"].models["pipeline"], tmp_path / "toy")
    assert "ToyHead reads no text, and its room does not say what it reads" in refused(capsys, pipeline)

    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"model_type": "polyrep_unheard_of"}))
    assert "an export runs installed code only" in refused(capsys, head)
    (head / "vocab.txt").write_text("[UNK]")
    (head / "config.json").write_text(json.dumps(config | {"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}))
    assert "an export runs installed code only" in refused(capsys, head)
    (head / "config.json").write_text(json.dumps(config))

    weights = load_file(head / "model.safetensors")
    save_file({"mix": weights["mix"]}, head / "model.safetensors", metadata={"format": "pt"})
    assert "lacks map.weight" in refused(capsys, head)
    (head / "model.safetensors").unlink()
    assert "the model has no weights" in refused(capsys, head)

    found = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert "onnxscript not installed" in (said := refused(capsys, head)) and 'pip install "polyrep[export]"' in said


def test_differences_are_relative_to_large_numbers_and_ties_at_a_cut_are_none():
    kept = np.array([[0.9, 0.5, 0.0, 0.0], [0.3, 0.0, 0.2, 0.0]])
    tied = np.array([[0.9, 0.0, 0.5, 0.0], [0.3, 0.0, 0.2, 0.0]])
    assert compare.difference_of(kept, kept) == compare.difference_of(kept, tied) == 0
    assert compare.difference_of(kept, tied * [[1, 1, 0, 1]] * 1.0) == 0.5, "one word fewer is no tie"
    assert compare.difference_of(kept, np.array([[0.0, 0.5, 0.9, 0.0], kept[1]])) == 0.9, "nor is a heavier one"
    assert compare.difference_of(np.array([[1000.0, 0.5]]), np.array([[1001.0, 0.5]])) == pytest.approx(1e-3)
    assert compare.difference_of(kept[None], kept[None, ::-1]) == 0, "the vectors of a text are a set"
    assert compare.difference_of(kept, kept[::-1]) > 0.1, "texts are not"
    assert compare.difference_of(kept, kept[:1]) == compare.difference_of(kept, kept * np.nan) == float("inf")
