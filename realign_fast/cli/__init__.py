"""The command line, ``realign-fast``."""
