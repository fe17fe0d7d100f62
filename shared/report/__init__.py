"""report.json, report.md and one self-contained page of results."""
