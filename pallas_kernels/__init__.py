"""Pallas kernels, one folder per operation.

A folder `<op>/` holds `reference.py`, the readable float32 definition that is the operation's
contract; the kernels `gpu.py` and `tpu.py`, which have the reference's signature and are tested
against it, forward and gradient; and an `__init__.py` with one public function that chooses among
them by device, or by name without falling back.
"""
