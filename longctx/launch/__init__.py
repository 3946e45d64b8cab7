"""Hands trainings to a cluster's scheduler."""
