"""The work itself: what is asked (`problem`), what is chosen (`plan`), how the pairs are walked (`by_rows`, ...)."""
