"""From a trained network to motion and frames."""
