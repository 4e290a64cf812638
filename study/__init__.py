"""Does LK training raise acceptance? A real target, trained drafts, real speculative decoding."""
