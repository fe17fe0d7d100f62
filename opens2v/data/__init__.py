"""Reading files and tables, media, caches, preparing raw material."""
