"""From a trained network to video."""
