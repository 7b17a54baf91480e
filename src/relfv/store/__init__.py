"""Files and what is known of them: written whole or not at all, locked, hashed, recorded."""
