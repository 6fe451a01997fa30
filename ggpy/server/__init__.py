"""The HTTP server: models behind the APIs that clients know. Thin: `Model` and its scheduler do the work."""
