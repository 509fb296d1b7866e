"""Other libraries' ways to the same results, one file for each kind."""
