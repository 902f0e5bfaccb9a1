"""Reading the JSON files that a run leaves in its directory. Never imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else that is no JSON to read; the message continues "<file> ...".
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ValueError("is no regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("is damaged, it is no JSON") from None
