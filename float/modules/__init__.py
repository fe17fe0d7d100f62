"""Parts of networks, frozen encoders, adapters."""
