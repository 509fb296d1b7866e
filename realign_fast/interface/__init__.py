"""What the library and its command line share: values and errors of options, and progress."""
