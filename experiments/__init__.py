"""One file per table, figure or check of the library.

Each file's docstring states the claim, the command that measures it and the result. The library never imports this package.
"""
