"""The type checker the tests put behind every annotation of the library."""

from beartype import BeartypeConf, beartype

# An int is welcome where a float is asked for, as in every Python library (PEP 484).
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
