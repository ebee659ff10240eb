"""Programs for people who work on TACO-DiT."""
