"""The commands of the `farebox` command line, one module each."""
