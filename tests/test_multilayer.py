"""MultiLayer: the loss against loops, every encoder against its own hidden states, and every door."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLI, DOCUMENTS, PATIENCE, QRELS, QUERIES, run_python, run_two_processes, write_beir
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import dot_score
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

import polyrep
from polyrep import InputError
from polyrep.cli import main, train
from polyrep.data import load_retrieval_dataset
from polyrep.hub.example import one_folder
from polyrep.hub.polyrep_room import pool_tokens
from polyrep.methods import (
    CachedMultiLayerObjective,
    MultiLayerConfig,
    MultiLayerHead,
    MultiLayerHeadConfig,
    MultiLayerHeadObjective,
    MultiLayerModel,
    MultiLayerObjective,
    MultiLayerPooling,
)
from polyrep.training.pairs import HeadData

TEXTS = ["show open ports", "make an archive of a folder", "file"]

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
ENCODERS = {
    "bert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0},
    "modernbert": SMALL | {"global_attn_every_n_layers": 2, "local_attention": 8, "reference_compile": False},
    "mpnet": SMALL,
    "xlm-roberta": SMALL,
    "t5": {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 64},
}
FINAL_NORM = ("modernbert", "t5")
"""Encoders that change their last state once more, so that a shorter one is another encoder."""


@pytest.fixture(scope="module")
def encoders(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, with random weights and the small tokenizer."""
    root, folders = tmp_path_factory.mktemp("encoders"), {}
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    for kind, sizes in ENCODERS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **special, **sizes)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        model = AutoModelForTextEncoding.from_config(config) if kind == "t5" else AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)  # T5's norms would else be ones
        folders[kind] = root / kind
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


def tokens_of(folder: Path, side: str = "right") -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    found = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def by_hand(states: torch.Tensor, mask: torch.Tensor, token: str) -> torch.Tensor:
    """Each text's vector at one layer, token by token."""
    rows = []
    for text, kept in zip(states, mask.bool(), strict=True):
        rows.append(text[kept][0] if token == "cls" else text[kept].double().mean(0).float())
    return torch.stack(rows)


def features_of(model: SentenceTransformer, *columns: list[str]) -> list[dict]:
    return [model.preprocess(texts) for texts in columns]


# Encoding


@pytest.mark.parametrize("token", ["mean", "cls"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_is_pooled_at_the_layers_it_names(encoders, kind, token):
    model = MultiLayerModel.from_encoder(str(encoders[kind]), layers=[-1, 1], pooling="mean", token=token).eval()
    batch = tokens_of(encoders[kind])
    with torch.no_grad():
        states = model.encoder(**batch, output_hidden_states=True).hidden_states
        first, last = (by_hand(states[layer], batch["attention_mask"], token) for layer in (1, 3))
        torch.testing.assert_close(model(**batch, task="document").sentence_embedding, (first + last) / 2)
        torch.testing.assert_close(model(**batch, task="query").sentence_embedding, last)
        shown = model(**batch, output_hidden_states=True).hidden_states
        torch.testing.assert_close(shown, torch.stack([last, first], 1))
    pipeline = SentenceTransformer(
        modules=[Transformer(str(encoders[kind])), MultiLayerPooling(layers=[-1, 1], pooling="mean", token=token)],
        device="cpu",
    )
    ours = pipeline.encode_document(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(ours, (first + last) / 2, atol=1e-5, rtol=1e-4)


def test_texts_padded_on_the_left_are_pooled_alike(backbone):
    for token in ("mean", "cls"):
        states = torch.randn(2, 5, 4)
        left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        head = pool_tokens(states, left, token)
        torch.testing.assert_close(head, by_hand(states, left, token))


def test_poolings_against_their_formulas():
    torch.manual_seed(0)
    states = torch.randn(5, 3, 8)

    def head(pooling, **config):
        made = MultiLayerHead(MultiLayerHeadConfig(layers=[-1, -2, -3], pooling=pooling, hidden_size=8, **config))
        return made.eval()

    def vector(made, task="document"):
        with torch.no_grad():
            output = made(states, task=task)
        return output.sentence_embedding if output.token_embeddings is None else output.token_embeddings

    for pooling in ("last", "self_contrastive"):
        assert torch.equal(vector(head(pooling)), states[:, 0])
    mix = head("scalar_mix")
    torch.testing.assert_close(vector(mix), states.mean(1))
    torch.testing.assert_close(vector(mix), vector(head("mean")))
    with torch.no_grad():
        mix.mix.copy_(torch.tensor([0.0, 1.0, -1.0]))
    share = np.exp([0.0, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum()
    by_layer = sum(float(w) * states[:, i] for i, w in enumerate(share))
    torch.testing.assert_close(vector(mix), by_layer)
    for made in (mix, head("mean"), head("multi")):
        assert torch.equal(vector(made, "query").reshape(5, 8), states[:, 0]), "queries are the first layer"
    torch.testing.assert_close(vector(head("mean", pool_queries=True), "query"), states.mean(1))
    assert torch.equal(vector(head("multi")), states)
    linear = head("linear")
    assert torch.equal(vector(linear), states[:, 0]), "starts as the first layer"
    with torch.no_grad():
        linear.map.weight.normal_()
    parts = linear.map.weight.view(8, 3, 8)  # (out, layer, in)
    for task in ("query", "document"):
        torch.testing.assert_close(vector(linear, task), torch.einsum("oli,bli->bo", parts, states))
    shared = head("mean", projection=True, normalize=True)
    with torch.no_grad():
        shared.map.weight.normal_()
    torch.testing.assert_close(vector(shared), F.normalize(states.mean(1) @ shared.map.weight.T, dim=1))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_self_contrastive_encodes_to_the_bit_what_the_plain_encoder_does_at_its_cost(
    backbone, tmp_path, pooling, normalize
):
    modules = [Transformer(str(backbone)), Pooling(32, pooling), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "plain"))
    plain = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    model = MultiLayerModel.from_encoder(str(tmp_path / "plain"), layers=[-1, 0, 1])
    assert (model.config.token, model.config.normalize) == (pooling, normalize), "the backbone's own by default"
    ours = one_folder(model, backbone, tmp_path / "ours")
    for encode in ("encode_query", "encode_document"):
        found, expected = (getattr(m, encode)(TEXTS, convert_to_tensor=True) for m in (ours, plain))
        assert torch.equal(found, expected)
    counts, asked = {}, []
    model.encoder.register_forward_pre_hook(
        lambda _, __, kwargs: asked.append(kwargs["output_hidden_states"]), with_kwargs=True
    )
    batch = tokens_of(backbone)
    for name, run in (("ours", lambda: model(**batch)), ("plain", lambda: plain({**batch}))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts[name] = counter.get_total_flops()
    assert counts["ours"] == counts["plain"] > 0 and asked == [False]


def test_untied_towers_are_chosen_by_task(backbone, tmp_path):
    model = MultiLayerModel.from_encoder(str(backbone), layers=[-1, 1], tied=False).eval()
    batch = tokens_of(backbone)
    start = [model(**batch, task=task).sentence_embedding for task in ("query", "document")]
    assert torch.equal(*start), "both start as the backbone"
    with torch.no_grad():
        model.query_encoder.embeddings.word_embeddings.weight.mul_(2)
    assert torch.equal(model(**batch, task="document").sentence_embedding, start[1])
    assert not torch.allclose(model(**batch, task="query").sentence_embedding, start[0])
    again = one_folder(model, backbone, tmp_path / "untied")
    expected = model(**batch, task="query").sentence_embedding
    torch.testing.assert_close(again.encode_query(TEXTS, convert_to_tensor=True), expected)


POOL = """
import sys
import numpy as np
import sentence_transformers

if __name__ == "__main__":
    texts, opened = ["show open ports", "make an archive of a folder", "file", "list"], []
    for family, folder in zip(("SentenceTransformer", "MultiVectorEncoder"), sys.argv[1:]):
        model = getattr(sentence_transformers, family)(folder, trust_remote_code=True, device="cpu")
        # One process gets it before its first text, and one after.
        early = model.start_multi_process_pool(["cpu"])
        expected = [*model.encode_document(texts[:2]), *model.encode_document(texts[2:])]
        late = model.start_multi_process_pool(["cpu"])
        opened += [(model, expected, early), (model, expected, late)]
    for model, expected, pool in opened:
        found = model.encode_document(texts, pool=pool, chunk_size=2)
        model.stop_multi_process_pool(pool)
        print(len(found), [np.array_equal(one, other) for one, other in zip(found, expected)])
    print("polyrep" in sys.modules)
"""


def test_a_pool_of_processes_encodes_what_one_does_after_a_first_text(backbone, tmp_path):
    layers = {"layers": [-1, 1], "projection": True, "hidden_size": 32}
    model = MultiLayerModel.from_encoder(str(backbone), layers=[-1, 1], pooling="mean")
    polyrep.save(one_folder(model, backbone, tmp_path / "init"), tmp_path / "one")
    modules = [Transformer(str(backbone)), MultiLayerPooling(pooling="multi", **layers)]
    polyrep.save(MultiVectorEncoder(modules=modules, device="cpu"), tmp_path / "several")
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, "pool.py", "one", "several"]  # no warm one, which its own processes could not start
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert run.stdout.splitlines() == ["4 [True, True, True, True]"] * 4 + ["False"], run.stderr[-3000:]


@pytest.mark.parametrize("kind", ENCODERS)
def test_copies_of_an_encoder_that_gave_its_states_give_the_same(encoders, kind):
    modules = [Transformer(str(encoders[kind])), MultiLayerPooling(layers=[-1, 0, 1], pooling="mean")]
    behind = SentenceTransformer(modules=modules, device="cpu")
    states = behind.encode(TEXTS)
    hooks = [len(module._forward_hooks) for module in behind.modules()]
    again = behind
    for _ in range(3):  # copies of copies hold no more hooks, and may be copied themselves
        again = pickle.loads(pickle.dumps(copy.deepcopy(again)))
        np.testing.assert_array_equal(again.encode(TEXTS), states)
        assert [len(module._forward_hooks) for module in again.modules()] == hooks
    np.testing.assert_array_equal(behind.encode(TEXTS), states)


def test_threads_may_encode_first_at_the_same_time(encoders):
    modules = [Transformer(str(encoders["bert"])), MultiLayerPooling(layers=[-1, 0, 1], pooling="mean")]
    behind = SentenceTransformer(modules=modules, device="cpu")
    expected = copy.deepcopy(behind).encode(TEXTS)
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: behind.encode(TEXTS), range(32)):
            np.testing.assert_array_equal(found, expected)
    pickle.dumps(behind)


def test_multi_scores_the_best_layer(backbone, tmp_path):
    pooling = MultiLayerPooling(layers=[-1, 0, 1], pooling="multi", normalize=True)
    model = MultiVectorEncoder(modules=[Transformer(str(backbone)), pooling], device="cpu")
    folder = polyrep.save(model, tmp_path / "multi")
    model = polyrep.load(folder, trust_remote_code=True, device="cpu")
    queries, documents = model.encode_query(TEXTS), model.encode_document(list(DOCUMENTS.values()))
    assert [tuple(q.shape) for q in queries] == [(1, 32)] * 3 and [tuple(d.shape) for d in documents] == [(3, 32)] * 5
    found = model.similarity(queries, documents)
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            best = max(float(torch.as_tensor(query[0]) @ torch.as_tensor(vector)) for vector in document)
            assert math.isclose(found[i, j].item(), best, abs_tol=1e-5)


# Shorter and plainer


def test_a_truncated_model_gives_that_layer_with_less_work(encoders):
    for kind, folder in encoders.items():
        model = MultiLayerModel.from_encoder(str(folder), layers=[-1, 1]).eval()
        batch = tokens_of(folder)
        if kind in FINAL_NORM:
            with pytest.raises(ValueError, match="changes its last state once more"):
                model.truncate(2)
            continue
        short = model.truncate(-2)
        with torch.no_grad():
            states = model.encoder(**batch, output_hidden_states=True).hidden_states[2]
            expected = by_hand(states, batch["attention_mask"], "mean")
            torch.testing.assert_close(short(**batch).sentence_embedding, expected)
        assert short.config.num_hidden_layers == 2 and short.config.encoder_config.num_hidden_layers == 2
        assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in model.parameters())
    for layer, words in ((0, "leaves no encoder"), (4, "Use 1 to 3"), (-9, "-3 to -1")):
        with pytest.raises(ValueError, match=words):
            model.truncate(layer)


@pytest.mark.parametrize("kind", FINAL_NORM)
def test_an_encoder_that_cannot_be_cut_is_kept_whole(encoders, kind):
    model = MultiLayerModel.from_encoder(str(encoders[kind]), layers=[2, 1], pooling="mean").eval()
    batch = tokens_of(encoders[kind])
    with torch.no_grad():
        states = model.encoder(**batch, output_hidden_states=True).hidden_states
        expected = sum(by_hand(states[layer], batch["attention_mask"], "mean") for layer in (1, 2)) / 2
        torch.testing.assert_close(model(**batch).sentence_embedding, expected)


def test_layers_above_the_deepest_that_is_read_are_left_out(encoders, tmp_path):
    model = MultiLayerModel.from_encoder(str(encoders["bert"]), layers=[2, 0], pooling="linear")
    assert model.config.num_hidden_layers == 2 and model.config.layers == [2, 0]
    whole = AutoModel.from_pretrained(encoders["bert"]).eval()
    batch = tokens_of(encoders["bert"])
    with torch.no_grad():
        states = whole(**batch, output_hidden_states=True).hidden_states[2]
        found = model.eval()(**batch).sentence_embedding
    torch.testing.assert_close(found, by_hand(states, batch["attention_mask"], "mean"))
    model.save_pretrained(tmp_path / "short")
    again = MultiLayerModel.from_pretrained(tmp_path / "short").eval()
    assert torch.equal(again(**batch).sentence_embedding, found)


PLAIN = """
import json, sys
from sentence_transformers import SentenceTransformer
folders, texts = json.loads(sys.argv[1])
assert not any(name.startswith(("polyrep", "modeling")) for name in sys.modules)
report = {}
for name, folder in folders.items():
    model = SentenceTransformer(folder, device="cpu")
    vectors = [model.encode_query(texts).tolist(), model.encode_document(texts).tolist()]
    report[name] = [*vectors, model.similarity_fn_name, model.prompts]
print("REPORT" + json.dumps(report))
"""


def test_the_plain_encoder_opens_anywhere_without_remote_code(encoders, tmp_path):
    bert, models, folders = encoders["bert"], {}, {}
    cases = {
        "tied": {},
        "untied": {"tied": False, "normalize": True},
        "cls": {"token": "cls"},
        "projected": {"projection": True, "normalize": True},
        "early": {"layers": [2, 0]},
    }
    for name, config in cases.items():
        model = MultiLayerModel.from_encoder(str(bert), **{"layers": [-1, 1]} | config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        whole = one_folder(model, bert, tmp_path / name)
        whole.prompts = {"query": "show ", "document": ""}
        folder = polyrep.save(whole, tmp_path / f"{name}-saved")
        reopened = AutoModel.from_pretrained(folder, trust_remote_code=True)
        folders[name] = str(reopened.to_plain_encoder(tmp_path / "plain" / name))
        models[name] = polyrep.load(folder, trust_remote_code=True, device="cpu")
    result = run_python("-c", PLAIN, json.dumps([folders, TEXTS]), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    seen = json.loads(result.stdout.partition("REPORT")[2])
    for name, model in models.items():
        for encode, found in zip((model.encode_query, model.encode_document), seen[name], strict=False):
            np.testing.assert_allclose(encode(TEXTS), found, atol=1e-6, err_msg=name)
        assert seen[name][2:] == ["dot", {"query": "show ", "document": ""}]
        plain = Path(folders[name])
        assert not list(plain.rglob("*.py")) and "auto_map" not in (plain / "modules.json").read_text()
    router = json.loads((Path(folders["untied"]) / "modules.json").read_text())
    assert [part["type"].rpartition(".")[2] for part in router] == ["Router"]
    assert not [p for p in (tmp_path / "plain").iterdir() if p.name.startswith(".")], "nothing half-written is left"


def test_what_no_plain_encoder_can_hold_is_refused(encoders, tmp_path):
    pooled = MultiLayerModel.from_encoder(str(encoders["bert"]), layers=[-1, 1], pooling="mean")
    with pytest.raises(ValueError, match="pooling='mean' reads layers"):
        pooled.to_plain_encoder(tmp_path / "plain", source=encoders["bert"])
    model = MultiLayerModel.from_encoder(str(encoders["bert"]), layers=[-1, 1])
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine exists"):
        model.to_plain_encoder(tmp_path / "mine", source=encoders["bert"])
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "plain").exists()


# Doors


def test_wrong_families_and_places_are_refused(backbone, static_model, encoders):
    transformer = Transformer(str(backbone))
    multi, one = MultiLayerPooling(layers=[-1, 0], pooling="multi"), MultiLayerPooling(layers=[-1, 0], pooling="mean")
    for family, pooling, wanted in (
        (SentenceTransformer, multi, "MultiVectorEncoder"),
        (MultiVectorEncoder, one, "SentenceTransformer"),
        (SparseEncoder, one, "SentenceTransformer"),
    ):
        with pytest.raises(ValueError, match=f"Open it as {wanted}"):
            family(modules=[transformer, pooling], device="cpu")
    with pytest.raises(ValueError, match="only a Transformer before it"):
        SentenceTransformer(modules=[static_model[0], one], device="cpu")
    with pytest.raises(ValueError, match="0 .embeddings. to 2 .last."):
        SentenceTransformer(modules=[transformer, MultiLayerPooling(layers=[-1, 5], pooling="mean")], device="cpu")
    with pytest.raises(ValueError, match="names a layer twice"):
        SentenceTransformer(modules=[transformer, MultiLayerPooling(layers=[-1, 2], pooling="mean")], device="cpu")
    with pytest.raises(ValueError, match="hidden_size=16, but the encoder has 2 layers of width 32"):
        SentenceTransformer(modules=[transformer, MultiLayerPooling(layers=[-1, 0], hidden_size=16)], device="cpu")
    with pytest.raises(ValueError, match="Pass hidden_size"):
        MultiLayerPooling(layers=[-1, 0], pooling="linear")


def test_a_folder_of_several_vectors_is_refused_by_another_family(backbone, tmp_path):
    pooling = MultiLayerPooling(layers=[-1, 0], pooling="multi")
    model = MultiVectorEncoder(modules=[Transformer(str(backbone)), pooling], device="cpu")
    folder = polyrep.save(model, tmp_path / "multi")
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace("MultiVectorEncoder", "SentenceTransformer"))
    with pytest.raises(ValueError, match="pooling='multi' in a SentenceTransformer"):
        polyrep.load(folder, trust_remote_code=True)


def test_an_encoder_without_hidden_states_is_refused(backbone):
    model = SentenceTransformer(
        modules=[Transformer(str(backbone)), MultiLayerPooling(layers=[-1, 0], pooling="mean")], device="cpu"
    )
    model[0].model.config.output_hidden_states = False
    with pytest.raises(ValueError, match="gave no hidden states, so layers .-1, 0. cannot be read"):
        model.encode(TEXTS)
    whole = MultiLayerModel.from_encoder(str(backbone), layers=[-1, 0], pooling="mean")
    inner = whole.encoder.forward
    whole.encoder.forward = lambda output_hidden_states, **inputs: inner(**inputs)
    with pytest.raises(ValueError, match="BertModel returned no hidden states"):
        whole(**tokens_of(backbone))


def test_backbones_of_more_modules_are_refused_with_a_way_out(backbone, sparse_model, tmp_path):
    SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "max")], device="cpu").save_pretrained(
        str(tmp_path / "max")
    )
    with pytest.raises(ValueError, match="Transformer . Pooling with pooling 'max'.*MultiLayerPooling"):
        MultiLayerModel.from_encoder(str(tmp_path / "max"))


def test_unnormalised_vectors_score_by_dot_unless_told_otherwise(backbone):
    def family(**options):
        pooling = MultiLayerPooling(layers=[-1, 0], pooling="mean")
        return SentenceTransformer(modules=[Transformer(str(backbone)), pooling], device="cpu", **options)

    assert family().similarity_fn_name == "dot"
    assert family(similarity_fn_name="cosine").similarity_fn_name == "cosine"


# The loss


class Bare(MultiLayerHeadObjective):
    """The objective over vectors that are given."""


def objective(pooling="self_contrastive", layers=(-1, -2, -3), normalize=False, **settings) -> Bare:
    config = MultiLayerHeadConfig(layers=list(layers), pooling=pooling, hidden_size=4, normalize=normalize)
    return Bare(MultiLayerHead(config), **settings)


def loops(q, d, own, lambda_, tau, tau_r, pooling="self_contrastive"):
    """The loss, a number at a time, in float64."""
    q, d, total = q.double().tolist(), d.double().tolist(), 0.0
    layers = range(len(d[0]))
    for i, query in enumerate(q):
        s = [[sum(a * b for a, b in zip(query[0], document[n], strict=True)) for n in layers] for document in d]
        if pooling == "self_contrastive":
            scores = [s[j][0] if j == own[i] else max(s[j]) for j in range(len(d))]
        else:
            scores = [max(row) if pooling == "multi" else row[0] for row in s]
        total += math.log(sum(math.exp((x - scores[own[i]]) / tau) for x in scores)) / len(q)
        mine = s[own[i]]
        total += lambda_ * math.log(sum(math.exp((x - mine[0]) / tau_r) for x in mine)) / len(q)
    return total


@pytest.mark.parametrize(
    ("pooling", "lambda_"),
    [(p, w) for p in ("self_contrastive", "last") for w in (0.0, 0.1, 1.0)] + [("multi", 0.0)],
)
def test_the_loss_against_loops(pooling, lambda_):
    torch.manual_seed(0)
    q, d = torch.randn(3, 3, 4), torch.randn(7, 3, 4)
    own = torch.tensor([2, 0, 5])
    loss = objective(pooling, lambda_=lambda_, tau=0.7, tau_r=1.3)
    served = d if pooling == "multi" else d[:, 0]
    parts = loss.losses((q[:, 0], q), (served, d), own)
    expected = loops(q, d, own.tolist(), lambda_, 0.7, 1.3, pooling)
    assert math.isclose(sum(parts.values()).item(), expected, rel_tol=1e-5)


def test_gradients_reach_the_layers_that_the_formula_names():
    """The own document's other layers are no part of the first term; the best layer of every other document is."""
    torch.manual_seed(1)
    q, d = torch.randn(3, 3, 4), torch.randn(5, 3, 4, requires_grad=True)
    own = torch.arange(3)
    first = objective(lambda_=0.0, tau=1.0).losses((q[:, 0], q), (d[:, 0], d), own)["contrast"]
    (grad,) = torch.autograd.grad(first, d)
    scores = torch.einsum("bd,nld->bnl", q[:, 0], d.detach())
    expected = torch.zeros_like(d)
    for i in range(3):
        taken = [0 if j == i else int(scores[i, j].argmax()) for j in range(5)]
        ranked = torch.stack([scores[i, j, taken[j]] for j in range(5)]).softmax(0)
        for j in range(5):
            expected[j, taken[j]] += (ranked[j] - float(j == i)) * q[i, 0] / 3
    torch.testing.assert_close(grad, expected)
    second = objective(lambda_=1.0, tau=1.0).losses((q[:, 0], q), (d[:, 0], d), own)["layers"]
    (grad,) = torch.autograd.grad(second, d)
    mine = torch.stack([scores[i, i] for i in range(3)]).softmax(1)  # (queries, layers)
    for i in range(3):
        target = mine[i] - torch.tensor([1.0, 0.0, 0.0])
        torch.testing.assert_close(grad[i], target[:, None] * q[i, 0] / 3)
    assert not grad[3:].any()


def test_stop_gradient_moves_no_other_layer_and_margin_is_content_with_a_lead():
    torch.manual_seed(2)
    q, d = torch.randn(3, 3, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    own = torch.arange(3)
    loss = objective(lambda_=1.0, tau=1.0, mode="stop_gradient", query_side=True)
    parts = loss.losses((q[:, 0], q), (d[:, 0], d), own)
    grads = torch.autograd.grad(sum(parts.values()), (q, d))
    for grad in grads:
        assert grad[:, 0].abs().sum() > 0 and not grad[:, 1:].any()
    hinge = objective(lambda_=2.0, tau=1.0, tau_r=0.5, mode="margin", margin=0.3)
    found = hinge.losses((q[:, 0], q), (d[:, 0], d), own)["layers"].item()
    s = torch.einsum("bd,bld->bl", q[:, 0], d[:3])
    expected = 2.0 * sum(max(0.0, 0.3 - float(row[0] - x)) for row in s.detach() for x in row[1:]) / 6 / 0.5
    assert math.isclose(found, expected, rel_tol=1e-5)
    far = torch.zeros(2, 3, 4)
    far[:, 0] = 10.0
    assert hinge.losses((far[:, 0], far), (far[:, 0], far), torch.arange(2))["layers"].item() == 0.0


def test_query_side_and_a_drawn_layer_are_negatives_too():
    torch.manual_seed(3)
    q, d, own = torch.randn(2, 3, 4), torch.randn(4, 3, 4), torch.arange(2)
    both = objective(lambda_=0.0, tau=1.0, query_side=True).losses((q[:, 0], q), (d[:, 0], d), own)["contrast"]
    expected = 0.0
    for i in range(2):
        scores = []
        for j in range(4):
            seen = [float(q[i, 0] @ d[j, layer]) for layer in range(3)]
            seen += [float(q[i, layer] @ d[j, 0]) for layer in (1, 2)]
            scores.append(seen[0] if i == j else max(seen))
        expected += math.log(sum(math.exp(x - scores[i]) for x in scores)) / 2
    assert math.isclose(both.item(), expected, rel_tol=1e-5)
    for drawn in (1, 2):
        found = objective(lambda_=0.5, tau=1.0, random_layer=True).losses((q[:, 0], q), (d[:, 0], d), own, drawn=drawn)
        pair = loops(q[:, [0, drawn]], d[:, [0, drawn]], [0, 1], 0.5, 1.0, 1.0)
        assert math.isclose(sum(found.values()).item(), pair, rel_tol=1e-5)
    draws = {objective(random_layer=True).draw() for _ in range(40)}
    assert draws == {1, 2}


def test_early_layers_rank_by_themselves_and_follow():
    torch.manual_seed(4)
    q, d, own = torch.randn(2, 3, 4), torch.randn(4, 3, 4), torch.tensor([1, 3])
    loss = objective("last", lambda_=0.0, tau=0.5, early_weight=0.7)
    found = loss.losses((q[:, 0], q), (d[:, 0], d), own, drawn=2)["early"].item()
    both = objective(lambda_=0.3, tau=0.5, early_weight=0.7)
    parts = both.losses((q[:, 0], q), (d[:, 0], d), own, drawn=2)
    contrast = loops(q, d, own.tolist(), 0.3, 0.5, 0.5)  # the drawn layer does not take the others' place
    assert math.isclose(parts["contrast"].item() + parts["layers"].item(), contrast, rel_tol=1e-5)
    expected = 0.0
    for i in range(2):
        early, full = (np.array([float(q[i, layer] @ d[j, layer]) / 0.5 for j in range(4)]) for layer in (2, 0))
        p, e = np.exp(full) / np.exp(full).sum(), np.exp(early) / np.exp(early).sum()
        expected += 0.7 * (-np.log(e[own[i]]) + (p * np.log(p / e)).sum()) / 2
    assert math.isclose(found, expected, rel_tol=1e-4)


def test_copies_of_the_own_document_are_no_negatives():
    torch.manual_seed(5)
    q, d = torch.randn(2, 3, 4), torch.randn(4, 3, 4)
    d[3] = d[0]
    known = torch.tensor([[True, False, False, True], [False, True, False, False]])
    loss = objective(lambda_=0.0, tau=1.0)
    with_copy = loss.losses((q[:1, 0], q[:1]), (d[:, 0], d), torch.tensor([0]), known=known[:1])["contrast"]
    without = loss.losses((q[:1, 0], q[:1]), (d[:3, 0], d[:3]), torch.tensor([0]))["contrast"]
    torch.testing.assert_close(with_copy, without)


def test_monitors_show_the_lead_and_its_saturation():
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    d = torch.tensor([[[2.0, 0.0], [0.5, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    loss = objective(layers=(-1, -2), lambda_=1.0, tau=1.0)
    loss.losses((q[:, 0], q.expand(-1, 2, -1)), (d[:, 0], d), torch.arange(2))
    assert math.isclose(loss.metrics["layer_margin"].item(), ((2 - 0.5) + (1 - 3)) / 2)
    shares = [1 / (1 + math.exp(0.5 - 2)), 1 / (1 + math.exp(3 - 1))]
    assert math.isclose(loss.metrics["layer_saturation"].item(), sum(shares) / 2, rel_tol=1e-6)
    assert loss.metrics["layer_wins"].item() == 0.0, "the other layers of the other documents score 0, as layer 0 does"
    d[1, 1, 0] = 5.0
    loss.losses((q[:, 0], q.expand(-1, 2, -1)), (d[:, 0], d), torch.arange(2))
    assert loss.metrics["layer_wins"].item() == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lambda_": -0.1}, "--lambda_ -0.1: below 0 it would teach the opposite"),
        ({"lambda_": float("nan")}, "--lambda_ nan"),
        ({"early_weight": -1.0}, "--early_weight -1.0"),
        ({"tau": 0.0}, "--tau 0.0"),
        ({"tau_r": -1.0}, "--tau_r -1.0"),
        ({"mode": "detach"}, "paper, stop_gradient or margin"),
        ({"pooling": "mean", "lambda_": 0.1}, "push away layers that a document is made of"),
        ({"pooling": "last", "layers": (-1,), "lambda_": 0.1}, "the loss compares layers, and there is one"),
    ],
)
def test_the_objective_refuses_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        objective(**settings)


def test_a_batch_without_negatives_is_refused():
    one = torch.randn(1, 3, 4)
    with pytest.raises(InputError, match="a batch of one pair without hard negatives"):
        objective().losses((one[:, 0], one), (one[:, 0], one), torch.tensor([0]))


def test_temperatures_follow_the_vectors():
    assert objective().lambda_ == 1.0 and objective("mean").lambda_ == objective("last", (-1,)).lambda_ == 0.0
    assert objective().tau == 1.0 and math.isclose(objective(normalize=True).tau, 0.05)
    fixed, learned = objective(tau=0.5), objective(tau=0.5, learn_tau=True)
    assert math.isclose(learned.log_scale.exp().item(), 2.0, rel_tol=1e-6)
    assert not fixed.log_scale.requires_grad and learned.log_scale.requires_grad


# Whole models


@pytest.fixture
def trainable(backbone, tmp_path):
    def build(**config):
        model = MultiLayerModel.from_encoder(str(backbone), **{"layers": [-1, 0, 1]} | config)
        return one_folder(model, backbone, tmp_path / f"model{len(list(tmp_path.iterdir()))}").train()

    return build


COLUMNS = (list(QUERIES.values()), ["archive", "ports", "grep lines"], ["cat", "ls", "tar file"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [[-1], [-1, 1]])
def test_one_layer_is_the_dual_encoder_of_sentence_transformers(trainable, layers):
    model = trainable(layers=layers, pooling="last")
    ours = MultiLayerObjective(model, lambda_=0.0)
    theirs = MultipleNegativesRankingLoss(model, scale=1.0, similarity_fct=dot_score)
    values = [sum(ours(features_of(model, *COLUMNS)).values()), theirs(features_of(model, *COLUMNS), None)]
    torch.testing.assert_close(*values)
    found, expected = (gradients(model, value) for value in values)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


SETTINGS = {
    "self_contrastive": ({}, {"lambda_": 0.5}),
    "untied": ({"tied": False}, {"lambda_": 1.0, "mode": "stop_gradient"}),
    "query side": ({"normalize": True}, {"query_side": True}),
    "early": ({"pooling": "last", "normalize": True}, {"early_weight": 1.0}),
    "regularised": ({"pooling": "last"}, {"lambda_": 0.1}),
    "scalar mix": ({"pooling": "scalar_mix", "pool_queries": True}, {}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_cached_gradients_are_those_of_the_whole_batch(trainable, case):
    config, settings = SETTINGS[case]
    model = trainable(**config)
    plain = MultiLayerObjective(model, **settings)
    cached = CachedMultiLayerObjective(model, mini_batch_size=2, **settings)
    torch.manual_seed(7)
    whole = sum(plain(features_of(model, *COLUMNS)).values())
    torch.manual_seed(7)
    pieces = cached(features_of(model, *COLUMNS))
    torch.testing.assert_close(whole.detach(), pieces.detach(), atol=1e-5, rtol=1e-5)
    expected, found = gradients(model, whole), gradients(model, pieces)
    moving = {name for name, gradient in expected.items() if gradient.abs().max() > 0}
    assert moving and moving <= found.keys()
    for name in moving:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-3)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(cached.metrics[name], value)


def test_several_vectors_train_as_the_best_of_them(backbone):
    pooling = MultiLayerPooling(layers=[-1, 0], pooling="multi", normalize=True)
    model = MultiVectorEncoder(modules=[Transformer(str(backbone)), pooling], device="cpu").train()
    values = {}
    for name, made in (
        ("plain", MultiLayerObjective(model, lambda_=0.0)),
        ("cached", CachedMultiLayerObjective(model, mini_batch_size=2, lambda_=0.0)),
    ):
        value = made(features_of(model, *COLUMNS))
        value = sum(value.values()) if isinstance(value, dict) else value
        values[name] = value.item(), gradients(model, value)
    queries = [torch.as_tensor(v)[0] for v in model.eval().encode_query(COLUMNS[0])]
    documents = [torch.as_tensor(v) for v in model.encode_document(COLUMNS[1] + COLUMNS[2])]
    scores = torch.stack([torch.stack([(d @ q).max() for d in documents]) for q in queries]) / 0.05
    expected = F.cross_entropy(scores, torch.arange(3)).item()
    for value, _ in values.values():
        assert math.isclose(value, expected, rel_tol=1e-4)
    for name, gradient in values["plain"][1].items():
        torch.testing.assert_close(values["cached"][1][name], gradient, atol=2e-5, rtol=1e-3)


def test_a_model_without_layers_is_refused(sentence_model):
    with pytest.raises(InputError, match="no layers to compare.*MultiLayerPooling"):
        MultiLayerObjective(sentence_model)


def test_training_leaves_the_config_as_it_was(trainable):
    model = trainable()
    MultiLayerObjective(model)(features_of(model, *COLUMNS))
    assert not model[0].model.config.output_hidden_states and not model[0].model.encoder.config.output_hidden_states


# Runs


@pytest.fixture(scope="module")
def runs(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped runs on small data, with a small model."""
    root = tmp_path_factory.mktemp("runs")
    data = write_beir(root / "tiny", split="train")
    SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu").save_pretrained(
        str(root / "backbone")
    )
    made = {}
    for source in (polyrep.files.shipped_folder("hub_configs")).glob("multilayer-*"):
        folder = root / "hub_configs" / source.name
        shutil.copytree(source, folder)
        recipe = (folder / "recipe.yaml").read_text().splitlines()
        changed = {
            "backbone": str(root / "backbone"),
            "datasets": [str(data)],
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 0.001,
            "disable_tqdm": True,
            "batch_sampler": "batch_sampler",  # four pairs of three queries make few batches without duplicates
            "hard_negatives": 0,
            "bf16": False,
        }
        if source.name.endswith("frozen"):
            changed |= {"cache_dir": str(root / "cache"), "layers": [-1, -2, -3]}
            for name in ("hard_negatives", "bf16", "batch_sampler"):
                changed.pop(name)
        kept = [line for line in recipe if line.split(":")[0] not in changed]
        (folder / "recipe.yaml").write_text("\n".join([*kept, *(f"{k}: {json.dumps(v)}" for k, v in changed.items())]))
        made[source.name] = folder
    return made


def trained(run: Path, output: Path, *flags: str) -> list[float]:
    assert main(["train", str(run), "--output_dir", str(output), *flags]) == 0
    log = json.loads((output / "training.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def _refusal(run: Path, output: Path, *flags: str, final: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        train([str(run), "--output_dir", str(output), *flags])
    assert (output / "final").exists() == final
    return str(caught.value)


VARIANTS = {
    "tied": [],
    "untied": ["--tied", "false"],
    "checkpointed": ["--gradient_checkpointing", "true", "--lora_rank", "2"],
    "half": ["--bf16", "true"],
    "cached": ["--objective", "CachedMultiLayerObjective", "--mini_batch_size", "1"],
    "control": ["--objective", "MultipleNegativesRankingLoss"],
    "early": ["--pooling", "last", "--lambda_", "0", "--early_weight", "1"],
    "mean": ["--pooling", "mean", "--lambda_", "0", "--layers", "-1", "0"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_run_trains_and_every_checkpoint_opens(runs, tmp_path, variant):
    losses = trained(runs["multilayer-minilm"], tmp_path / "out", *VARIANTS[variant])
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    for part in ("checkpoint-2", "final"):
        model = polyrep.load(tmp_path / "out" / part, trust_remote_code=True, device="cpu")
        assert model.encode_query(TEXTS).shape == (3, 32)
        assert not model[0].model.config.output_hidden_states
    start, end = (load_file(tmp_path / "out" / part / "model.safetensors") for part in ("init", "final"))
    towers = ["encoder.", "query_encoder."] if variant == "untied" else ["encoder."]
    for tower in towers:
        name = f"{tower}encoder.layer.0.output.dense.weight"
        assert not torch.equal(start[name], end[name]), f"{tower} is trained"
    assert "The same pooling behind any encoder" in (tmp_path / "out" / "final" / "README.md").read_text()
    if variant == "tied":
        log = json.loads((tmp_path / "out" / "training.json").read_text())["log"]
        assert all({"layer_margin", "layer_saturation"} <= entry.keys() for entry in log if "loss" in entry)


def test_the_run_scores_as_it_trains_and_reads_what_the_backbone_reads(runs, backbone, tmp_path):
    """Unnormalised vectors are served by the inner product; maximal length and prompts are the backbone's."""
    own = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "cls")], device="cpu")
    own.max_seq_length, own.prompts = 8, {"query": "list ", "document": ""}
    own.save_pretrained(str(tmp_path / "own"))
    long = ["show open ports and sockets and files and more of them"]
    for normalize, similarity in (("false", "dot"), ("true", "cosine")):
        output = tmp_path / similarity
        flags = ["--backbone", str(tmp_path / "own"), "--normalize", normalize, "--learning_rate", "1e-9"]
        trained(runs["multilayer-minilm"], output, *flags, "--max_steps", "1")
        model = polyrep.load(output / "final", trust_remote_code=True, device="cpu")
        assert model.similarity_fn_name == similarity and model.max_seq_length == 8
        assert model.prompts == own.prompts and model[0].model.config.token == "cls"
        expected = own.encode_query(long, normalize_embeddings=normalize == "true")
        np.testing.assert_allclose(model.encode_query(long), expected, atol=1e-5)


def test_a_resumed_run_must_be_the_same(runs, tmp_path):
    trained(runs["multilayer-minilm"], tmp_path / "out")
    for flag, value in (("--lora_rank", "2"), ("--hard_negatives", "1"), ("--lambda_", "0.5"), ("--pooling", "last")):
        words = _refusal(
            runs["multilayer-minilm"], tmp_path / "out", flag, value, "--resume_from_checkpoint", "last", final=True
        )
        assert f"started with another {flag[2:]}" in words


def test_the_cached_run_learns_what_the_plain_one_does(runs, tmp_path):
    plain = trained(runs["multilayer-minilm"], tmp_path / "plain")
    cached = trained(runs["multilayer-minilm"], tmp_path / "cached", *VARIANTS["cached"])
    np.testing.assert_allclose(cached, plain, rtol=1e-3)


def test_several_vectors_train_by_the_command(runs, tmp_path):
    trained(runs["multilayer-minilm-multi"], tmp_path / "out")
    for part in ("init", "checkpoint-2", "final"):
        model = polyrep.load(tmp_path / "out" / part, trust_remote_code=True, device="cpu")
        assert isinstance(model, MultiVectorEncoder) and model.encode_document(TEXTS)[0].shape == (2, 32)
    assert "names 9" in _refusal(runs["multilayer-minilm-multi"], tmp_path / "bad", "--layers", "-1", "9")


def test_runs_refuse_what_cannot_be_trained(runs, tmp_path):
    run = runs["multilayer-minilm"]
    for flags, words in (
        (["--layers", "-1", "7"], "names 7, but the encoder has 2 layers"),
        (["--layers", "-1", "2"], "names a layer twice"),
        (["--pooling", "multi"], "multilayer-minilm-multi"),
        (["--lambda_", "-1"], "--lambda_ -1.0"),
        (["--per_device_train_batch_size", "1"], "a batch of one pair"),
        (["--lora_rank", "-2"], "--lora_rank -2"),
        (["--hard_negatives", "-1"], "--hard_negatives -1: is out of its range. Use a whole number from 0 to 100"),
        (["--negative_margin", "2"], "--negative_margin 2.0: is out of its range. Use a number from 0 to 1"),
        (["--pooling", "mean"], "push away layers"),
    ):
        assert words in _refusal(run, tmp_path / "refused", *flags)
    frozen = _refusal(runs["multilayer-minilm-frozen"], tmp_path / "refused", "--lora_rank", "4")
    assert "fits a head" in frozen


def test_mined_negatives_are_documents_that_nobody_judged_relevant(runs, tmp_path, monkeypatch):
    seen = []
    original = MultiLayerObjective.forward

    def spy(self, features, labels=None):
        features = list(features)
        words = self.model.tokenizer.batch_decode
        seen.append([words(f["input_ids"], skip_special_tokens=True) for f in features])
        return original(self, features, labels)

    monkeypatch.setattr(MultiLayerObjective, "forward", spy)
    flags = ["--hard_negatives", "2", "--negative_margin", "0", "--max_steps", "2"]
    few = _refusal(  # five documents, and a batch takes eight
        runs["multilayer-minilm"], tmp_path / "few", *flags, "--batch_sampler", "no_duplicates"
    )
    assert "make no batch of 2" in few
    trained(runs["multilayer-minilm"], tmp_path / "out", *flags)
    assert seen and all(len(columns) == 4 for columns in seen), "query, document and two negatives"
    for queries, positives, *negatives in seen:
        for column in negatives:
            assert len(column) == len(queries)
            assert all(n != p for n, p in zip(column, positives, strict=True))


def test_adapters_are_merged_into_every_folder(runs, tmp_path):
    for variant in ([], ["--tied", "false"]):
        output = tmp_path / f"out{len(variant)}"
        flags = ["--lora_rank", "2", "--learning_rate", "0.01", "--save_steps", "4", *variant]
        trained(runs["multilayer-minilm"], output, *flags)
        start, checkpoint, end = (
            load_file(output / part / "model.safetensors") for part in ("init", "checkpoint-4", "final")
        )
        assert start.keys() == checkpoint.keys() == end.keys(), "no name tells that there were adapters"
        moved = {name for name in start if not torch.equal(start[name], end[name])}
        assert moved and all(name.endswith(".weight") and "embeddings" not in name for name in moved)
        for name, value in end.items():
            torch.testing.assert_close(checkpoint[name], value)
        for part in ("checkpoint-4", "final"):
            assert polyrep.load(output / part, trust_remote_code=True).encode_query(TEXTS).shape == (3, 32)


def test_the_frozen_run_fits_the_map_of_the_cached_layers(runs, backbone, tmp_path):
    losses = trained(runs["multilayer-minilm-frozen"], tmp_path / "out", "--layers", "-1", "1", "0")
    assert losses[-1] < losses[0]
    head = MultiLayerHead.from_pretrained(tmp_path / "out" / "head").eval()
    assert head.config.layers == [-1, 1, 0] and head.config.base_fingerprint
    model = polyrep.load(tmp_path / "out" / "final", trust_remote_code=True, device="cpu")
    batch = tokens_of(backbone)
    with torch.no_grad():
        states = AutoModel.from_pretrained(backbone).eval()(**batch, output_hidden_states=True).hidden_states
        pooled = torch.stack([by_hand(states[layer], batch["attention_mask"], "mean") for layer in (2, 1, 0)], 1)
        expected = head(pooled).sentence_embedding
    torch.testing.assert_close(model.encode_document(TEXTS, convert_to_tensor=True), expected, atol=1e-5, rtol=1e-4)
    start = MultiLayerHead(head.config)
    assert not torch.allclose(start.map.weight, head.map.weight, atol=1e-4)


def test_the_frozen_run_takes_the_first_token_where_the_backbone_does(runs, backbone, tmp_path):
    SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "cls")], device="cpu").save_pretrained(
        str(tmp_path / "cls")
    )
    flags = ["--backbone", str(tmp_path / "cls"), "--layers", "-1", "0", "--max_steps", "1", "--learning_rate", "1e-9"]
    trained(runs["multilayer-minilm-frozen"], tmp_path / "out", *flags)
    model = polyrep.load(tmp_path / "out" / "final", trust_remote_code=True, device="cpu")
    plain = SentenceTransformer(str(tmp_path / "cls"), device="cpu")
    np.testing.assert_allclose(model.encode_document(TEXTS), plain.encode_document(TEXTS), atol=1e-5)


def test_flags_name_the_method_of_head_and_model(runs, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(runs["multilayer-minilm"]), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag in ("--layers", "--pooling", "--tied", "--lambda_", "--early_weight", "--hard_negatives", "--lora_rank"):
        assert flag in shown
    assert "--hidden_size" not in shown and "--base_fingerprint" not in shown
    assert "Weight of the second term" in shown, "help comes from the class that says it"


def test_relevant_documents_of_a_query_are_never_its_negatives(backbone, tmp_path):
    """q3 has two: each is known where the other is the own one."""
    model = SentenceTransformer(modules=[Transformer(str(backbone)), Pooling(32, "mean")], device="cpu")
    data = HeadData(kind="layers", negatives=3, labels=True, depth=5)
    for name in ("first", "second"):
        dataset = load_retrieval_dataset(write_beir(tmp_path / name, split="train"), "train")
        data.add(model, dataset, show_progress=False)
    batch = data.collate([data[row] for row in range(len(data))])
    queries, documents = batch["features"]
    ids = list(DOCUMENTS) * 2
    names = [f"{part} {ids[place]}" for place in documents["index"] for part in [int(place) // 5]]
    seen = (queries["judged"][..., None] == documents["index"] + 1).any(1)
    for row, (part, query, _) in enumerate(data.pairs):
        relevant = {f"{part} {d}" for d in list(QRELS.values())[query]}
        assert [name in relevant for name in names] == seen[row].tolist()


def test_config_and_head_say_the_same_of_an_encoder():
    config = MultiLayerConfig(encoder_config={"model_type": "bert", **SMALL}, layers=[-1, 1])
    assert (config.hidden_size, config.num_hidden_layers) == (32, 3)
    again = MultiLayerConfig(**config.to_dict())
    assert again.layers == [-1, 1] and again.encoder_config.hidden_size == 32


def test_two_encoders_in_two_processes_need_the_cached_objective(runs, tmp_path):
    flags = ["--output_dir", str(tmp_path / "two"), "--tied", "false", "--lambda_", "1", "--max_steps", "2"]
    refused = run_two_processes(CLI, "train", str(runs["multilayer-minilm"]), *flags)
    assert refused.returncode and "--objective CachedMultiLayerObjective" in refused.stderr
