"""The checker that runs every annotation under pytest. As in PEP 484, an int is a float."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
