"""Does a run survive what happens to runs."""
