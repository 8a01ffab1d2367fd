"""Weights in and out of the released layout: one declarative key table, strict in both directions."""
