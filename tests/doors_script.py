"""Do with model folders what somebody does who knows transformers and sentence-transformers, and not polyrep.

    python doors_script.py JOB

JOB is a JSON file with ``folders``, ``method/kind`` -> a folder; ``queries``, ``corpus`` and ``qrels``; ``scratch``,
a folder to write to; ``python``, the interpreter of further processes; and ``report``, the file to write:
``method/kind`` -> door -> ``yes``, None where the folder has no such door, what was raised, or what was measured.
It runs where polyrep cannot be imported, and so do the processes that it starts.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.util
import json
import math
import multiprocessing.forkserver
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any


class Absent(importlib.abc.MetaPathFinder):
    """Makes polyrep and the test room unimportable, as on a machine that does not have them."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polyrep", "modeling", "toy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ in ("__main__", "__mp_main__"):  # the latter in processes of a pool, which import this file
    sys.meta_path.insert(0, Absent())

import numpy as np  # noqa: E402
import sentence_transformers  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from sentence_transformers.multi_vector_encoder import losses as multi_vector_losses  # noqa: E402
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator  # noqa: E402
from sentence_transformers.sparse_encoder import losses as sparse_losses  # noqa: E402
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402
from transformers.integrations import peft as integration  # noqa: E402


def splade_loss(model: Any) -> Any:
    ranking = sparse_losses.SparseMultipleNegativesRankingLoss(model)
    return sparse_losses.SpladeLoss(model, ranking, query_regularizer_weight=0.01, document_regularizer_weight=0.01)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "SentenceTransformer": (losses.MultipleNegativesRankingLoss, InformationRetrievalEvaluator),
    "SparseEncoder": (splade_loss, SparseInformationRetrievalEvaluator),
    "MultiVectorEncoder": (
        multi_vector_losses.MultiVectorMultipleNegativesRankingLoss,
        MultiVectorInformationRetrievalEvaluator,
    ),
}
"""Family -> a loss and an evaluator that belong to it."""

DOORS: dict[str, Callable[[Folder], Any]] = {}
Vectors = dict[str, list[np.ndarray]]

OTHER_RANKINGS = "ranks otherwise"


class Unequal(Exception):
    """A folder opened, and gave something else than it does otherwise."""


class Folder:
    """A published folder, and what is asked of it."""

    def __init__(self, name: str, job: dict[str, Any]):
        self.method = name.partition("/")[0]
        self.path, self.scratch, self.job = Path(job["folders"][name]), Path(job["scratch"]) / name, job
        self.family = self.read("config_sentence_transformers.json")["model_type"]
        self.queries, self.documents = list(job["queries"].values()), list(job["corpus"].values())
        self.scratch.mkdir(parents=True)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def open(self, path: str | Path | None = None, **options: Any) -> Any:
        return getattr(sentence_transformers, self.family)(
            str(path or self.path), trust_remote_code=True, **({"device": "cpu"} | options)
        )

    def vectors(self, model: Any, **options: Any) -> Vectors:
        return {
            "query": arrays(model.encode_query(self.queries, **options)),
            "document": arrays(model.encode_document(self.documents, **options)),
        }

    @cached_property
    def model(self) -> Any:
        """It is opened once for all doors that leave it as it is."""
        return self.open()

    @cached_property
    def plain(self) -> Vectors:
        return self.vectors(self.model)

    def same(self, model: Any) -> str:
        """That a model gives the vectors of the folder."""
        equal(self.vectors(model), self.plain)
        return "yes"

    def rankings(self, vectors: Vectors) -> list[list[int]]:
        """Documents for each query, best first; by the score that the folder names."""
        several = self.family == "MultiVectorEncoder"
        found = []
        for query in vectors["query"]:
            scores = []
            for document in vectors["document"]:
                products = np.atleast_2d(query) @ np.atleast_2d(document).T
                if self.model.similarity_fn_name == "cosine":
                    products = products / np.linalg.norm(query) / np.linalg.norm(document)
                scores.append(products.max(1).sum() if several else products.item())
            found.append(np.argsort(scores)[::-1].tolist())
        return found

    def train(self, model: Any, folder: Path, **options: Any) -> None:
        """Three steps of the family's own trainer."""
        pairs = [(q, d) for q, judged in self.job["qrels"].items() for d in judged]
        data = Dataset.from_dict(
            {
                "query": [self.job["queries"][q] for q, _ in pairs],
                "positive": [self.job["corpus"][d] for _, d in pairs],
            }
        )
        arguments = getattr(sentence_transformers, f"{self.family}TrainingArguments")(
            output_dir=str(folder),
            max_steps=3,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            router_mapping={"query": "query", "positive": "document"},
            **options,
        )
        loss = FAMILIES[self.family][0](model)
        trainer = getattr(sentence_transformers, f"{self.family}Trainer")(
            model=model, args=arguments, train_dataset=data, loss=loss
        )
        before = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if len(logged) != 3 or not all(map(math.isfinite, logged)):
            raise Unequal(f"losses {logged}")
        if not any((weight != before[key]).any() for key, weight in model.named_parameters() if key in before):
            raise Unequal("no weight moved")
        model.eval()


def arrays(vectors: Any) -> list[np.ndarray]:
    """A text each, in double precision, whatever the family returns."""
    found = []
    for vector in vectors:
        tensor = torch.as_tensor(vector)
        found.append((tensor.to_dense() if tensor.layout != torch.strided else tensor).detach().double().cpu().numpy())
    return found


def distance(found: Vectors, expected: Vectors) -> float:
    """Length of the greatest difference to that of the vector, or to 1 where it is shorter; infinite if none is."""
    shares = [0.0]
    for task, some in expected.items():
        if [one.shape for one in found[task]] != [other.shape for other in some]:
            return math.inf
        for one, other in zip(found[task], some, strict=True):
            shares.append(np.linalg.norm(one - other) / max(1, np.linalg.norm(other)))
    return max(shares) if np.isfinite(shares).all() else math.inf


def equal(found: Vectors, expected: Vectors, within: float = 1e-5) -> None:
    if not (far := distance(found, expected)) <= within:
        raise Unequal(f"vectors differ by {far:.2g} of their length")


def door(function: Callable[[Folder], Any]) -> Callable[[Folder], Any]:
    DOORS[function.__name__] = function
    return function


@door
def family(folder: Folder) -> Any:
    """The vectors, which the caller compares with those of the model that was saved."""
    return {task: [vector.tolist() for vector in some] for task, some in folder.plain.items()}


@door
def automodel(folder: Folder) -> Any:
    model = AutoModel.from_pretrained(folder.path, trust_remote_code=True).eval()
    config = folder.read("config.json")
    named = config["architectures"][0]
    if type(model).__name__ != named or not config["model_type"].startswith("polyrep_"):
        raise Unequal(f"a bare {type(model).__name__} of type {config['model_type']}")
    tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=True)
    found = {}
    for task, texts in (("query", folder.queries), ("document", folder.documents)):
        prompt = folder.model.prompts.get(task) or ""
        tokens = tokenizer([prompt + text for text in texts], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**tokens, task=task)
        if folder.family == "MultiVectorEncoder":
            masks = output["mask"]
            found[task] = arrays(some[mask] for some, mask in zip(output["token_embeddings"], masks, strict=True))
        else:
            found[task] = arrays(output["sentence_embedding"])
    equal(found, folder.plain)
    return "yes"


@door
def named_folder(folder: Folder) -> Any:
    """By a relative path with blanks and dots in it."""
    name = Path("my models", "v1.5 (new)", f"{folder.scratch.name}.v2 final")
    shutil.copytree(folder.path, folder.scratch / name)
    before = os.getcwd()
    os.chdir(folder.scratch)
    try:
        if "AutoModel" in folder.read("config.json").get("auto_map", {}):
            AutoModel.from_pretrained(name, trust_remote_code=True)
        return folder.same(folder.open(f"./{name}"))
    finally:
        os.chdir(before)


@door
def save(folder: Folder) -> Any:
    """Saved by its user, twice over, and opened again."""
    folder.model.save_pretrained(str(folder.scratch / "saved"))
    again = folder.open(folder.scratch / "saved")
    again.save_pretrained(str(folder.scratch / "twice"))
    return folder.same(folder.open(folder.scratch / "twice"))


@door
def deepcopy(folder: Folder) -> Any:
    copied = copy.deepcopy(folder.model)
    folder.same(copied)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    return folder.same(folder.model)


@door
def bfloat16(folder: Folder) -> Any:
    """The encoder's weights take half the bytes, and the vectors are about the same."""
    model = folder.open(model_kwargs={"dtype": torch.bfloat16})
    kinds = {weight.dtype for name, weight in model.named_parameters() if ".attention." in name}
    if kinds != {torch.bfloat16}:
        raise Unequal(f"attention has weights in {kinds}")
    equal(folder.vectors(model), folder.plain, within=0.15)  # eight bits, through layers and perhaps an exponential
    return "yes"


@door
def eager_attention(folder: Folder) -> Any:
    model = folder.open(model_kwargs={"attn_implementation": "eager"})
    used = {
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "config") and type(module).__name__.endswith("SelfAttention")
    }
    if used != {"eager"}:
        raise Unequal(f"attention is {', '.join(sorted(used))}")
    return folder.same(model)


@door
def max_seq_length(folder: Folder) -> Any:
    """A shorter limit cuts texts where it says, and is kept when the model is saved."""
    model, long = folder.open(), ["file list port " * 10, "port"]
    limit = model.max_seq_length = 9
    if model.max_seq_length != limit:
        raise Unequal(f"max_seq_length={model.max_seq_length} after it was set to {limit}")
    cut = arrays(model.encode_document(long))
    model.save_pretrained(str(folder.scratch / "short"))
    again = folder.open(folder.scratch / "short")
    if again.max_seq_length != limit:
        raise Unequal(f"max_seq_length={again.max_seq_length} once saved")
    words = ("file list port " * 10).split()
    whole = [arrays(folder.model.encode_document([" ".join(words[:n]), "port"])) for n in range(limit)]
    for found in (cut, arrays(again.encode_document(long))):
        if not any(distance({"": found}, {"": some}) <= 1e-5 for some in whole[limit - 4 :]):
            raise Unequal("a long text is not that of its first tokens")
    return "yes"


@door
def device_map(folder: Folder) -> Any:
    for placed in ("cpu", "auto"):
        folder.same(folder.open(model_kwargs={"device_map": placed}))
    return "yes"


@door
def compile(folder: Folder) -> Any:
    """The model, by the part of torch.compile that reads its code; one folder of a method, since it takes long."""
    first = next(name for name in folder.job["folders"] if name.partition("/")[0] == folder.method)
    if folder.path != Path(folder.job["folders"][first]):
        return None
    torch._dynamo.reset()
    model = folder.open()
    model[0].model = torch.compile(model[0].model, backend="eager")
    return folder.same(model)


@door
def pool(folder: Folder) -> Any:
    """Two processes, after it has encoded here."""
    folder.plain  # noqa: B018
    model = folder.open()
    folder.same(model)
    started = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        equal(folder.vectors(model, pool=started, chunk_size=2), folder.plain)
    finally:
        model.stop_multi_process_pool(started)
    return "yes"


@door
def normalize(folder: Folder) -> Any:
    """Vectors of length one rank as plain ones do."""
    if folder.family == "SparseEncoder":  # whose encode has no such option
        return None
    found = folder.vectors(folder.model, normalize_embeddings=True)
    lengths = [np.linalg.norm(vector, axis=-1) for some in found.values() for vector in some]
    if not all(np.allclose(length, 1, atol=1e-5) for length in lengths):
        raise Unequal("vectors have other lengths than one")
    return "yes" if folder.rankings(found) == folder.rankings(folder.plain) else OTHER_RANKINGS


@door
def evaluator(folder: Folder) -> Any:
    """nDCG@10 and MRR@10, which the caller compares with its own."""
    relevant = {query: set(judged) for query, judged in folder.job["qrels"].items()}
    measure = FAMILIES[folder.family][1](
        folder.job["queries"], folder.job["corpus"], relevant, name="tiny", write_csv=False
    )
    found = measure(folder.model)
    return {metric: found[f"tiny_{folder.model.similarity_fn_name}_{metric}@10"] for metric in ("ndcg", "mrr")}


@door
def trainer(folder: Folder) -> Any:
    """Three steps; what the trainer wrote opens and gives the vectors of what was trained."""
    model = folder.open()
    folder.train(model, folder.scratch / "trained", save_steps=3)
    trained = folder.vectors(model)
    if distance(trained, folder.plain) <= 1e-5:
        raise Unequal("no vector moved")
    equal(folder.vectors(folder.open(folder.scratch / "trained" / "checkpoint-3")), trained)
    return "yes"


@door
def lora(folder: Folder) -> Any:
    """An adapter of the encoder's attention: added, trained for three steps, saved, and opened again."""
    if len(folder.read("modules.json")) > 1:
        return None  # the root, which an adapter names as its base, refuses to be opened without the modules behind it
    integration.check_peft_version = lambda **_: None  # transformers 5.24 asks for a PEFT that is not out
    model = folder.open()
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    folder.train(model, folder.scratch / "adapted", save_strategy="no")
    trained = folder.vectors(model)
    if distance(trained, folder.plain) <= 1e-5:
        raise Unequal("no vector moved")
    model.save_pretrained(str(folder.scratch / "adapter"))
    equal(folder.vectors(folder.open(folder.scratch / "adapter")), trained)
    return "yes"


@door
def langchain(folder: Folder) -> Any:
    if folder.family != "SentenceTransformer":
        return None
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(
        model_name=str(folder.path),
        model_kwargs={"trust_remote_code": True, "device": "cpu"},
        query_encode_kwargs={"task": "query"},
        encode_kwargs={"task": "document"},
    )
    found = {
        "query": arrays(embeddings.embed_query(text) for text in folder.queries),
        "document": arrays(embeddings.embed_documents(folder.documents)),
    }
    equal(found, folder.plain)
    return "yes"


@door
def llama_index(folder: Folder) -> Any:
    if folder.family != "SentenceTransformer":
        return None
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    class ByTask(HuggingFaceEmbedding):
        """It knows prompts of queries and of texts, and no task."""

        def _embed(self, inputs, prompt_name=None):
            encode = self._model.encode_query if prompt_name == "query" else self._model.encode_document
            return encode(inputs, normalize_embeddings=self.normalize).tolist()

    embedding = ByTask(str(folder.path), trust_remote_code=True, device="cpu", normalize=False)
    found = {
        "query": arrays(embedding.get_query_embedding(text) for text in folder.queries),
        "document": arrays(embedding.get_text_embedding_batch(folder.documents)),
    }
    equal(found, folder.plain)
    return "yes"


PACKAGES = {"langchain": "langchain_huggingface", "llama_index": "llama_index"}
"""Door -> a package that it needs and that the tests do not."""


def main(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Try every door of every folder."""
    missing = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    report: dict[str, dict[str, Any]] = {}
    for name in job["folders"]:
        folder, report[name] = Folder(name, job), {}
        for title, enter in DOORS.items():
            if title in missing or title not in job.get("doors", DOORS):
                continue
            started = time.perf_counter()
            try:
                report[name][title] = enter(folder)
            except Exception as error:  # whatever a library makes of it
                report[name][title] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            print(f"{time.perf_counter() - started:.2f} s", name, title, file=sys.stderr)
    return report


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    multiprocessing.set_executable(wanted["python"])
    # Spawned processes import torch for seconds each; forks of one that has imported it take the same pickles.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["sentence_transformers"])
    multiprocessing.forkserver.ensure_running()  # which imports meanwhile
    sentence_transformers.base.model.mp.get_context = lambda method: forks
    torch.multiprocessing.set_sharing_strategy("file_system")  # forks take no more than 256 open files
    torch.manual_seed(0)
    made = main(wanted)
    Path(wanted["report"]).write_text(json.dumps(made), encoding="utf-8")
