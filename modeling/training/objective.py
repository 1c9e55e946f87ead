"""What the trainers ask of an objective, each with the answer that a stock loss of sentence-transformers gives.

An objective has the shape of such a loss, so the two stand for one another: as controls, stock losses train our models
and heads, on the same data in the same order. It is a module with

- ``__init__(model, ...)``, whose numbers, strings and switches become flags of ``train``;
- ``forward(features, labels)``, which gives a loss, or parts of it by name, which are added and logged apart;
- ``get_config_dict()`` and ``citation``, for the card.

What else the trainers may ask of it is :class:`Objective`, from which a loss of ours inherits; ``contract`` answers
for a stock loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, overload

from torch import Tensor, nn

from .pairs import HeadData
from .sides import Features

if TYPE_CHECKING:
    from datasets import Dataset


class Rows(Protocol):
    """What a trainer goes through: :class:`~polyrep.training.pairs.HeadData`, or what an objective makes of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...

    def collate(self, rows: list[Any], /) -> dict[str, Any]:
        """A batch, ``features`` and ``labels`` as the objective's ``forward`` takes them."""
        ...


class Objective(nn.Module):
    """A loss, and what the trainers may ask of it beside ``forward``; every answer here is that of a stock loss.

    An objective trains either a whole model, whose inputs are texts, or the head of a frozen backbone, whose inputs
    are the backbone's vectors from a cache: ``trains_on`` says which.

    Attributes:
        model: What is trained and saved: a sentence-transformers model, or a head. Set by the constructor.
        metrics: Name -> scalar of the last step, logged beside the loss.
        progress: Of a head: step, and steps in all. Set by the trainer before each step.
        seed: Of a head: seed of the run, for draws that are the same in every process; see
            :func:`~polyrep.training.losses.row_uniform`. Set by the trainer before each step.
    """

    model: Any

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, Tensor] = {}
        self.progress: tuple[int, int] = (0, 1)
        self.seed = 0

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Pattern of parameter names -> multiple of ``--learning_rate``; read when the optimizer is made."""
        return {}

    @classmethod
    def learns_from_labels(cls, settings: Mapping[str, Any]) -> bool:
        """Whether judgments have any influence, for the card; by default all unless ``label_weight`` is 0.

        Args:
            settings: Arguments of the constructor.
        """
        return settings.get("label_weight", 1) > 0

    @classmethod
    def learns_from_teacher(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a ``--teacher`` scores its pairs; by default if it has a ``distill_weight`` above 0.

        Args:
            settings: Arguments of the constructor.
        """
        return bool(settings.get("distill_weight"))

    # Of a whole model

    def initialize(self, pairs: Mapping[str, Dataset]) -> None:
        """Set what follows from the training texts; once, before the first step of a run that is not resumed.

        Args:
            pairs: Data set -> its pairs, with columns ``query``, ``positive`` and perhaps ``negative_1`` and so on.
        """

    def complete(self, pairs: Mapping[str, Dataset]) -> None:
        """Set what follows from the trained weights; once, by the first process, before the trained model is saved.

        Args:
            pairs: As for :meth:`initialize`.
        """

    # Of a head

    trains_on: ClassVar[Literal["sentence", "tokens", "layers", "states"] | None] = None
    """Kind of cached vectors that a head learns from: one a text, several, one a layer, or every token at some layers.
    None: of a whole model."""

    one_corpus: ClassVar[bool] = False
    """Whether it ranks the texts of all data sets as one corpus, in which no text may be there twice."""

    @property
    def needs_labels(self) -> bool:
        """Whether pairs come from judgments. Else each query's nearest document takes the place of the judged one."""
        return False

    @property
    def narrowed(self) -> tuple[str, ...]:
        """``query`` or ``document`` or both: sides whose texts are also encoded with less in them."""
        return ()

    @property
    def layer_token(self) -> str:
        """Which state stands for a text at a layer, where it trains on ``layers`` or ``states``.

        It is the ``mean`` of all, or ``cls``; of ``states`` also ``lasttoken``.
        """
        return "mean"

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Which hidden states of the encoder it reads, where it trains on ``states``; the last tells what is near."""
        return (-1,)

    @classmethod
    def planned_rows(cls, settings: Mapping[str, Any]) -> int | None:
        """How many rows ``prepare`` will give, as far as is known before anything is encoded; None: all pairs.

        Args:
            settings: Arguments of the constructor.
        """
        return None

    def prepare(self, data: HeadData) -> Rows:
        """Set what follows from the cached vectors; once, before the first step, in every process, resumed or not.

        Returns:
            What the trainer goes through: the pairs, or rows of the objective's own.
        """
        return data

    mining_vectors: Callable[[Features, str], Tensor] | None = None
    """``mining_vectors(features, task)`` gives ``(texts, dim)``, by whose inner products each further epoch takes its
    negatives with ``--remine``. None: the objective makes no single vectors."""

    def finish(self) -> None:
        """Set what follows from the trained weights in closed form; before every save, checkpoints included."""


@overload
def contract(loss: type[nn.Module]) -> type[Objective]: ...


@overload
def contract(loss: nn.Module) -> Objective: ...


def contract(loss: nn.Module | type[nn.Module]) -> Objective | type[Objective]:
    """Who answers the trainers for a loss, or for its class: it itself, or for a stock loss the defaults above.

    Raises:
        TypeError: It answers by itself and is no :class:`Objective`, so that nobody would ask it.
    """
    owner = loss if isinstance(loss, type) else type(loss)
    if not issubclass(owner, Objective):
        if own := sorted(name for name in vars(Objective) if not name.startswith("_") and hasattr(owner, name)):
            raise TypeError(f"{owner.__name__}: has {own[0]!r} and would not be asked. Inherit from Objective.")
        return Objective if isinstance(loss, type) else Objective()
    return loss  # type: ignore[return-value]
