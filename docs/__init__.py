"""Builders of the pictures and of the page."""
