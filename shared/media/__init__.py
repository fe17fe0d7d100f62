"""Pictures and tar shards."""
