"""Recorded results as tables and plots."""
