"""Self-contained HTML pages: no network, no code from elsewhere, everything escaped.

A page is a template, one style sheet and one script of this folder, and data as JSON. The content security policy
allows exactly that style and that script, by their hashes, and pictures that are in the page itself; so a name that
holds a tag is text, twice over.
"""

from onnxcar.pages._explanation import explanation
from onnxcar.pages._html import write
from onnxcar.pages._report import comparison

__all__ = ["comparison", "explanation", "write"]
