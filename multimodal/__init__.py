"""A compact image-text-audio model."""
