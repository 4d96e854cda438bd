"""The checker of signatures while the tests run: beartype, with an int welcome where a float is asked for, as mypy has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
