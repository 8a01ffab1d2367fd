"""The mesh: tests."""
