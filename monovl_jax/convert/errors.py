"""What conversion refuses, in one sentence."""


class WeightsError(ValueError):
    """Weights or folders that cannot be converted; the message says what is wrong, where, and the mend."""
