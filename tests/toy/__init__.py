"""The test room, registered like any other."""

from polyrep.registry import Room, register

from .modeling_toy import ToyHead, ToyModel, ToyPooling
from .objective import ToyLoss

register(Room(ToyModel, head=ToyHead, module=ToyPooling, objectives={"ToyLoss": ToyLoss}))
