"""Held-out losses, formulas, meters, previews."""
