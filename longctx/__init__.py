"""Pretraining of hybrid language models with one sequence spread over many devices."""

__version__ = "0.1.0"
