"""Denoisers."""
