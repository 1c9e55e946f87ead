"""What tells one model from another: a hash over its weight files and module configs.

Shipped files need it too, to know the backbone of a head, so it stands in :mod:`polyrep.hub.polyrep_room`.
"""

from .polyrep_room import NOT_FINGERPRINTED, fingerprint, weight_files, without

__all__ = ["NOT_FINGERPRINTED", "fingerprint", "weight_files", "without"]
