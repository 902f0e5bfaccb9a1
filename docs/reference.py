"""The API reference, from docstrings: python docs/reference.py DIRECTORY (make docs: build/docs).

Needs the extras docs and frameworks.
"""

import sys
from pathlib import Path

import pdoc
import pdoc.render

import syncbn

# Public names, and the modules below them that the pages of docs/ name.
MODULES = [
    "syncbn",
    "syncbn.nn.moments",
    "syncbn.stats.pooling",
    "syncbn.surgery.conversion_report",
    "syncbn.integrations.lightning",
]


def main(directory: Path) -> None:
    """Writes an HTML page per module, and an index."""
    for name in syncbn.__all__:
        getattr(syncbn, name)  # names are lazy, and pdoc looks only at what is there
    pdoc.render.configure(docformat="google", math=True, show_source=False, search=False)
    pdoc.pdoc(*MODULES, output_directory=directory)
    print(directory / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
