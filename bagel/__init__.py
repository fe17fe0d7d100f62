"""BAGEL: one Mixture-of-Transformers that writes text and pictures."""
