"""Files and the records about them: written whole or not at all, locked, hashed, recorded."""
