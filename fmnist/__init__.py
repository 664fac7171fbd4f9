"""Comparable training runs of one small model on Fashion-MNIST."""

__version__ = "0.1.0"
