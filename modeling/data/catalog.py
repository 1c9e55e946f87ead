"""Data sets by name: what each asks, its licence, where it comes from, and what it must be when it has arrived.

One table, :data:`CATALOG`; ``polyrep data list`` prints it. The project holds none of these texts: ``named.py``
fetches them from their own places at a fixed commit, and turns them into BEIR layout on the user's machine.

A licence is what the authors or, where they are silent, MTEB's table of tasks states; read the origin's own words
before you pass anything on. The Hub's commits are those that MTEB 2.26 measures with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import converters

Converter = Callable[[Path, Path], None]
"""Fills an empty folder, the second, in BEIR layout from one that holds what was fetched."""


@dataclass(frozen=True)
class NamedSet:
    """A data set that is known by name.

    Attributes:
        name: As in ``--dataset NAME``.
        task: What is asked, and what answers.
        documents: How many it has; 0 where that depends on the machine.
        licence: Of its contents.
        citation: Whom to credit.
        origin: ``ORG/NAME`` of the Hub, or the address of a repository; empty where nothing can be fetched.
        commit: Of the origin.
        files: To fetch: addresses in which ``{commit}`` stands for the commit. An archive is unpacked.
        convert: Turns those into BEIR layout.
        sha256: File -> hash of the converted set as :func:`polyrep.data.named.content_hashes` gives it. Empty where
            none is on record; then the commit alone vouches for the content.
        bring: What users bring themselves, where nobody may pass it on.
        same_ids: Whether MTEB leaves out the document with the id of a query.
    """

    name: str
    task: str
    documents: int
    licence: str
    citation: str
    origin: str = ""
    commit: str = ""
    files: tuple[str, ...] = ()
    convert: Converter | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    bring: str = ""
    same_ids: bool = False


_RAW = "https://raw.githubusercontent.com"
_CAPTIONS = "a folder with the captions, and images/ or vectors of them, as modeling/data/captions.py describes it"

_SETS = [
    NamedSet(
        "python_docs",
        "what an object of Python does -> its documentation",
        0,
        "of each package",
        "the authors of the packages that are installed",
    ),
    NamedSet(
        "tldr_pages",
        "what a command does -> its page",
        6357,
        "CC BY 4.0",
        "the tldr-pages team and contributors",
        "https://github.com/tldr-pages/tldr",
        "08e345f42639f67d99282813247ac670dc6e87cb",
        ("https://codeload.github.com/tldr-pages/tldr/tar.gz/{commit}",),
        converters.tldr_pages,
        sha256={
            "corpus": "114003cc206d9852e354463c82646c21417cf26cb3472d6ab5e51127fa6942c0",
            "qrels/dev": "64cea856743c62241e970b5523f38019fbe06eead4eb4b67754e418337e67798",
            "qrels/test": "121e5eebd01c0b3ed08b5932fbaad3c23d3ad309aee82d92aabd06eb976b1585",
            "qrels/train": "614a889aa81f32c1913f04ff7be931337335982539852e66144f87d555f26613",
            "queries": "e4d613e060cd03cb0b08d86d29b52be8fd6e31a85b7f06ceeb4c5e6a34747c04",
        },
    ),
    NamedSet(
        "scitldr",
        "summary in one sentence -> abstract of the paper",
        3229,
        "Apache-2.0",
        "Cachola et al., TLDR: Extreme Summarization of Scientific Documents, 2020",
        "https://github.com/allenai/scitldr",
        "5ccad9c00a60ad75c9e04abf7f27d0f53f983b20",
        tuple(f"{_RAW}/allenai/scitldr/{{commit}}/SciTLDR-Data/SciTLDR-A/{s}.jsonl" for s in ("train", "dev", "test")),
        converters.scitldr,
        sha256={
            "corpus": "5fad828890b6853f52fbfb62a56356bda7d26a88cdd69b0eaa689a4885dd1619",
            "qrels/dev": "ccf1c94bf5ac3d9447d991ec2bfcb6a6eef3c0ce4ef91d0c2079265a5dfe1ade",
            "qrels/test": "eabdbe39b7d6dc304409c2e11ea8948037cee69ba8c5654cbdef89c2efd3fb34",
            "qrels/train": "5cf7a16d253f14e3acfdabb82ac9c671c1ddbb1eda2701cb1791a4042b0f1e01",
            "queries": "ccd83ae810d4bc98dbb36c575b2a2bb3d59514d171c3ebb4a0faa206261ae816",
        },
    ),
    NamedSet(
        "pubmedqa",
        "research question -> abstract without its conclusion",
        1000,
        "MIT",
        "Jin et al., PubMedQA: A Dataset for Biomedical Research Question Answering, 2019",
        "https://github.com/pubmedqa/pubmedqa",
        "1cbae8e92f72f20c8d3747cbb3bf5bc53554d997",
        tuple(f"{_RAW}/pubmedqa/pubmedqa/{{commit}}/data/{n}.json" for n in ("ori_pqal", "test_ground_truth")),
        converters.pubmedqa,
        sha256={
            "corpus": "8be751dc1a050c1aefb1d67c1d0965dcbfeab4453291960263c5b41089ca7472",
            "qrels/dev": "d99f5daf0b7ab0ac5c7590b525c86cff20c71958cd0f5199135f76baaa7cd692",
            "qrels/test": "bf27b720899f11caf0905d6054d0cfedfe4a1ae8efded347595bd2381c4a3cfb",
            "qrels/train": "ac910fab8ece02fed525c7a5c28840e1e4b88c9f800e29f14a6e17fbae29c506",
            "queries": "25648d4c78a7dacb9462186647cca966d413409b5479b61df9319e3237d2f02b",
        },
    ),
    NamedSet(
        "scifact",
        "scientific claim -> abstract with evidence",
        5183,
        "CC BY 4.0 (claims), ODC-By 1.0 (abstracts)",
        "Wadden et al., Fact or Fiction: Verifying Scientific Claims, 2020",
        "mteb/scifact",
        "d56462d0e63a25450459c4f213e49ffdb866f7f9",
        sha256={
            "corpus": "69a00c23b139adc4a423e8be94d6bf86baf1187cedd74f4493f24d331c025cae",
            "qrels/dev": "9db3eedbbd0e7d0c04a62ee922a790c0ac3ffaa547224667adddf8305bd4ae59",
            "qrels/test": "6da58f6bc74b96f148ecd50a602630473cc011ba421ad2f0f5ba04faf720ba80",
            "qrels/train": "991930d2b5ba60243860ab1ce144a729a326686b8fe6a1fc44ba38174b6cb488",
            "queries": "a3b30ca95eb36637fffe3eb6e7a8230e32830e980ba278bcca8a6255120c5f2b",
        },
    ),
    NamedSet(
        "nfcorpus",
        "question of a layman -> medical abstract",
        3633,
        "not stated",
        "Boteva et al., A Full-Text Learning to Rank Dataset for Medical Information Retrieval, 2016",
        "mteb/nfcorpus",
        "ec0fa4fe99da2ff19ca1214b7966684033a58814",
    ),
    NamedSet(
        "arguana",
        "argument -> its best counterargument",
        8674,
        "CC BY-SA 4.0",
        "Wachsmuth et al., Retrieval of the Best Counterargument without Prior Topic Knowledge, 2018",
        "mteb/arguana",
        "c22ab2a51041ffd869aaddef7af8d8215647e41a",
        same_ids=True,
    ),
    NamedSet(
        "scidocs",
        "title of a paper -> papers that it cites",
        25657,
        "CC BY-SA 4.0",
        "Cohan et al., SPECTER: Document-level Representation Learning, 2020",
        "mteb/scidocs",
        "f8c2fcf00f625baaa80f62ec5bd9e1fff3b8ae88",
    ),
    NamedSet(
        "fiqa",
        "question about money -> answer",
        57638,
        "not stated",
        "Maia et al., WWW'18 Open Challenge: Financial Opinion Mining and Question Answering, 2018",
        "mteb/fiqa",
        "27a168819829fe9bcd655c2df245fb19452e8e06",
        same_ids=True,
    ),
    NamedSet(
        "trec-covid",
        "question about COVID-19 -> paper",
        171332,
        "not stated",
        "Roberts et al., Searching for scientific evidence in a pandemic: TREC-COVID, 2021",
        "mteb/trec-covid",
        "bb9466bac8153a0349341eb1b22e06409e78ef4e",
    ),
    NamedSet(
        "quora",
        "question -> duplicates of it",
        522931,
        "not stated",
        "Quora, Question Pairs, 2017",
        "mteb/quora",
        "e4e08e0b7dbe3c8700f0daef558ff32256715259",
        same_ids=True,
    ),
    NamedSet(
        "webis-touche2020-v3",
        "controversial question -> arguments",
        303732,
        "CC BY-SA 4.0",
        "Thakur et al., Systematic Evaluation of Neural Retrieval Models on the Touché 2020 Argument Retrieval Subset "
        "of BEIR, 2024",
        "mteb/webis-touche2020-v3",
        "431886eaecc48f067a3975b70d0949ea2862463c",
    ),
    NamedSet(
        "flickr8k",
        "caption -> photograph",
        8000,
        "research and education, not to be passed on",
        "Hodosh, Young and Hockenmaier, Framing Image Description as a Ranking Task, 2013",
        bring=_CAPTIONS,
    ),
    NamedSet(
        "coco_captions",
        "caption -> photograph",
        123287,
        "CC BY 4.0 (captions), of each image's own",
        "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015",
        bring=_CAPTIONS,
    ),
]

CATALOG = {entry.name: entry for entry in _SETS}
"""Name -> what is known of it."""
