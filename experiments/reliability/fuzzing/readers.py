"""All readers by name."""

from __future__ import annotations

from experiments.reliability.fuzzing import data, weights

READERS = {reader.name: reader for reader in (*data.READERS, *weights.READERS)}
