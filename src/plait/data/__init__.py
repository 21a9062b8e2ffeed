"""Records and pictures; nothing here knows of tokens."""
