"""Timing scripts; tests never import them."""
