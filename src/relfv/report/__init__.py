"""Figures and the page, made from saved artifacts alone."""
