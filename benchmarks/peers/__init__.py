"""Other libraries' implementations of the same results, one file for each group of ops."""
