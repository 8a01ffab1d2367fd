"""Runs that are disturbed on purpose."""
