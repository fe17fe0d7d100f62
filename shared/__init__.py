"""The workshop: the loop and its parts; knows no system."""
