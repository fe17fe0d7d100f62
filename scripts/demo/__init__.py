"""The demo in a browser: one tab a system over its checkpoint. Started by scripts/demo.sh."""
