"""A run in, a folder out: recipes, cached pairs, two trainers, mining, teachers.

In the order in which one reads it:

- ``recipes.py`` makes a plan of a run and what is asked over it, ``arguments.py`` has its flags, ``datasets.py`` reads
  its data sets;
- ``train.py`` trains a plan, and says what comes after what;
- ``whole.py`` trains a whole model, with ``mining.py`` for its negatives and ``adapters.py`` for LoRA;
- ``frozen.py`` trains a head on cached vectors, with ``head_trainer.py``; ``pairs.py`` makes its batches of what
  ``sides.py`` and ``vectors.py`` encode;
- ``objective.py`` is what both ask of an objective, ``losses.py`` what objectives share, ``teachers.py`` who scores;
- ``build.py``, ``checkpoints.py`` and ``record.py`` write what is to be trained, what a run goes on from, and what
  came of it.
"""

from .head_trainer import HeadTrainer
from .objective import Objective
from .pairs import HeadData
from .recipes import Plan, plan_of, resolve
from .train import run

__all__ = ["HeadData", "HeadTrainer", "Objective", "Plan", "plan_of", "resolve", "run"]
