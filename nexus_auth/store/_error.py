"""The error of a store that cannot be used now."""


class StoreError(Exception):
    """A store could not do what was asked: it is out of reach, locked, full, read-only, or open to others."""
