"""One folder a method: what it is, how it is learned, its rows in the frontier. Importing one registers it."""

from .citadel import *
from .dense2sparse import *
from .dual_encoder import *
from .gaussian import *
from .late_interaction import *
from .lemur import *
from .metaembed import *
from .multilayer import *
from .reinpool import *
from .unifier import *
