"""The one exception that means: this sample (not the program) is at fault."""

from __future__ import annotations


class SampleError(ValueError):
    """A bad sample: one sentence with what is wrong and the mend; `at(file, line)` adds where.

    Training skips, counts and lists such samples; `strict` lets the exception through.
    """

    def at(self, file: object, line: int) -> SampleError:
        """The same error with `FILE:LINE: ` in front."""
        return SampleError(f"{file}:{line}: {self}")
