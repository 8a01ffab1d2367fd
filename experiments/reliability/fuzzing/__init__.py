"""What `experiments.reliability.fuzz` is made of: mutations, the pool of processes, and one small reader for each kind of input."""
