"""A run in, a folder out: recipes, cached pairs, two trainers, mining, teachers."""

from .head_trainer import HeadTrainer
from .objective import Objective
from .pairs import HeadData
from .recipes import Plan, plan_of, resolve
from .train import run

__all__ = ["HeadData", "HeadTrainer", "Objective", "Plan", "plan_of", "resolve", "run"]
