"""Scores, tables, plots and traces of what a model writes."""
