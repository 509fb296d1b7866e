"""Adapters to other libraries, one file for each; a library is imported only by its file."""
