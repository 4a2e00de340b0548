"""Talking with a finished model."""
