"""Measures relays against each other on one machine. Not part of the program, and never in its wheel."""
