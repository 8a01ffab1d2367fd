"""Speed and agreement measured against plain PyTorch."""
