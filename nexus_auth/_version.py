"""The version of this copy of nexus_auth, vendored copies included."""

__version__ = "0.1.0"
