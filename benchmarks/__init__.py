"""The experiments of four papers and of this package, one script each."""
