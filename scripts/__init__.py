"""Launchers, benchmarks and the settings' reference."""
