"""A small mixture-of-experts checkpoint, as data: see README.md here."""
