"""Readers of logs, one for each family of formats: each returns rows in the order of the file."""
