"""Tests of monovl_jax.training."""
