"""What tells one model from another: a hash over all of its folder that changes a vector.

Shipped files need it too, to know the backbone of a head, so it stands in :mod:`polyrep.hub.polyrep_folder`.
"""

import re

from .polyrep_folder import NOT_FINGERPRINTED, fingerprint, fingerprints, weight_files, without

__all__ = ["NOT_FINGERPRINTED", "fingerprint", "fingerprints", "told", "weight_files", "without"]


def told(fingerprint: str) -> str:
    """A fingerprint as messages show it: its first digits, and what one of the first version does not say."""
    first = re.fullmatch(r"[0-9a-f]{64}", fingerprint)
    old = " (of version 1, which says nothing of prompts and tokenizer)" if first else ""
    return f"{fingerprint[:14]}{old}"
