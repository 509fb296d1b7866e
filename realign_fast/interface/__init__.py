"""Parts that the library and its command line share: values of options, and progress."""
