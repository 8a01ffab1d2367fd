"""Measuring a model: parity with recorded outputs, metrics, benchmark readers."""
