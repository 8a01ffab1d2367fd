"""Recording what the PyTorch models compute, for `monovl parity` to compare with."""
