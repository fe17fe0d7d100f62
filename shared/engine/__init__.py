"""Strategies, ranks, checkpoints, averages: what the loop stands on."""
