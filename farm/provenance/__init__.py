"""C2PA: pictures signed with a certificate of one's own, and what a picture says of its origin.

A signed picture carries a manifest: who signed it, that a model made it (trainedAlgorithmicMedia),
and the SHA-256 of all else in the file, pixels and parameters alike. To save it anew strips that.
No time-stamp server is asked, so a signature is good for as long as its certificate. Each manifest
has a number of its own: a picture that is signed twice gives two files.

Format: https://spec.c2pa.org (2.x), by c2pa-python, which is the extra `provenance`. Nothing here
uses the network: a manifest that is kept elsewhere is not fetched.
"""

from farm.provenance.authority import Authority, make_authority
from farm.provenance.mark import Mark, is_signed, read_mark
from farm.provenance.pem import read_anchors
from farm.provenance.signer import Signer, open_signer

__all__ = [
    "Authority",
    "Mark",
    "Signer",
    "is_signed",
    "make_authority",
    "open_signer",
    "read_anchors",
    "read_mark",
]
