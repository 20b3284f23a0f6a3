"""gentrain."""
