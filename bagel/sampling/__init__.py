"""From a trained network to text and pictures."""
