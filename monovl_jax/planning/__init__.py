"""Ahead-of-time compile for a named TPU pod, on a machine without one: does a recipe fit, and what does it cost."""
