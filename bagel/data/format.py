"""The record formats as data (format.json): what each is recognised by, its fields, and examples that load."""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent / "format.json"
FORMATS: dict[str, dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["formats"]
