"""FLOAT: audio-driven talking portraits by rectified flow on motion latents (Ki, Min, Chae, ICCV 2025).

This package's name is also that of a builtin: write `from float.model import X`, never `import float`.
"""
