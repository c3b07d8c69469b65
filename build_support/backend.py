"""The build backend: setuptools' own, started from this folder so that setup.py finds the rest of it."""

from setuptools.build_meta import *  # noqa: F403
