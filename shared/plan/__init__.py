"""The dry run: what a step costs, without running it."""
