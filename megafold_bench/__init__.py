"""The measurement harness: points, processes, devices, records. It knows no model."""

__version__ = "0.1.0"
