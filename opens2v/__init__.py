"""OpenS2V: a subject picture and a text become a video."""
