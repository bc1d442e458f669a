"""Pallas kernels, one folder per operation.

A folder `<operation>/` holds `reference.py`, the readable definition in plain JAX that is the
operation's contract; the kernels `gpu.py` and `tpu.py`, tested against it; `index.py`, the
arithmetic of their blocks, loops and masks, of which `claims.py` says what is proved; `cases.py`,
the shapes that they are compiled and timed at; and in `__init__.py` the public functions, which
choose an implementation by device, or take the named one without falling back.
"""
