"""Fetching public data sets: connections, archives, the catalogue."""
